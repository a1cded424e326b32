"""The names of precisions, from whatever people type."""

from __future__ import annotations

import pytest
import torch

from dora_diffusion.config.fields import DTYPES, PRECISIONS, Setting, dtype_name, precision_name
from dora_diffusion.config.train import settings


@pytest.mark.parametrize(
    ("words", "dtype", "precision"),
    [
        (("float32", "fp32"), "float32", "no"),
        (("float16", "fp16"), "float16", "fp16"),
        (("bfloat16", "bf16"), "bfloat16", "bf16"),
    ],
)
def test_a_precision_has_one_name_per_library(
    words: tuple[str, ...], dtype: str, precision: str
) -> None:
    assert {dtype_name(word) for word in words} == {dtype}
    assert {precision_name(word) for word in (*words, precision)} == {precision}


def test_other_words_stay() -> None:
    assert (dtype_name("fp8"), precision_name("fp8"), precision_name("auto")) == (
        "fp8",
        "fp8",
        "auto",
    )
    assert precision_name("none") == "no"


def test_what_the_flags_take_is_what_the_libraries_know() -> None:
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in DTYPES)
    assert PRECISIONS == ("auto", "no", "fp16", "bf16")


@pytest.mark.parametrize(
    "setting",
    [setting for setting in settings() if setting.choices],
    ids=lambda setting: setting.name,
)
def test_a_choice_is_known_with_hyphens_or_underscores_and_in_capitals(setting: Setting) -> None:
    for choice in setting.choices or ():
        for word in (choice, choice.replace("-", "_"), choice.replace("_", "-")):
            assert setting.cast(word) == setting.cast(word.upper()) == choice
