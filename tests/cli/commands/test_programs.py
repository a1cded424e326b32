"""Verdicts on programs in few lines: what is special to one of them stays."""

from __future__ import annotations

import pytest

from dora_diffusion.cli.commands.adapters import clip_skip_line, where_it_works
from dora_diffusion.formats.adapter.metadata import AdapterMetadata


@pytest.mark.parametrize(
    ("verdicts", "exact", "wrong"),
    [
        ({"A": "exact", "B": "exact", "C": "wrong: no magnitudes"}, ["exact: A, B"], "C"),
        # A way of being exact that one program has is said of it; one that all have is not.
        ({"A": "exact: by a patch", "B": "exact"}, ["exact: A (by a patch), B"], ""),
        ({"A": "exact: in float32", "B": "exact: in float32"}, ["exact: A, B"], ""),
        # Wrong for a few layers only is worth knowing.
        ({"A": "wrong: it leaves 3 layers out", "B": "wrong: no norms"}, [],
         "A (it leaves 3 layers out), B"),
        ({"A": "exact", "B": "exact but slow", "C": "-"}, ["exact: A", "exact but slow: B"], ""),
        ({}, [], ""),
    ],
)  # fmt: skip
def test_programs_are_gathered_by_what_is_said_of_them(
    verdicts: dict[str, str], exact: list[str], wrong: str
) -> None:
    assert where_it_works(verdicts) == (exact, wrong)


@pytest.mark.parametrize(
    ("program", "family", "extra", "end"),
    [
        ("a1111", "sd1", {"clip_skip": "1"}, "clip_skip 1: set Clip skip 2 there"),
        ("forge", "sdxl", {"clip_skip": "1"}, "clip_skip 1: set Clip skip 3 there"),
        ("comfyui", "sd1", {"clip_skip": "1"}, "clip_skip 1: set CLIP Set Last Layer -2 there"),
        ("comfyui", "sd1", {}, ""),
        ("diffusers", "sd1", {"clip_skip": "1"}, ""),
    ],
)
def test_a_programs_own_clip_skip_is_said(
    program: str, family: str, extra: dict[str, str], end: str
) -> None:
    line = clip_skip_line(program, AdapterMetadata(family=family, extra=extra))
    assert line == (f"trained with {end}" if end else "")
