"""Low-rank layers fitted to tuned weights, or to a base with adapters, and settings of a fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dora_diffusion.config.adapter import NORM_AXES
from dora_diffusion.config.families import DEFAULT_FAMILY, Family
from dora_diffusion.config.fields import require, require_choice
from dora_diffusion.export.files import ExportError, OnProgress, ProgressReporter
from dora_diffusion.formats.adapter.metadata import APPROXIMATES, APPROXIMATION_ERROR, TRAINED_ALPHA
from dora_diffusion.formats.checkpoint.weights import ModelWeights, module_shapes, module_weight
from dora_diffusion.formats.layouts import CONVERSIONS, KEY_FORMATS, input_format
from dora_diffusion.formats.layouts.layout import denoiser_of, is_mixed, norm_axes, refuse_denoiser
from dora_diffusion.numerics.extract import best_dora, known_scale
from dora_diffusion.numerics.low_rank import low_rank, plain_lora, truncated
from dora_diffusion.numerics.merging import WeightedAdapter, layers_of, merge_tensor
from dora_diffusion.numerics.precision import upcast
from dora_diffusion.numerics.threads import map_ahead
from dora_diffusion.numerics.weights import (
    LayerKind,
    LayerWeights,
    NormAxis,
    Strengths,
    out_in,
)

METHODS = {"dora": "DoRA", "lora": "LoRA"}


@dataclass(frozen=True)
class FitSettings:
    """Settings for fitting layers.

    Attributes:
        rank: Largest rank; None: the rank of the fitted layers.
        conv_rank: Largest rank of Conv2d layers; None: ``rank``.
        energy: Use each layer's smallest rank that keeps this share of the squared singular values,
            up to the largest rank.
        method: A key of ``METHODS``.
        norm_axis: Axis of the magnitudes; None: the adapters' axis, or output.
        dtype: Dtype of the low-rank factors; None: float32.

    Raises:
        ConfigError: If a value is not valid.
    """

    rank: int | None = None
    conv_rank: int | None = None
    energy: float | None = None
    method: Literal["dora", "lora"] = "dora"
    norm_axis: NormAxis | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name, rank in (("rank", self.rank), ("conv_rank", self.conv_rank)):
            require(rank is None or rank > 0, f"{name} is {rank}; it must be at least 1", name)
        require_choice("method", self.method, tuple(METHODS))
        if self.norm_axis is not None:
            require_choice("norm_axis", self.norm_axis, NORM_AXES)
        energy = 1.0 if self.energy is None else self.energy
        problem = f"energy is {energy:g}; it must be above 0 and at most 1"
        require(0 < energy <= 1, problem, "energy")

    @property
    def axis(self) -> NormAxis:
        """Axis of the magnitudes."""
        return self.norm_axis or "output"

    @property
    def use_dora(self) -> bool:
        """True if layers get a magnitude."""
        return self.method == "dora"

    def rank_of(self, shape: tuple[int, ...], default: int) -> int:
        """Return the largest rank for a weight ``(out, in, *k)``; ``default`` if none is set."""
        rank = self.conv_rank if len(shape) > 2 and self.conv_rank is not None else self.rank
        return default if rank is None else rank

    def key_format(self, requested: str | None, family: Family = DEFAULT_FAMILY) -> str:
        """Return the key format to write: the requested one, else one that can store the layers.

        Args:
            requested: The requested key format.
            family: Family of the model.

        Raises:
            ExportError: If the requested one is unknown or cannot store them.
        """
        on_input = self.use_dora and self.axis == "input"
        default = input_format(family.denoiser) if on_input else "diffusers"
        if requested is None:
            return default
        if requested not in KEY_FORMATS:
            there_is = f"there is {', '.join(KEY_FORMATS)}"
            raise ExportError(f"unknown key format {requested!r}; {there_is}")
        if on_input and requested != default:
            raise ExportError(
                f"the {requested} format cannot store magnitudes on the input axis; choose "
                f"{default}, or the output axis"
            )
        able = CONVERSIONS[requested].denoisers
        refuse_denoiser(requested, able, {family.denoiser, family.name})
        return requested

    @property
    def limits(self) -> dict[str, float]:
        names = ("rank", "conv_rank", "energy")
        return {n: value for n in names if (value := getattr(self, n)) is not None}

    @property
    def ranks(self) -> str:
        """The limits as a text, such as ``"rank 8, energy 0.95"``."""
        limits = [f"{name} {value:g}" for name, value in self.limits.items()]
        return ", ".join(limits) or "sum of the ranks"

    def __str__(self) -> str:
        """Describe the fit: ``"nearest DoRA, output axis, rank 8"``."""
        axis = f"{self.axis} axis, " if self.use_dora else ""
        return f"nearest {METHODS[self.method]}, {axis}{self.ranks}"


def axis_of(layers: Iterable[LayerWeights]) -> NormAxis:
    """Return the axis of all magnitudes; the output axis if they differ, or there are none."""
    return "input" if norm_axes(layers) == {"input"} else "output"


def key_format_for(layers: Mapping[str, LayerWeights]) -> str:
    """Return the key format that can store these layers: Diffusers', if possible."""
    is_uniform = not is_mixed(layers) and "input" not in norm_axes(layers.values())
    return "diffusers" if is_uniform else input_format(denoiser_of(layers))


