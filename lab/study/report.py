"""Report of a study: means by row, paired differences and plots, as Markdown and HTML.

Plots have the style of `lab.analysis.plots`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dora_diffusion.config.wording import aligned, counted
from dora_diffusion.data.sheets import sheet
from dora_diffusion.evaluation.measures import MEASURES, measure_of, title_of
from dora_diffusion.evaluation.report import Row, Section, as_html, shown
from dora_diffusion.evaluation.statistics import Interval
from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.sampling.images import save_image
from lab.analysis.plots import (
    DELTA,
    MARKERS,
    draw_changes,
    ordered_color,
    panel_grid,
    save_figure,
    tidy,
)
from lab.statistics import cluster_interval
from lab.study.config import BASE, Study
from lab.study.subjects import StudySubject
from lab.study.trials import RECORDS_FILE, Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHOD = (
    "Intervals are at 95%, over subjects and seeds (two-level bootstrap); differences are paired "
    "by subject and seed"
)
# Least number of values whose minimum and maximum, the widest ends of a bootstrap interval, contain
# the true median in 95% of cases: 1 - 2 / 2**n.
_ENOUGH = 6
_ANALYSIS = {
    "correlation": f"correlation of {DELTA}M and {DELTA}D",
    "delta_m": f"{DELTA}M, share of the norm",
    "delta_d": f"{DELTA}D, 1 \N{MINUS SIGN} cosine",
}
# Means over trials: title -> (key of the record, format, unit).
_COSTS = {
    "trained parameters": ("parameters", "{:,.0f}", 1.0),
    "live memory while training, MB": ("live_bytes", "{:.1f}", 1e-6),
    "processor seconds per step": ("processor_seconds_per_step", "{:.3f}", 1.0),
    "seconds per step": ("seconds_per_step", "{:.3f}", 1.0),
}
_PLOTTED = ("subject_similarity", "prompt_similarity", "others_kind", "others_similarity",
            "class_leakage", "class_similarity", "denoising_loss")  # fmt: skip


@dataclass(frozen=True)
class Results:
    """Results of a study.

    Attributes:
        study: The study.
        records: Records of the trials.
        tuning: Records of the tuning of rates.
        rates: Learning rates by method, including tuned ones.
        subjects: Subjects of the study.
        images: Image files by (row, subject).
    """

    study: Study
    records: Sequence[Record]
    tuning: Sequence[Record] = ()
    rates: Mapping[str, Sequence[float]] = field(default_factory=dict)
    subjects: Sequence[StudySubject] = ()
    images: Mapping[tuple[str, str], Path] = field(default_factory=dict)


def figure_of(record: Record, name: str) -> float | None:
    """Return a measure of a record, or a figure of its analysis; None if not measured."""
    figures: dict[str, float] = {**record.get("analysis", {}), **record["measures"]}
    return figures.get(name)


def interval(records: Iterable[Record], name: str) -> Interval | None:
    """Mean over subjects and seeds, with its interval; None if never measured."""
    by_subject: dict[str, list[float]] = {}
    for record in records:
        if (figure := figure_of(record, name)) is not None:
            by_subject.setdefault(record["subject"], []).append(figure)
    return cluster_interval(by_subject) if by_subject else None


def paired_difference(
    records: Sequence[Record], row: str, reference: str, name: str
) -> Interval | None:
    """Mean paired difference of two rows by subject and seed; None without pairs."""
    references = {
        (record["subject"], record["seed"]): figure_of(record, name)
        for record in of_row(records, reference)
    }
    by_subject: dict[str, list[float]] = {}
    for record in of_row(records, row):
        figure, other = figure_of(record, name), references.get((record["subject"], record["seed"]))
        if figure is not None and other is not None:
            by_subject.setdefault(record["subject"], []).append(figure - other)
    return cluster_interval(by_subject) if by_subject else None


def caution(records: Iterable[Record]) -> str:
    """Return a caution if there are too few records for valid intervals; else empty."""
    pairs = {(record["subject"], record["seed"]) for record in records}
    subjects = len({subject for subject, _ in pairs})
    if len(pairs) < 2 or subjects >= _ENOUGH:
        return ""
    count, units = (len(pairs), "seed") if subjects == 1 else (subjects, "subject")
    text = f"intervals of {counted(len(pairs), 'run')} on {counted(subjects, 'subject')}"
    if subjects == 1:
        text += " do not apply to other subjects"
    if count < _ENOUGH:
        text += f"{', and' if subjects == 1 else ''} are too narrow: with {count} {units}s, "
        text += f"95% intervals contain the truth at most {1 - 2 / 2**count:.0%} of the time"
    return f"{text}; {_ENOUGH} subjects or more are enough"


def rows_in(records: Sequence[Record]) -> list[str]:
    """Names of the rows in order, the base first."""
    names = list(dict.fromkeys(record["row"] for record in records))
    return sorted(names, key=lambda name: name != BASE)


def of_row(records: Iterable[Record], row: str) -> list[Record]:
    return [record for record in records if record["row"] == row]


def _figure_rows(
    records: Sequence[Record], cells: Callable[[str], Sequence[Interval | None]], *, signed: bool
) -> list[Row]:
    """Make a table row for each measured figure, in the order of `MEASURES`."""
    measured = {name for record in records for name in record["measures"]}
    order = list(MEASURES)
    names = sorted(measured, key=lambda name: (order.index(name.partition("@")[0]), name))
    rows = []
    for name in (*names, *_ANALYSIS):
        is_share = name not in _ANALYSIS and measure_of(name).kind == "share"
        title = _ANALYSIS[name] if name in _ANALYSIS else title_of(name)
        rows.append([title, *(shown(cell, is_share, signed=signed) for cell in cells(name))])
    return rows


def figures_table(records: Sequence[Record]) -> list[Row]:
    """Make a table with a row per figure and a column per row of the study."""
    columns = {name: of_row(records, name) for name in rows_in(records)}
    figures = _figure_rows(
        records, lambda name: [interval(r, name) for r in columns.values()], signed=False
    )
    costs = [
        [title, *(_mean(r, *cost) for r in columns.values())] for title, cost in _COSTS.items()
    ]
    rates = [
        dict.fromkeys(r["learning_rate"] for r in column if r["learning_rate"] is not None)
        for column in columns.values()
    ]
    counts = [
        f"{len(r)} ({counted(len({record['subject'] for record in r}), 'subject')})"
        for r in columns.values()
    ]
    shown_rates = [", ".join(f"{rate:g}" for rate in column) or "-" for column in rates]
    head = ["", *columns]
    return [head, *figures, ["learning rate", *shown_rates], *costs, ["trials", *counts]]


def _mean(records: Sequence[Record], key: str, form: str, unit: float) -> str:
    values = [record[key] for record in records if record.get(key) is not None]
    return form.format(sum(values) / len(values) * unit) if values else "-"


def differences_table(records: Sequence[Record], reference: str) -> list[Row]:
    """Make a table of differences of all rows to the reference, by figure."""
    compared_rows = [name for name in rows_in(records) if name not in (BASE, reference)]

    def differences(name: str) -> list[Interval | None]:
        return [paired_difference(records, row, reference, name) for row in compared_rows]

    head = [f"difference to {reference}", *compared_rows]
    return [head, *_figure_rows(records, differences, signed=True)]


def write_plots(records: Sequence[Record], folder: Path) -> dict[str, Path]:
    """Write all plots that the records have data for; returns title -> file."""
    drawn = {
        "Figures by method": ("figures.png", by_method(records)),
        "Figures over rank": ("rank.png", over_rank(records)),
        f"{DELTA}M and {DELTA}D": ("weights.png", weights(records)),
    }
    files = {title: (folder / name, figure) for title, (name, figure) in drawn.items() if figure}
    for file, figure in files.values():
        save_figure(figure, file, dpi=140)
    return {title: file for title, (file, _) in files.items()}


def _plotted(records: Sequence[Record]) -> list[tuple[str, str, int]]:
    """Main measured figures, as (name, title, scale)."""
    measured = {name for record in records for name in record["measures"]}
    names = [
        name for stem in _PLOTTED for name in sorted(measured) if name.partition("@")[0] == stem
    ]
    shares = {name: measure_of(name).kind == "share" for name in names}
    return [(n, title_of(n) + " (%)" * s, 100 if s else 1) for n, s in shares.items()]


def by_method(records: Sequence[Record]) -> Figure | None:
    """Plot the main figures: a dot per row of the study, with its confidence interval."""
    rows, plotted = rows_in(records), _plotted(records)
    if not plotted:
        return None
    figure, panels = panel_grid(
        len(plotted), (2.7, 0.34 * len(rows)), (1.6, 1.1), len(plotted), sharey=True
    )
    for panel, (name, title, scale) in zip(panels, plotted, strict=True):
        for position, row in enumerate(rows):
            estimate = interval(of_row(records, row), name)
            if estimate is None:
                continue
            color = "0.45" if row == BASE else ordered_color(position, len(rows))
            panel.plot(scale * estimate.mean, position, "o", color=color, markersize=6)
            if estimate.low is not None and estimate.high is not None:
                panel.hlines(position, scale * estimate.low, scale * estimate.high, color=color)
        panel.set_xlabel(title, fontsize=8.5)
        tidy(panel)
    panels[0].set_yticks(range(len(rows)), rows, fontsize=9)
    panels[0].invert_yaxis()
    return figure


def over_rank(records: Sequence[Record]) -> Figure | None:
    """Plot the main figures over rank: a line per kind of adapter with at least three ranks."""
    lines, plotted = rank_lines(records), _plotted(records)[:4]
    if not lines or not plotted:
        return None
    figure, panels = panel_grid(len(plotted), (3.2, 3.1), (0.6, 0), len(plotted))
    for panel, (name, title, scale) in zip(panels, plotted, strict=True):
        for index, (label, rows) in enumerate(lines.items()):
            estimates = [(rank, interval(of_row(records, row), name)) for rank, row in rows]
            points = [(rank, i) for rank, i in estimates if i is not None]
            ranks, means = [r for r, _ in points], [scale * i.mean for _, i in points]
            color, marker = ordered_color(index, len(lines)), MARKERS[index % len(MARKERS)]
            panel.plot(ranks, means, color=color, marker=marker, markersize=4.5, label=label)
            if all(i.low is not None and i.high is not None for _, i in points):
                low, high = ([scale * float(getattr(i, end)) for _, i in points]
                             for end in ("low", "high"))  # fmt: skip
                panel.fill_between(ranks, low, high, color=color, alpha=0.15, linewidth=0)
        panel.set_xscale("log", base=2)
        ticks = sorted({rank for rows in lines.values() for rank, _ in rows})
        panel.set_xticks(ticks, [str(rank) for rank in ticks], fontsize=8)
        panel.set_xlabel("rank", fontsize=9)
        panel.set_title(title, fontsize=9.5)
        tidy(panel)
    panels[0].legend(fontsize=8, frameon=False)
    return figure


def rank_lines(records: Sequence[Record]) -> dict[str, list[tuple[int, str]]]:
    """Group rows that only differ in rank: name without rank -> (rank, row), by rank."""
    kinds: dict[str, list[tuple[int, str]]] = {}
    ranked = ("rank", "conv_rank", "lora_alpha", "conv_alpha", "learning_rate")
    for row in rows_in(records):
        first = of_row(records, row)[0]
        if row == BASE or first["settings"].get("method") == "full":
            continue
        rest = {k: v for k, v in first["settings"].items() if k not in ranked}
        kinds.setdefault(str(sorted(rest.items())), []).append((first["settings"]["rank"], row))
    lines = {}
    for rows in map(sorted, kinds.values()):
        name, _, end = rows[0][1].rpartition("-")  # "dora-r4": "dora"
        if len({rank for rank, _ in rows}) >= 3:
            lines[name if end.lstrip("r").isdigit() else rows[0][1]] = rows
    return lines


def weights(records: Sequence[Record]) -> Figure | None:
    """Plot delta D over delta M: a panel per row, with the first trial of each subject."""
    analyzed = [record for record in records if record.get("analysis")]
    rows = [row for row in rows_in(records) if of_row(analyzed, row)]
    if not rows:
        return None
    figure, panels = panel_grid(len(rows), (3.7, 3.2), (0.6, 0.4))
    for panel, row in zip(panels, rows, strict=True):
        _draw_weights(panel, row, of_row(analyzed, row))
    figure.supxlabel(f"{DELTA}M: mean change of norm per output channel", fontsize=10)
    figure.supylabel(f"{DELTA}D: mean of 1 \N{MINUS SIGN} cosine", fontsize=10)
    return figure


def _draw_weights(panel: Any, row: str, records: Sequence[Record]) -> None:
    firsts: Mapping[str, Record] = {r["subject"]: r for r in reversed(records)}
    points = [record["analysis"]["points"] for record in firsts.values()]
    count = max(map(len, points))
    for index in range(count):
        checkpoint_points = [run[index] for run in points if index < len(run)]
        x, y = (
            np.concatenate([point[name] for point in checkpoint_points])
            for name in ("delta_m", "delta_d")
        )
        style = {"s": 8, "alpha": 0.5, "label": f"step {checkpoint_points[0]['step']}"}
        draw_changes(panel, x, y, index, count, linewidth=1.6, **style)
    coefficient = interval(records, "correlation")
    panel.set_title(f"{row}: r = {shown(coefficient, False, digits=2)}", fontsize=9.5)
    panel.ticklabel_format(scilimits=(-2, 3), useMathText=True)
    panel.legend(fontsize=7.5, frameon=False)
    tidy(panel)


def write_report(results: Results, output: Path) -> dict[str, Path]:
    """Write the page, its images, and a file of all records; returns their paths."""
    sections, title = _sections(results, output), f"Methods compared on {results.study.base}"
    records = ",\n".join(json.dumps(record) for record in (*results.tuning, *results.records))
    return {
        "page": save_text(output / "report.html", as_html(title, sections)),
        "markdown": save_text(output / "report.md", as_markdown(title, sections)),
        "records": save_text(output / RECORDS_FILE, f"[\n{records}\n]\n"),
    }


def _sections(results: Results, output: Path) -> list[Section]:
    records, study = results.records, results.study
    sections = [Section("Figures", _intro(results), figures_table(records))]
    if len(rows_in(records)) > 2:
        text = (
            f"{METHOD}; differences of shares are in percentage points. An interval that contains "
            "0 shows no difference."
        )
        sections.append(
            Section("Paired differences", text, differences_table(records, study.reference))
        )
    if results.images:
        file = save_image(image_grid(results), output / "grid.png")
        text = "First seed of each subject, under its prompt."
        sections.append(Section("Images", text, image=file))
    sections += [Section(title, image=file) for title, file in write_plots(records, output).items()]
    if results.tuning:
        sections.append(_tuning(results))
    methods = [["method", "settings"]]
    methods += [[m.name, _words(m.settings)] for m in study.methods]
    sections.append(Section("Methods", f"Common settings: {_words(study.common)}.", methods))
    return sections


def _intro(results: Results) -> str:
    study, records = results.study, results.records
    subjects = ", ".join(subject.name for subject in results.subjects)
    machines = ", ".join(dict.fromkeys(record["machine"] for record in records))
    pairs = study.pairs()
    per_subject = len(pairs) // len(study.subjects)
    expected = (len(study.methods) + 1) * len(pairs)
    remaining = max(0, expected - len(records))
    missing = f" {remaining} trials have no record yet." if remaining else ""
    diverged = [record["row"] for record in records if "diverged" in record]
    if diverged:
        rows = ", ".join(sorted(set(diverged)))
        missing += f" {len(diverged)} diverged and have no figures ({rows})."
    if doubt := caution(records):
        missing += f" Caution: {doubt}."
    return (
        f"Subjects: {subjects}; {counted(per_subject, 'seed')} each, "
        f"{counted(len({seed for _, seed in pairs}), 'seed')} in all; {len(records)} trials on "
        f"{machines}.{missing} {METHOD}. Live memory: weights, gradients, optimizer state, and "
        "tensors that autograd saves for a batch."
    )


def _tuning(results: Results) -> Section:
    tune = results.study.tune
    assert tune is not None
    keep = ", ".join(f"{name} within {most:g}" for name, most in tune.keep.items())
    text = (
        f"On {', '.join(map(str, tune.subjects))}, {counted(len(tune.seeds), 'seed')} each: the "
        f"rate with the best {tune.best} that keeps {keep} of the base's. Chosen rates: "
        + ", ".join(f"{name} {rates[0]:g}" for name, rates in results.rates.items() if rates)
        + "."
    )
    return Section("Learning rates", text, figures_table(results.tuning))


def _words(values: object) -> str:
    items = dict(values).items() if isinstance(values, dict) else ()
    return ", ".join(f"`{name}: {value}`" for name, value in items) or "only the common settings"


def image_grid(results: Results) -> Image.Image:
    """Sheet of the first seed's image of each subject by row, under the true images."""
    rows: dict[str, list[Image.Image]] = {"truth": [s.truth() for s in results.subjects]}
    for row in rows_in(results.records):
        files = [results.images.get((row, subject.name)) for subject in results.subjects]
        if any(files):
            empty = Image.new("RGB", (64, 64), "white")
            rows[row] = [Image.open(file).convert("RGB") if file else empty for file in files]
    return sheet(rows, [subject.label for subject in results.subjects])


def as_markdown(title: str, sections: Sequence[Section]) -> str:
    """Format a page as Markdown, with links to image files."""
    blocks = [f"# {title}"]
    for section in sections:
        blocks.append(f"## {section.title}")
        blocks += [section.text] if section.text else []
        blocks += [aligned(section.table)] if section.table else []
        blocks += [f"![{section.title}]({section.image.name})"] if section.image else []
    return "\n\n".join(blocks) + "\n"
