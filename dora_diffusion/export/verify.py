"""Verify a merged model: recompute every adapted tensor and compare the rest with the base."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from os import PathLike

import torch
from torch import Tensor

from dora_diffusion.config.base import AnyModel, BaseModel
from dora_diffusion.export.checkpoint import UNUSED, weights_of_no_component
from dora_diffusion.export.files import OnProgress, ProgressReporter, open_model
from dora_diffusion.export.merge_spec import Adapters, MergeSpec, recorded
from dora_diffusion.export.merged import MergedModel, open_base
from dora_diffusion.export.metadata import MERGED
from dora_diffusion.formats.adapter.stored import adapter_hash
from dora_diffusion.formats.checkpoint.models import StoredModel
from dora_diffusion.formats.checkpoint.schedule import MARKERS, STEP
from dora_diffusion.formats.checkpoint.weights import ModelWeights, standard_key
from dora_diffusion.formats.names.modules import BUFFERS, split_component
from dora_diffusion.numerics.merging import cast_error, layers_of, merge_error
from dora_diffusion.numerics.precision import upcast
from dora_diffusion.numerics.threads import map_ahead
from dora_diffusion.numerics.weights import LayerWeights, MergeStrengths, Strengths

# Bound on differences by the summation order of other machines, relative to the largest entry.
_FLOAT32_NOISE = 16 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class KindReport:
    """Errors of the adapted tensors of one kind.

    Attributes:
        tensors: Number of tensors.
        largest: Largest relative difference, ``max|merged - expected| / max|expected|``.
        worst: Name of the tensor with the largest difference.
        allowed: Largest relative difference that rounding to the file's dtypes explains.
    """

    tensors: int
    largest: float
    worst: str
    allowed: float


@dataclass
class VerifyReport:
    """Result of the comparison.

    Attributes:
        kinds: Errors of adapted tensors by kind, such as ``"unet Linear"``.
        unchanged: Number of other tensors that equal the base's, bit for bit.
        problems: Problems, one line each; empty if the model is verified.
        assumptions: Assumptions about the adapters, one line each. The result depends on them.
    """

    kinds: dict[str, KindReport] = field(default_factory=dict)
    unchanged: int = 0
    problems: list[str] = field(default_factory=list)
    assumptions: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True if there are no problems."""
        return not self.problems


def verify_checkpoint(
    merged: str | PathLike[str],
    base: AnyModel,
    adapters: Adapters,
    *,
    strength: float | MergeStrengths = 1.0,
    alpha: float | None = None,
    on_progress: OnProgress | None = None,
) -> VerifyReport:
    """Compare a merged model with the merge of base and adapters.

    Args:
        merged: The model to verify, a folder or a single file, written by any program.
        base: As in `export_checkpoint`.
        adapters: The merged adapters, as in `export_checkpoint`.
        strength: As in `export_checkpoint`.
        alpha: As in `export_checkpoint`.
        on_progress: Called with (bytes compared, total bytes).

    Raises:
        ExportError: If no adapter is given.
        MergeError, AdapterFormatError: If an adapter does not fit the base.
        TensorFileError: If a file is damaged.
    """
    spec = MergeSpec(adapters, MergeStrengths.of(strength))
    spec.require_adapter()
    base = BaseModel.of(base)
    with open_model(merged) as merged_model, open_base(base) as (model, weights, _):
        read = spec.read(weights, alpha)
        expected = MergedModel(weights, spec.weighted())
        left_out = merged_model.left_out | model.left_out
        comparison = WeightComparison(merged_model, expected, left_out)
        report = comparison.run(on_progress, from_single_file=model.is_single_file)
        model.override_schedule(base, [adapter.metadata for adapter in read])
        report.problems.extend(_problems_besides_weights(merged_model, model))
        report.assumptions.extend(spec.assumptions())
    if report.problems and (hint := _recorded_strengths(merged_model, spec)):
        report.problems.append(hint)
    return report


