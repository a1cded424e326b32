"""The text-to-image model: a Stable Diffusion UNet and text encoder, small enough for two cores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_diffusion.embedded.instrument import ATTRIBUTES
from dora_diffusion.embedded.pretrain.fit import FitSettings, Progress, fit
from dora_diffusion.embedded.pretrain.instrument import NO_NAME
from dora_diffusion.embedded.pretrain.latents import LatentSet, open_latents, tokenize
from dora_diffusion.embedded.pretrain.tokenizer import MAX_LENGTH
from dora_diffusion.embedded.pretrain.vae import LATENT_CHANNELS

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "steps_offset": 1,
}
TEXT_WIDTH = 128
BATCH = 32
CAPTION_DROPOUT = 0.1
LOW_SNR, HIGH_SNR = 0.5, 11.0
ATTRIBUTE_WEIGHT = 0.03
ATTRIBUTES_UNTIL = 0.5


class TextToImage(nn.Module):
    """Everything that is trained together.

    The attribute heads read the pooled text: they teach the text encoder its words before the
    UNet could, and are dropped in the end.
    """

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        from diffusers.models.attention_processor import AttnProcessor

        super().__init__()
        self.unet = new_unet()
        # torch's fused attention for CPUs is slow backwards with heads this narrow: plain matrix
        # products make the whole step a quarter faster.
        self.unet.set_attn_processor(AttnProcessor())
        self.text_encoder = new_text_encoder(tokenizer)
        self.attribute_heads = nn.ModuleList(
            nn.Linear(TEXT_WIDTH, len(choices)) for choices in ATTRIBUTES.values()
        )


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


def new_text_encoder(tokenizer: CLIPTokenizer) -> Any:
    """A fresh CLIP text encoder of two layers."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=3 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def v_loss(prediction: Tensor, latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Velocity loss, weighted to the noise levels where pictures are decided; ``alpha_bar`` (b,).

    Full weight between `LOW_SNR` and `HIGH_SNR`, fading outside: about the emphasis of the
    log-normal levels of EDM (Karras et al. 2022, section 5) under uniform timesteps.
    """
    a = alpha_bar.view(-1, 1, 1, 1)
    velocity = a.sqrt() * noise - (1 - a).sqrt() * latents
    snr = alpha_bar / (1 - alpha_bar)
    weight = (snr / LOW_SNR).clamp(max=1) * ((1 + HIGH_SNR) / (1 + snr)).clamp(max=1)
    return ((prediction - velocity).pow(2).mean((1, 2, 3)) * weight).mean()


def diffusion_loss(
    model: TextToImage,
    data: LatentSet,
    alphas: Tensor,
    empty: Tensor,
    progress: float,
    generator: torch.Generator,
) -> Tensor:
    """The loss of one random batch; ``empty`` holds the token ids of the empty prompt."""
    index = torch.randint(0, len(data), (BATCH,), generator=generator)
    which = torch.randint(0, data.token_ids.shape[1], (BATCH,), generator=generator)
    mean, std = data.mean[index].float(), data.std[index].float()
    latents = mean + std * torch.randn(mean.shape, generator=generator)
    dropped = torch.rand(BATCH, generator=generator) < CAPTION_DROPOUT
    token_ids = torch.where(dropped[:, None], empty, data.token_ids[index, which].long())
    timesteps = torch.randint(0, len(alphas), (BATCH,), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    a = alphas[timesteps].view(-1, 1, 1, 1)
    noisy_latents = a.sqrt() * latents + (1 - a).sqrt() * noise
    with torch.autocast("cpu", torch.bfloat16):
        states = model.text_encoder(token_ids).last_hidden_state
        prediction = model.unet(noisy_latents, timesteps, states).sample
    loss = v_loss(prediction.float(), latents, noise, alphas[timesteps])
    if progress >= ATTRIBUTES_UNTIL:
        return loss
    mentioned = data.mentioned[index, which].long().masked_fill(dropped[:, None], NO_NAME)
    return loss + ATTRIBUTE_WEIGHT * _attribute_loss(model, states.float(), mentioned)


def _attribute_loss(model: TextToImage, states: Tensor, mentioned: Tensor) -> Tensor:
    pooled = states[:, 1:].mean(1)
    losses = [
        F.cross_entropy(head(pooled), target, ignore_index=NO_NAME, reduction="sum")
        for head, target in zip(model.attribute_heads, mentioned.unbind(1), strict=True)
    ]
    return torch.stack(losses).sum() / len(states)


def train_diffusion(folder: Path, minutes: float, learning_rate: float = 1.2e-3) -> Path:
    """Train on ``folder``'s latents and captions; the pipeline is in ``folder/pipeline``.

    The folder also gets every intermediate average, so that one can look while it trains.
    """
    from diffusers import DDPMScheduler
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    data = open_latents(folder)
    scheduler: Any = DDPMScheduler(**SCHEDULE)
    alphas: Tensor = scheduler.alphas_cumprod
    empty = tokenize(tokenizer, [""])[0]

    def loss(model: TextToImage, progress: float, generator: torch.Generator) -> Tensor:
        return diffusion_loss(model, data, alphas, empty, progress, generator)

    def report(model: TextToImage, progress: Progress) -> None:
        export_pipeline(model, folder, folder / "pipeline")

    torch.manual_seed(3)
    settings = FitSettings(minutes, learning_rate, hold=0.35, warmup=200)
    fit("diffusion", folder, TextToImage(tokenizer), loss, settings, report)
    return folder / "pipeline"


def export_pipeline(model: TextToImage, folder: Path, output: Path) -> None:
    """Write a diffusers pipeline in float16 from trained weights and ``folder``'s other parts."""
    import copy
    import shutil

    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    pipeline: Any = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae").half(),
        text_encoder=copy.deepcopy(model.text_encoder).half(),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=copy.deepcopy(model.unet).half(),
        scheduler=DDIMScheduler(**SCHEDULE, set_alpha_to_one=False, timestep_spacing="trailing"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(output)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(folder / "tokenizer" / name, output / "tokenizer" / name)
    _write_published_names(output / "text_encoder" / "model.safetensors")
    _edit_config(output / "text_encoder" / "config.json", dtype="float32")
    _edit_config(output / "vae" / "config.json", _name_or_path=None)
    _edit_config(output / "tokenizer" / "tokenizer_config.json", is_local=None)
    for file in output.rglob("*"):
        if file.is_file():
            file.chmod(0o644)  # safetensors writes for its owner alone


def _edit_config(file: Path, **changes: str | None) -> None:
    """Set keys of a JSON file, or drop those that are None.

    The text encoder's type is one: without a ``torch_dtype``, transformers opens a model in the
    type that its config names, but diffusers opens its own in float32, and both must agree.
    """
    import json

    config = json.loads(file.read_text()) | changes
    kept = {key: value for key, value in config.items() if changes.get(key, "") is not None}
    file.write_text(json.dumps(kept, indent=2) + "\n")


def _write_published_names(file: Path) -> None:
    """Put ``text_model.`` before every key, as in published checkpoints.

    Transformers 5 leaves it out when it saves; every version reads it.
    """
    from safetensors.torch import load_file, save_file

    prefix = "text_model."
    tensors = load_file(file)
    named = {prefix + key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    save_file(named, file, metadata={"format": "pt"})


def trained_model(folder: Path) -> TextToImage:
    """The averaged weights of the last saved state, finished or not."""
    from transformers import CLIPTokenizer

    model = TextToImage(CLIPTokenizer.from_pretrained(folder / "tokenizer"))
    model.load_state_dict(torch.load(folder / "diffusion.pt", weights_only=True)["average"])
    return model.eval()
