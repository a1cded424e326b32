"""Rare words in the captions: which of them mean something, and what."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dora_diffusion.toy.benchmark_subjects import TRIGGER
from lab.pretrain.names import designs, newcomers, rare_words, sample_named


def drawn(count: int = 600) -> list:
    generator = np.random.default_rng(0)
    return [sample_named(generator) for _ in range(count)]


def test_every_rare_word_is_a_design_or_a_newcomer() -> None:
    assert TRIGGER in newcomers()
    assert set(designs()) | set(newcomers()) == set(rare_words())
    assert not set(designs()) & set(newcomers())
    assert len(set(rare_words())) == len(rare_words())


def test_a_design_is_always_the_same_look_on_any_class() -> None:
    named = [(subject, name) for subject, name in drawn() if name in designs()]
    assert 0.1 < len(named) / 600 < 0.2
    for subject, name in named:
        assert replace(subject, kind="mug") == designs()[name]
    assert len({subject.kind for subject, _ in named}) > 6


def test_a_newcomer_is_somebody_else_each_time() -> None:
    named = [(subject, name) for subject, name in drawn() if name in newcomers()]
    assert 0.06 < len(named) / 600 < 0.14
    assert len({subject.body for subject, _ in named}) == len(named)
    assert all(subject.color is None for subject, _ in named)
