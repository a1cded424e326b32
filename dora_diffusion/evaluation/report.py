"""Reports of evaluations as table, JSON and sheet of images; and pages of sections."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment

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
from dora_diffusion.sampling.images import save_image

if TYPE_CHECKING:
    from PIL.Image import Image


SCHEMA = 2
METHOD = (
    "95% confidence intervals over images with independent seeds: Student's t (changes are "
    "paired by prompt and seed); for shares (%) Wilson's, and Newcombe's for their change"
)
LOSS_ROSE = (
    "The subject's denoising loss and its similarity both rise: after many steps on a few photos, "
    "the model expects their views and backgrounds, but the loss is computed on true images with "
    "others. The loss shows overfitting; similarity shows the likeness."
)
FILES = {"scores": "scores.json", "table": "scores.md", "images": "images.png"}


@dataclass(frozen=True)
class Evaluation:
    """Measurements of an adapter.

    Attributes:
        subject: Name of the subject.
        columns: ``"base"``, ``"adapted"`` and, if available, ``"truth"`` -> measures.
        seeds: Seeds, one for each round of prompts.
        images: Row of the sheet -> images, in the columns of ``labels``.
        labels: Column labels of the sheet.
        notes: Measures that are not available, with the reasons.
        details: Base, adapter, trigger and sampling settings.
        cautions: Limitations of the figures.
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
        """Names of all measures of the adapted model."""
        return list(self.columns["adapted"])

    def interval(self, column: str, name: str) -> Interval | None:
        """Interval of a measure; ``"change"`` is adapted minus base. None if not measured."""
        if column == "change":
            adapted, base = (self.columns[key].get(name) for key in ("adapted", "base"))
            return None if adapted is None or base is None else difference(name, adapted, base)
        values = self.columns.get(column, {}).get(name)
        return None if values is None else summarize(name, values)

    def to_dict(self) -> dict[str, Any]:
        """Return all attributes except the images, as plain values."""
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
        """Format the figures as a Markdown table that is also readable as plain text."""
        columns = [*self.columns, "change"]
        rows = [["measure", *columns]]
        for name in self.names:
            is_share = measure_of(name).kind == "share"
            intervals = {column: self.interval(column, name) for column in columns}
            cells = [shown(i, is_share, signed=c == "change") for c, i in intervals.items()]
            rows.append([title_of(name), *cells])
        changes = [self.interval("change", n) for n in ("denoising_loss", "subject_similarity")]
        both_rose = all(change and change.low is not None and change.low > 0 for change in changes)
        notes = [LOSS_ROSE] if both_rose else []
        notes += [f"caution: {caution}" for caution in self.cautions]
        notes += [f"not measured: {note}" for note in self.notes]
        return "\n".join([aligned(rows), "", METHOD + ".", *notes])

    def write(self, folder: str | PathLike[str]) -> dict[str, Path]:
        """Write the `FILES`; returns their paths."""
        files = {name: Path(folder) / file for name, file in FILES.items()}
        save_text(files["scores"], json.dumps(self.to_dict(), indent=2) + "\n")
        save_text(files["table"], f"# {self.subject}\n\n{self.table()}\n")
        if not self.images:
            del files["images"]
        else:
            save_image(sheet(self.images, self.labels), files["images"])
        return files


def shown(
    interval: Interval | None, is_share: bool, *, signed: bool = False, digits: int | None = None
) -> str:
    """Format an interval: ``0.83 [0.79, 0.87]``, ``95% [83, 99]``; a dash if not measured."""
    if interval is None:
        return "-"
    scale = 100 if is_share else 1
    if digits is None:
        # Four decimals for values that two would round to nearly nothing.
        mean = interval.mean
        digits = 0 if is_share else 2 if abs(mean) >= 0.1 or mean == 0 else 4
    sign = "+" if signed else ""
    text = f"{scale * interval.mean:{sign}.{digits}f}" + ("%" if is_share and not signed else "")
    if interval.low is None or interval.high is None:
        return text
    ends = ", ".join(f"{scale * end:{sign}.{digits}f}" for end in (interval.low, interval.high))
    return f"{text} [{ends}]"


Row = list[str]
_PAGE = Environment(
    autoescape=True, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
).from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class LinkedImage:
    """An image that the page links.

    Attributes:
        caption: Caption of the image.
        source: URL of the image, relative to the page.
    """

    caption: str
    source: str


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: Heading.
        text: A paragraph of text.
        table: Rows; the first one is the header.
        image: Image file in the folder of the page.
        images: Linked images, only shown in HTML.
    """

    title: str
    text: str = ""
    table: Sequence[Row] = ()
    image: Path | None = None
    images: Sequence[LinkedImage] = ()

    def encoded_image(self) -> str:
        """Return the content of `image` in base64."""
        return base64.b64encode(self.image.read_bytes()).decode() if self.image else ""


def as_html(title: str, sections: Sequence[Section]) -> str:
    """Format a page as HTML in one file, with embedded images."""
    return _PAGE.render(title=title, sections=sections)
