"""Place of each layer in its model, its change by training, and figures over layers."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dora_diffusion.evaluation.statistics import Interval, correlation_interval
from dora_diffusion.numerics.decomposition import Decomposition

# Of a layer, as many of its singular values as are reported.
LEADING = 16
_PLACES = {"down_blocks": "UNet down", "mid_block": "UNet mid", "up_blocks": "UNet up"}
# In the order in which images pass them.
PLACES = (
    "text encoder",
    "text encoder 2",
    "UNet in and time",
    *_PLACES.values(),
    "UNet out",
)
KINDS = ("attention", "feed-forward", "convolution", "embedding", "other")
_BLOCK = re.compile(r".*?\.(?:resnets|attentions|downsamplers|upsamplers|layers)\.\d+")


def place_of(name: str) -> str:
    """The part of the model that a layer is in: one of ``PLACES``."""
    component, _, path = name.partition(".")
    if component != "unet":
        return component.replace("_", " ")
    first = path.partition(".")[0]
    return _PLACES.get(first, "UNet out" if first == "conv_out" else "UNet in and time")


def is_table(name: str) -> bool:
    """Return whether a layer is a text encoder's table of vectors, an Embedding."""
    return name.endswith(("token_embedding", "position_embedding"))


def kind_of(name: str, shape: tuple[int, ...]) -> str:
    """Return the kind of a layer with this weight shape: one of ``KINDS``."""
    if re.search(r"\.(attn\d|self_attn)\.", name):
        return "attention"
    if re.search(r"\.(ff|mlp)\.", name):
        return "feed-forward"
    if is_table(name):
        return "embedding"
    return "convolution" if len(shape) > 2 else "other"


def block_of(name: str) -> str:
    """The resnet, stack of attention or layer of a text encoder that a layer belongs to.

    A layer of none is a block of its own.
    """
    match = _BLOCK.match(name)
    return match[0] if match else name


def model_order(name: str) -> tuple[int, list[int | str], str]:
    """A key that sorts layers as the model runs them, and numbers as numbers."""
    parts: list[int | str] = [
        int(part) if part.isdecimal() else part for part in block_of(name).split(".")
    ]
    return PLACES.index(place_of(name)), parts, name


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a matrix.

    Attributes:
        leading: The largest ``LEADING``, falling.
        effective_rank: `numerics.decomposition.effective_rank` of all of them.
    """

    leading: tuple[float, ...]
    effective_rank: float


@dataclass(frozen=True)
class LayerChange:
    """Change of one layer by training.

    Attributes:
        name: Canonical module name.
        shape: Of its weight, ``(out, in, *k)``.
        parts: Its change of magnitude and of direction.
        update: The spectrum of ``W_t - W_0``.
        low_rank: Of a DoRA, that of ``s B A`` inside its norm; None of anything else.
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
        layers: One or more.
        place: Where they are; ``""`` for all.
        kind: What they do; ``""`` for all.
        share: Of the checkpoint's ``|W_t - W_0|^2``.
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
            "delta_m": self.mean("delta_m"),
            "relative_delta_m": self.mean("relative_delta_m"),
            "delta_d": self.mean("delta_d"),
            "relative_change": self.relative_change,
            "effective_rank": self.effective_rank,
        }


@dataclass(frozen=True)
class CheckpointChange:
    """Change of a model by training, at one checkpoint.

    Attributes:
        step: Optimizer steps; None where that is not known.
        method: Of an adapter ``"DoRA"`` or ``"LoRA"``; ``"model"``.
        layers: Those that were changed, at least one, in the model's order.
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
        whole = squared_change(self.layers)
        chosen = {
            (place, kind): [x for x in self.layers if (x.place, x.kind) == (place, kind)]
            for place in PLACES
            for kind in KINDS
        }
        return [
            LayerGroup(layers, place, kind, squared_change(layers) / whole)
            for (place, kind), layers in chosen.items()
            if layers
        ]


@dataclass(frozen=True)
class RunChange:
    """Change of a model by training, over the checkpoints of a run.

    Attributes:
        name: Of the run, adapter or model.
        checkpoints: In their order, at least one.
        notes: What to know before the figures are believed, one line each.
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
        checkpoints: Of one run.
        magnitude: ``"delta_m"`` as in the paper, or ``"relative_delta_m"``.
    """
    blocks: dict[str, list[tuple[float, float]]] = {}
    for checkpoint in checkpoints:
        for layer in checkpoint.layers:
            pair = (getattr(layer, magnitude), layer.delta_d)
            blocks.setdefault(block_of(layer.name), []).append(pair)
    return correlation_interval(blocks)
