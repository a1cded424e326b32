"""Plots of a study: figures by method, figures over rank, and what training did to the weights.

They look as those of an analysis do, see `lab.analysis.plots`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dora_diffusion.evaluation.measures import measure_of, title_of
from dora_diffusion.evaluation.report import shown
from dora_diffusion.lab.analysis.plots import (
    DELTA,
    MARKERS,
    draw_changes,
    ordered_color,
    panel_grid,
    save_figure,
    tidy,
)
from dora_diffusion.lab.study.config import BASE
from dora_diffusion.lab.study.tables import analysis_of, figure_of, interval, of_row, rows_in
from dora_diffusion.lab.study.trials import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WANTED = ("subject_similarity", "prompt_similarity", "others_kind", "others_similarity",
           "class_leakage", "class_similarity", "denoising_loss")  # fmt: skip


def write_plots(records: Sequence[Record], folder: Path) -> dict[str, Path]:
    """Write the plots that these records have something for; returns title -> file."""
    drawn = {
        "Figures by method": ("figures.png", by_method(records)),
        "Figures over rank": ("rank.png", over_rank(records)),
        f"{DELTA}M and {DELTA}D": ("weights.png", weights(records)),
    }
    files = {}
    for title, (name, figure) in drawn.items():
        if figure is not None:
            save_figure(figure, folder / name, dpi=140)
            files[title] = folder / name
    return files


def by_method(records: Sequence[Record]) -> Figure | None:
    """The main figures: a dot per row of the study, with its confidence interval."""
    from matplotlib.figure import Figure

    rows = rows_in(records)
    names = shown_measures(records)
    if not names:
        return None
    figure = Figure(figsize=(1.6 + 2.7 * len(names), 1.1 + 0.34 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        scale = 100 if measure_of(name).kind == "share" else 1
        for place, row in enumerate(rows):
            found = interval(of_row(records, row), figure_of(name))
            if found is None:
                continue
            color = "0.45" if row == BASE else ordered_color(place, len(rows))
            panel.plot(scale * found.mean, place, "o", color=color, markersize=6)
            if found.low is not None and found.high is not None:
                panel.plot([scale * found.low, scale * found.high], [place] * 2, color=color)
        panel.set_xlabel(title_of(name) + (" (%)" if scale == 100 else ""), fontsize=8.5)
        tidy(panel)
    panels[0].set_yticks(range(len(rows)), rows, fontsize=9)
    panels[0].invert_yaxis()
    return figure


def over_rank(records: Sequence[Record]) -> Figure | None:
    """The main figures over rank, a line for each kind of adapter that has three ranks or more."""
    from matplotlib.figure import Figure

    lines = rank_lines(records)
    names = shown_measures(records)[:4]
    if not lines or not names:
        return None
    figure = Figure(figsize=(0.6 + 3.2 * len(names), 3.1), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        scale = 100 if measure_of(name).kind == "share" else 1
        for place, (label, rows) in enumerate(lines.items()):
            found = {rank: interval(of_row(records, row), figure_of(name)) for rank, row in rows}
            points = [(rank, i) for rank, i in found.items() if i is not None]
            ranks, means = [r for r, _ in points], [scale * i.mean for _, i in points]
            color, marker = ordered_color(place, len(lines)), MARKERS[place % len(MARKERS)]
            panel.plot(ranks, means, color=color, marker=marker, markersize=4.5, label=label)
            if all(i.low is not None and i.high is not None for _, i in points):
                low, high = ([scale * float(getattr(i, end)) for _, i in points]
                             for end in ("low", "high"))  # fmt: skip
                panel.fill_between(ranks, low, high, color=color, alpha=0.15, linewidth=0)
        panel.set_xscale("log", base=2)
        ticks = sorted({rank for rows in lines.values() for rank, _ in rows})
        panel.set_xticks(ticks, [str(rank) for rank in ticks], fontsize=8)
        panel.set_xlabel("rank", fontsize=9)
        panel.set_title(title_of(name) + (" (%)" if scale == 100 else ""), fontsize=9.5)
        tidy(panel)
    panels[0].legend(fontsize=8, frameon=False)
    return figure


def rank_lines(records: Sequence[Record]) -> dict[str, list[tuple[int, str]]]:
    """Rows that differ in rank alone, rising: name of the first -> (rank, row)."""
    kinds: dict[str, list[tuple[int, str]]] = {}
    ranked = ("rank", "conv_rank", "lora_alpha", "conv_alpha", "learning_rate")
    for row in rows_in(records):
        first = of_row(records, row)[0]
        if row == BASE or first["settings"].get("method") == "full":
            continue
        rest = {k: v for k, v in first["settings"].items() if k not in ranked}
        kinds.setdefault(str(sorted(rest.items())), []).append((first["settings"]["rank"], row))
    lines = [sorted(rows) for rows in kinds.values() if len({rank for rank, _ in rows}) >= 3]
    return {_line_name(rows[0][1]): rows for rows in lines}


def _line_name(row: str) -> str:
    """A row's name without its rank: ``"dora-r4"`` -> ``"dora"``."""
    return row.rpartition("-")[0] if row.rpartition("-")[2].lstrip("r").isdigit() else row


def weights(records: Sequence[Record]) -> Figure | None:
    """Delta D over delta M: a panel per row, of the first trial of each subject."""
    rows = [row for row in rows_in(records) if any(r.get("analysis") for r in of_row(records, row))]
    if not rows:
        return None
    figure, panels = panel_grid(len(rows), (3.7, 3.2), (0.6, 0.4))
    for panel, row in zip(panels, rows, strict=True):
        _draw_weights(panel, row, [r for r in of_row(records, row) if r.get("analysis")])
    figure.supxlabel(f"{DELTA}M: mean change of norm per output channel", fontsize=10)
    figure.supylabel(f"{DELTA}D: mean of 1 \N{MINUS SIGN} cosine", fontsize=10)
    return figure


def _draw_weights(panel: Any, row: str, records: Sequence[Record]) -> None:
    firsts: Mapping[str, Record] = {r["subject"]: r for r in reversed(records)}
    points = [p["points"] for p in (record["analysis"] for record in firsts.values())]
    count = max(map(len, points))
    for place in range(count):
        at = [run[place] for run in points if place < len(run)]
        x = np.concatenate([point["delta_m"] for point in at])
        y = np.concatenate([point["delta_d"] for point in at])
        look = {"s": 8, "alpha": 0.5, "label": f"step {at[0]['step']}"}
        draw_changes(panel, x, y, place, count, linewidth=1.6, **look)
    found = interval(records, analysis_of("correlation"))
    panel.set_title(f"{row}: r = {shown(found, False, digits=2)}", fontsize=9.5)
    panel.ticklabel_format(scilimits=(-2, 3), useMathText=True)
    panel.legend(fontsize=7.5, frameon=False)
    tidy(panel)


def shown_measures(records: Sequence[Record]) -> list[str]:
    taken = {name for record in records for name in record["measures"]}
    return [name for stem in _WANTED for name in sorted(taken) if name.partition("@")[0] == stem]
