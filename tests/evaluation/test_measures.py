"""Names, groups and intervals of figures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dora_diffusion.evaluation.measures import (
    ScoredImage,
    Scores,
    difference,
    mean_distances,
    summarize,
    title_of,
)


def test_distances_are_those_of_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.rand(6, 5, generator=generator), dim=1)
    groups = ["a", "b", "a", "a", "b", "c"]
    for cosine in (True, False):
        found = mean_distances(rows, groups, cosine=cosine)
        for i, group in enumerate(groups):
            others = [j for j, g in enumerate(groups) if g == group and j != i]
            array = rows.double().numpy()
            wanted = [
                1 - array[i] @ array[j] if cosine else np.sqrt(np.mean((array[i] - array[j]) ** 2))
                for j in others
            ]
            assert found[i] == pytest.approx(np.mean(wanted) if wanted else 0, abs=1e-5)


def test_scores_are_kept_by_round_and_group() -> None:
    groups, rounds = ["subject", "others", "subject", "subject"], [0, 0, 1, 1]
    scores = Scores([ScoredImage(g, "", r, 0) for g, r in zip(groups, rounds, strict=True)])
    scores.add("background", "subject", [True, False, False, None])
    scores.add("side", "pose", [1, 1, 1, 1])
    assert scores.values == {"background": ((1.0,), (0.0,))}


def test_shares_and_means_have_their_intervals() -> None:
    share = summarize("background", ((1, 1, 0), (1, 1, 1)))
    assert (share.method, share.n, share.mean) == ("wilson", 6, 5 / 6)
    mean = summarize("subject_similarity@dino", ((0.2, 0.4), (0.6, 0.8)))
    assert (mean.method, mean.n, mean.mean) == ("t", 4, pytest.approx(0.5))
    # Paired: the spread of the images cancels.
    moved = difference("denoising_loss", ((1.1, 2.1), (3.1, 4.1)), ((1, 2), (3, 4)))
    assert moved.low == pytest.approx(0.1)
    assert difference("background", ((1,),), ((0,),)).method == "newcombe"
    assert title_of("subject_similarity@dino") == "subject similarity (dino)"


@pytest.mark.parametrize("dimensions", [1, 48])
def test_intervals_of_diversity_hold_what_they_promise(dimensions):
    """Over 300 evaluations of 10 prompts and 4 seeds, nine in ten at least hold the truth."""
    generator = np.random.default_rng(0)
    first, second = generator.standard_normal((2, 20_000, dimensions))
    truth = np.sqrt(((first - second) ** 2).sum(1)).mean() / np.sqrt(dimensions)
    keys = list(range(10)) * 4
    held = 0
    for _ in range(300):
        vectors = torch.tensor(generator.standard_normal((40, dimensions)), dtype=torch.float32)
        distances = mean_distances(vectors, keys, cosine=False)
        rounds = tuple(tuple(distances[start : start + 10]) for start in range(0, 40, 10))
        interval = summarize("diversity_pixels", rounds)
        assert interval.mean == pytest.approx(np.mean(distances))
        held += interval.low <= truth <= interval.high
    assert held / 300 > 0.9
