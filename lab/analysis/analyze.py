"""Comparison of tuned weights with the base weights, one layer at a time.

Tuned weights are a run's checkpoints, an adapter, or a fully fine-tuned model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from os import PathLike, fspath
from pathlib import Path

import torch
from torch import Tensor

from dora_diffusion.config.adapter import NORM_AXES
from dora_diffusion.config.base import AnyModel, BaseModel
from dora_diffusion.config.fields import require_choice
from dora_diffusion.config.wording import listing
from dora_diffusion.export.files import ExportError, model_name, open_model
from dora_diffusion.export.metadata import trained_steps
from dora_diffusion.formats.adapter.file import AdapterFile, read_adapter
from dora_diffusion.formats.adapter.metadata import parse_metadata
from dora_diffusion.formats.adapter.stored import find_adapter
from dora_diffusion.formats.checkpoint.models import (
    PipelineFolder,
    StoredModel,
    comparable_shapes,
    is_model,
)
from dora_diffusion.formats.checkpoint.weights import (
    ModelWeights,
    check_dtype,
    module_weight,
)
from dora_diffusion.formats.files.runs import pipeline_in
from dora_diffusion.formats.files.stream import read_header
from dora_diffusion.formats.layouts.layout import AdapterFormatError
from dora_diffusion.numerics.merging import merge_tensor
from dora_diffusion.numerics.weights import (
    LayerWeights,
    NormAxis,
    Strengths,
    out_in,
)
from dora_diffusion.training.results.checkpoint import folders_after, step_of
from lab.analysis.decomposition import (
    decompose,
    effective_rank,
    low_rank_singular_values,
    singular_values,
)
from lab.analysis.report import (
    LEADING,
    Analysis,
    CheckpointChange,
    LayerChange,
    RunChange,
    Spectrum,
    is_table,
    model_order,
)

# Called with (completed layers, total layers).
Progress = Callable[[int, int], None]


def analyze_weights(
    sources: str | PathLike[str] | Sequence[str | PathLike[str]],
    base: AnyModel,
    *,
    norm_axis: NormAxis = "output",
    layers: Sequence[str] = ("*",),
    alpha: float | None = None,
    on_progress: Progress | None = None,
) -> Analysis:
    """Analyze how training changed a model's weights, as in section 3.2 of the DoRA paper.

    Computes for each layer and checkpoint the changes of magnitude and direction of its channels,
    and singular values and effective rank of its change; over layers, the correlation of magnitude
    and direction, and the share of each part of the model. One weight is in memory at a time.

    Args:
        sources: One source, or several to compare: the output folder of a run (all its
            checkpoints), an adapter, or a model that was trained from the base or merged.
        base: The model before training: a Diffusers folder, a hub id, ``embedded:NAME`` or a
            single-file checkpoint; or one of these as a `BaseModel`.
        norm_axis: Axis of the channels: ``"output"`` or ``"input"``, regardless of an adapter's.
        layers: Patterns of canonical layer names, such as ``"*.to_q"``; ``*`` also matches dots.
        alpha: Alpha of an adapter whose file does not contain it.
        on_progress: Called with (completed layers, total layers).

    Raises:
        ExportError: If there are no sources, a model was not trained from this base, or no layer
            was changed.
        AdapterFormatError: If an adapter cannot be read, or does not fit the base.
        MergeError: If a layer is stored in 8 bits or less.

    Example:
        >>> analyze_weights("embedded:tiny-sd", base="embedded:tiny-sd")
        Traceback (most recent call last):
            ...
        dora_diffusion.export.files.ExportError: embedded:tiny-sd: no layer differs from the base's
    """
    paths = [sources] if isinstance(sources, (str, PathLike)) else list(sources)
    if not paths:
        raise ExportError("no run, adapter or model to analyze was given")
    require_choice("norm_axis", norm_axis, NORM_AXES)
    saved_runs = [find_run(fspath(path)) for path in paths]
    names = [source.name for source in saved_runs]
    total = sum(len(source.checkpoints) for source in saved_runs)
    with open_model(base) as model:
        analyzer = _Analyzer(model, norm_axis, layers, alpha, on_progress, total)
        runs = [
            analyzer.run(source, source.name if names.count(source.name) == 1 else str(path))
            for path, source in zip(paths, saved_runs, strict=True)
        ]
        path = BaseModel.of(base).path
        name = model_name(model.path) if Path(path).exists() else str(path)
    return Analysis(name, norm_axis, tuple(layers), runs)


@dataclass
class _Analyzer:
    """Analyzer of checkpoints of one base.

    Progress assumes that the ``left`` remaining checkpoints have as many layers as the open one.
    """

    base: StoredModel
    axis: NormAxis
    patterns: Sequence[str]
    alpha: float | None
    on_progress: Progress | None
    left: int
    done: int = 0
    total: int = 0

    def run(self, source: SavedRun, name: str) -> RunChange:
        checkpoints: list[CheckpointChange] = []
        notes: list[str] = []
        for step, path in source.checkpoints:
            with open_tuned(path, self.base, self.alpha) as tuned:
                change = self._checkpoint(tuned, name, step)
                notes += tuned.notes
            if change.layers:
                checkpoints.append(change)
            else:
                notes.append(f"{change.label}: no layer differs from the base's")
        if not checkpoints:
            raise ExportError(f"{name}: no layer differs from the base's")
        return RunChange(name, checkpoints, tuple(dict.fromkeys(notes)))

    def _checkpoint(self, tuned: TunedWeights, run: str, step: int | None) -> CheckpointChange:
        names = [n for n in tuned.names if any(fnmatchcase(n, p) for p in self.patterns)]
        if not names:
            raise ExportError(
                f"{run}: no layer matches {' or '.join(self.patterns)}; it has "
                f"{listing(tuned.names, 3)}"
            )
        self.total = self.done + self.left * len(names)
        self.left -= 1
        changes = [self._layer(tuned, name) for name in sorted(names, key=model_order)]
        layers = [change for change in changes if change is not None]
        return CheckpointChange(
            step, tuned.method, layers, len(names) - len(layers), tuned.other_changes(self.base)
        )

    def _layer(self, tuned: TunedWeights, name: str) -> LayerChange | None:
        """Compute the change of a layer; None if it did not change."""
        base = module_weight(self.base, name)
        weight, factors = tuned.weight(name, base), tuned.factors(name)
        self.done += 1
        if self.on_progress is not None:
            self.on_progress(self.done, self.total)
        if is_table(name):
            # As in adapters: output channels are dimensions of the vectors, inputs are rows.
            base, weight = out_in(base, "embedding"), out_in(weight, "embedding")
        decomposition = decompose(base, weight, self.axis)
        if not decomposition.squared_change:
            return None
        low_rank = None if factors is None else low_rank_singular_values(factors)
        if factors is not None and factors.magnitude is None and low_rank is not None:
            return LayerChange(name, tuple(base.shape), decomposition, _spectrum(low_rank))
        update = _spectrum(singular_values(base, weight))
        inner_spectrum = None if low_rank is None else _spectrum(low_rank)
        return LayerChange(name, tuple(base.shape), decomposition, update, inner_spectrum)


def _spectrum(values: Tensor) -> Spectrum:
    return Spectrum(tuple(values[:LEADING].tolist()), effective_rank(values))


@dataclass(frozen=True)
class SavedRun:
    """Source of an analysis: the checkpoints of a run, or a single adapter or model.

    Attributes:
        name: Name of its file or folder, or of the model.
        checkpoints: Adapters or models in order, each with its step, or None if that is unknown.
    """

    name: str
    checkpoints: Sequence[tuple[int | None, Path | str]]


def find_run(source: str | Path) -> SavedRun:
    """Find the checkpoints of a path or a model's name.

    A run has the checkpoints of its training, and its result if that is at another step.

    Raises:
        FileNotFoundError: If the path does not exist.
        AdapterFormatError: If a folder contains no adapter or model.
    """
    path = Path(source).expanduser()
    checkpoints: list[tuple[int | None, Path | str]] = [
        (step_of(folder), folder) for folder in folders_after(path, -1) if _is_checkpoint(folder)
    ]
    if not checkpoints or _is_checkpoint(path):
        step = _trained_steps(source)
        if step is None or step not in [step for step, _ in checkpoints]:
            checkpoints.append((step, source))
    name = model_name(path) if path.exists() else str(source)
    return SavedRun(name.removesuffix(".safetensors"), checkpoints)


def _is_checkpoint(folder: Path) -> bool:
    """Return whether a folder contains an adapter or a model."""
    try:
        return is_model(folder) or bool(find_adapter(folder))
    except (AdapterFormatError, FileNotFoundError):
        return False


def _trained_steps(source: str | Path) -> int | None:
    """Read the number of training steps from the metadata of an adapter or a model."""
    path = Path(source).expanduser()
    if path.is_dir() and (folder := pipeline_in(path)):
        return trained_steps(PipelineFolder(folder).metadata)
    if names_model(source) or (file := find_adapter(source)).suffix != ".safetensors":
        return None
    steps = parse_metadata(read_header(file).metadata).extra.get("training_steps", "")
    return int(steps) if steps.isdecimal() else None


def names_model(source: str | Path) -> bool:
    """Return whether a source is a whole model: a pipeline's folder, a single file, or a name."""
    path = Path(source).expanduser()
    # A missing path with this suffix is a missing file, not a model's name.
    return is_model(path) if path.exists() else path.suffix != ".safetensors"


