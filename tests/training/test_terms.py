"""The objective that trains, against its definition on raw Diffusers modules.

The reference loads the same folder with Diffusers, replaces each adapted weight by the dense
``W' = m (W + sBA) / norm`` with the norm detached, encodes prompts with the pipeline's own
`encode_prompt`, and writes the loss out term by term. Loss and gradients of every factor and
magnitude must agree.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dora_diffusion.adapters.inject import adapter_parameters, inject_adapters
from dora_diffusion.adapters.layers import adapted_layers
from dora_diffusion.adapters.scope import norm_scope
from dora_diffusion.config import AdapterConfig, TrainConfig
from dora_diffusion.config.base import BaseModel
from dora_diffusion.data.crops import CropRecord
from dora_diffusion.data.dataset import SampleBatch
from dora_diffusion.data.sampler import generator_for
from dora_diffusion.models.components import Components
from dora_diffusion.models.load import load_components
from dora_diffusion.training.batch import Batch, draw_batch
from tests.training.helpers import losses_by, terms_of

# A seed whose timesteps are some early, with an SNR above min-SNR's gamma, and some late.
SEED, MICRO_STEP, FIRST_ROW = 26, 5, 3
CAPTIONS = ["a photo of sks dog on the red toy", "sks dog", "the cat in a backpack, sks dog"]
CLASS_CAPTIONS = ["a photo of dog on the red toy", "dog", "the cat in a backpack, dog"]
# A slider whose targets are the captions, and whose anchors the class captions.
SLIDER: dict[str, Any] = {
    "teach": "slider", "target": CAPTIONS, "anchors": CLASS_CAPTIONS, "slider_guidance": 1.7,
    "positive": ["a red dog", "a cat on the toy", "the toy"],
    "negative": ["a dog", "a cat in the backpack", "a photo of the red toy on a dog"],
}  # fmt: skip
HEIGHT, WIDTH = 128, 96


@dataclass(frozen=True)
class Case:
    """Settings of one comparison."""

    family: str
    text_encoders: bool = False
    prior: str | None = None
    masked: bool = False
    unmasked_prior: float = 0.0
    huber: str = ""
    snr_gamma: float = 5.0
    noise_offset: float = 0.0
    norm_axis: str = "output"
    zero_snr: bool = False

    @property
    def predicts_v(self) -> bool:
        return self.family == "sd2" or self.zero_snr

    @property
    def schedule(self) -> dict[str, Any]:
        """The noise schedule that is asked for, where that is not the folder's own."""
        asked = {"prediction_type": "v_prediction", "zero_terminal_snr": True}
        return asked if self.zero_snr else {}

    def __str__(self) -> str:
        parts = [
            self.family,
            self.prior or "",
            self.huber,
            self.norm_axis,
            f"snr{self.snr_gamma:g}",
        ]
        parts += [
            "text" * self.text_encoders,
            f"masked{self.unmasked_prior:g}" * self.masked,
            "zero" * self.zero_snr,
        ]
        return "-".join(parts)


# Each setting stands in one of them, and each pair of prior, mask and family that shares code.
CASES = [
    Case("sd1", text_encoders=True, prior="image-free", noise_offset=0.1, huber="exponential"),
    Case("sd1", text_encoders=True, prior="image-free", masked=True, unmasked_prior=0.7),
    Case("sd1", prior="images", snr_gamma=0.0, huber="constant"),
    Case("sd1", prior="slider", text_encoders=True, noise_offset=0.1),
    Case("sd2", masked=True, unmasked_prior=2.0, huber="snr"),
    Case("sd2", text_encoders=True, prior="images"),
    Case("sdxl", text_encoders=True, prior="images", masked=True, unmasked_prior=0.5,
         noise_offset=0.1),
    Case("sdxl", text_encoders=True, prior="image-free"),
    Case("sdxl", masked=True, snr_gamma=0.0, norm_axis="input"),
    Case("sdxl", zero_snr=True),
    Case("sdxl", prior="slider", snr_gamma=0.0),
]  # fmt: skip
MORE = [
    Case("sd2", prior="image-free", snr_gamma=0.0),
    Case("sd1", text_encoders=True, prior="images", masked=True),
    Case("sd1"),
    Case("sd1", snr_gamma=0.0, norm_axis="input"),
    Case("sd1", prior="image-free", huber="exponential"),
    Case("sd1", prior="slider", snr_gamma=0.0),
    Case("sd2", masked=True),
    Case("sd2", prior="slider", snr_gamma=0.0),
    Case("sdxl"),
    Case("sdxl", prior="images", masked=True, unmasked_prior=0.5, snr_gamma=0.0),
]


