"""tiny-sdxl: SDXL's UNet and its two text encoders, small enough for two cores."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dora_diffusion.config.families import FAMILIES
from dora_diffusion.models.conditioning import Conditioning
from dora_diffusion.models.families.stable_diffusion import predict_by_unet
from lab.pretrain.diffusion import SCHEDULE, Denoiser, clip_text_config
from lab.pretrain.pipeline import finish_folder
from lab.pretrain.vae import LATENT_CHANNELS
from lab.pretrain.views import SIDE

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

WIDTHS = (128, 192)
"""Widths of the two text encoders."""

POOLED = 128
TIME_IDS, TIME_ID_WIDTH = 6, 32


class TextToImageXL(Denoiser):
    """UNet and both text encoders; a caption is left out by zeros, as SDXL's pipeline does.

    Its schedule ends in pure noise (Lin et al., arXiv:2305.08891), and the loss counts there. Where
    an object stands is seen in the least trace of an image, since latents of 128 pixels have four
    times as many places that tell it: only without any does a model need what crops say.
    """

    family = FAMILIES["sdxl"]
    low_snr = 0.0
    schedule = SCHEDULE | {"rescale_betas_zero_snr": True}

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        from diffusers.models.attention_processor import AttnProcessor
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        super().__init__(sum(WIDTHS))
        self.unet = new_unet()
        # As for tiny-sd: faster backwards than torch's fused attention.
        self.unet.set_attn_processor(AttnProcessor())
        self.text_encoder = CLIPTextModel(clip_text_config(tokenizer, WIDTHS[0], 3))
        self.text_encoder_2 = CLIPTextModelWithProjection(clip_text_config(tokenizer, WIDTHS[1], 3))

    def forward(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        token_ids: Tensor,
        dropped: Tensor,
        time_ids: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """See `Denoiser.forward`."""
        text = self.encode_text(token_ids)
        states, pooled = text.encoder_hidden_states, text.pooled
        assert pooled is not None
        keep = (~dropped).to(states.dtype)
        kept = Conditioning(states * keep[:, None, None], pooled * keep[:, None])
        return predict_by_unet(self.unet, noisy_latents, timesteps, kept, time_ids), states


def new_unet() -> Any:
    """A fresh UNet of 6.4 M parameters for 32x32 latents: tiny-sd's, with a level around it."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIDE // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=(64, 64, 96, 128),
        down_block_types=("DownBlock2D",) * 2 + ("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",) * 2,
        cross_attention_dim=sum(WIDTHS),
        attention_head_dim=4,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=TIME_IDS * TIME_ID_WIDTH + POOLED,
    )


def export_sdxl(model: TextToImageXL, folder: Path, output: Path) -> None:
    """Write a diffusers pipeline in float16 from trained weights and ``folder``'s other parts."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTokenizer

    vae = AutoencoderKL.from_pretrained(folder / "vae").half()
    vae.register_to_config(sample_size=SIDE, force_upcast=False)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    pipeline: Any = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=copy.deepcopy(model.text_encoder).half(),
        text_encoder_2=copy.deepcopy(model.text_encoder_2).half(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=copy.deepcopy(model.unet).half(),
        scheduler=DDIMScheduler(
            **model.schedule, set_alpha_to_one=False, timestep_spacing="trailing"
        ),
        add_watermarker=False,
    )
    pipeline.save_pretrained(output)
    finish_folder(output, folder / "tokenizer")
