"""Prove a merged model: recompute every adapted tensor and compare the rest with the base."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dora_diffusion.config.base import AnyModel, BaseModel
from dora_diffusion.export.files import OnProgress, ProgressReporter, open_model
from dora_diffusion.export.folder import UNUSED, WEIGHT_PREFIXES
from dora_diffusion.export.merge_spec import Adapters, MergeSpec, adapter_hash, recorded
from dora_diffusion.export.merged import MergedModel, open_vae, with_vae
from dora_diffusion.export.metadata import MERGED
from dora_diffusion.formats.checkpoint.models import StoredModel
from dora_diffusion.formats.checkpoint.schedule import MARKERS, STEP
from dora_diffusion.formats.checkpoint.weights import ModelWeights, standard_key
from dora_diffusion.formats.names.modules import BUFFERS, split_component
from dora_diffusion.numerics.merging import cast_error, layers_of, merge_error, merge_tensor
from dora_diffusion.numerics.precision import upcast
from dora_diffusion.numerics.threads import map_ahead
from dora_diffusion.numerics.weights import LayerWeights, MergeStrengths

# What another machine's or library's summation order may change, relative to the largest entry.
_FLOAT32_NOISE = 16 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class KindReport:
    """Errors of the adapted tensors of one kind.

    Attributes:
        tensors: Their number.
        largest: The largest relative difference, ``max|merged - expected| / max|expected|``.
        worst: Name of the tensor with it.
        allowed: The largest relative difference that rounding to the file's dtypes explains.
    """

    tensors: int
    largest: float
    worst: str
    allowed: float


@dataclass(frozen=True)
class VerifyReport:
    """Result of the comparison.

    Attributes:
        kinds: The adapted tensors by kind, such as ``"unet Linear"``.
        unchanged: Number of other tensors that equal the base's, bit for bit.
        problems: What is wrong, one line each; empty if the model is proven.
        assumptions: What was assumed of the adapters, one line each: the proof holds as far as
            that is true.
    """

    kinds: dict[str, KindReport]
    unchanged: int
    problems: list[str] = field(default_factory=list)
    assumptions: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True if nothing is wrong."""
        return not self.problems


def verify_checkpoint(
    merged: str | Path,
    base: AnyModel,
    adapters: Adapters,
    *,
    strength: float | MergeStrengths = 1.0,
    alpha: float | None = None,
    on_progress: OnProgress | None = None,
) -> VerifyReport:
    """Compare a merged model with what base and adapters give.

    Args:
        merged: The model to prove, a folder or a single file, written by any program.
        base: As for `export_checkpoint`, like all that follows.
        adapters: What was merged.
        strength: Of all adapters, or all of their `MergeStrengths`.
        alpha: What adapters were trained with whose files do not say it.
        on_progress: Called with (bytes compared, bytes in all).

    Raises:
        ExportError: If there is no adapter.
        MergeError, AdapterFormatError: If an adapter does not fit the base.
        TensorFileError: If a file is damaged.
    """
    spec = MergeSpec(adapters, MergeStrengths.of(strength))
    spec.require_adapter()
    base = BaseModel.of(base)
    with contextlib.ExitStack() as stack:
        merged_model = stack.enter_context(open_model(merged))
        model = stack.enter_context(open_model(base))
        weights: ModelWeights = model
        if base.vae is not None:
            weights = with_vae(model, stack.enter_context(open_vae(base.vae)))
        read = spec.read(weights, alpha)
        expected = MergedModel(weights, spec.weighted(read))
        report = WeightComparison(merged_model, expected, model.is_single_file).run(on_progress)
        model.restate_schedule(base, [adapter.metadata for adapter in read])
        report.problems.extend(_beside_the_weights(merged_model, model))
        report.assumptions.extend(spec.assumptions(read))
    if report.problems and (hint := _recorded_strengths(merged_model, spec)):
        report.problems.append(hint)
    return report