def make_batch(case: Case, with_moments: Any = None) -> SampleBatch:
    """Three photos of different captions, sizes, crops and masks, and as many class images."""
    count = 6 if case.prior in ("images", "slider") else 3
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(count, 3, HEIGHT, WIDTH, generator=generator) * 2 - 1
    crops = [
        CropRecord((90 + 7 * row, 200 - 11 * row), (3 * row, 50 - 5 * row), (HEIGHT, WIDTH))
        for row in range(count)
    ]
    mask = (torch.rand(count, 1, HEIGHT, WIDTH, generator=generator) > 0.4).float()
    mask[:, :, : HEIGHT // 2] *= 0.5
    return SampleBatch(
        [f"photo {row}" for row in range(count)],
        (CAPTIONS + CLASS_CAPTIONS)[:count],
        crops,
        torch.arange(count) >= 3,
        pixels if with_moments is None else None,
        None if with_moments is None else with_moments(pixels),
        mask if case.masked else None,
        range(count - 3),
        CLASS_CAPTIONS if case.prior == "image-free" else (),
    )


def adapted_components(folder: Any, case: Case) -> Components:
    """The package's model with adapters whose every number has moved."""
    components = load_components(BaseModel(folder, **case.schedule))
    generator = torch.Generator().manual_seed(2)
    for name, model in components.adaptable().items():
        if name != "unet" and not case.text_encoders:
            continue
        config = AdapterConfig(
            targets=("attention+conv",) if name == "unet" else ("text-encoder",),
            rank=3, alpha=2.0, conv_rank=2, conv_alpha=3.0, norm_axis=case.norm_axis,
        )  # fmt: skip
        inject_adapters(model, config, generator=generator)
        with torch.no_grad():
            for parameter in adapter_parameters(model):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(parameter * (1 + 0.1 * noise) + 0.05 * noise)
    return components


def ours(components: Components, case: Case, samples: SampleBatch) -> tuple[Batch, Tensor, Tensor]:
    """Loss of subject and prior as training computes them; gradients are left behind."""
    slider = TrainConfig(**SLIDER) if case.prior == "slider" else None
    held = {"masked_loss": case.masked, "unmasked_prior": case.unmasked_prior}
    config = TrainConfig(seed=SEED, noise_offset=case.noise_offset, **held)
    batch = draw_batch(components, components.process, samples, config, MICRO_STEP, FIRST_ROW)
    terms = terms_of(
        components,
        snr_gamma=case.snr_gamma,
        unmasked_prior=case.unmasked_prior,
        huber=case.huber,
        slider=slider,
    )
    with norm_scope(*components.adaptable().values()):
        subject, prior = losses_by(components, terms, batch, train_text_encoder=case.text_encoders)
        (subject + 0.7 * prior).backward()
    return batch, subject.detach(), prior.detach()


@functools.cache
def untrained(folder: Path) -> Any:
    """Diffusers' pipeline of a base, which only predicts."""
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder)


