"""An evaluation as a table, as JSON and as a sheet of images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_diffusion.config.wording import aligned
from dora_diffusion.data.sheets import sheet
from dora_diffusion.evaluation.measures import (
    Values,
    difference,
    measure_of,
    seed_means,
    summarize,
    title_of,
)
from dora_diffusion.evaluation.statistics import Interval
from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.sampling.images import save_png

if TYPE_CHECKING:
    from PIL.Image import Image

SCHEMA = 2
METHOD = (
    "95% confidence intervals over images, each of a seed of its own: Student's t (changes are "
    "paired by prompt and seed); for shares (%) Wilson's, and Newcombe's for their change"
)
FILES = {"scores": "scores.json", "table": "scores.md", "images": "images.png"}


@dataclass(frozen=True)
class Evaluation:
    """Measurements of an adapter.

    Attributes:
        subject: Its name.
        columns: ``"base"``, ``"adapted"`` and, where it is known, ``"truth"`` -> measures.
        seeds: One round of prompts each.
        images: Row of the sheet -> images, in the columns of ``labels``.
        labels: What each column of the sheet shows.
        notes: What could not be measured, and why.
        details: Base, adapter, trigger, sampling: what the figures are of.
        cautions: What to know before the figures are believed.
    """

    subject: str
    columns: Mapping[str, Mapping[str, Values]]
    seeds: tuple[int, ...]
    images: Mapping[str, Sequence[Image]] = field(default_factory=dict)
    labels: Sequence[str] = ()
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    cautions: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """All measures, in the order of the adapted model's."""
        return list(self.columns["adapted"])

    def interval(self, column: str, name: str) -> Interval | None:
        """A figure with its interval; ``"change"`` is adapted minus base. None if not measured."""
        if column == "change":
            adapted, base = (self.columns[key].get(name) for key in ("adapted", "base"))
            return None if adapted is None or base is None else difference(name, adapted, base)
        values = self.columns.get(column, {}).get(name)
        return None if values is None else summarize(name, values)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the images, as plain values."""
        return {
            "schema": SCHEMA,
            "subject": self.subject,
            **self.details,
            "seeds": list(self.seeds),
            "intervals": METHOD,
            "measures": {name: self._measure(name) for name in self.names},
            "notes": list(self.notes),
            "cautions": list(self.cautions),
        }

    def _measure(self, name: str) -> dict[str, Any]:
        columns = (*self.columns, "change")
        intervals = {column: self.interval(column, name) for column in columns}
        return {
            **asdict(measure_of(name)),
            **{column: interval and asdict(interval) for column, interval in intervals.items()},
            "per_seed": {
                column: seed_means(values[name])
                for column, values in self.columns.items()
                if name in values
            },
        }

    def table(self) -> str:
        """The figures as a Markdown table, which reads well as plain text too."""
        columns = [*self.columns, "change"]
        rows = [["measure", *columns]]
        for name in self.names:
            is_share = measure_of(name).kind == "share"
            cells = [
                shown(self.interval(column, name), is_share, signed=column == "change")
                for column in columns
            ]
            rows.append([title_of(name), *cells])
        notes = [f"caution: {caution}" for caution in self.cautions]
        notes += [f"not measured: {note}" for note in self.notes]
        return "\n".join([aligned(rows), "", METHOD + ".", *notes])

    @staticmethod
    def exists(folder: Path) -> bool:
        """Return whether a folder holds an evaluation, which `write` would replace."""
        return any((folder / name).exists() for name in FILES.values())

    def write(self, folder: Path) -> dict[str, Path]:
        """Write the `FILES`; returns their paths."""
        files = {
            "scores": save_text(
                folder / FILES["scores"], json.dumps(self.to_dict(), indent=2) + "\n"
            ),
            "table": save_text(folder / FILES["table"], f"# {self.subject}\n\n{self.table()}\n"),
        }
        if self.images:
            files["images"] = save_png(sheet(self.images, self.labels), folder / FILES["images"])
        return files


def shown(
    interval: Interval | None, is_share: bool, *, signed: bool = False, digits: int | None = None
) -> str:
    """``0.83 [0.79, 0.87]``, ``95% [83, 99]``; a dash where nothing was measured."""
    if interval is None:
        return "-"
    scale = 100 if is_share else 1
    if digits is None:
        # Two decimals, or four where two would say nothing.
        mean = interval.mean
        digits = 0 if is_share else 2 if abs(mean) >= 0.1 or mean == 0 else 4
    sign = "+" if signed else ""
    text = f"{scale * interval.mean:{sign}.{digits}f}" + ("%" if is_share and not signed else "")
    if interval.low is None or interval.high is None:
        return text
    ends = ", ".join(f"{scale * end:{sign}.{digits}f}" for end in (interval.low, interval.high))
    return f"{text} [{ends}]"