@dataclass(frozen=True)
class FitTarget:
    """Target for the fit of one layer.

    Attributes:
        base: The base weight, as the model stores it.
        tuned: The weight to approximate.
        rank: Rank of the layer if the settings have none.
        start: Initial scales for a DoRA; see `best_dora`.
        layer: A layer to copy, if no fit is needed.
        kind: How the weight is stored.
    """

    base: Tensor
    tuned: Tensor
    rank: int = 0
    start: Tensor | None = None
    layer: LayerWeights | None = None
    kind: LayerKind = "plain"


@dataclass
class Fitted:
    """Fitted layers and their errors.

    Attributes:
        layers: The layers by canonical module name.
        errors: ``|W'' - W'| / |W' - W|`` of each layer in the Frobenius norm, for a tuned W'.
        total_error: The error of all layers together.
        unchanged: Number of modules with the base's weight, which get no layer.
    """

    layers: dict[str, LayerWeights] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    unchanged: int = 0
    _left: float = 0.0
    _size: float = 0.0

    @property
    def total_error(self) -> float:
        """The error of all layers together."""
        return self._left / self._size if self._size else 0.0

    def add(self, name: str, layer: LayerWeights, left: float, size: float) -> None:
        """Add a layer with its ``|W'' - W'|`` and ``|W' - W|``."""
        self.layers[name] = layer
        self.errors[name] = left / size if size else 0.0
        self._left, self._size = math.hypot(self._left, left), math.hypot(self._size, size)

    def stated(
        self, extra: Mapping[str, str], of: str, how: str | FitSettings, before: float = 0.0
    ) -> dict[str, str]:
        """Return metadata fields with the fit, its target, and a bound on the error.

        Args:
            extra: Further fields, except the alpha of training: fitted layers have another alpha.
            of: Name of the target.
            how: Description of the fit.
            before: Error of the target itself.
        """
        error = before + self.total_error + before * self.total_error
        facts = {"approximation": str(how), APPROXIMATES: of, APPROXIMATION_ERROR: f"{error:.3g}"}
        return {name: text for name, text in extra.items() if name != TRAINED_ALPHA} | facts


def fit_layers(
    model: ModelWeights,
    names: Sequence[str],
    target_of: Callable[[str], FitTarget | None],
    settings: FitSettings,
    on_progress: OnProgress | None = None,
) -> Fitted:
    """Fit layers, a few at a time in threads of one core each.

    Args:
        model: The base.
        names: Canonical module names.
        target_of: Loads the target of a layer; None if the weight is the base's.
        settings: Settings of the fit.
        on_progress: Called with (bytes of these weights done, total bytes).

    Raises:
        ExportError: If a weight contains numbers that are not finite.
    """
    fitted, nbytes = Fitted(), {name: model.specs[f"{name}.weight"].nbytes for name in names}
    report = ProgressReporter(sum(nbytes.values()), on_progress)

    def fit(name: str) -> tuple[LayerWeights, float, float] | None:
        target = target_of(name)
        return None if target is None else _fit(name, target, settings)

    for name, result in map_ahead(fit, names):
        if result is None:
            fitted.unchanged += 1
        else:
            fitted.add(name, *result)
        report.step(nbytes[name])
    return fitted