class Reference:
    """The objective written out on Diffusers' own pipeline, with dense adapted weights."""

    def __init__(self, folder: Any, components: Components, case: Case) -> None:
        from diffusers import DDPMScheduler, DiffusionPipeline

        self.case = case
        self.base = untrained(folder)
        self.adapted = DiffusionPipeline.from_pretrained(folder)
        self.schedule = DDPMScheduler.from_pretrained(
            folder / "scheduler", rescale_betas_zero_snr=case.zero_snr
        )
        self.leaves = {
            f"{component}.{path}": (layer, dense_weight(self.adapted, component, path, layer))
            for component, model in components.adaptable().items()
            for path, layer in adapted_layers(model)
        }

    def loss(self, batch: SampleBatch, class_captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Loss of the subject and of the prior."""
        count = len(batch)
        rows = [self._row(batch, row) for row in range(count)]
        alpha_bar = torch.stack([row["alpha_bar"] for row in rows])
        target = torch.stack([row["target"] for row in rows])
        noisy = torch.stack([row["noisy"] for row in rows])
        timesteps = torch.stack([row["timestep"] for row in rows])
        weight = self._snr_weight(alpha_bar)
        if self.case.prior == "slider":
            target = self._slider_target(batch, noisy, timesteps)
        pred = self._predict(self.adapted, noisy, timesteps, batch.captions, batch.crops)
        with torch.no_grad():
            untrained = self._predict(self.base, noisy, timesteps, batch.captions, batch.crops)
        per_row = []
        for row in range(count):
            error = self._error(pred[row] - target[row], timesteps[row], alpha_bar[row])
            if batch.mask is None:
                per_row.append(weight[row] * error.mean())
                continue
            # The share of each latent's 8 x 8 pixels that the mask covers.
            share = batch.mask[row, 0].unfold(0, 8, 8).unfold(1, 8, 8).mean(dim=(2, 3))
            channels = error.shape[0]
            per_row.append(weight[row] * (error * share).sum() / (channels * share.sum()))
            away = self._error(pred[row] - untrained[row], timesteps[row], alpha_bar[row])
            outside = 1 - share
            mean = (away * outside).sum() / (channels * outside.sum())
            per_row[row] = per_row[row] + self.case.unmasked_prior * weight[row] * mean
        subject = torch.stack(per_row[:3]).mean()
        if self.case.prior in ("images", "slider"):
            return subject, torch.stack(per_row[3:]).mean()
        if self.case.prior is None:
            return subject, torch.zeros(())
        with torch.no_grad():
            held = self._predict(self.base, noisy, timesteps, class_captions, batch.crops)
        now = self._predict(self.adapted, noisy, timesteps, class_captions, batch.crops)
        away = [
            self._error(now[row] - held[row], timesteps[row], alpha_bar[row]).mean()
            for row in range(count)
        ]
        return subject, (weight * torch.stack(away)).mean()

    def _error(self, difference: Tensor, timestep: Tensor, a: Tensor) -> Tensor:
        """The square, or the Huber loss with c = 0.1."""
        if not self.case.huber:
            return difference**2
        d = {
            "constant": torch.tensor(0.1),
            "exponential": torch.exp(torch.log(torch.tensor(0.1)) * timestep / 1000),
            "snr": 0.9 / (1 + ((1 - a) / a) ** 0.5) ** 2 + 0.1,
        }[self.case.huber].double()
        return (2 * d * ((difference.double() ** 2 + d**2).sqrt() - d)).float()

    @torch.no_grad()
    def _slider_target(self, batch: SampleBatch, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The base's predictions; of the targets moved from the negative to the positive end."""
        target = self._predict(self.base, noisy, timesteps, batch.captions, batch.crops)
        for row in range(3):
            one = slice(row, row + 1)
            given = self.base, noisy[one], timesteps[one]
            ends = (
                self._predict(*given, [SLIDER[end][row]], batch.crops[one])[0]
                for end in ("positive", "negative")
            )
            high, low = ends
            target[row] += SLIDER["slider_guidance"] * (high - low)
        return target

    def _row(self, batch: SampleBatch, row: int) -> dict[str, Tensor]:
        """One row's draws, in the order that a run's reproducibility rests on."""
        is_prior = bool(batch.is_prior[row])
        place = FIRST_ROW + row % 3
        generator = generator_for("draw", SEED, MICRO_STEP, place, is_prior)
        with torch.no_grad():
            posterior = self.base.vae.encode(batch.pixels[row : row + 1]).latent_dist
        shape = posterior.mean.shape
        latents = posterior.mean + posterior.std * torch.randn(shape, generator=generator)
        latents = (latents * self.base.vae.config.scaling_factor)[0]
        timestep = torch.randint(1000, (), generator=generator)
        noise = torch.randn(shape[1:], generator=generator)
        if self.case.noise_offset:
            noise = noise + self.case.noise_offset * torch.randn(4, 1, 1, generator=generator)
        a = self.schedule.alphas_cumprod[timestep]
        velocity = a**0.5 * noise - (1 - a) ** 0.5 * latents
        return {
            "timestep": timestep,
            "alpha_bar": a,
            "noisy": a**0.5 * latents + (1 - a) ** 0.5 * noise,
            "target": velocity if self.case.predicts_v else noise,
        }

    def _snr_weight(self, alpha_bar: Tensor) -> Tensor:
        if not self.case.snr_gamma:
            return torch.ones_like(alpha_bar)
        snr = alpha_bar / (1 - alpha_bar)
        assert snr.min() < self.case.snr_gamma < snr[:3].max(), "min-SNR must act on some rows"
        clipped = torch.minimum(snr, torch.full_like(snr, self.case.snr_gamma))
        return clipped / (snr + 1 if self.case.predicts_v else snr)

    def _predict(
        self,
        pipeline: Any,
        noisy: Tensor,
        timesteps: Tensor,
        captions: Sequence[str],
        crops: Sequence[CropRecord],
    ) -> Tensor:
        """Row by row, so that no row can borrow another's conditioning."""
        predictions = []
        for row, (caption, crop) in enumerate(zip(captions, crops, strict=True)):
            states, _, *pooled = pipeline.encode_prompt(
                caption, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
            )
            added = None
            if self.case.family == "sdxl":
                (height, width), (top, left) = crop.original_size, crop.crop_top_left
                ids = torch.tensor([[height, width, top, left, HEIGHT, WIDTH]])
                added = {"text_embeds": pooled[0], "time_ids": ids}
            predictions.append(
                pipeline.unet(
                    noisy[row : row + 1],
                    timesteps[row],
                    encoder_hidden_states=states,
                    added_cond_kwargs=added,
                ).sample[0]
            )
        return torch.stack(predictions)


def dense_weight(pipeline: Any, component: str, path: str, layer: Any) -> list[Tensor]:
    """Put ``m (W + sBA) / norm`` in the place of a weight; returns the leaves A, B, m."""
    adapter = layer.adapters["default"]
    leaves = [t.detach().clone().requires_grad_() for t in (adapter.down, adapter.up)]
    leaves.append(adapter.magnitude.detach().clone().requires_grad_())
    down, up, magnitude = leaves
    module = getattr(pipeline, component).get_submodule(path)
    weight = module.weight.detach()
    delta = (up.flatten(1) @ down.flatten(1)).view(weight.shape)
    direction = weight + adapter.alpha / down.shape[0] * delta
    kept = 0 if adapter.norm_axis == "output" else 1
    others = [dim for dim in range(weight.ndim) if dim != kept]
    norm = direction.detach().square().sum(dim=others, keepdim=True).sqrt()
    del module._parameters["weight"]
    module.weight = magnitude.view(norm.shape) * direction / norm
    return leaves


def gradients(reference: Reference) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Every gradient: its name, the package's, the reference's."""
    for name, (layer, leaves) in reference.leaves.items():
        adapter = layer.adapters["default"]
        for part, leaf in zip(("down", "up", "magnitude"), leaves, strict=True):
            yield f"{name}.{part}", getattr(adapter, part).grad, leaf.grad


def assert_same(reference: Reference, subject: Tensor, prior: Tensor, batch: SampleBatch) -> None:
    expected = reference.loss(batch, CLASS_CAPTIONS)
    torch.testing.assert_close(subject, expected[0].detach(), rtol=2e-5, atol=0)
    torch.testing.assert_close(prior, expected[1].detach(), rtol=2e-5, atol=0)
    (expected[0] + 0.7 * expected[1]).backward()
    compared = 0
    for name, found, wanted in gradients(reference):
        if wanted is None:
            # SDXL reads the penultimate layers: the last ones get no gradient.
            assert found is None or not found.any(), name
            continue
        error = (found - wanted).norm() / wanted.norm()
        assert error < 1e-4, f"{name}: gradient off by {error:.1e}"
        compared += 1
    assert compared > 100


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)], ids=str
)
def test_loss_and_gradients_are_those_of_the_definition(case, request) -> None:
    folder = request.getfixturevalue(f"{case.family}_folder")
    components = adapted_components(folder, case)
    batch = make_batch(case)
    _, subject, prior = ours(components, case, batch)
    assert_same(Reference(folder, components, case), subject, prior, batch)


def test_cached_moments_train_as_the_pixels_do(sdxl_folder) -> None:
    case = Case("sdxl", prior="images")
    components = adapted_components(sdxl_folder, case)

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        return components.vae.encode(pixels).latent_dist.parameters

    _, subject, prior = ours(components, case, make_batch(case, encode))
    batch = make_batch(case)
    assert_same(Reference(sdxl_folder, components, case), subject, prior, batch)


def test_a_batch_of_subjects_is_the_mean_of_its_rows(sdxl_folder) -> None:
    """One row holds its prior by a class image, one without, one not at all."""
    case = Case("sdxl", prior="images")
    components, batch = adapted_components(sdxl_folder, case), make_batch(case)
    rows = [1, 2, 0, 3]
    held = [None, CLASS_CAPTIONS[2], None]

    def part(rows: list[int], **fields: Any) -> SampleBatch:
        return replace(
            batch, sample_ids=[batch.sample_ids[r] for r in rows],
            captions=[batch.captions[r] for r in rows], crops=[batch.crops[r] for r in rows],
            is_prior=batch.is_prior[rows], pixels=batch.pixels[rows], **fields,
        )  # fmt: skip

    mixed = part(rows, partners=[2], class_captions=held)
    _, subject, prior = ours(components, case, mixed)
    alone = [
        part(rows[place : place + 1] + ([3] if place == 2 else []),
             partners=[0] if place == 2 else [], class_captions=held[place : place + 1])
        for place in range(3)
    ]  # fmt: skip
    losses = []
    terms = terms_of(components, snr_gamma=case.snr_gamma)
    for place, single in enumerate(alone):
        first_row = FIRST_ROW + place
        config = TrainConfig(seed=SEED)
        drawn = draw_batch(components, components.process, single, config, MICRO_STEP, first_row)
        with torch.no_grad(), norm_scope(*components.adaptable().values()):
            losses.append([float(loss) for loss in losses_by(components, terms, drawn)])
    assert losses[0][1] == 0 < losses[1][1]
    assert float(subject) == pytest.approx(sum(loss for loss, _ in losses) / 3, rel=1e-5)
    assert float(prior) == pytest.approx((losses[1][1] + losses[2][1]) / 3, rel=1e-5)
