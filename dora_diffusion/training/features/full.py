"""Full fine-tuning: training of the model's own weights."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dora_diffusion.config import TrainConfig
from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.features.average import SCHEDULE_FREE
from dora_diffusion.config.wording import listing
from dora_diffusion.export.checkpoint import export_trained
from dora_diffusion.export.files import open_model
from dora_diffusion.export.merged import MergedModel
from dora_diffusion.formats.adapter.embeddings import read_tokens
from dora_diffusion.formats.adapter.metadata import AdapterMetadata
from dora_diffusion.formats.files.runs import PIPELINE_NAME
from dora_diffusion.formats.names.modules import canonical
from dora_diffusion.models.components import Components
from dora_diffusion.models.precision import dtype_of
from dora_diffusion.numerics.merging import is_finite
from dora_diffusion.numerics.operation import convolve
from dora_diffusion.training.features.code import FeatureCode, Select
from dora_diffusion.training.optimizer import weight_groups
from dora_diffusion.training.processes import (
    add_up,
    exchange,
    gather,
    is_sharded,
    local,
    own_part,
)
from dora_diffusion.training.trainable.adapters import (
    StartingAdapter,
    components_that_train,
    enter_training,
    matched,
)
from dora_diffusion.training.trainable.weights import TrainedWeights, Writer

# Bytes of optimizer state per parameter. adamw8bit quantises both moments, and
# prodigy-schedule-free reduces one of them to rows and columns.
_MOMENTS = {
    "adamw": 8, "adamw8bit": 2, "prodigy": 16, "adafactor": 0, "adamw-schedule-free": 8,
    "prodigy-schedule-free": 4,
}  # fmt: skip

MUCH = 0.9
"""Share of the changes that a file should preserve."""


@dataclass(frozen=True)
class FullReport:
    """Summary of full fine-tuning: trained weights and disk space.

    Attributes:
        tensors: Number of trained tensors.
        parameters: Number of trained parameters.
        model_bytes: Size of the model on disk.
        checkpoint_bytes: Size of a checkpoint: model, trained weights and their average in float32,
            and optimizer state.
    """

    tensors: int
    parameters: int
    model_bytes: int
    checkpoint_bytes: int

    def __str__(self) -> str:
        return (
            f"full fine-tuning of {self.tensors} tensors, {self.parameters:,} parameters (on disk "
            f"{_size(self.model_bytes)}, each checkpoint {_size(self.checkpoint_bytes)})"
        )


class FullCode(FeatureCode):
    """Full fine-tuning in a run."""

    def weights(
        self, select: Select, components: Components, start: StartingAdapter | None
    ) -> FullWeights:
        return select_weights(components, self.config)


@dataclass(frozen=True, kw_only=True)
class FullWeights(TrainedWeights):
    """Trained float32 weights of a model.

    Attributes:
        config: Settings, including the base model and the format of the result.
        base: Values of `trained` before training, if they are kept.
    """

    config: TrainConfig
    report: FullReport
    base: dict[str, Tensor] = field(default_factory=dict)

    noun = "model"

    def parameters(self) -> dict[str, nn.Parameter]:
        return {**self.trained, **self.words.parameters()}

    def tensors(self) -> Mapping[str, Tensor]:
        return self.parameters()

    def groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        return weight_groups(self.trained, config) + self.words.groups()

    @contextmanager
    def base_weights(self, *, keep: bool = False) -> Iterator[None]:
        base = self.base or self._read(self._source)
        if keep:
            self.base.update(base)
        trained: dict[str, Tensor] = {}
        caches = torch.is_autocast_cache_enabled()
        # Autocast caches casts by parameter, not by value, so that its cache must be off.
        torch.set_autocast_cache_enabled(False)
        try:
            for name, parameter in self.trained.items():
                trained[name] = exchange(parameter, base[name])
            with self.words.at_start():
                yield
        finally:
            for name, values in trained.items():
                exchange(self.trained[name], values)
            torch.set_autocast_cache_enabled(caches)

    def writer(self) -> Writer:
        """Return a function that writes the whole model as a Diffusers folder."""
        values = {n: gather(p) if is_sharded(p) else p.detach() for n, p in self.trained.items()}
        return partial(self._export, values=values)

    def write_checkpoint(
        self, folder: Path, metadata: AdapterMetadata, values: Mapping[str, Tensor]
    ) -> Path:
        return self._export(folder, metadata, values)

    def check(self, written: Path) -> None:
        """Check that the trained weights are finite, one tensor at a time."""
        with open_model(str(written)) as model:
            wrong = [name for name in self.trained if not is_finite(model[name])]
        words = self.words.parameters()
        wrong += [name for name, rows in words.items() if not is_finite(rows.detach())]
        if wrong:
            raise ValueError(f"{listing(wrong, 2)} contains values that are not finite")

    def result(self, folder: Path) -> Path:
        """Return the folder of the model inside the output folder of the run."""
        return folder / PIPELINE_NAME

    def write_copies(self, folder: Path, metadata: AdapterMetadata, write: Writer) -> None:
        """Write the whole model as one file in the original layout, if ``single_file`` is set."""
        if self.config.single_file:
            write(folder / f"{PIPELINE_NAME}.safetensors", metadata)

    def reload(self, written: Path) -> float:
        """Load the written weights, which may be rounded.

        Returns:
            Share of the changes that the file preserves, over all trained weights:
            ``1 - |written - trained| / |trained - base|``, at least 0.

        Warns:
            UserWarning: If the share is less than `MUCH`.
        """
        lost, moved = [0.0, 0.0], [0.0, 0.0]  # Sums over sharded weights and over the others.
        with open_model(str(written)) as file, open_model(self._source) as base, torch.no_grad():
            for name, parameter in self.trained.items():
                shard, is_whole = local(parameter), not is_sharded(parameter)
                new, old = (own_part(parameter, model[name]).to(shard) for model in (file, base))
                lost[is_whole] += (new - shard).square().sum().item()
                moved[is_whole] += (shard - old).square().sum().item()
                shard.copy_(new)
            dtypes = {file.specs[name].dtype for name in self.trained}
        self.words.load(read_tokens(written))
        if any(map(is_sharded, self.trained.values())):
            sums = torch.tensor([lost[0], moved[0]], device=self.components.device)
            lost[0], moved[0] = add_up(sums).tolist()
        preserved = max(0.0, 1 - (sum(lost) / sum(moved)) ** 0.5) if sum(moved) else 1.0
        if preserved < MUCH:
            names = listing(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            warnings.warn(
                f"the model is saved in {names}, which preserves {preserved:.0%} of the changes: "
                "resume with --save_precision float32 to preserve all of them",
                stacklevel=4,
            )
        return preserved

    def _export(
        self, output: Path, metadata: AdapterMetadata, values: Mapping[str, Tensor]
    ) -> Path:
        config = self.config
        folder = output.parent if output.suffix == ".safetensors" else output
        written = export_trained(
            self._source,
            {name: values[name].cpu for name in self.trained},
            output,
            metadata,
            words=self.words.files(folder),
            dtype=_dtype(config),
        )
        self.words.write(folder)
        return written

    @property
    def _source(self) -> BaseModel:
        """The stored base model; for a hub id, its folder in the cache."""
        return replace(self.config.base_model, path=self.components.source)

    def _read(self, source: BaseModel) -> dict[str, Tensor]:
        """Read the trained weights' values from a stored model, in float32 on the device."""
        device = self.components.device
        with open_model(source) as model:
            return {
                name: own_part(parameter, model[name]).to(device, torch.float32)
                for name, parameter in self.trained.items()
            }


