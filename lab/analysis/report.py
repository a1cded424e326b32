"""Figures of weight changes, by layer and over layers, as tables, JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from dora_diffusion.config.wording import aligned
from dora_diffusion.evaluation import report
from dora_diffusion.evaluation.statistics import Interval
from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.formats.names.modules import MOST_BLOCKS
from dora_diffusion.numerics.weights import NormAxis
from lab.analysis.decomposition import Decomposition
from lab.statistics import correlation_interval

SCHEMA = 1
FILES = {"analysis": "analysis.json", "layers": "layers.csv", "table": "analysis.md"}
METHOD = (
    "95% confidence intervals of correlations are from a bootstrap that resamples the model's "
    "blocks (resnets, stacks of attention, layers of a text encoder), each with all its layers and "
    "checkpoints, since these are not independent observations; the interval shows how far the "
    "figure depends on the blocks, not on the seed, and is too narrow for models with few blocks"
)
_COLUMNS = (
    "run", "method", "step", "layer", "place", "kind", "shape", "delta_m", "relative_delta_m",
    "delta_d", "norm", "relative_change", "effective_rank", "low_rank_effective_rank",
)  # fmt: skip
# Number of reported singular values of a layer.
LEADING = 16
_PLACES = {"down_blocks": "UNet down", "mid_block": "UNet mid", "up_blocks": "UNet up"}
_REFINERS = {"context_refiner": "context refiner", "noise_refiner": "noise refiner"}
_STACKS = {
    "layers": "layers", "transformer_blocks": "double blocks",
    "single_transformer_blocks": "single blocks",
}  # fmt: skip
# In the order of the forward pass.
PLACES = (
    "text encoder", "text encoder 2", "UNet in and time", *_PLACES.values(), "UNet out",
    "transformer in and time", *_REFINERS.values(),
    *(f"{stack} {first} to {first + 9}" for stack in _STACKS.values()
      for first in range(0, MOST_BLOCKS, 10)),
    "transformer out",
)  # fmt: skip
KINDS = ("attention", "feed-forward", "convolution", "embedding", "other")
_BLOCK = re.compile(
    r".*?\.(?:resnets|attentions|downsamplers|upsamplers|layers|\w+_refiner|\w*transformer_blocks)\.\d+"
)


def place_of(name: str) -> str:
    """Return the part of the model that contains a layer: one of ``PLACES``."""
    component, _, path = name.partition(".")
    first, _, rest = path.partition(".")
    if component == "transformer":
        return _place_in_transformer(first, rest)
    if component != "unet":
        return component.replace("_", " ")
    return _PLACES.get(first, "UNet out" if first == "conv_out" else "UNet in and time")


def _place_in_transformer(first: str, rest: str) -> str:
    if stack := _STACKS.get(first):
        start = int(rest.partition(".")[0]) // 10 * 10
        return f"{stack} {start} to {start + 9}"
    is_last = first in ("all_final_layer", "norm_out", "proj_out")
    return _REFINERS.get(first, "transformer out" if is_last else "transformer in and time")


def is_table(name: str) -> bool:
    """Return whether a layer is an Embedding of a text encoder."""
    return name.endswith(("token_embedding", "position_embedding", "embed_tokens"))


def kind_of(name: str, shape: tuple[int, ...]) -> str:
    """Return the kind of a layer with this weight shape: one of ``KINDS``."""
    if re.search(r"\.(attn\d?|self_attn|attention)\.", name):
        return "attention"
    if re.search(r"(?<!t_embedder)\.(ff|ff_context|mlp|feed_forward)\.", name):
        return "feed-forward"
    if is_table(name):
        return "embedding"
    return "convolution" if len(shape) > 2 else "other"


def block_of(name: str) -> str:
    """Return the resnet, stack of attention or text-encoder layer that contains a layer.

    Any other layer is its own block.
    """
    match = _BLOCK.match(name)
    return match[0] if match else name


def model_order(name: str) -> tuple[int, list[int | str], str]:
    """Sort key of layers: order of the forward pass, with numeric order of numbers."""
    path: list[int | str] = [
        int(step) if step.isdecimal() else step for step in block_of(name).split(".")
    ]
    return PLACES.index(place_of(name)), path, name


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a matrix.

    Attributes:
        leading: The largest ``LEADING`` values, in descending order.
        effective_rank: `numerics.low_rank.effective_rank` of all values.
    """

    leading: tuple[float, ...]
    effective_rank: float


