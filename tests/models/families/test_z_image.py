"""Z-Image against Diffusers' own pipeline and transformer, on a tiny random model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline

from dora_diffusion.models.components import Components
from dora_diffusion.models.conditioning import Conditioning
from dora_diffusion.models.load import check_components, load_components
from dora_diffusion.models.text import encode_negative, encode_prompts, truncated_text
from dora_diffusion.sampling.generate import generate_images
from dora_diffusion.sampling.settings import SamplingSettings
from tests.z_image import write_z_image

PROMPTS = ["a photo of sks mug", "", "a blue mug on a table, " * 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_z_image(tmp_path_factory.mktemp("z") / "model")


@pytest.fixture(scope="module")
def components(folder: Path) -> Components:
    return load_components(folder)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> ZImagePipeline:
    loaded = ZImagePipeline.from_pretrained(folder, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_the_model_is_complete(folder: Path, components: Components) -> None:
    assert components.family.name == "z-image"
    assert (components.default_resolution, components.size_step, components.bucket_step) == (
        64, 16, 16,
    )  # fmt: skip
    assert set(check_components(folder).values()) == {""}


@torch.no_grad()
def test_prompts_are_encoded_as_in_the_pipeline(
    components: Components, pipeline: ZImagePipeline
) -> None:
    encoded = encode_prompts(components, PROMPTS).by_prompt()
    # The pipeline changes the list that it is given.
    wanted, _ = pipeline.encode_prompt([*PROMPTS], do_classifier_free_guidance=False)
    assert [len(states) for states in encoded] == [len(states) for states in wanted]
    for ours, theirs in zip(encoded, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@torch.no_grad()
def test_clip_skip_reads_an_earlier_layer(components: Components) -> None:
    (encoder,), (tokenizer,) = components.text_encoders, components.tokenizers
    skipping = components.reading(1, None, is_told=False)
    chat = [{"role": "user", "content": PROMPTS[0]}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    ids = ids if torch.is_tensor(ids) else ids["input_ids"]
    hidden = encoder(ids, output_hidden_states=True).hidden_states
    (states,) = encode_prompts(skipping, PROMPTS[:1]).by_prompt()
    torch.testing.assert_close(states, hidden[-3][0], rtol=0, atol=1e-6)
    # Negative prompts are read without it, as in Stable Diffusion.
    (states,) = encode_negative(skipping, PROMPTS[:1]).by_prompt()
    torch.testing.assert_close(states, hidden[-2][0], rtol=0, atol=1e-6)


@torch.no_grad()
def test_predictions_are_those_of_the_transformer(
    components: Components, pipeline: ZImagePipeline
) -> None:
    """Diffusers' own convention: told 1 - s, its output is the negative velocity."""
    noisy, timesteps = torch.randn(3, 4, 8, 8), torch.tensor([0, 400, 999])
    conditioning = encode_prompts(components, PROMPTS)
    predicted = components.predict(noisy, timesteps, conditioning)
    sigmas = pipeline.scheduler.sigmas.flip(0)[timesteps]
    for row in range(3):  # One by one: batches of other lengths bring an attention mask.
        states, _ = pipeline.encode_prompt([PROMPTS[row]], do_classifier_free_guidance=False)
        (output,) = pipeline.transformer(
            [noisy[row].unsqueeze(1)], 1 - sigmas[row : row + 1], states, return_dict=False
        )[0]
        torch.testing.assert_close(predicted[row], -output.squeeze(1), rtol=0, atol=1e-5)


def test_truncated_prompts_are_told(components: Components) -> None:
    (tokenizer,) = components.tokenizers
    frame = len(tokenizer.apply_chat_template(
        [{"role": "user", "content": ""}], tokenize=False, add_generation_prompt=True
    ).replace("<|im_start|>", "s").replace("<|im_end|>", "e"))  # fmt: skip
    # A byte is a token. The frame around the prompt ends it, too.
    limit = components.family.most_tokens
    assert limit == 512
    tail = len("e\nsassistant\n")
    fits = "x" * (limit - frame)
    assert truncated_text(components, fits) == ""
    assert truncated_text(components, fits + "x" * tail) == ""
    assert truncated_text(components, fits + "x" * tail + "yz") == "yz"
    with pytest.warns(UserWarning, match="longer than the model's 512 tokens.*yz"):
        encode_prompts(components, [fits + "x" * tail + "yz"])


def test_rows_keep_their_lengths() -> None:
    a = Conditioning(torch.ones(2, 3, 5), None, (3, 2))
    b = Conditioning(torch.ones(1, 4, 5), None, (4,))
    joined = Conditioning.cat([a, b])
    assert joined.encoder_hidden_states.shape == (3, 4, 5)
    assert [len(states) for states in joined.by_prompt()] == [3, 2, 4]
    assert joined[[2, 0]].lengths == (4, 3)
    assert joined[torch.tensor([1])].lengths == (2,)
    assert joined[1:].lengths == (2, 4)
    assert joined[1].lengths == (2,)
    assert joined.to(torch.float64).zeros().lengths == (3, 2, 4)
    assert not joined.encoder_hidden_states[0, 3:].any()


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_an_image_is_that_of_the_pipeline(
    components: Components, pipeline: ZImagePipeline, guidance: float
) -> None:
    """Diffusers' scale is one less: it adds to the conditional prediction."""
    settings = SamplingSettings(steps=3, guidance_scale=guidance, negative_prompt="a dog")
    ours = generate_images(components, PROMPTS[0], [5, 7], settings)
    for image, seed in zip(ours, (5, 7), strict=True):
        wanted = pipeline(
            PROMPTS[0], negative_prompt="a dog", height=64, width=64, num_inference_steps=3,
            guidance_scale=guidance - 1, generator=torch.Generator().manual_seed(seed),
        ).images[0]  # fmt: skip
        pair = (np.asarray(each, dtype=np.int16) for each in (image, wanted))
        assert np.abs(np.subtract(*pair)).max() <= 1
