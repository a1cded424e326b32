"""The diffusion training that both models share: what is drawn, the loss, the schedule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_diffusion.config.families import Family
from dora_diffusion.models.conditioning import Conditioning
from dora_diffusion.models.families.stable_diffusion import encode_tokens
from dora_diffusion.numerics.loss import add_noise, denoising_loss, training_target
from dora_diffusion.toy.instrument import ATTRIBUTES
from lab.pretrain.fit import FitSettings, Progress, fit
from lab.pretrain.instrument import NO_NAME
from lab.pretrain.latents import LatentSet, open_latents
from lab.pretrain.tokenizer import MAX_LENGTH

if TYPE_CHECKING:
    from transformers import CLIPTextConfig, CLIPTokenizer

SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "steps_offset": 1,
}
BATCH = 32
CAPTION_DROPOUT = 0.1
HIGH_SNR = 11.0
ATTRIBUTE_WEIGHT = 0.03
ATTRIBUTES_UNTIL = 0.5


class Denoiser(nn.Module):
    """A UNet and its text encoders, trained together.

    The attribute heads read the text: they teach the text encoders their words before the UNet
    could, and are dropped in the end.

    Attributes:
        family: whose text encoders it has, by the names of `Family.text_encoder_names`, and which
            of their states it reads.
        low_snr: signal-to-noise ratio of the latents below which the loss counts less.
        schedule: settings of the noise schedule.
    """

    family: Family
    low_snr = 0.5
    schedule = SCHEDULE

    def __init__(self, text_width: int) -> None:
        super().__init__()
        self.attribute_heads = nn.ModuleList(
            nn.Linear(text_width, len(choices)) for choices in ATTRIBUTES.values()
        )

    def encode_text(self, token_ids: Tensor) -> Conditioning:
        """Encode token ids ``(b, MAX_LENGTH)`` with the family's text encoders."""
        encoders = [getattr(self, name) for name in self.family.text_encoder_names]
        return encode_tokens(self.family, encoders, [token_ids] * len(encoders))

    def forward(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        token_ids: Tensor,
        dropped: Tensor,
        time_ids: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Predict what the schedule's ``prediction_type`` names: the velocity or the noise.

        Args:
            noisy_latents: (b, c, h, w).
            timesteps: (b,).
            token_ids: (b, MAX_LENGTH).
            dropped: (b,) bool, which captions to leave out.
            time_ids: (b, 6) SDXL's sizes, or (b, 0).

        Returns:
            the prediction (b, c, h, w), and the text's states (b, MAX_LENGTH, text_width).
        """
        raise NotImplementedError


def clip_text_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    """The configuration of a small CLIP text encoder."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        projection_dim=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def velocity_weight(alpha_bar: Tensor, low_snr: float) -> Tensor:
    """Loss weight of each sample, for the noise levels where images are decided; ``(b,)``.

    Full weight between ``low_snr`` and `HIGH_SNR`, fading outside: about the emphasis of the
    log-normal levels of EDM (Karras et al. 2022, section 5) under uniform timesteps.

    Args:
        alpha_bar: ``(b,)``.
        low_snr: signal-to-noise ratio below which the loss counts less; 0 fades nowhere below.
    """
    snr = alpha_bar / (1 - alpha_bar)
    weight = ((1 + HIGH_SNR) / (1 + snr)).clamp(max=1)
    return weight * (snr / low_snr).clamp(max=1) if low_snr > 0 else weight


def diffusion_loss(
    model: Denoiser,
    data: LatentSet,
    alphas: Tensor,
    generator: torch.Generator,
    teach_words: bool,
) -> Tensor:
    """The loss of one random batch; ``alphas`` are the schedule's ``alpha_bar``, (1000,)."""
    index = torch.randint(0, len(data), (BATCH,), generator=generator)
    which = torch.randint(0, data.token_ids.shape[1], (BATCH,), generator=generator)
    mean, std = data.latents[index].float().unbind(1)
    latents = mean + std * torch.randn(mean.shape, generator=generator)
    dropped = torch.rand(BATCH, generator=generator) < CAPTION_DROPOUT
    timesteps = torch.randint(0, len(alphas), (BATCH,), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    alpha_bar = alphas[timesteps]
    noisy_latents = add_noise(latents, noise, alpha_bar)
    token_ids = data.token_ids[index, which].long()
    with torch.autocast("cpu", torch.bfloat16):
        prediction, states = model(
            noisy_latents, timesteps, token_ids, dropped, data.time_ids[index].long()
        )
    target = training_target(model.schedule["prediction_type"], latents, noise, alpha_bar)
    weight = velocity_weight(alpha_bar, model.low_snr)
    if model.schedule["prediction_type"] == "epsilon":
        weight = weight / alpha_bar  # An error of the noise is sqrt(alpha_bar) of the velocity's.
    loss = denoising_loss(prediction, target, weight).mean()
    if not teach_words:
        return loss
    mentioned = data.mentioned[index, which].long().masked_fill(dropped[:, None], NO_NAME)
    return loss + ATTRIBUTE_WEIGHT * _attribute_loss(model, states.float(), mentioned)


def _attribute_loss(model: Denoiser, states: Tensor, mentioned: Tensor) -> Tensor:
    pooled = states[:, 1:].mean(1)
    losses = [
        F.cross_entropy(head(pooled), target, ignore_index=NO_NAME, reduction="sum")
        for head, target in zip(model.attribute_heads, mentioned.unbind(1), strict=True)
    ]
    return torch.stack(losses).sum() / len(states)


Model = TypeVar("Model", bound=Denoiser)


def train_diffusion(
    model: Model,
    folder: Path,
    minutes: float,
    export: Callable[[Model, Path, Path], None],
    learning_rate: float,
    *,
    knows_words: bool = False,
) -> Path:
    """Train on ``folder``'s latents and captions; the pipeline is in ``folder/pipeline``.

    A model that knows its words needs no attribute heads.

    The folder also gets every intermediate average, so that one can look while it trains.
    """
    from diffusers import DDPMScheduler

    data = open_latents(folder)
    scheduler: Any = DDPMScheduler(**model.schedule)
    alphas: Tensor = scheduler.alphas_cumprod

    def loss(model: Model, progress: float, generator: torch.Generator) -> Tensor:
        teach_words = not knows_words and progress < ATTRIBUTES_UNTIL
        return diffusion_loss(model, data, alphas, generator, teach_words)

    def report(model: Model, progress: Progress) -> None:
        export(model, folder, folder / "pipeline")

    settings = FitSettings(minutes, learning_rate, hold=0.35, warmup=200)
    fit("diffusion", folder, model, loss, settings, report)
    return folder / "pipeline"


def load_average(model: Model, folder: Path) -> Model:
    """Fill a model with the averaged weights of the last saved state, finished or not."""
    model.load_state_dict(torch.load(folder / "diffusion.pt", weights_only=True)["average"])
    return model.eval()
