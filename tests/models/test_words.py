"""Trained words in text encoders, against Diffusers' textual inversion and a table that grew."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dora_diffusion import AdapterConfig, inject_adapters
from dora_diffusion.data.captions import contains_token
from dora_diffusion.models.components import Components
from dora_diffusion.models.conditioning import Conditioning
from dora_diffusion.models.load import load_components
from dora_diffusion.models.text import encode_prompts, truncated_text
from dora_diffusion.models.words import (
    add_own_tokens,
    add_tokens,
    has_words,
    own_words,
    token_parts,
    write_out_words,
)
from dora_diffusion.sampling.generate import generate_images

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


def tensors(conditioning: Conditioning) -> list[Tensor]:
    pair = conditioning.encoder_hidden_states, conditioning.pooled
    return [tensor for tensor in pair if tensor is not None]


def test_prompts_are_encoded_as_with_textual_inversion(pair: tuple[Components, Components]) -> None:
    ours, theirs = (encode_prompts(components, PROMPTS) for components in pair)
    torch.testing.assert_close(tensors(ours), tensors(theirs), rtol=0, atol=1e-6)
    assert [has_words(pair[0], prompt) for prompt in PROMPTS] == [True, False, True]
    assert len(generate_images(pair[0], PROMPTS[0], [0], None, require_finite=False)) == 1


# Prompts, and the ids that they are read as: letters are words of two and of one vector.
READINGS = {
    "a zwq dog": "a zwq zwq_1 dog",
    "A Zwq dog": "a zwq zwq_1 dog",
    "ZWQ": "zwq zwq_1",
    "(A Zwq dog:1.2)": "( a zwq zwq_1 dog :1 . 2 )",
    "((Zwq)), [ZWQ], {zwq}": "(( zwq zwq_1 )), [ zwq zwq_1 ], { zwq zwq_1 }",
    'Zwq\'s dog; zwq-dog. "zwq"': 'zwq zwq_1 \'s dog ; zwq zwq_1 - dog . " zwq zwq_1 "',
    "a <Bolt>, on <bolt>.": "a <bolt> <bolt>_1 , on <bolt> <bolt>_1 .",
    "(<Bolt>:1.2) [<BOLT>]": "( <bolt> <bolt>_1 :1 . 2 ) [ <bolt> <bolt>_1 ]",
    "Zwq and Éclair, E\u0301CLAIR": "zwq zwq_1 and \xe9clair \xe9clair_1 , \xe9clair \xe9clair_1",
    "Zwq zwq_1 and zwq": "zwq zwq_1 and zwq zwq_1",
    "a Zwq_1 dog": "a zwq_1 dog",
    "zwq\n  ONE": "zwq zwq_1 one",
    "x<bolt>": "x <bolt> <bolt>_1",
    "<bolt>s, <bolt>2": "<bolt> <bolt>_1 s , <bolt> <bolt>_1 2",
    "<bolt><bolt>": "<bolt> <bolt>_1 <bolt> <bolt>_1",
    "zwq<bolt>one": "zwq zwq_1 <bolt> <bolt>_1 one",
}
# Of letters that are not word: inside others, which `contains_token` does not find either.
NOT_READ = ["zwqs", "azwq", "my_zwq", "zwq2", "zwqzwq", "a dog"]
NEW = {"zwq": 2, "<bolt>": 2, "\xe9clair": 2, "one": 1}


def ids_of_parts(tokenizer: Any, text: str) -> list[int]:
    """Ids of what is between spaces, each by itself: no part meets a neighbour."""
    return [
        number
        for part in text.split()
        for number in tokenizer(part, add_special_tokens=False).input_ids
    ]


def ids_read(components: Components, prompt: str, read: Callable[[], object]) -> list[list[int]]:
    """Tokens of the first prompt for each text encoder, without start, end and padding."""
    seen: list[Tensor] = []
    hooks = [
        encoder.get_input_embeddings().register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0])
        )
        for encoder in components.text_encoders
    ]
    read()
    for hook in hooks:
        hook.remove()
    ends = [tokenizer.eos_token_id for tokenizer in components.tokenizers]
    rows = (ids[0].tolist()[1:] for ids in seen[: len(ends)])
    return [row[: row.index(end)] for row, end in zip(rows, ends, strict=True)]


@pytest.fixture(scope="module")
def with_words(sdxl_folder: Path) -> Components:
    components = load_components(sdxl_folder)
    add_tokens(components, {word: vectors(components, n, n) for word, n in NEW.items()})
    return components


@pytest.fixture(scope="module")
def plain(sdxl_folder: Path) -> Any:
    """A tokenizer without words."""
    return load_components(sdxl_folder).tokenizers[0]


@pytest.fixture(scope="module")
def pooled(sdxl_folder: Path) -> Components:
    """The words are those of an adapter, and the base has another one of the first's name."""
    components = load_components(sdxl_folder)
    add_tokens(components, {"zwq": vectors(components, 3, 7)})
    words = {word: vectors(components, n, n) for word, n in NEW.items()}
    add_own_tokens(components, "mine", words)
    return components


