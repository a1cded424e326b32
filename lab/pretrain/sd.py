"""tiny-sd: a Stable Diffusion UNet and text encoder, small enough for two cores."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dora_diffusion.config.families import FAMILIES
from dora_diffusion.models.families.stable_diffusion import predict_by_unet, tokenize
from lab.pretrain.diffusion import Denoiser, clip_text_config
from lab.pretrain.pipeline import finish_folder
from lab.pretrain.vae import LATENT_CHANNELS

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

TEXT_WIDTH = 128


class TextToImage(Denoiser):
    """UNet and text encoder; a caption is left out by encoding the empty one."""

    family = FAMILIES["sd1"]
    empty: Tensor

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        from diffusers.models.attention_processor import AttnProcessor
        from transformers import CLIPTextModel

        super().__init__(TEXT_WIDTH)
        self.unet = new_unet()
        # torch's fused attention for CPUs is slow backwards with heads this narrow: plain matrix
        # products make the whole step a quarter faster.
        self.unet.set_attn_processor(AttnProcessor())
        self.text_encoder = CLIPTextModel(clip_text_config(tokenizer, TEXT_WIDTH, 2))
        self.register_buffer("empty", tokenize(tokenizer, [""]).input_ids[0], persistent=False)

    def forward(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        token_ids: Tensor,
        dropped: Tensor,
        time_ids: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """See `Denoiser.forward`."""
        token_ids = torch.where(dropped[:, None], self.empty, token_ids)
        conditioning = self.encode_text(token_ids)
        prediction = predict_by_unet(self.unet, noisy_latents, timesteps, conditioning)
        return prediction, conditioning.encoder_hidden_states


def new_unet() -> Any:
    """A fresh UNet of 5.6 M parameters for 16x16 latents."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=(64, 96, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def export_sd(model: TextToImage, folder: Path, output: Path) -> None:
    """Write a diffusers pipeline in float16 from trained weights and ``folder``'s other parts."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    pipeline: Any = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae").half(),
        text_encoder=copy.deepcopy(model.text_encoder).half(),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=copy.deepcopy(model.unet).half(),
        scheduler=DDIMScheduler(
            **model.schedule, set_alpha_to_one=False, timestep_spacing="trailing"
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(output)
    finish_folder(output, folder / "tokenizer")
