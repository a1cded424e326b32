"""Weights in prompts: by A1111's rules, written anew character by character and token by token."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import replace

import pytest
import torch

from dora_diffusion.models.emphasis import (
    has_editing,
    has_weights,
    parse_weights,
    plain_parts,
    unread_syntax,
)
from dora_diffusion.models.load import load_components
from dora_diffusion.models.text import encode_prompts, encode_weighted
from dora_diffusion.models.words import add_tokens
from dora_diffusion.sampling.generate import generate_images
from dora_diffusion.sampling.settings import SamplingSettings
from tests.refusal import refused

LONG = "a red toy, " * 14 + "on the green grass by the blue lake with a dog"
PROMPTS = [
    "a photo of a dog",
    "a photo of a (dog)",
    "a photo of a ((red)) [dog]",
    "a (red:1.5) dog on the (grass:0.6), [[blue]] sky",
    "(a (red:1.3) dog:0.8) on grass",
    "(a [red (dog)])",
    r"a \(dog\) \[on\] the (grass\):1.2)",
    r"a back\slash \\ (dog)",
    "an (open bracket that ends nowhere, [twice",
    "closed) by ] nothing :1.5) here",
    "a : b (c:d:1.4) (e: 1.6 )",
    "(dog:0) and (cat:-0.5)",
    "a dog BREAK on the (grass:1.4)",
    "a dog BREAK BREAK on the grass BREAK",
    "BREAK a BREAKFAST for the dog",
    LONG,
    f"({LONG}:1.3) and [{LONG}]",
    "x " * 74 + ", " + "(y z:1.2) " * 60,
    "x " * 75 + ", y, " + "z " * 100,
    "(sks:1.4) <zwx> (a <zwx>, dog:1.2) [<zwx>]",
    "",
]


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def components(request):
    """With a word that was trained, and a last norm as trained models have it.

    Of a fresh norm the mean of all states is 0.
    """
    loaded = load_components(request.getfixturevalue(f"{request.param}_folder"))
    generator = torch.Generator().manual_seed(2)
    for encoder in loaded.text_encoders:
        (bias,) = (p for n, p in encoder.named_parameters() if n.endswith("final_layer_norm.bias"))
        with torch.no_grad():
            bias.add_(torch.randn(bias.shape, generator=generator) + 0.5)
    names = loaded.family.text_encoder_names
    vectors = {
        name: torch.randn(encoder.config.hidden_size, generator=generator)
        for name, encoder in zip(names, loaded.text_encoders, strict=True)
    }
    add_tokens(loaded, {"<zwx>": vectors})
    return loaded.reading(None, 0)


def read(prompt):
    """Letters with their weights, and None for a break, by one pass over the characters."""
    out, stack = [], []
    at = 0

    def close(start, factor):
        for index in range(start, len(out)):
            if out[index] is not None:
                out[index] = (out[index][0], out[index][1] * factor)

    while at < len(prompt):
        letter = prompt[at]
        weight = re.compile(r":\s*([+-]?[.\d]+)\s*\)").match(prompt, at)
        stop = re.compile(r"\s*\bBREAK\b\s*").match(prompt, at)
        rounds = [index for kind, index in stack if kind == "("]
        squares = [index for kind, index in stack if kind == "["]
        if letter == "\\":
            if prompt[at + 1 : at + 2] in [*"()[]\\"]:
                out.append((prompt[at + 1], 1.0))
                at += 1
        elif letter in "([":
            stack.append((letter, len(out)))
        elif weight and rounds:
            stack.remove(("(", rounds[-1]))
            close(rounds[-1], float(weight[1]))
            at = weight.end() - 1
        elif letter == ")" and rounds:
            stack.reverse()
            stack.remove(("(", rounds[-1]))
            stack.reverse()
            close(rounds[-1], 1.1)
        elif letter == "]" and squares:
            stack.reverse()
            stack.remove(("[", squares[-1]))
            stack.reverse()
            close(squares[-1], 1 / 1.1)
        elif stop:
            out.append(None)
            at = stop.end() - 1
        else:
            out.append((letter, 1.0))
        at += 1
    for kind, index in stack:
        close(index, 1.1 if kind == "(" else 1 / 1.1)
    return out


def runs(letters):
    """Parts of a prompt: of each the texts with one weight."""
    parts = [[]]
    for each in letters:
        if each is None:
            parts.append([])
        elif parts[-1] and math.isclose(parts[-1][-1][1], each[1], rel_tol=1e-12):
            parts[-1][-1][0] += each[0]
        else:
            parts[-1].append([*each])
    return parts


def chunks_of(tokenizer, prompt):
    """Token by token: the chunk in the making, and where its last comma is."""
    comma = tokenizer.convert_tokens_to_ids(",</w>")
    done, ids, weights, last = [], [], [], -1

    def flush():
        nonlocal ids, weights, last
        done.append((ids, weights))
        ids, weights, last = [], [], -1

    for number, part in enumerate(runs(read(prompt))):
        if number:
            flush()
        for text, weight in part:
            for token in tokenizer(text, add_special_tokens=False).input_ids:
                if token == comma:
                    last = len(ids)
                elif len(ids) == 75 and last != -1 and 75 - last <= 20:
                    moved = ids[last + 1 :], weights[last + 1 :]
                    ids, weights = ids[: last + 1], weights[: last + 1]
                    flush()
                    ids, weights = moved
                if len(ids) == 75:
                    flush()
                ids.append(token)
                weights.append(weight)
    if ids or not done:
        flush()
    return done


def expected_states(components, prompt):
    """Of each text encoder alone, one chunk after the other, by Transformers."""
    both, pooled = [], None
    for encoder, tokenizer in zip(components.text_encoders, components.tokenizers, strict=True):
        states = []
        for number, (ids, weights) in enumerate(chunks_of(tokenizer, prompt)):
            start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
            row = [start, *ids, end] + [tokenizer.pad_token_id] * (75 - len(ids))
            with torch.no_grad():
                out = encoder(torch.tensor([row]), output_hidden_states=True)
            is_penultimate = components.family.hidden_state == "penultimate"
            own = out.hidden_states[-2] if is_penultimate else out.last_hidden_state
            factors = torch.tensor([1.0, *weights] + [1.0] * (76 - len(weights)))
            weighted = own * factors[None, :, None]
            states.append(weighted * own.mean() / weighted.mean())
            if not number:
                pooled = getattr(out, "text_embeds", None)
        both.append(torch.cat(states, dim=1))
    return torch.cat(both, dim=-1), pooled


@pytest.mark.parametrize("prompt", PROMPTS)
def test_states_are_those_of_a1111s_rules(prompt, components):
    with torch.no_grad():
        found = encode_weighted(components, [prompt])
    states, pooled = expected_states(components, prompt)
    torch.testing.assert_close(found.encoder_hidden_states, states, rtol=1e-5, atol=1e-5)
    if components.family.has_pooled:
        torch.testing.assert_close(found.pooled, pooled, rtol=1e-5, atol=1e-5)
    else:
        assert found.pooled is None
    # Not what the prompt gives as text, unless nothing in it is weighted.
    if not has_weights(prompt) and prompt != LONG and "," not in prompt:
        plain = encode_prompts(components, [prompt])
        torch.testing.assert_close(found.encoder_hidden_states, plain.encoder_hidden_states)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_texts_and_weights_are_those_of_one_pass_over_the_letters(prompt):
    expected = runs(read(prompt))
    found = [[[text, weight] for text, weight in part] for part in parse_weights(prompt)]
    assert [[text for text, _ in part] for part in found] == [
        [text for text, _ in part] for part in expected
    ]
    for mine, theirs in zip(found, expected, strict=True):
        assert [w for _, w in mine] == pytest.approx([w for _, w in theirs])
    assert plain_parts(prompt) == ["".join(text for text, _ in part) for part in expected]


def test_rows_of_a_batch_do_not_depend_on_each_other(components):
    prompts = [PROMPTS[2], PROMPTS[12], PROMPTS[0]]
    with torch.no_grad():
        together = encode_weighted(components, prompts)
        for row, prompt in enumerate(prompts):
            alone = encode_weighted(components, [prompt])
            length = alone.encoder_hidden_states.shape[1]
            torch.testing.assert_close(
                together.encoder_hidden_states[row, :length], alone.encoder_hidden_states[0],
                rtol=1e-5, atol=1e-5,
            )  # fmt: skip
            if components.family.has_pooled:
                torch.testing.assert_close(
                    together.pooled[row], alone.pooled[0], rtol=1e-5, atol=1e-5
                )


def test_the_limit_of_tokens_is_of_each_part(components):
    components = components.reading(None, 75)
    with torch.no_grad():
        cut = encode_weighted(components, [f"({LONG}:1.2) BREAK a (dog)"]).encoder_hidden_states
    assert cut.shape[1] == 2 * 77
    second, _ = expected_states(components, "a (dog)")
    torch.testing.assert_close(cut[:, 77:], second, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("prompt", "is_edited"), [
    ("[cat:dog:0.5]", True), ("[cat::0.5] x", True), ("a [dog:10]", True), ("[a|b]", True),
    ("[dog]", False), ("(dog:1.2)", False), (r"\[a|b\]", False), ("[a, b]", False),
    ("[(cat:1.2)|dog]", True), ("[((a:1.2) b):0.5]", True), ("(a [b|c])", True),
    ("[a (b|c)]", False), ("[(cat:1.2)]", False), ("[a:b]", False),
])  # fmt: skip
def test_prompt_editing_is_known(prompt, is_edited):
    assert has_editing(prompt) == is_edited


# Syntax of A1111 and ComfyUI -> what of the message names it; empty where it is applied.
SYNTAX = {
    "a (red:1.3) dog": "", "a [red] dog": "", r"a \(red\) dog": "", "a red BREAK dog": "",
    "a dog AND a cat": "AND, which", "a dog\nAND\na cat:0.5": "AND, which",
    "a [red:blue:0.5] dog": "[a:b:0.5] and", "a [red|blue] dog": "[a:b:0.5] and",
    "a [red::5] dog": "[a:b:0.5] and", "a embedding:mug dog": "embedding:NAME",
    "(embedding:mug:1.2)": "embedding:NAME", "a dog <lora:x:1>": "<lora:NAME>",
    "a dog <lyco:x:1>": "<lora:NAME>", "a dog <hypernet:x:1>": "<lora:NAME>",
    "a {red|blue} dog": "{a|b} and", "a __colour__ dog": "{a|b} and",
    "SAND, ANDY and an embedding: a dog": None,
}  # fmt: skip


@pytest.mark.parametrize("prompt", SYNTAX)
def test_syntax_of_other_programs_is_applied_or_named(prompt):
    named = SYNTAX[prompt]
    kinds = unread_syntax(prompt)
    assert [kind.startswith(named or "") for kind in kinds] == [True] * bool(named)
    # What is applied is not in the text that is read.
    assert (plain_parts(prompt) != [prompt]) or named != ""


def test_each_prompt_is_told_once_of_syntax_that_is_read_as_text(sd1_folder):
    components = load_components(sd1_folder)
    settings = SamplingSettings(steps=1, width=16, height=16, prompt_weights=True)
    for prompt_weights in (True, False):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            generate_images(
                components, ["a dog AND a cat"] * 2, [0, 1],
                replace(settings, prompt_weights=prompt_weights),
            )  # fmt: skip
        said = [str(warning.message) for warning in caught if "web UIs" in str(warning.message)]
        line = "syntax of web UIs is read as text here (AND, which combines prompts): 'a dog AND"
        assert [text.startswith(line) for text in said] == [True] * prompt_weights


def test_a_weight_that_is_no_number_is_one_line():
    with refused("prompt_weights", "the weight 1.2.3"):
        parse_weights("a (dog:1.2.3)")
    # As A1111 does: what is no weight is text.
    assert parse_weights("(dog:1e9)") == [[("dog:1e9", pytest.approx(1.1))]]


def test_chunks_are_as_long_as_the_model_reads() -> None:
    """The embedded models read 30 tokens: a prompt with brackets is cut where any other is."""
    components = load_components("embedded:tiny-sd")
    words = "a red mug on the grass " * 12
    with pytest.warns(UserWarning, match="longer than the model's 32 tokens"):
        expected = encode_prompts(components, [words]).encoder_hidden_states
    for prompt in (f"(a:1.0){words[1:]}", f"({words}:1)"):
        states = encode_weighted(components, [prompt]).encoder_hidden_states
        torch.testing.assert_close(states, expected, rtol=0, atol=1e-6)
