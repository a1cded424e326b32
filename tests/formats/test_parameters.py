"""The parameters text by itself: tags of networks, strengths and quoted fields."""

from __future__ import annotations

import pytest

from dora_diffusion.formats.parameters import (
    fields_of,
    network_tags,
    parameters_of,
    split_strengths,
)


def test_each_tag_is_found_even_if_it_is_incomplete() -> None:
    prompt = "a <lora:x:1> mug <lyco:my y:0.5:te=1> on <hypernet:z> and <lora:w"
    assert network_tags(prompt) == [
        "<lora:x:1>",
        "<lyco:my y:0.5:te=1>",
        "<hypernet:z>",
        "<lora:w",
    ]
    assert network_tags("3 < 4, lora:x, <b>") == []


@pytest.mark.parametrize(
    ("text", "strengths"),
    [
        ("", (None, None, "")),
        (":0.8", ("0.8", None, "")),
        ("0.8:.5", ("0.8", ".5", "")),
        (":1e-3:-2.:lbw=ALL", ("1e-3", "-2.", "lbw=ALL")),
        (":te=1", (None, None, "te=1")),
    ],
)
def test_strengths_are_split_from_options(text: str, strengths: tuple[str | None, ...]) -> None:
    assert split_strengths(text) == strengths


def test_a_written_text_reads_back() -> None:
    fields = {"Steps": "9", "Size": "8x8", "Note": 'a, "b": c', "Model": " m "}
    text = parameters_of("a mug,\nred", "blurry\nsmall", fields)
    expected = {"Prompt": "a mug,\nred", "Negative prompt": "blurry\nsmall", **fields}
    assert fields_of(text) == expected
