"""Measures: name, meaning and confidence interval of each figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import yaml
from torch import Tensor

from dora_diffusion.evaluation.statistics import (
    Interval,
    share_difference,
    t_interval,
    wilson_interval,
)

Values = tuple[tuple[float, ...], ...]
"""One value per image, grouped by the seed of the images."""


@dataclass(frozen=True)
class Measure:
    """One figure of an evaluation.

    Attributes:
        title: Title in tables.
        kind: ``"share"`` of images that are right, or ``"mean"`` over images.
        better: Direction of improvement; ``"base"``: as close to the base model as possible.
        meaning: Description in a sentence.
    """

    title: str
    kind: Literal["mean", "share"]
    better: Literal["higher", "lower", "base"]
    meaning: str


_TABLE = yaml.safe_load(Path(__file__).with_name("measures.yaml").read_text(encoding="utf-8"))
MEASURES: dict[str, Measure] = {name: Measure(**facts) for name, facts in _TABLE.items()}
"""Measures by name; a name followed by ``@MODEL`` is the measure by a metric model."""

LEAKAGE = 0.7
"""Cosine above which an image shows the subject; same subject: 0.95, others: rarely 0.7."""


@dataclass(frozen=True)
class ScoredImage:
    """Request of one image.

    Attributes:
        group: ``"subject"``, its ``"class"`` without the token, ``"others"``, ...
        prompt: Prompt of the image.
        round: Index of the round of all prompts; rounds have different seeds.
        seed: Seed of the image.
    """

    group: str
    prompt: str
    round: int
    seed: int


class Scores:
    """Values of images by measure; images belong to groups and to rounds of seeds."""

    def __init__(self, requests: Sequence[ScoredImage]) -> None:
        """Create empty scores for the requests."""
        self.requests = requests
        self.values: dict[str, Values] = {}

    def add(self, name: str, group: str, values: Sequence[float | None]) -> None:
        """Add a measure of one group, from one value per image of all groups.

        Values of None are skipped; a measure without values is not added.
        """
        rounds: dict[int, list[float]] = {}
        for request, value in zip(self.requests, values, strict=True):
            if request.group == group and value is not None:
                rounds.setdefault(request.round, []).append(float(value))
        if rounds:
            self.values[name] = tuple(tuple(rounds[number]) for number in sorted(rounds))

    def add_diversity(self, name: str, vectors: Tensor, *, cosine: bool) -> None:
        """Add the mean distance between the subject's images of a prompt, if there are several."""
        if len({request.round for request in self.requests}) > 1:
            keys = [(request.group, request.prompt) for request in self.requests]
            self.add(name, "subject", mean_distances(vectors, keys, cosine=cosine))

    def add_change(self, name: str, features: Tensor, base: Tensor) -> None:
        """Add the distances of images of other classes to the base's: unit vectors ``(n, d)``."""
        change = (1 - (features * base).sum(1)).clamp_min(0).tolist()
        self.add(name, "others", change)


def measure_of(name: str) -> Measure:
    """Return the measure of a name with or without ``@MODEL``."""
    return MEASURES[name.partition("@")[0]]


def title_of(name: str) -> str:
    """Return the title of a figure in tables."""
    stem, _, model = name.partition("@")
    return MEASURES[stem].title + (f" ({model})" if model else "")


def seed_means(values: Values) -> list[float]:
    return [float(np.mean(group)) for group in values]


def summarize(name: str, values: Values) -> Interval:
    """Estimate and interval over images with independent seeds: Wilson's for shares, else t.

    Intervals include the spread between prompts, which makes them wider than the spread between
    seeds alone.
    """
    if measure_of(name).kind == "share":
        flat = _flat(values)
        return wilson_interval(sum(flat), len(flat))
    return t_interval(_independent(name, values))


def difference(name: str, values: Values, base: Values) -> Interval:
    """Mean change from the base: means paired by image, shares with Newcombe's interval."""
    if measure_of(name).kind == "share":
        return share_difference(summarize(name, values), summarize(name, base))
    pairs = zip(_independent(name, values), _independent(name, base), strict=True)
    return t_interval([adapted - before for adapted, before in pairs])


def _independent(name: str, values: Values) -> list[float]:
    """Independent values: one per image; for diversity, one per prompt over all seeds.

    Distances between images of one prompt are not independent, since they share images.
    """
    if name.startswith("diversity") and len({len(group) for group in values}) == 1:
        return [float(mean) for mean in np.mean(values, axis=0)]
    return _flat(values)


def _flat(values: Values) -> list[float]:
    return [value for group in values for value in group]


def similarities(features: Tensor, references: Tensor) -> list[float]:
    """Mean cosine of each image to all references: unit vectors ``(n, d)`` and ``(m, d)``."""
    cosines: list[float] = (features @ references.T).mean(1).tolist()
    return cosines


def mean_distances(vectors: Tensor, groups: Sequence[object], *, cosine: bool) -> list[float]:
    """Mean distance of each row to the other rows of its group; 0 for a single row.

    The average over a group is its mean pairwise distance.

    Args:
        vectors: ``(n, d)``: unit vectors for ``cosine``, else pixels from 0 to 1.
        groups: n keys; rows with the same key form a group.
        cosine: Use ``1 - cosine``; else the root mean square difference.
    """
    result = [0.0] * len(groups)
    for key in dict.fromkeys(groups):
        rows = [row for row, group in enumerate(groups) if group == key]
        members = vectors[rows]
        if cosine:
            distances = 1 - members @ members.T
        else:
            distances = torch.cdist(members, members) / vectors.shape[1] ** 0.5
        distances.fill_diagonal_(0)
        for row, total in zip(rows, distances.sum(1).tolist(), strict=True):
            result[row] = total / max(1, len(rows) - 1)
    return result