class WeightComparison:
    """The weights of a merged model against what they should be."""

    def __init__(self, merged: ModelWeights, expected: MergedModel, from_single_file: bool) -> None:
        self.merged, self.expected, self.from_single_file = merged, expected, from_single_file
        self.kinds: dict[str, KindReport] = {}
        self.problems: list[str] = []
        self.unchanged = 0

    def run(self, on_progress: OnProgress | None) -> VerifyReport:
        """Compare all tensors."""
        base, merged = self.expected.base.specs, self.merged.specs
        for name in sorted(base.keys() ^ merged.keys()):
            if not name.endswith(BUFFERS) and not self._left_out(name):
                whose = "the merged model" if name in base else "the base"
                self.problems.append(f"{name} is not in {whose}")
        names = sorted(base.keys() & merged.keys())
        report = ProgressReporter(sum(merged[name].nbytes for name in names), on_progress)
        for name, wanted in map_ahead(self._wanted, names):
            if base[name].shape != merged[name].shape:
                self.problems.append(f"{name} has another shape than the base's")
            elif wanted is not None:
                self._compare_adapted(name, wanted)
            else:
                self._compare_unadapted(name)
            report.step(merged[name].nbytes)
        return VerifyReport(self.kinds, self.unchanged, self.problems)

    def _left_out(self, name: str) -> bool:
        """Return whether a folder lacks this tensor of an original Stable Diffusion 2 model."""
        if not self.from_single_file or name in self.merged.specs:
            return False
        return name.startswith(UNUSED) and not layers_of(name, self.expected.adapters)

    def _compare_unadapted(self, name: str) -> None:
        actual = self.merged[name]
        expected = self.expected.base[name]
        if _overflowed(actual, expected):
            self.problems.append(f"{name} is not finite, and the base's is")
        elif _same_bits(actual, expected.to(actual.dtype)):
            self.unchanged += 1
        else:
            self.problems.append(f"{name} is not adapted, but differs from the base's")

    def _wanted(self, name: str) -> Tensor | None:
        """The merged tensor in float32; None for a tensor that is not adapted, or another's."""
        layers, base = layers_of(name, self.expected.adapters), self.expected.base
        if not layers or base.specs[name].shape != self.merged.specs[name].shape:
            return None
        return merge_tensor(base[name], layers, torch.float32)

    def _compare_adapted(self, name: str, wanted: Tensor) -> None:
        actual = self.merged[name]
        if not actual.is_floating_point():
            self.problems.append(f"{name} holds {actual.dtype}, not floating-point numbers")
            return
        size = wanted.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        difference = (actual.float() - wanted).abs()
        rounding = cast_error(wanted, actual.dtype) + _FLOAT32_NOISE * size
        # In this form, so that a NaN is a problem, too.
        if not bool((difference <= rounding).all()):
            # Where terms nearly cancel, rounding is a larger share of what they add up to.
            rounding = torch.maximum(rounding, cast_error(wanted, actual.dtype) + self._error(name))
        if not bool((difference <= rounding).all()):
            ratio = (difference / rounding).max().item()
            self.problems.append(
                f"{name} differs by {ratio:.2g} times the rounding of its dtype, in one number"
            )
        self._count(name, (difference / size).max().item(), (rounding / size).max().item())

    def _error(self, name: str) -> Tensor:
        """Return the allowed difference between two computations of a merged tensor."""
        layers = layers_of(name, self.expected.adapters)
        return 2 * merge_error(self.expected.base[name], layers)

    def _count(self, name: str, largest: float, allowed: float) -> None:
        kind = _kind(name, layers_of(name, self.expected.adapters)[0][0])
        report = KindReport(1, largest, name, allowed)
        if old := self.kinds.get(kind):
            worse = report if not largest <= old.largest else old
            allowed = max(allowed, old.allowed)
            report = KindReport(old.tensors + 1, worse.largest, worse.worst, allowed)
        self.kinds[kind] = report


def _overflowed(actual: Tensor, expected: Tensor) -> bool:
    """Return whether numbers that were finite are not any more."""
    narrowed = actual.is_floating_point() and actual.dtype != expected.dtype
    return narrowed and bool((upcast(expected).isfinite() & ~upcast(actual).isfinite()).any())


def _beside_the_weights(merged: StoredModel, base: StoredModel) -> Iterator[str]:
    """Yield problems of names, of tensors without a component, and of the noise schedule."""
    yield from merged.naming_problems()
    yield from (f"{key} is not in the base" for key in _unexpected_keys(merged, base))
    if merged.is_single_file:
        has, should_have = merged.markers(), base.markers()
        yield from (f"it is marked as {marker}, the base is not" for marker in has - should_have)
        yield from (f"the base is marked as {marker}, it is not" for marker in should_have - has)
    settings, expected = merged.schedule(), base.schedule()
    for name in ("prediction_type", "rescale_betas_zero_snr"):
        if name in settings and settings[name] != expected.get(name, settings[name]):
            yield f"its {name} is {settings[name]}, the base's is {expected[name]}"


def _unexpected_keys(merged: StoredModel, base: StoredModel) -> list[str]:
    """Tensors of no component that the base lacks; beside a folder, only those that look like one.

    The noise schedule, for one, is a config in folders, and is often left in single files.
    """
    stated = {*MARKERS, STEP}
    keys = [k for k in merged.other_specs if k not in stated and not k.endswith(BUFFERS)]
    if base.is_single_file:
        known = {standard_key(key) for key in base.other_specs}
        return [key for key in keys if standard_key(key) not in known]
    return [key for key in keys if key.startswith(WEIGHT_PREFIXES) and ".loss." not in key]


def _same_bits(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(
        left.contiguous().view(-1).view(torch.uint8), right.contiguous().view(-1).view(torch.uint8)
    )


def _kind(name: str, layer: LayerWeights) -> str:
    return f"{split_component(name)[0]} {layer.kind_and_size}"


def _recorded_strengths(merged: StoredModel, spec: MergeSpec) -> str:
    """A line on strengths, if the merged model says that it was made with others."""
    record = recorded(merged.metadata.get(MERGED, ""))
    if not record:
        return ""
    strength, knobs = spec.strengths.strength, list(spec.knobs().values())
    given = {adapter_hash(path): [own * strength, *knobs] for path, own in spec.pairs()}
    if record.keys() != given.keys():
        return "the model says that it was made from other adapters than these"
    if record == given:
        return ""
    return f"the model says that it was merged with other strengths: {_strengths(record.values())}"


def _strengths(values: Iterable[list[float]]) -> str:
    names = ("strength", "unet", "text encoder", "direction", "magnitude")
    return "; ".join(
        ", ".join(f"{name} {value:g}" for name, value in zip(names, strengths, strict=True))
        for strengths in values
    )