@torch.no_grad()
def _fit(name: str, target: FitTarget, settings: FitSettings) -> tuple[LayerWeights, float, float]:
    """Return the fitted layer, in the dtype to write, ``|W'' - W'|`` and ``|W' - W|``."""
    base, tuned = (out_in(w, target.kind) for w in (target.base, upcast(target.tuned)))
    size = (tuned - base).norm().item()
    if not math.isfinite(size):
        raise ExportError(f"{name} contains numbers that are not finite, in the base or the target")
    if target.layer is not None:
        layer = dataclasses.replace(target.layer, kind="plain")
    else:
        rank, energy = settings.rank_of(tuple(base.shape), target.rank), settings.energy
        if settings.use_dora:
            layer = best_dora(base, tuned, rank, settings.axis, energy=energy, start=target.start)
        else:
            layer = low_rank(tuned - base, rank, energy)
    dtype = settings.dtype or torch.float32
    layer = dataclasses.replace(layer, down=layer.down.to(dtype), up=layer.up.to(dtype))
    merged = merge_tensor(base, [(layer, Strengths())], tuned.dtype)
    left = merged.sub_(tuned).norm().item()
    return dataclasses.replace(layer, kind=target.kind), left, size


def fit_to_adapters(
    model: ModelWeights,
    adapters: Sequence[WeightedAdapter],
    settings: FitSettings,
    on_progress: OnProgress | None = None,
) -> Fitted:
    """Fit layers to the sum of adapters on a base.

    A layer of only one adapter, at strength 1, is copied if its rank, method and axis fit the
    settings.

    Args:
        model: The base.
        adapters: Layers and strengths of the adapters.
        settings: Settings of the fit. Without a rank each layer gets the sum of the ranks.
        on_progress: Called with (bytes of the base's adapted weights done, total bytes).
    """
    names = [n for n in module_shapes(model) if any(n in adapter.layers for adapter in adapters)]

    def target_of(name: str) -> FitTarget | None:
        base, layers = module_weight(model, name), layers_of(f"{name}.weight", adapters)
        tuned = merge_tensor(base, layers, upcast(base).dtype)
        kind = layers[0][0].kind
        if len(layers) == 1 and _stays(*layers[0], settings):
            return FitTarget(base, tuned, layer=layers[0][0], kind=kind)
        if _cancels(base, tuned, layers):
            return None
        strengths = [(layer, strengths.strength) for layer, strengths in layers]
        rank = sum(layer.rank for layer, _ in layers)
        start = known_scale(out_in(base, kind), strengths, settings.axis)
        return FitTarget(base, tuned, rank, start, kind=kind)

    return fit_layers(model, names, target_of, settings, on_progress)


def _cancels(base: Tensor, tuned: Tensor, layers: Sequence[tuple[LayerWeights, Strengths]]) -> bool:
    """Return whether several layers cancel up to the rounding of float32."""
    change = (tuned - base).norm()
    total = sum(abs(strengths.strength) for _, strengths in layers) if len(layers) > 1 else 0.0
    rounding = torch.finfo(torch.float32).eps * total * base.norm(dtype=change.dtype)
    return bool(change <= rounding)


def _stays(layer: LayerWeights, strengths: Strengths, settings: FitSettings) -> bool:
    """Return whether a layer already has the settings' method, axis and rank."""
    is_dora = layer.magnitude is not None
    return (
        strengths == Strengths()
        and settings.energy is None
        and is_dora == settings.use_dora
        and (not is_dora or layer.norm_axis == settings.axis)
        and layer.rank <= settings.rank_of(layer.weight_shape, layer.rank)
    )


def decomposed(
    layers: Mapping[str, LayerWeights], settings: FitSettings, model: ModelWeights | None
) -> Fitted:
    """Reduce the rank of layers by their singular values, in their dtype.

    Args:
        layers: Layers of the adapter.
        settings: The limits on the rank; without one each layer keeps its rank.
        model: The base, for plain LoRA. Without it magnitudes are kept, and errors are relative to
            ``s B A``, which is the whole change of a plain LoRA.
    """
    fitted = Fitted()
    for name, layer in layers.items():
        rank, energy = settings.rank_of(layer.weight_shape, layer.rank), settings.energy
        if model is None or layer.magnitude is None:
            fitted.add(name, *truncated(layer, rank, energy))
        else:
            fitted.add(name, *plain_lora(module_weight(model, name), layer, rank, energy))
    return fitted