@dataclass(frozen=True)
class LayerChange:
    """Change of one layer by training.

    Attributes:
        name: Canonical module name.
        shape: Shape of the weight, ``(out, in, *k)``.
        parts: Changes of magnitude and direction.
        update: Spectrum of ``W_t - W_0``.
        low_rank: For DoRA, spectrum of ``s B A`` inside the norm; else None.
    """

    name: str
    shape: tuple[int, ...]
    parts: Decomposition
    update: Spectrum
    low_rank: Spectrum | None = None

    @property
    def place(self) -> str:
        """Place of the layer: one of ``PLACES``."""
        return place_of(self.name)

    @property
    def kind(self) -> str:
        """Kind of the layer: one of ``KINDS``."""
        return kind_of(self.name, self.shape)

    @property
    def delta_m(self) -> float:
        """Mean change of magnitude over channels, in the unit of the weight."""
        return self.parts.delta_m

    @property
    def delta_d(self) -> float:
        """Mean change of direction over channels: 1 - cosine."""
        return self.parts.delta_d

    @property
    def relative_delta_m(self) -> float:
        """``delta_m`` as a share of the mean norm of a channel before training."""
        return self.parts.delta_m / self.parts.norm if self.parts.norm else 0.0

    @property
    def relative_change(self) -> float:
        """``|W_t - W_0| / |W_0|`` in the Frobenius norm."""
        return LayerGroup([self]).relative_change


