"""Conditioning against diffusers' own encode_prompt, bit for bit."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from dora_diffusion.data.crops import CropRecord
from dora_diffusion.models.load import Components, load_components
from dora_diffusion.models.text import (
    Conditioning,
    encode_prompts,
    encode_tokens,
    encode_unconditional,
    time_ids,
    tokenize,
    truncated_text,
)

PROMPTS = ["a photo of sks dog", "", "A red  toy, on the backpack!", "zebra " * 11]
LONG = "a photo of sks dog on the red backpack " + "a cat in the photo " * 16


@pytest.fixture(params=["sd1_folder", "sd2_folder", "sdxl_folder"])
def components(request: pytest.FixtureRequest) -> Components:
    return load_components(request.getfixturevalue(request.param))


def reference(components: Components, prompts: list[str], guided: bool = False) -> tuple:
    """Diffusers' embeddings: positive, negative, and SDXL's pooled pair (else Nones)."""
    encoded = components.pipeline().encode_prompt(
        prompts,
        device="cpu",
        num_images_per_prompt=1,
        do_classifier_free_guidance=guided,
    )
    return encoded if len(encoded) == 4 else (*encoded, None, None)


def assert_same(conditioning: Conditioning, hidden: torch.Tensor, pooled: object) -> None:
    assert torch.equal(conditioning.encoder_hidden_states, hidden)
    if pooled is None:
        assert conditioning.pooled is None
    else:
        assert torch.equal(conditioning.pooled, pooled)


def test_prompts_encode_as_in_the_pipeline(components: Components) -> None:
    hidden, _, pooled, _ = reference(components, PROMPTS)
    encoded = encode_prompts(components, PROMPTS)
    assert_same(encoded, hidden, pooled)
    assert encoded.encoder_hidden_states.shape[-1] == components.unet.config.cross_attention_dim
    assert_same(encode_prompts(components, [""]), *reference(components, [""])[0:4:2])


def test_token_ids_encode_as_their_prompts_do(components: Components) -> None:
    ids = [tokenize(tokenizer, PROMPTS).input_ids for tokenizer in components.tokenizers]
    encoded = encode_tokens(components.family, components.text_encoders, ids)
    hidden, _, pooled, _ = reference(components, PROMPTS)
    assert_same(encoded, hidden, pooled)


def test_padding_is_masked_where_the_encoder_asks_for_it(sd1_folder: Path) -> None:
    components = load_components(sd1_folder)
    unmasked = encode_prompts(components, PROMPTS)
    components.text_encoders[0].config.use_attention_mask = True
    hidden, _, pooled, _ = reference(components, PROMPTS)
    masked = encode_prompts(components, PROMPTS)
    assert_same(masked, hidden, pooled)
    assert not torch.equal(masked.encoder_hidden_states, unmasked.encoder_hidden_states)


def test_unconditional_is_what_guidance_uses(components: Components) -> None:
    _, negative, _, pooled = reference(components, ["a dog", "a cat"], guided=True)
    assert_same(encode_unconditional(components, 2), negative, pooled)
    zeros = bool((negative == 0).all())
    assert zeros == components.family.has_pooled == components.zeros_for_empty_prompt


def test_long_prompts_are_cut_as_in_the_pipeline_and_say_what(components: Components) -> None:
    with pytest.warns(UserWarning, match="longer than the model's 77 tokens") as caught:
        encoded = encode_prompts(components, [LONG, LONG, "a dog"])
    assert len(caught) == 1
    assert caught[0].filename == __file__
    hidden, _, pooled, _ = reference(components, [LONG, LONG, "a dog"])
    assert_same(encoded, hidden, pooled)
    cut = truncated_text(components.tokenizers[0], LONG)
    assert repr(cut) in str(caught[0].message)
    assert LONG.strip().endswith(cut)
    assert len(cut.split()) == len(LONG.split()) - 75


def test_prompts_at_the_limit_do_not_warn(components: Components) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_prompts(components, ["dog " * 75])
    assert truncated_text(components.tokenizers[0], "dog " * 76) == "dog"


def test_gradients_reach_every_encoder(components: Components) -> None:
    for encoder in components.text_encoders:
        encoder.requires_grad_(True)
    encoded = encode_prompts(components, ["a photo of sks dog"])
    (encoded.encoder_hidden_states.square().sum()).backward()
    for encoder in components.text_encoders:
        gradient = encoder.get_input_embeddings().weight.grad
        assert gradient.abs().sum() > 0
    assert not encoded.detach().encoder_hidden_states.requires_grad


def test_multi_vector_tokens_expand_as_in_the_pipeline(components: Components) -> None:
    for tokenizer, encoder in zip(components.tokenizers, components.text_encoders, strict=True):
        tokenizer.add_tokens(["<thing>", "<thing>_1", "<thing>_2"])
        with torch.random.fork_rng():
            torch.manual_seed(0)
            encoder.resize_token_embeddings(len(tokenizer))
    prompts = ["a photo of <thing>", "a dog"]
    hidden, _, pooled, _ = reference(components, prompts)
    assert_same(encode_prompts(components, prompts), hidden, pooled)
    tokenizer = components.tokenizers[0]
    first = tokenizer.convert_tokens_to_ids("<thing>")
    unexpanded = tokenizer("a photo of <thing>").input_ids
    assert unexpanded.count(first) == 1
    assert first + 1 not in unexpanded


def test_conditioning_rows_can_be_chosen_and_stacked() -> None:
    whole = Conditioning(torch.randn(3, 4, 5), torch.randn(3, 2))
    assert len(whole) == 3
    assert len(whole[1]) == 1
    assert_same(whole[[2, 0]], whole.encoder_hidden_states[[2, 0]], whole.pooled[[2, 0]])
    assert_same(Conditioning.cat([whole[0], whole[1:]]), whole.encoder_hidden_states, whole.pooled)
    assert whole.to(torch.float64).pooled.dtype == torch.float64
    assert set(whole.tensors()) == {"encoder_hidden_states", "pooled"}
    bare = Conditioning(torch.randn(1, 4, 5))
    assert bare[0].pooled is None
    assert set(bare.tensors()) == {"encoder_hidden_states"}
    with pytest.raises(ValueError, match="some has none"):
        Conditioning.cat([whole, bare])


def test_a_single_string_is_refused(components: Components) -> None:
    with pytest.raises(TypeError, match="list of prompts"):
        encode_prompts(components, "a dog")


def test_time_ids_are_the_pipelines(sdxl_folder: Path) -> None:
    components = load_components(sdxl_folder)
    expected = components.pipeline()._get_add_time_ids(
        (600, 800), (12, 34), (512, 512), torch.float32, text_encoder_projection_dim=48
    )
    ids = time_ids(components.family, [CropRecord((600, 800), (12, 34), (512, 512))])
    assert torch.equal(ids, expected)


def test_added_conditions_run_the_unet(components: Components) -> None:
    encoded = encode_prompts(components, ["a dog", "a cat"])
    ids = time_ids(components.family, [CropRecord((64, 64), (0, 0), (64, 64))] * 2)
    added = encoded.added_cond_kwargs(ids)
    assert (added is None) == (not components.family.has_time_ids)
    with torch.no_grad():
        prediction = components.unet(
            torch.randn(2, 4, 8, 8),
            torch.tensor([3, 7]),
            encoded.encoder_hidden_states,
            added_cond_kwargs=added,
        ).sample
    assert torch.isfinite(prediction).all()
