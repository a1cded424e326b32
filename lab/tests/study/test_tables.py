"""Means and paired differences, against a plain restatement."""

from __future__ import annotations

import re

import numpy as np
import pytest

from lab.statistics import cluster_interval
from lab.study.report import (
    caution,
    differences_table,
    figures_table,
    interval,
    paired_difference,
)
from lab.tests.study.helpers import record

VALUES = {  # subject -> seed -> (dora, lora)
    "mug": {0: (0.81, 0.80), 1: (0.86, 0.79), 2: (0.83, 0.84)},
    "car": {0: (0.61, 0.55), 1: (0.66, 0.60)},
    "duck": {3: (0.90, 0.91)},
}


def records():
    rows = []
    for subject, seeds in VALUES.items():
        # In another order of seeds for each row: pairs are by name, not by place.
        rows += [record("dora", subject, s, subject_similarity=v[0]) for s, v in seeds.items()]
        rows += [
            record("lora", subject, s, subject_similarity=v[1]) for s, v in reversed(seeds.items())
        ]
    # Without a partner of its subject and seed.
    rows.append(record("dora", "mug", 9, subject_similarity=0.0))
    return rows


def restated(values, draws=10_000):
    """Two-level bootstrap of the mean over subjects of their means, in plain NumPy."""
    groups = [np.array(v, float) for v in values]
    generator = np.random.default_rng(12)
    means = []
    for _ in range(draws):
        chosen = generator.integers(len(groups), size=len(groups))
        means.append(
            np.mean([generator.choice(groups[g], len(groups[g]), replace=True).mean()
                     for g in chosen])
        )  # fmt: skip
    return np.mean([g.mean() for g in groups]), *np.quantile(means, (0.025, 0.975))


def test_differences_are_paired_by_subject_and_seed():
    found = paired_difference(records(), "dora", "lora", "subject_similarity")
    mean, low, high = restated([[a - b for a, b in v.values()] for v in VALUES.values()])
    assert found.n == 6
    assert found.mean == pytest.approx(mean, abs=1e-12)
    assert (found.low, found.high) == pytest.approx((low, high), abs=2e-3)  # of random draws


@pytest.mark.parametrize(
    ("subjects", "seeds", "said"),
    [
        (1, 2, "2 runs on 1 subject do not apply to other subjects, and are too narrow: with 2 "
         "seeds, 95% intervals contain the truth at most 50% of the time"),
        (1, 8, "8 runs on 1 subject do not apply to other subjects;"),
        (2, 8, "16 runs on 2 subjects are too narrow: with 2 subjects, .* at most 50%"),
        (5, 1, "5 runs on 5 subjects are too narrow: with 5 subjects, .* at most 94%"),
        (6, 1, "^$"), (6, 4, "^$"), (1, 1, "^$"),  # one run alone has no interval
    ],
)  # fmt: skip
def test_intervals_of_few_runs_stand_with_a_caution(subjects, seeds, said):
    rows = [
        record(row, f"subject {place}", seed, subject_similarity=0.5)
        for place in range(subjects) for seed in range(seeds) for row in ("base", "lora")
    ]  # fmt: skip
    assert re.search(said, caution(rows))


@pytest.mark.parametrize("count", [2, 3, 5, 6])
def test_so_often_an_interval_of_few_subjects_contains_the_truth(count):
    """Drawn: what the caution says is the most that there can be."""
    generator = np.random.default_rng(5)
    hits = []
    for draw in range(400):
        values = {str(place): [value] for place, value in enumerate(generator.normal(size=count))}
        found = cluster_interval(values, draws=500, seed=draw)
        hits.append(found.low <= 0 <= found.high)
    assert np.mean(hits) < 1 - 2 / 2**count + 0.05


def test_means_are_over_subjects_of_their_seeds():
    found = interval([r for r in records() if r["seed"] != 9 and r["row"] == "dora"],
                     "subject_similarity")  # fmt: skip
    mean, low, high = restated([[a for a, _ in v.values()] for v in VALUES.values()])
    assert found.mean == pytest.approx(mean, abs=1e-12)
    assert (found.low, found.high) == pytest.approx(
        (low, high), abs=1e-2
    )  # few values: the ends are coarse


def test_tables_have_a_column_for_every_row_and_nothing_for_what_was_not_measured():
    rows = [*records(), record("base", "mug", 0, background=1.0)]
    table = figures_table(rows)
    assert table[0] == ["", "base", "dora", "lora"]
    lines = {line[0]: line[1:] for line in table[1:]}
    assert lines["subject similarity"][0] == "-"
    assert lines["background as asked"] == ["100%", "-", "-"]
    assert lines["learning rate"] == ["-", "0.001", "0.001"]
    assert differences_table(rows, "lora")[0] == ["difference to lora", "dora"]


def test_costs_are_means_over_the_trials_of_a_row():
    costs = ({"parameters": 1000, "live_bytes": 2e6, "seconds_per_step": 0.25},
             {"parameters": 1000, "live_bytes": 4e6, "seconds_per_step": 0.75})  # fmt: skip
    rows = [record("base", "mug", 0)]
    rows += [record("dora", "mug", seed) | cost for seed, cost in enumerate(costs)]
    lines = {line[0]: line[1:] for line in figures_table(rows)[1:]}
    assert lines["trained parameters"] == ["-", "1,000"]
    assert lines["live memory while training, MB"] == ["-", "3.0"]
    assert lines["seconds per step"] == ["-", "0.500"]
    assert lines["processor seconds per step"] == ["-", "-"]
    assert lines["trials"] == ["1 (1 subject)", "2 (1 subject)"]


def test_figures_of_the_analysis_are_read_where_there_is_one():
    one = record("dora", "mug", 0) | {"analysis": {"correlation": -0.5}}
    assert interval([one, record("dora", "mug", 1)], "correlation").mean == -0.5