@contextlib.contextmanager
def open_tuned(
    source: str | Path, base: StoredModel, alpha: float | None = None
) -> Iterator[TunedWeights]:
    """Open a checkpoint, and close its files afterwards.

    Args:
        source: An adapter, or a model.
        base: Base model of its training.
        alpha: Alpha of an adapter whose file does not contain it.

    Raises:
        ExportError: If a model does not have the base's layers.
        AdapterFormatError: If an adapter cannot be read, or does not fit the base.
    """
    if names_model(source):
        with open_model(source) as model:
            yield TunedModel(model, base)
        return
    adapter = read_adapter(source, base, sums=True)
    notes = adapter.assumptions
    if alpha is not None and adapter.lacks_alpha:
        adapter, notes = read_adapter(source, base, alpha=alpha, sums=True), ()
    elif alpha is not None:
        notes = (f"alpha {alpha:g} has no effect: the file contains its own",)
    yield TunedAdapter(adapter, notes)


class TunedAdapter:
    """Base weights with an adapter applied, in float64.

    Attributes:
        method: ``"DoRA"``, ``"LoRA"`` or ``"DoRA and LoRA"``.
        names: Canonical names of the modules whose weight may differ from the base's.
        notes: Limitations of the figures, one line each.
    """

    def __init__(self, adapter: AdapterFile, notes: Sequence[str]) -> None:
        self._adapter, self.notes = adapter, notes
        self.names = [*adapter.layers, *(n for n in adapter.beside if n not in adapter.layers)]
        layers = [*adapter.layers.values(), *adapter.beside.values()]
        kinds = {"LoRA" if layer.magnitude is None else "DoRA" for layer in layers}
        self.method = " and ".join(sorted(kinds))

    def _layers(self, name: str) -> list[LayerWeights]:
        sources = (self._adapter.layers, self._adapter.beside)
        return [layers[name] for layers in sources if name in layers]

    def weight(self, name: str, base: Tensor) -> Tensor:
        """``W'``, not rounded to the base's dtype, which would lose small changes."""
        layers = [(layer, Strengths()) for layer in self._layers(name)]
        return merge_tensor(base.double(), layers, torch.float64)

    def factors(self, name: str) -> LayerWeights | None:
        """Return the low-rank layer of a module; None if it has a DoRA and a LoRA."""
        layers = self._layers(name)
        return layers[0] if len(layers) == 1 else None

    def other_changes(self, base: ModelWeights) -> int:
        """Number of changed tensors without channels: 0, since only weights are adapted."""
        return 0


