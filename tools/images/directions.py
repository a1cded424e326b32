"""``dora.png``: magnitude and direction of weight rows before and after a training.

DoRA writes each row of a weight as a magnitude times a direction (arXiv:2402.09353, section 3.1).
The adapter is trained on the sample by its own settings, as the grids have it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_diffusion import load_components
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.numerics.dora import adapted_weight
from lab.analysis.plots import save_figure, tidy
from tools.images.grids import BASE, TOKEN, trained

SHOWN = 4
# Between the rows that are drawn, in the unit of the magnitudes.
APART = 0.32


@dataclass(frozen=True)
class Rows:
    """The rows of one adapted weight.

    Attributes:
        name: Of the layer.
        before: Magnitudes (norms) of the base's rows, ``(out,)``.
        after: Those of the trained rows, ``(out,)``.
        angle: Between the two, in degrees, ``(out,)``.
    """

    name: str
    before: Tensor
    after: Tensor
    angle: Tensor


def rows_of(name: str, weight: Tensor, tuned: Tensor) -> Rows:
    """Compare two weights ``(out, in, *k)`` row by row, in float64."""
    base, new = weight.double().flatten(1), tuned.double().flatten(1)
    before, after = base.norm(dim=1), new.norm(dim=1)
    cosine = (base * new).sum(dim=1) / (before * after)
    return Rows(name, before, after, cosine.clamp(-1, 1).arccos().rad2deg())


@torch.no_grad()
def adapted_rows(adapter: Path) -> list[Rows]:
    """The rows of every layer of the UNet that an adapter of `BASE` changes, most changed first."""
    weights = load_components(BASE).denoiser.state_dict()
    found = []
    for name, layer in read_adapter(adapter).layers.items():
        weight = weights.get(f"{name.removeprefix('unet.')}.weight")
        if weight is not None:
            found.append(rows_of(name, weight, adapted_weight(weight, layer)))
    return sorted(found, key=lambda rows: -float(rows.angle.mean()))


def draw(name: str, output: Path, work: Path, steps: int | None = None) -> list[Path]:
    """Write ``dora.png``, after the training that it shows.

    Args:
        name: Of the file.
        output: Its folder.
        work: Folder of the training.
        steps: Of the training, if not its own number.
    """
    from matplotlib.figure import Figure

    layers = adapted_rows(trained("plain", {}, TOKEN, work, steps))
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    arrows, bars, points = figure.subplots(1, 3)
    _draw_arrows(arrows, layers[0])
    _draw_bars(bars, layers[0])
    for rows in layers:
        points.plot(100 * (rows.after / rows.before - 1), rows.angle, ".", ms=2, alpha=0.4)
    points.set_title(f"All rows of all {len(layers)} layers of the UNet", fontsize=10)
    points.set_xlabel("change of magnitude in %")
    points.set_ylabel("change of direction in degrees")
    for panel in (arrows, bars, points):
        tidy(panel)
    file = output / f"{name}.png"
    save_figure(figure, file, dpi=100)
    return [file]


def _draw_arrows(panel: Any, rows: Rows) -> None:
    """Each row in the plane of its two directions, to scale; that of the base lies on the axis."""
    places = [-APART * index for index in range(SHOWN)]
    for index, place in enumerate(places):
        turned = rows.angle[index].deg2rad()
        ends = {
            "gray": (rows.before[index].item(), place),
            "C0": (
                (rows.after[index] * turned.cos()).item(),
                place + (rows.after[index] * turned.sin()).item(),
            ),
        }
        for color, end in ends.items():
            arrow = {"arrowstyle": "->", "color": color, "shrinkA": 0, "shrinkB": 0}
            panel.annotate("", end, xytext=(0, place), arrowprops=arrow)
        panel.text(0.1, place - 0.07, f"{rows.angle[index]:.0f} degrees", fontsize=8)
    panel.set_xlim(0, 1.15 * float(rows.after[:SHOWN].max()))
    panel.set_ylim(places[-1] - 0.12, APART)
    panel.set_aspect("equal")
    panel.set_yticks(places, [f"row {index}" for index in range(SHOWN)])
    panel.set_xlabel("gray: base; blue: trained; length: magnitude")
    panel.set_title(f"Direction of rows of\n{rows.name.removeprefix('unet.')}", fontsize=8)


def _draw_bars(panel: Any, rows: Rows) -> None:
    place = torch.arange(SHOWN)
    panel.barh(-place + 0.2, rows.before[:SHOWN], height=0.4, color="gray", label="base")
    panel.barh(-place - 0.2, rows.after[:SHOWN], height=0.4, color="C0", label="trained")
    panel.set_yticks((-place).tolist(), [f"row {index}" for index in range(SHOWN)])
    panel.set_xlim(0, 1.5 * float(rows.after[:SHOWN].max()))
    panel.set_xlabel("magnitude (norm of the row)")
    panel.legend(fontsize=8, loc="upper right")
    panel.set_title("Magnitude of the same rows", fontsize=10)
