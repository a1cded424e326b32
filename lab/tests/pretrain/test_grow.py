"""Growing tiny-sdxl from tiny-sd: what is known stays known, and what is new is silent at first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dora_diffusion.models.embedded import model_folder
from dora_diffusion.models.families.stable_diffusion import tokenize
from lab.pretrain.grow import grow_from_sd
from lab.pretrain.sdxl import POOLED, WIDTHS, TextToImageXL
from lab.pretrain.views import training_captions


@pytest.fixture(scope="module")
def grown(tokenizer: Any) -> TextToImageXL:
    torch.manual_seed(0)
    model = TextToImageXL(tokenizer)
    grow_from_sd(model, [training_captions(index, 1)[0] for index in range(300)])
    return model.eval()


def test_encoders_have_their_widths_and_a_pooled_vector(grown: Any, tokenizer: Any) -> None:
    token_ids = tokenize(tokenizer, ["a red mug", "a sks mug"]).input_ids
    conditioning = grown.encode_text(token_ids)
    pooled = conditioning.pooled
    assert conditioning.encoder_hidden_states.shape == (2, 32, sum(WIDTHS))
    assert pooled.shape == (2, POOLED)
    assert not torch.allclose(pooled[0], pooled[1])


@torch.no_grad()
def test_the_grown_unet_answers_as_its_core_does_on_averaged_latents(
    grown: Any, tokenizer: Any
) -> None:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    core = UNet2DConditionModel.from_pretrained(model_folder("tiny-sd") / "unet")
    encoder = CLIPTextModel.from_pretrained(model_folder("tiny-sd") / "text_encoder")
    token_ids = tokenize(
        tokenizer, ["a photo of a red striped mug on the grass", "a fish"]
    ).input_ids
    # Of a single colour each: the level around the core convolves before it averages.
    latents = torch.randn(2, 8, 1, 1, generator=torch.Generator().manual_seed(1))
    timesteps, time_ids = torch.tensor([300, 700]), torch.full((2, 6), 128)
    answer, _ = grown(
        latents.expand(-1, -1, 32, 32), timesteps, token_ids, torch.zeros(2).bool(), time_ids
    )
    states = encoder(token_ids).last_hidden_state
    expected = core(latents.expand(-1, -1, 16, 16), timesteps, states).sample
    inner = (..., slice(8, 24), slice(8, 24))
    difference = (F.avg_pool2d(answer[inner], 2) - expected[..., 4:12, 4:12]).std()
    assert difference < 0.3 * expected[..., 4:12, 4:12].std()


@torch.no_grad()
def test_dropped_captions_are_zeros_and_sizes_say_nothing_yet(grown: Any, tokenizer: Any) -> None:
    latents = torch.randn(1, 8, 32, 32, generator=torch.Generator().manual_seed(2))
    first, second = tokenize(tokenizer, ["a mug", "a blue fish at night"]).input_ids.split(1)

    def answer(token_ids: torch.Tensor, dropped: bool, side: int) -> torch.Tensor:
        ids, drop = torch.full((1, 6), side), torch.tensor([dropped])
        return grown(latents, torch.tensor([500]), token_ids, drop, ids)[0]

    assert torch.equal(answer(first, True, 128), answer(second, True, 128))
    assert not torch.equal(answer(first, False, 128), answer(second, False, 128))
    assert torch.equal(answer(first, False, 128), answer(first, False, 32))