@dataclass(frozen=True)
class LayerGroup:
    """Group of layers: all of a checkpoint, or of one kind in one place.

    Attributes:
        layers: One or more layers.
        place: Part of the model; ``""`` for all.
        kind: Kind of the layers; ``""`` for all.
        share: Share of the checkpoint's ``|W_t - W_0|^2``.
    """

    layers: Sequence[LayerChange]
    place: str = ""
    kind: str = ""
    share: float = 1.0

    def mean(self, name: str) -> float:
        """Mean of ``"delta_m"``, ``"delta_d"`` or ``"relative_delta_m"`` over layers."""
        return statistics.fmean(getattr(layer, name) for layer in self.layers)

    @property
    def relative_change(self) -> float:
        """``|W_t - W_0| / |W_0|`` of all layers together, in the Frobenius norm."""
        whole = math.fsum(layer.parts.squared_norm for layer in self.layers)
        return math.sqrt(squared_change(self.layers) / whole) if whole else 0.0

    @property
    def effective_rank(self) -> float:
        """Median of the update's effective rank over layers."""
        return statistics.median(layer.update.effective_rank for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return the group's figures."""
        return {
            "layers": len(self.layers),
            **{name: self.mean(name) for name in ("delta_m", "relative_delta_m", "delta_d")},
            "relative_change": self.relative_change,
            "effective_rank": self.effective_rank,
        }


@dataclass(frozen=True)
class CheckpointChange:
    """Change of a model by training, at one checkpoint.

    Attributes:
        step: Optimizer steps; None if unknown.
        method: ``"DoRA"`` or ``"LoRA"`` for an adapter, else ``"model"``.
        layers: Changed layers, at least one, in the model's order.
        unchanged: Number of layers that equal the base's, bit for bit.
        other_changes: Number of changed tensors without channels: biases, norms.
    """

    step: int | None
    method: str
    layers: Sequence[LayerChange]
    unchanged: int = 0
    other_changes: int = 0

    @property
    def label(self) -> str:
        return "result" if self.step is None else f"step {self.step}"

    @property
    def whole(self) -> LayerGroup:
        return LayerGroup(self.layers)

    def groups(self) -> list[LayerGroup]:
        """Return the layers by place and kind, in the model's order; their shares sum to 1."""
        total = squared_change(self.layers)
        by_group = {
            (place, kind): [x for x in self.layers if (x.place, x.kind) == (place, kind)]
            for place in PLACES
            for kind in KINDS
        }
        return [
            LayerGroup(layers, place, kind, squared_change(layers) / total)
            for (place, kind), layers in by_group.items()
            if layers
        ]


@dataclass(frozen=True)
class RunChange:
    """Change of a model by training, over the checkpoints of a run.

    Attributes:
        name: Name of the run, adapter or model.
        checkpoints: Checkpoints in order, at least one.
        notes: Limitations of the figures, one line each.
    """

    name: str
    checkpoints: Sequence[CheckpointChange]
    notes: Sequence[str] = ()

    @property
    def method(self) -> str:
        return self.checkpoints[-1].method


def squared_change(layers: Sequence[LayerChange]) -> float:
    """``|W_t - W_0|^2`` over layers."""
    return math.fsum(layer.parts.squared_change for layer in layers)


def correlation(
    checkpoints: Sequence[CheckpointChange], magnitude: str = "delta_m"
) -> Interval | None:
    """Correlation of the changes of magnitude and direction over layers and checkpoints.

    The interval resamples blocks of the model, see `block_of`: layers of one block, and one layer
    at several checkpoints, are not independent observations.

    Args:
        checkpoints: Checkpoints of one run.
        magnitude: ``"delta_m"`` as in the paper, or ``"relative_delta_m"``.
    """
    blocks: dict[str, list[tuple[float, float]]] = {}
    for checkpoint in checkpoints:
        for layer in checkpoint.layers:
            pair = (getattr(layer, magnitude), layer.delta_d)
            blocks.setdefault(block_of(layer.name), []).append(pair)
    return correlation_interval(blocks)


@dataclass(frozen=True)
class Analysis:
    """Change of a model's weights by training, for one or several runs.

    Attributes:
        base: Name of the model before training.
        norm_axis: Axis of the channels.
        patterns: Patterns of the analyzed layers.
        runs: Changes by run.
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
                    **_plain(_correlations(run.checkpoints)),
                    "checkpoints": [_checkpoint(checkpoint) for checkpoint in run.checkpoints],
                }
                for run in self.runs
            ],
        }

    def table(self) -> str:
        """Format the figures by checkpoint and the shares by part of the model, in Markdown."""
        return "\n".join(
            [
                aligned(self._figures()),
                "",
                f"Channels are on the {self.norm_axis} axis. delta M: mean change of their "
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
            title = f"{run.name} ({run.method})"
            for checkpoint in run.checkpoints:
                whole = checkpoint.whole
                means = [f"{whole.mean(name):.3g}" for name in ("delta_m", "delta_d")]
                both = map(shown, _correlations([checkpoint]).values())
                size = [f"{whole.relative_change:.2%}", f"{whole.effective_rank:.1f}"]
                count = str(len(checkpoint.layers))
                rows.append([title, checkpoint.label, count, *means, *both, *size])
            if len(run.checkpoints) > 1:
                both = map(shown, _correlations(run.checkpoints).values())
                rows.append([title, "all", "", "", "", *both, "", ""])
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
        """Format one row for each layer of each checkpoint."""
        text = io.StringIO()
        singular = [f"singular_value_{i}" for i in range(1, LEADING + 1)]
        writer = csv.DictWriter(text, [*_COLUMNS, *singular], lineterminator="\n")
        writer.writeheader()
        pairs = [(run, checkpoint) for run in self.runs for checkpoint in run.checkpoints]
        for run, checkpoint in pairs:
            identity = {"run": run.name, "method": checkpoint.method, "step": checkpoint.step}
            for layer in checkpoint.layers:
                inner = layer.low_rank and layer.low_rank.effective_rank
                writer.writerow({
                    **identity, "layer": layer.name, **_layer(layer),
                    "shape": "x".join(map(str, layer.shape)), "low_rank_effective_rank": inner,
                    **dict(zip(singular, layer.update.leading, strict=False)),
                })  # fmt: skip
        return text.getvalue()

    def write(self, folder: str | PathLike[str]) -> dict[str, Path]:
        """Write the `FILES`; returns their paths."""
        folder = Path(folder)
        texts = {
            "analysis": json.dumps(self.to_dict(), indent=1) + "\n",
            "layers": self.csv(),
            "table": f"# Changes of {self.base} by training\n\n{self.table()}\n",
        }
        return {name: save_text(folder / FILES[name], text) for name, text in texts.items()}


def shown(interval: Interval | None) -> str:
    """Format an interval: ``+0.83 [+0.71, +0.92]``; a dash without a correlation."""
    return report.shown(interval, False, signed=True, digits=2)


def _checkpoint(checkpoint: CheckpointChange) -> dict[str, Any]:
    return {
        "step": checkpoint.step,
        "method": checkpoint.method,
        **_plain(_correlations([checkpoint])),
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


def _correlations(checkpoints: Sequence[CheckpointChange]) -> dict[str, Interval | None]:
    both = {"correlation": "delta_m", "relative_correlation": "relative_delta_m"}
    return {key: correlation(checkpoints, name) for key, name in both.items()}


def _plain(intervals: Mapping[str, Interval | None]) -> dict[str, Any]:
    return {key: interval and asdict(interval) for key, interval in intervals.items()}


def _layer(layer: LayerChange) -> dict[str, Any]:
    names = ("place", "kind", "shape", "delta_m", "relative_delta_m", "delta_d")
    return {
        **{name: getattr(layer, name) for name in names},
        "norm": layer.parts.norm,
        "relative_change": layer.relative_change,
        "effective_rank": layer.update.effective_rank,
    }
