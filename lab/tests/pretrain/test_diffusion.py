"""The pretraining's objective, against raw modules and diffusers' own scheduler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from dora_diffusion.toy.instrument import ATTRIBUTES
from lab.pretrain import diffusion
from lab.pretrain.instrument import NO_NAME
from lab.pretrain.latents import LatentSet
from lab.pretrain.sd import TextToImage
from lab.pretrain.sdxl import TextToImageXL
from lab.pretrain.start import fill_from_package

BATCH = 5
MODELS = {"tiny-sd": (TextToImage, 16), "tiny-sdxl": (TextToImageXL, 32)}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small, and with several captions left out."""
    monkeypatch.setattr(diffusion, "BATCH", BATCH)
    monkeypatch.setattr(diffusion, "CAPTION_DROPOUT", 0.5)


def drawn_data(tokenizer: Any, side: int, has_time_ids: bool) -> LatentSet:
    """Seven images with three captions each, all different."""
    generator = torch.Generator().manual_seed(0)
    captions = [f"a photo of {k} red mugs on the grass" for k in range(21)]
    token_ids = tokenizer(captions, padding="max_length", max_length=32, return_tensors="pt")
    latents = torch.randn(7, 2, 8, side, side, generator=generator)
    latents[:, 1] = 0.1 * latents[:, 1].abs()
    mentioned = torch.stack(
        [torch.randint(len(c), (7, 3), generator=generator) for c in ATTRIBUTES.values()], -1
    )
    mentioned[torch.rand(mentioned.shape, generator=generator) < 0.3] = NO_NAME
    time_ids = torch.randint(24, 200, (7, 6 if has_time_ids else 0), generator=generator)
    return LatentSet(
        latents.half(),
        token_ids.input_ids.view(7, 3, 32).to(torch.int16),
        mentioned.to(torch.int16),
        time_ids.to(torch.int16),
    )


def predict_raw(model: Any, noisy: Any, t: Any, ids: Any, dropped: Any, time_ids: Any) -> Any:
    """Velocity and text states from the modules alone; as the two families are published."""
    if isinstance(model, TextToImage):
        empty = torch.tensor([model.empty.tolist()] * BATCH)
        states = model.text_encoder(torch.where(dropped[:, None], empty, ids)).last_hidden_state
        return model.unet(noisy, t, states).sample, states
    first = model.text_encoder(ids, output_hidden_states=True).hidden_states[2]
    second = model.text_encoder_2(ids, output_hidden_states=True)
    states = torch.cat([first, second.hidden_states[2]], -1)
    keep = 1.0 - dropped.float()
    added = {"text_embeds": second.text_embeds * keep[:, None], "time_ids": time_ids}
    kept = states * keep[:, None, None]
    return model.unet(noisy, t, kept, added_cond_kwargs=added).sample, states


def reference_loss(
    model: Any, data: LatentSet, scheduler: Any, generator: torch.Generator, teach_words: bool
) -> torch.Tensor:
    """The loss that the models were made with, in one piece."""
    index = torch.randint(0, 7, (BATCH,), generator=generator)
    which = torch.randint(0, 3, (BATCH,), generator=generator)
    mean, std = data.latents[index, 0].float(), data.latents[index, 1].float()
    latents = mean + std * torch.randn(mean.shape, generator=generator)
    dropped = torch.rand(BATCH, generator=generator) < 0.5
    assert 0 < dropped.sum() < BATCH
    t = torch.randint(0, 1000, (BATCH,), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    noisy = scheduler.add_noise(latents, noise, t)
    ids = data.token_ids[index, which].long()
    with torch.autocast("cpu", torch.bfloat16):
        velocity, states = predict_raw(model, noisy, t, ids, dropped, data.time_ids[index].long())
    squares = F.mse_loss(
        velocity.float(), scheduler.get_velocity(latents, noise, t), reduction="none"
    )
    snr = scheduler.alphas_cumprod[t] / (1 - scheduler.alphas_cumprod[t])
    weight = torch.minimum(torch.ones(BATCH), 12 / (1 + snr))
    if isinstance(model, TextToImage):
        weight = weight * torch.minimum(torch.ones(BATCH), snr / 0.5)
    loss = (squares.mean((1, 2, 3)) * weight).mean()
    if not teach_words:
        return loss
    mentioned = data.mentioned[index, which].long().masked_fill(dropped[:, None], NO_NAME)
    # One mean, and sums in this order: in bfloat16 another order is another gradient.
    pooled = states.float()[:, 1:].mean(1)
    words = [
        F.cross_entropy(head(pooled), mentioned[:, k], reduction="sum", ignore_index=NO_NAME)
        for k, head in enumerate(model.attribute_heads)
    ]
    return loss + 0.03 * (torch.stack(words).sum() / BATCH)


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    named = model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "teach_words"), [("tiny-sd", False), ("tiny-sd", True), ("tiny-sdxl", True)]
)
def test_loss_and_gradients_are_those_of_the_raw_modules(
    name: str, teach_words: bool, tokenizer: Any
) -> None:
    kind, side = MODELS[name]
    torch.manual_seed(0)
    model: Any = kind(tokenizer)
    fill_from_package(model, name)
    data = drawn_data(tokenizer, side, name == "tiny-sdxl")
    scheduler: Any = DDPMScheduler(**model.schedule)
    expected = reference_loss(model, data, scheduler, torch.Generator().manual_seed(5), teach_words)
    expected_gradients = gradients(model, expected)
    loss = diffusion.diffusion_loss(
        model, data, scheduler.alphas_cumprod, torch.Generator().manual_seed(5), teach_words
    )
    found = gradients(model, loss)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert set(found) == set(expected_gradients)
    assert any(key.startswith("text_encoder.") for key in found)
    assert any(key.startswith("attribute_heads.") for key in found) == teach_words
    for key, gradient in found.items():
        difference = (gradient - expected_gradients[key]).norm()
        assert difference <= 1e-6 * expected_gradients[key].norm(), key


class NoiseOfVelocity(TextToImage):
    """The noise by a model of the velocity: sqrt(a) v + sqrt(1 - a) x."""

    schedule = TextToImage.schedule | {"prediction_type": "epsilon"}

    def forward(self, noisy: Any, t: Any, *conditions: Any) -> Any:
        velocity, states = super().forward(noisy, t, *conditions)
        a = DDPMScheduler(**self.schedule).alphas_cumprod[t][:, None, None, None]
        return a.sqrt() * velocity.float() + (1 - a).sqrt() * noisy, states


def test_errors_of_the_noise_count_as_those_of_the_velocity(tokenizer: Any) -> None:
    data, losses = drawn_data(tokenizer, 16, has_time_ids=False), []
    for kind in (TextToImage, NoiseOfVelocity):
        torch.manual_seed(0)
        model = kind(tokenizer).eval()
        alphas = DDPMScheduler(**model.schedule).alphas_cumprod
        draws = torch.Generator().manual_seed(5)
        losses.append(diffusion.diffusion_loss(model, data, alphas, draws, teach_words=False))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)


def test_the_weight_fades_outside_of_the_levels_that_decide() -> None:
    snr = torch.tensor([0.0, 0.25, 0.5, 1.0, 11.0, 23.0])
    alpha_bar = snr / (1 + snr)
    weight = diffusion.velocity_weight(alpha_bar, 0.5)
    torch.testing.assert_close(weight, torch.tensor([0.0, 0.5, 1.0, 1.0, 1.0, 0.5]))
    weight = diffusion.velocity_weight(alpha_bar, 0.0)
    torch.testing.assert_close(weight, torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.5]))
