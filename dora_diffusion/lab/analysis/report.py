"""An analysis as tables, as JSON and as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dora_diffusion.config.wording import aligned
from dora_diffusion.evaluation import report
from dora_diffusion.evaluation.statistics import Interval
from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.lab.analysis.changes import (
    LEADING,
    CheckpointChange,
    LayerChange,
    RunChange,
    correlation,
)
from dora_diffusion.numerics.weights import NormAxis

SCHEMA = 1
FILES = {"analysis": "analysis.json", "layers": "layers.csv", "table": "analysis.md"}
METHOD = (
    "95% confidence intervals of correlations are from a bootstrap that resamples the model's "
    "blocks (resnets, stacks of attention, layers of a text encoder), each with all its layers and "
    "checkpoints, since these are not independent observations; it says how far the figure depends "
    "on which blocks there are, not what another seed would give, and is too narrow for a model of "
    "few blocks"
)
_COLUMNS = (
    "run", "method", "step", "layer", "place", "kind", "shape", "delta_m", "relative_delta_m",
    "delta_d", "norm", "relative_change", "effective_rank", "low_rank_effective_rank",
)  # fmt: skip


@dataclass(frozen=True)
class Analysis:
    """Change of a model's weights by training, for one or several runs.

    Attributes:
        base: Name of the model before training.
        norm_axis: What a channel is.
        patterns: Of the layers that were looked at.
        runs: Their checkpoints and layers.
    """

    base: str
    norm_axis: NormAxis
    patterns: tuple[str, ...]
    runs: Sequence[RunChange]

    def to_dict(self) -> dict[str, Any]:
        """Return everything, as plain values."""
        return {
            "schema": SCHEMA,
            "base": self.base,
            "norm_axis": self.norm_axis,
            "layers": list(self.patterns),
            "intervals": METHOD,
            "runs": [
                {
                    "name": run.name,
                    "method": run.method,
                    "notes": list(run.notes),
                    **_correlations(run.checkpoints),
                    "checkpoints": [_checkpoint(checkpoint) for checkpoint in run.checkpoints],
                }
                for run in self.runs
            ],
        }

    def table(self) -> str:
        """The figures of each checkpoint, and the share of each part of the model, in Markdown."""
        return "\n".join(
            [
                aligned(self._figures()),
                "",
                f"Channels are those of the {self.norm_axis} axis. delta M: mean change of their "
                "norm, in the weights' unit; delta D: mean change of their direction, 1 - cosine; "
                "both averaged over layers. Effective rank: median over layers. " + METHOD + ".",
                "",
                aligned(self._shares()),
                "",
                "Share of the squared change of all weights, at the last checkpoint.",
                *(f"note: {run.name}: {note}" for run in self.runs for note in run.notes),
            ]
        )

    def _figures(self) -> list[list[str]]:
        head = ["run", "checkpoint", "layers", "delta M", "delta D", "correlation"]
        rows = [[*head, "with relative delta M", "relative change", "effective rank"]]
        for run in self.runs:
            for checkpoint in run.checkpoints:
                whole = checkpoint.whole
                rows.append(
                    [
                        f"{run.name} ({run.method})",
                        checkpoint.label,
                        str(len(checkpoint.layers)),
                        f"{whole.mean('delta_m'):.3g}",
                        f"{whole.mean('delta_d'):.3g}",
                        shown(correlation([checkpoint])),
                        shown(correlation([checkpoint], "relative_delta_m")),
                        f"{whole.relative_change:.2%}",
                        f"{whole.effective_rank:.1f}",
                    ]
                )
            if len(run.checkpoints) > 1:
                both = [
                    shown(correlation(run.checkpoints, name))
                    for name in ("delta_m", "relative_delta_m")
                ]
                rows.append([f"{run.name} ({run.method})", "all", "", "", "", *both, "", ""])
        return rows

    def _shares(self) -> list[list[str]]:
        groups = [{(g.place, g.kind): g for g in run.checkpoints[-1].groups()} for run in self.runs]
        places = dict.fromkeys(key for run in groups for key in run)
        rows = [["part of the model", *(run.name for run in self.runs)]]
        for key in places:
            shares = [f"{run[key].share:.1%}" if key in run else "-" for run in groups]
            rows.append([", ".join(key), *shares])
        return rows

    def csv(self) -> str:
        """One row for each layer of each checkpoint."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*_COLUMNS, *(f"singular_value_{i}" for i in range(1, LEADING + 1))])
        for run in self.runs:
            for checkpoint in run.checkpoints:
                for layer in checkpoint.layers:
                    values = {
                        "run": run.name,
                        "method": checkpoint.method,
                        "step": checkpoint.step,
                        "layer": layer.name,
                        **_layer(layer),
                        "shape": "x".join(map(str, layer.shape)),
                        "low_rank_effective_rank": layer.low_rank and layer.low_rank.effective_rank,
                    }
                    row = [values[name] for name in _COLUMNS]
                    writer.writerow([*row, *layer.update.leading])
        return text.getvalue()

    @staticmethod
    def exists(folder: Path) -> bool:
        """Return whether a folder holds an analysis, which `write` would replace."""
        return any((folder / name).exists() for name in FILES.values())

    def write(self, folder: Path) -> dict[str, Path]:
        """Write the `FILES`; returns their paths."""
        texts = {
            "analysis": json.dumps(self.to_dict(), indent=1) + "\n",
            "layers": self.csv(),
            "table": f"# What training did to {self.base}\n\n{self.table()}\n",
        }
        return {name: save_text(folder / FILES[name], text) for name, text in texts.items()}


def shown(interval: Interval | None) -> str:
    """``+0.83 [+0.71, +0.92]``; a dash where there is no correlation."""
    return report.shown(interval, False, signed=True, digits=2)


def _checkpoint(checkpoint: CheckpointChange) -> dict[str, Any]:
    return {
        "step": checkpoint.step,
        "method": checkpoint.method,
        **_correlations([checkpoint]),
        **checkpoint.whole.to_dict(),
        "unchanged_layers": checkpoint.unchanged,
        "other_changed_tensors": checkpoint.other_changes,
        "groups": [
            {"place": group.place, "kind": group.kind, "share": group.share, **group.to_dict()}
            for group in checkpoint.groups()
        ],
        "by_layer": {
            layer.name: {
                **_layer(layer),
                "singular_values": layer.update.leading,
                "low_rank": layer.low_rank and asdict(layer.low_rank),
            }
            for layer in checkpoint.layers
        },
    }


def _correlations(checkpoints: Sequence[CheckpointChange]) -> dict[str, Any]:
    both = {"correlation": "delta_m", "relative_correlation": "relative_delta_m"}
    intervals = {key: correlation(checkpoints, name) for key, name in both.items()}
    return {key: interval and asdict(interval) for key, interval in intervals.items()}


def _layer(layer: LayerChange) -> dict[str, Any]:
    return {
        "place": layer.place,
        "kind": layer.kind,
        "shape": layer.shape,
        "delta_m": layer.delta_m,
        "relative_delta_m": layer.relative_delta_m,
        "delta_d": layer.delta_d,
        "norm": layer.parts.norm,
        "relative_change": layer.relative_change,
        "effective_rank": layer.update.effective_rank,
    }
