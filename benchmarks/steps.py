"""Steps until a likeness is learned: the tables of lab/measurements/steps.md.

    python benchmarks/steps.py lab/measurements

Reads the records of steps.yaml, steps-photos.yaml and steps-balanced.yaml. Drift is the rise of the
denoising loss of other images over the base's. Between the rows of a series, similarity is
interpolated linearly. The exponent of a setting x is that of steps ~ x^exponent, for each subject.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from dora_diffusion.evaluation.report import shown
from dora_diffusion.evaluation.statistics import Interval
from lab.statistics import cluster_interval
from lab.study.config import BASE

USUAL, STEPS = "usual", 50
"""The reference: other series are compared at its similarity after these steps."""
FACTORS = {"rate-8e-3": 8 / 2, "batch-1": 1 / 5, "rank-32": 32 / 8}
"""Series -> its setting, as a factor of the reference's."""
LIKENESS = 0.9
"""Share of a curve's highest similarity, where numbers of photos are compared."""

Curve = Mapping[int, tuple[float, float]]
"""Step -> similarity and drift; step 0 is the base."""


def curves(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Curve]]:
    """Curves of all subjects by series; rows are called SERIES-STEPS."""
    bases = {r["subject"]: r["measures"] for r in records if r["method"] == BASE}
    series: dict[str, dict[str, dict[int, tuple[float, float]]]] = {}
    for record in (record for record in records if record["method"] != BASE):
        subject, measures = record["subject"], record["measures"]
        name, _, step = record["row"].rpartition("-")
        start = {0: (bases[subject]["subject_similarity"], 0.0)}
        drift = measures["others_loss"] - bases[subject]["others_loss"]
        curve = series.setdefault(name, {}).setdefault(subject, start)
        curve[int(step)] = measures["subject_similarity"], drift
    return {name: dict(subjects) for name, subjects in series.items()}


def steps_to(curve: Curve, similarity: float) -> float | None:
    """Return the first step of a similarity, interpolated; None if it is not reached."""
    points = [(step, curve[step][0]) for step in sorted(curve)]
    for (before, low), (step, high) in pairwise(points):
        if high >= similarity:
            return before + (step - before) * (similarity - low) / (high - low)
    return None


def growth_table(subjects: Mapping[str, Curve]) -> str:
    """Similarity and drift of a series, and each as a multiple of the row before."""
    rows = [["steps", "similarity", "times the row before", "drift", "times the row before"]]
    for before, step in pairwise([0, 0, *sorted(next(iter(subjects.values())))[1:]]):
        row = [str(step)]
        for column in (0, 1):
            values = {name: curve[step][column] for name, curve in subjects.items()}
            row.append(shown(mean_of(values), False) if step or not column else "0")
            # A ratio to the base, whose similarity is about 0, says nothing.
            ratios = {n: v / subjects[n][before][column] for n, v in values.items() if before}
            row.append(ratio_cell(ratios) if ratios else "")
        rows.append(row)
    return markdown(rows)


def exponents_table(series: Mapping[str, Mapping[str, Curve]]) -> str:
    """Steps of every series to the similarity of the reference, and their exponents.

    A curve that does not reach it counts with its last row: it needs at least as many steps.
    """
    rows = [["series", "subjects that reach it", "steps", "times 50 steps", "exponent"]]
    usual = dict.fromkeys(series[USUAL], float(STEPS))
    for name, factor in FACTORS.items():
        curves_of = series[name]
        reached = {s: steps_to(curves_of[s], c[STEPS][0]) for s, c in series[USUAL].items()}
        steps = {s: step or float(max(curves_of[s])) for s, step in reached.items()}
        count = f"{sum(map(bool, reached.values()))} of {len(reached)}"
        rows.append([name, count, *ratio_cells(steps, usual, factor)])
    return markdown(rows)


def photos_table(five: Mapping[str, Curve], one: Mapping[str, Curve]) -> str:
    """Steps with five photos and with one, each to a share of its own highest similarity."""
    names = [name for name in five if f"{name}_1" in one]
    by_photos = {5: {n: five[n] for n in names}, 1: {n: one[f"{n}_1"] for n in names}}
    rows = [["photos", "steps to 90%", "times those of 5", f"drift after {STEPS} steps",
             "times that of 5"]]  # fmt: skip
    steps, drift = dict[int, dict[str, float]](), dict[int, dict[str, float]]()
    for photos, subjects in by_photos.items():
        highest = {name: max(v for v, _ in curve.values()) for name, curve in subjects.items()}
        steps[photos] = {n: steps_to(c, LIKENESS * highest[n]) or 0 for n, c in subjects.items()}
        drift[photos] = {name: curve[STEPS][1] for name, curve in subjects.items()}
        far = {name: value / drift[5][name] for name, value in drift[photos].items()}
        span, times, _ = ratio_cells(steps[photos], steps[5], photos / 5)
        rows.append([str(photos), span, times, shown(mean_of(drift[photos]), False, digits=3)])
        rows[-1].append("1" if photos == 5 else ratio_cell(far))
    return markdown(rows)


def ratio_cells(steps: Mapping[str, float], usual: Mapping[str, float], factor: float) -> list[str]:
    """Mean and range of steps, their ratios to the usual, and the exponent of a factor."""
    values, ratios = steps.values(), {name: step / usual[name] for name, step in steps.items()}
    span = f"{geometric_mean(values):.0f} ({min(values):.0f} to {max(values):.0f})"
    if factor == 1:
        return [span, "1", ""]
    exponents = {name: math.log(ratio) / math.log(factor) for name, ratio in ratios.items()}
    return [span, ratio_cell(ratios), shown(mean_of(exponents), False, signed=True, digits=2)]


def ratio_cell(ratios: Mapping[str, float]) -> str:
    """Geometric mean with its interval over subjects."""
    logs = mean_of({name: math.log(ratio) for name, ratio in ratios.items()})
    ends = [math.exp(end) for end in (logs.mean, logs.low, logs.high) if end is not None]
    return "{:.2f} [{:.2f}, {:.2f}]".format(*ends) if len(ends) == 3 else f"{ends[0]:.2f}"


def mean_of(values: Mapping[str, float]) -> Interval:
    """Mean over subjects, with the interval that `compare` gives."""
    return cluster_interval({subject: [value] for subject, value in values.items()})


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Format rows as the documents do."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


def tables(folder: Path) -> list[str]:
    """All tables, from the records in a folder."""
    series, photos, balanced = (
        curves(json.loads((folder / f"{name}-records.json").read_text(encoding="utf-8")))
        for name in ("steps", "steps-photos", "steps-balanced")
    )
    usual = series[USUAL]
    growth = [growth_table(usual), growth_table(balanced["cosine"])]
    return [*growth, exponents_table(series), photos_table(usual, photos[USUAL])]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="Folder of the records.")
    print("\n\n".join(tables(parser.parse_args().folder)))


if __name__ == "__main__":
    main()
