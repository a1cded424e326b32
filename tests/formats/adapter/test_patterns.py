"""PEFT's patterns: what ``re`` and PEFT answer, in a time that has an end."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from dora_diffusion.formats.adapter import alpha
from dora_diffusion.formats.adapter.alpha import NamePatterns
from dora_diffusion.formats.adapter.file import AdapterFormatError, read_adapter
from tests.formats.adapter.helpers import BLOCK
from tests.properties import at_least

ATOMS = st.sampled_from(
    ["a", "b", "0", "_", "-", ".", r"\.", r"\-", "[ab]", "[^a]", "[a-c_.]", "[]a]", r"[\d.]",
     r"\d", r"\w", r"\W", r"\s"]
)  # fmt: skip
QUANTIFIERS = st.sampled_from(
    ["", "*", "+", "?", "*?", "+?", "??", "{2}", "{0}", "{,2}", "{1,2}", "{1,}", "{,}", "{0,3}?"]
)
ITEMS = st.one_of(
    st.tuples(ATOMS, QUANTIFIERS).map("".join), st.sampled_from(["^", "$", r"\b", r"\B"])
)
# In a group that repeats nothing repeats, or `re` may not end.
PLAIN = st.lists(ATOMS | st.sampled_from(["", "^", "$", r"\b"]), max_size=3).map("".join)
GROUPS = st.tuples(
    st.sampled_from(["(", "(?:"]), st.lists(PLAIN, min_size=1, max_size=3).map("|".join),
    st.just(")"), QUANTIFIERS,
).map("".join)  # fmt: skip
SEQUENCES = st.lists(ITEMS | GROUPS, max_size=4).map("".join)
PATTERNS = st.one_of(
    st.lists(SEQUENCES, min_size=1, max_size=3).map("|".join),
    st.tuples(SEQUENCES, SEQUENCES).map(lambda two: f"({two[0]}(?:{two[1]}|b))"),
    st.sampled_from(["a)(b", "a)|(b"]),
)


@at_least(300)
@given(pattern=PATTERNS, names=st.lists(st.text("ab0_.- \n", min_size=1, max_size=7), max_size=6))
def test_patterns_match_what_re_matches(pattern: str, names: list[str]) -> None:
    patterns, expected = NamePatterns(), re.compile(rf"(.*\.)?({pattern})$")
    for name in names:
        assert patterns.matches(pattern, name) == (expected.match(name) is not None), name


@pytest.mark.parametrize(
    "pattern",
    ["to_k", "attn2.to_k", r"attn2\.to_k", "mid_block.*conv1", r".*\.attn[12]\.to_(q|k)",
     "^conv_in",
     r"down_blocks\.\d+\..*", r"(up|down)_blocks.*(proj_in|proj_out)$", "o_q", "unet.conv_in", ""],
)  # fmt: skip
def test_names_of_a_unet_match_as_peft_matches_them(pattern: str) -> None:
    from peft.utils.other import get_pattern_key

    patterns = NamePatterns()
    places = ("down_blocks.0", "down_blocks.11", "mid_block", "up_blocks.2")
    layers = ("attentions.1.proj_in", "attentions.0.transformer_blocks.0.attn1.to_q",
              "attentions.1.transformer_blocks.1.attn2.to_k", "resnets.0.conv1")  # fmt: skip
    names = ["conv_in", "conv_out", *(f"{place}.{layer}" for place in places for layer in layers)]
    found = {name for name in names if patterns.matches(pattern, name)}
    # PEFT gives the pattern's own key, else the name; no name is one of these patterns.
    assert found == {name for name in names if get_pattern_key([pattern], name) == pattern}
    assert (not found) == (pattern in ("o_q", "unet.conv_in", ""))


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(" * 5000 + ")" * 5000, "broken"),
        ("to_q(", "broken"),
        ("*", "broken"),
    ],
)
def test_what_cannot_be_matched_is_refused_by_name(pattern: str, reason: str) -> None:
    with pytest.raises(AdapterFormatError, match=f"the pattern .* {reason}|is {reason}") as refused:
        NamePatterns().matches(pattern, "a")
    assert repr(pattern)[1:20] in str(refused.value)


def test_a_file_with_a_pattern_that_does_not_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"base_model.model.{BLOCK}.attn1.to_q"
    tensors = {
        f"{path}.lora_A.weight": torch.ones(2, 8), f"{path}.lora_B.weight": torch.ones(8, 2)
    }  # fmt: skip
    folder = tmp_path / "unet"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}
    for number, pattern in ((6, "([a-z0-9_.]+)+!"), (5, r"attn\d\.to_(q|k)")):
        config["alpha_pattern"] = {"([a-z0-9_.]+)+!": 9, pattern: 5}
        (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")
        (layer,) = read_adapter(folder).layers.values()
        assert layer.alpha == number
    config["alpha_pattern"] = {"((.|.)+)+(?<=x)": 9}
    (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    monkeypatch.setattr(alpha, "NamePatterns", partial(NamePatterns, 0.01))
    with pytest.raises(
        AdapterFormatError, match=r"the pattern '.*' takes too long to match; write"
    ):
        read_adapter(folder)