def select_weights(components: Components, config: TrainConfig) -> FullWeights:
    """Select the trained weights, and set their components to training mode.

    Args:
        components: A model in float32.
        config: All settings.

    Raises:
        TargetError: If a target matches no layer.

    Warns:
        UserWarning: If the disk has no space for result and checkpoints.
    """
    modules, trained = components_that_train(components, config), {}
    for name, model in modules.items():
        parameters = _parameters_to_train(name, model, config)
        trained |= {canonical(name, path): parameter for path, parameter in parameters.items()}
        if components.device.type == "cpu" and config.mixed_precision == "bf16":
            widen_small_convolutions(model)
        enter_training(model, components, config)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    count = sum(parameter.numel() for parameter in trained.values())
    with open_model(BaseModel(components.source, config.variant)) as stored:
        specs = MergedModel(stored, (), _dtype(config)).specs
        size = sum(spec.nbytes for spec in specs.values())
    is_averaged = config.optimizer in SCHEDULE_FREE or config.ema_decay is not None
    checkpoint = size + count * (4 + 4 * is_averaged + _MOMENTS[config.optimizer])
    report = FullReport(len(trained), count, size, checkpoint)
    _check_disk(config, report)
    return FullWeights(
        components=components, modules=modules, report=report, config=config,
        trained=trained,
    )  # fmt: skip


def widen_small_convolutions(model: nn.Module) -> None:
    """Replace the forward pass of a model's convolutions by `convolve`."""
    for module in model.modules():
        # Other padding modes pad before the convolution, so that every tap meets the input.
        if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros":
            module.forward = partial(_convolve, module)  # type: ignore[method-assign]


def _convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    settings = conv.stride, conv.padding, conv.dilation, conv.groups
    return convolve(x, conv.weight, conv.bias, *settings)


def _parameters_to_train(
    name: str, model: nn.Module, config: TrainConfig
) -> dict[str, nn.Parameter]:
    """Return all parameters of a component, or the parameters of its targets."""
    if config.full_weights != "targets":
        return dict(model.named_parameters())
    return {
        f"{path}.{suffix}": parameter
        for path in matched(name, model, config)
        for suffix, parameter in model.get_submodule(path).named_parameters()
    }


def _dtype(config: TrainConfig) -> torch.dtype | None:
    return None if config.save_precision is None else dtype_of(config.save_precision)


def _check_disk(config: TrainConfig, report: FullReport) -> None:
    """Warn if result and checkpoints will not fit on the disk."""
    output = Path(config.output_dir).resolve()
    existing = next(folder for folder in (output, *output.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    needed = report.model_bytes * (2 if config.single_file else 1)
    if config.checkpointing_steps != 0:
        # A new checkpoint is complete before an old one is removed.
        checkpoints = (config.checkpoints_total_limit or 1) + 1 + config.keep_best
        needed += checkpoints * report.checkpoint_bytes
    if free < needed:
        warnings.warn(
            f"the disk has {_size(free)} free, but this run writes {_size(needed)} or more: free "
            "some space, set --checkpoints_total_limit 1, or --checkpointing_steps 0",
            stacklevel=3,
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
