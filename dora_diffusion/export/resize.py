"""The layers of adapters with another rank: fitted to what they make of a base, or from factors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from dora_diffusion.export.fit import FitSettings, FitTarget, Fitted, fit_layers
from dora_diffusion.export.output import OnProgress, ProgressReporter
from dora_diffusion.formats.checkpoint.weights import ModelWeights, module_shapes, module_weight
from dora_diffusion.merge import WeightedAdapter, layers_of, merge_tensor
from dora_diffusion.numerics.extract import known_scale
from dora_diffusion.numerics.low_rank import truncated
from dora_diffusion.numerics.precision import upcast
from dora_diffusion.numerics.weights import LayerWeights, NormAxis, Strengths, oriented

_AS_TRAINED = Strengths()


def axis_of(layers: Iterable[LayerWeights]) -> NormAxis:
    """The axis of all magnitudes; the output axis where they differ, or there is none."""
    axes = {layer.norm_axis for layer in layers if layer.magnitude is not None}
    return axes.pop() if len(axes) == 1 else "output"


def key_format_for(layers: Mapping[str, LayerWeights]) -> str:
    """The key format that can hold these layers: Diffusers' where it is possible."""
    kinds = {None if w.magnitude is None else w.norm_axis for w in layers.values()}
    return "diffusers" if len(kinds) == 1 and "input" not in kinds else "kohya"


def fit_to_adapters(
    model: ModelWeights,
    adapters: Sequence[WeightedAdapter],
    settings: FitSettings,
    on_progress: OnProgress | None = None,
) -> Fitted:
    """One layer for each that adapters have on a base: the nearest to all of them together.

    A layer that one adapter alone has, at strength 1, stays as it is where its rank, its kind and
    its axis are as wanted.

    Args:
        model: The base.
        adapters: Their layers and strengths.
        settings: How they are fitted. Without a rank each layer gets the sum of theirs.
        on_progress: Called with (bytes of the base's adapted weights done, bytes in all).
    """
    names = [n for n in module_shapes(model) if any(n in adapter.layers for adapter in adapters)]
    nbytes = {name: model.specs[f"{name}.weight"].nbytes for name in names}
    report = ProgressReporter(sum(nbytes.values()), on_progress)

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
        start = known_scale(oriented(base, kind), strengths, settings.norm_axis)
        return FitTarget(base, tuned, rank, start, kind=kind)

    return fit_layers(names, target_of, settings, lambda name: report.step(nbytes[name]))


def _cancels(base: Tensor, tuned: Tensor, layers: Sequence[tuple[LayerWeights, Strengths]]) -> bool:
    """Whether nothing is left of several layers but what float32 rounds."""
    change = (tuned - base).norm()
    total = sum(abs(strengths.strength) for _, strengths in layers) if len(layers) > 1 else 0.0
    rounding = torch.finfo(torch.float32).eps * total * base.norm(dtype=change.dtype)
    return bool(change <= rounding)


def _stays(layer: LayerWeights, strengths: Strengths, settings: FitSettings) -> bool:
    """Whether a layer is already what is wanted."""
    is_dora = layer.magnitude is not None
    return (
        strengths == _AS_TRAINED
        and settings.energy is None
        and is_dora == settings.use_dora
        and (not is_dora or layer.norm_axis == settings.norm_axis)
        and layer.rank <= settings.rank_of(layer.weight_shape, layer.rank)
    )


def truncate_layers(layers: Mapping[str, LayerWeights], settings: FitSettings) -> Fitted:
    """Layers of a smaller rank from their factors alone, without the base.

    Magnitudes stay. Errors are those of ``s B A``, which is the whole change of a plain LoRA.
    """
    fitted = Fitted()
    for name, layer in layers.items():
        rank = settings.rank_of(layer.weight_shape, layer.rank)
        fitted.add(name, *truncated(layer, rank, settings.energy))
    return fitted
