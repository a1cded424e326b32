"""Trained words in text encoders, against Diffusers' textual inversion and a table that grew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dora_diffusion import AdapterConfig, inject_adapters
from dora_diffusion.generate import generate_images
from dora_diffusion.models.components import Components
from dora_diffusion.models.load import load_components
from dora_diffusion.models.text import encode_prompts
from dora_diffusion.models.words import add_tokens, has_words

PROMPTS = ["a photo of a <x> dog", "a dog", "<x>, <y>"]


def vectors(components: Components, count: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(count, encoder.config.hidden_size, generator=generator)
        for name, encoder in zip(
            components.family.text_encoder_names, components.text_encoders, strict=True
        )
    }


def load_in_diffusers(components: Components, token: str, values: dict[str, Tensor]) -> None:
    pipeline = components.pipeline()
    for name, encoder, tokenizer in zip(
        values, components.text_encoders, components.tokenizers, strict=True
    ):
        pipeline.load_textual_inversion(
            {token: values[name]}, token=token, text_encoder=encoder, tokenizer=tokenizer
        )


@pytest.fixture
def pair(sdxl_folder: Path) -> tuple[Components, Components]:
    """A model with two trained words, here and in Diffusers."""
    ours, theirs = load_components(sdxl_folder), load_components(sdxl_folder)
    for token, count in {"<x>": 2, "<y>": 1}.items():
        values = vectors(ours, count, count)
        add_tokens(ours, {token: values})
        load_in_diffusers(theirs, token, values)
    return ours, theirs


def test_prompts_are_encoded_as_with_textual_inversion(pair: tuple[Components, Components]) -> None:
    ours, theirs = (encode_prompts(components, PROMPTS) for components in pair)
    for name, tensor in ours.tensors().items():
        torch.testing.assert_close(tensor, theirs.tensors()[name], rtol=0, atol=1e-6)
    assert [has_words(pair[0], prompt) for prompt in PROMPTS] == [True, False, True]
    assert len(generate_images(pair[0], PROMPTS[0], [0], None, require_finite=False)) == 1


def test_gradients_are_those_of_a_table_that_grew(pair: tuple[Components, Components]) -> None:
    ours, theirs = pair
    for components in pair:
        for encoder in components.text_encoders:
            table = encoder.get_input_embeddings()
            getattr(table, "rows", table.weight).requires_grad_(True)
        encoded = encode_prompts(components, PROMPTS)
        (encoded.encoder_hidden_states.square().sum() + encoded.pooled.sum()).backward()
    for one, other in zip(ours.text_encoders, theirs.text_encoders, strict=True):
        table, grown = one.get_input_embeddings(), other.get_input_embeddings().weight
        assert table.weight.grad is None
        wanted = grown.grad[table.num_embeddings :]
        assert wanted.abs().min() > 0
        torch.testing.assert_close(table.rows.grad, wanted, rtol=1e-4, atol=1e-5)


def test_a_word_gets_the_vectors_of_the_next_adapter(sdxl_folder: Path) -> None:
    components = load_components(sdxl_folder)
    first, second = vectors(components, 2, 0), vectors(components, 2, 1)
    add_tokens(components, {"<x>": first, "<y>": first})
    add_tokens(components, {"<y>": second})
    for name, encoder in zip(second, components.text_encoders, strict=True):
        rows = encoder.get_input_embeddings().rows
        assert torch.equal(rows, torch.cat([first[name], second[name]]))
    with pytest.raises(ValueError, match="has the token '<y>' already"):
        add_tokens(components, {"<y>": vectors(components, 3, 0)})
    with pytest.raises(ValueError, match="has the token 'dog</w>' already"):
        add_tokens(components, {"dog</w>": second})


def test_a_table_with_an_adapter_cannot_grow(sd1_folder: Path) -> None:
    components = load_components(sd1_folder)
    (encoder,) = components.text_encoders
    inject_adapters(encoder, AdapterConfig(targets=("token-embedding",), rank=2))
    with pytest.raises(ValueError, match="<x> cannot be added to a token embedding that carries"):
        add_tokens(components, {"<x>": vectors(components, 1, 0)})