class TunedModel:
    """A fully fine-tuned or merged model, with the methods of `TunedAdapter`."""

    method = "model"

    def __init__(self, model: StoredModel, base: StoredModel) -> None:
        self._model = model
        shapes, base_shapes = comparable_shapes(model, base)
        different = [name for name in base_shapes if shapes.get(name) != base_shapes[name]]
        if different or shapes.keys() - base_shapes.keys():
            examples = listing(different or shapes.keys() - base_shapes.keys(), 3)
            raise ExportError(
                f"{model.path.name} was not trained from {base.path.name}: they differ in the "
                f"layers {examples}; give the base model of its training with --base"
            )
        self.names = list(base_shapes)
        specs = [
            (model.specs[f"{name}.weight"], base.specs[f"{name}.weight"]) for name in base_shapes
        ]
        for name, (spec, _) in zip(base_shapes, specs, strict=True):
            check_dtype(name, spec.dtype)
        rounded = sorted({str(spec.dtype)[6:] for spec, before in specs if spec != before})
        self.notes = [
            f"stored as {' and '.join(rounded)}, unlike the base: rounding counts as change"
        ] * bool(rounded)

    def weight(self, name: str, base: Tensor) -> Tensor:
        return self._model[f"{name}.weight"]

    def factors(self, name: str) -> LayerWeights | None:
        """None: a model does not contain low-rank factors."""
        return None

    def other_changes(self, base: ModelWeights) -> int:
        """Number of changed tensors of UNet and text encoders without channels, such as biases."""
        measured = {f"{name}.weight" for name in self.names}
        comparable = [
            name
            for name, spec in base.specs.items()
            if name in self._model.specs
            and name not in measured
            and not name.startswith("vae.")
            and spec.dtype.is_floating_point
        ]
        return sum(not torch.equal(self._model[n].double(), base[n].double()) for n in comparable)


TunedWeights = TunedAdapter | TunedModel
"""Tuned weights of one checkpoint."""