@pytest.mark.parametrize("prompt", [*READINGS, *NOT_READ])
def test_every_reader_finds_all_vectors_of_a_word(
    with_words: Components, plain: Any, prompt: str
) -> None:
    """In training, in a pipeline, in chunks and in a warning, however the word is written."""
    expected = [
        ids_of_parts(tokenizer, READINGS[prompt])
        if prompt in READINGS
        else plain(prompt, add_special_tokens=False).input_ids
        for tokenizer in with_words.tokenizers
    ]
    pipeline = with_words.pipeline()
    for read in (
        lambda: encode_prompts(with_words, [prompt]),
        lambda: encode_prompts(with_words.reading(None, 0), [prompt, prompt + " dog" * 80]),
        lambda: pipeline.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False),
        lambda: pipeline.encode_prompt([prompt], device="cpu", do_classifier_free_guidance=False),
    ):
        assert ids_read(with_words, prompt, read) == expected
    assert has_words(with_words, prompt) == (prompt in READINGS)
    is_named = any(contains_token(unicodedata.normalize("NFC", prompt), word) for word in NEW)
    assert is_named == (prompt in READINGS) or prompt == "a Zwq_1 dog"
    room = 75 - len(expected[0])
    full = prompt + " dog" * room
    assert truncated_text(with_words, full) == ""
    assert truncated_text(with_words, full + " cat") == "cat"


BETWEEN = ["", *" ,.;:!?()[]{}|/\\'\"-_*+=&%$#@~^<>0a", "dog", "\xe9", ") (", "), (", "\n"]


@given(st.lists(st.tuples(st.sampled_from(BETWEEN), st.sampled_from(sorted(NEW))), min_size=1),
       st.sampled_from(BETWEEN))  # fmt: skip
def test_every_word_is_read_at_every_boundary(
    with_words: Components, parts: list[tuple[str, str]], end: str
) -> None:
    """A word of letters is read unless another letter, digit or underscore touches it."""
    prompt = "".join(f"{between}{word}" for between, word in parts) + end
    expected, at = Counter[str](), 0
    for between, word in parts:
        begin = at + len(between)
        at = begin + len(word)
        touching = (prompt[begin - 1 : begin], word[0]), (word[-1], prompt[at : at + 1])
        if not any(re.fullmatch(r"\w\w", left + right) for left, right in touching):
            expected[word] += 1
    tokenizer = with_words.tokenizers[0]
    read = Counter(tokenizer.tokenize(write_out_words(tokenizer, prompt)))
    for word, count in NEW.items():
        for part in token_parts(word, count):
            assert read[part] == expected[word], (prompt, part)


@pytest.mark.parametrize("prompt", [*READINGS, *NOT_READ])
def test_an_adapters_own_words_are_read_alike(
    with_words: Components, pooled: Components, prompt: str
) -> None:
    """A prompt of the adapter is encoded as by a model that has its words."""
    prompts = [prompt, prompt + " dog" * 80]
    for length in (75, 0):
        alone = encode_prompts(with_words.reading(None, length), prompts)
        ours = encode_prompts(pooled.reading(None, length), prompts, adapters=["mine", "mine"])
        torch.testing.assert_close(tensors(ours), tensors(alone), rtol=0, atol=1e-6)
    long = prompts[1]
    own = own_words(pooled.text_encoders[0], "mine")
    cut = truncated_text(with_words, long)
    assert truncated_text(pooled, long, own) == cut


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
    with pytest.raises(ValueError, match="already has the token '<y>'"):
        add_tokens(components, {"<y>": vectors(components, 3, 0)})
    with pytest.raises(ValueError, match="already has the token 'dog</w>'"):
        add_tokens(components, {"dog</w>": second})


def test_a_table_with_an_adapter_cannot_grow(sd1_folder: Path) -> None:
    components = load_components(sd1_folder)
    (encoder,) = components.text_encoders
    inject_adapters(encoder, AdapterConfig(targets=("token-embedding",), rank=2))
    with pytest.raises(ValueError, match="<x> cannot be added to a token embedding with"):
        add_tokens(components, {"<x>": vectors(components, 1, 0)})