@dataclass
class WeightComparison:
    """Comparison of a merged model's weights with the expected ones.

    Attributes:
        merged: The merged model.
        expected: The expected model.
        left_out: Components that one of them does not have, which are not compared.
        report: The results so far.
    """

    merged: ModelWeights
    expected: MergedModel
    left_out: Set[str] = frozenset()
    report: VerifyReport = field(default_factory=VerifyReport)

    def run(self, on_progress: OnProgress | None, *, from_single_file: bool) -> VerifyReport:
        """Compare all tensors. A folder made from a single file may lack unused tensors."""
        base, merged = (
            {n: spec for n, spec in model.specs.items() if n.partition(".")[0] not in self.left_out}
            for model in (self.expected.base, self.merged)
        )
        for name in sorted(base.keys() ^ merged.keys()):
            is_unused = from_single_file and name in base and name.startswith(UNUSED)
            if not (name.endswith(BUFFERS) or (is_unused and not self._layers(name))):
                whose = "the merged model" if name in base else "the base"
                self._problem(f"{name} is not in {whose}")
        names = sorted(base.keys() & merged.keys())
        report = ProgressReporter(sum(merged[name].nbytes for name in names), on_progress)
        for name, expected in map_ahead(self._expected, names):
            if base[name].shape != merged[name].shape:
                self._problem(f"{name} has another shape than the base's")
            elif expected is not None:
                self._compare_adapted(name, expected)
            else:
                self._compare_unadapted(name)
            report.step(merged[name].nbytes)
        return self.report

    def _problem(self, text: str) -> None:
        self.report.problems.append(text)

    def _layers(self, name: str) -> list[tuple[LayerWeights, Strengths]]:
        return layers_of(name, self.expected.adapters)

    def _compare_unadapted(self, name: str) -> None:
        actual, expected = self.merged[name], self.expected.base[name]
        narrowed = actual.is_floating_point() and actual.dtype != expected.dtype
        if narrowed and bool((upcast(expected).isfinite() & ~upcast(actual).isfinite()).any()):
            self._problem(f"{name} is not finite, but the base's is")
        elif torch.equal(_bits(actual), _bits(expected.to(actual.dtype))):
            self.report.unchanged += 1
        else:
            self._problem(f"{name} is not adapted, but differs from the base's")

    def _expected(self, name: str) -> Tensor | None:
        """Return the merged tensor in float32; None if it is not adapted or has another shape."""
        shapes = {model.specs[name].shape for model in (self.expected.base, self.merged)}
        is_compared = self._layers(name) and len(shapes) == 1
        return self.expected.tensor(name, torch.float32) if is_compared else None

    def _compare_adapted(self, name: str, expected: Tensor) -> None:
        actual = self.merged[name]
        if not actual.is_floating_point():
            self._problem(f"{name} is {actual.dtype}, not floating-point")
            return
        size = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        difference, cast = (actual.float() - expected).abs(), cast_error(expected, actual.dtype)
        rounding = cast + _FLOAT32_NOISE * size
        # In this form, a NaN counts as a problem.
        if not bool((difference <= rounding).all()):
            # If terms nearly cancel, rounding is large relative to their sum.
            merge = 2 * merge_error(self.expected.base[name], self._layers(name))
            rounding = torch.maximum(rounding, cast + merge)
        if not bool((difference <= rounding).all()):
            ratio = (difference / rounding).max().item()
            text = f"{name} differs in one number by {ratio:.2g} times the rounding of its dtype"
            self._problem(text)
        largest, allowed = ((error / size).max().item() for error in (difference, rounding))
        kind = f"{split_component(name)[0]} {self._layers(name)[0][0].kind_and_size}"
        old = self.report.kinds.get(kind, KindReport(0, -1.0, "", 0.0))
        worst = (old.largest, old.worst) if largest <= old.largest else (largest, name)
        report = KindReport(old.tensors + 1, *worst, max(allowed, old.allowed))
        self.report.kinds[kind] = report


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _problems_besides_weights(merged: StoredModel, base: StoredModel) -> Iterator[str]:
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
    """Return tensors without a component that the base lacks.

    If the base is a folder, only keys with a component's prefix count, since single files often
    contain tensors, such as the noise schedule, that are configs in folders.
    """
    stated = {*MARKERS, STEP}
    keys = [k for k in merged.other_specs if k not in stated and not k.endswith(BUFFERS)]
    if not base.is_single_file:
        return weights_of_no_component(keys)
    known = {standard_key(key) for key in base.other_specs}
    return [key for key in keys if standard_key(key) not in known]


def _recorded_strengths(merged: StoredModel, spec: MergeSpec) -> str:
    """Return a line on strengths if the merged model records others; else an empty text."""
    record = {
        sha256: strengths for _, sha256, strengths in recorded(merged.metadata.get(MERGED, ""))
    }
    if not record:
        return ""
    strength, knobs = spec.strengths.strength, list(spec.knobs().values())
    requested = {adapter_hash(path): [factor * strength, *knobs] for path, factor in spec.pairs}
    if record.keys() != requested.keys():
        return "the model's record names other adapters than these"
    if record == requested:
        return ""
    names = ("strength", "unet", "text encoder", "direction", "magnitude")
    named = (zip(names, strengths, strict=True) for strengths in record.values())
    texts = (", ".join(f"{name} {value:g}" for name, value in strengths) for strengths in named)
    return f"the model's record has other strengths: {'; '.join(texts)}"
