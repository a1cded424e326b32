"""Full fine-tuning: weights of the model itself that a run trains."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from dora_diffusion.config import TrainConfig
from dora_diffusion.config.base import BaseModel
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
    TrainedAdapters,
    Writer,
    components_that_train,
    enter_training,
    matched,
)
from dora_diffusion.training.trainable.words import TrainedTokens

# Bytes of float32 per parameter that an optimizer keeps; adamw8bit quantises its two moments, and
# the last one keeps rows and columns of one.
_MOMENTS = {
    "adamw": 8, "adamw8bit": 2, "prodigy": 16, "adafactor": 0, "adamw-schedule-free": 8,
    "prodigy-schedule-free": 4,
}  # fmt: skip

MUCH = 0.9
"""Share of what was learned that a file should keep."""


@dataclass(frozen=True)
class FullReport:
    """Trained weights of full fine-tuning, and the disk space that they take.

    Attributes:
        tensors: Number of trained tensors.
        parameters: Numbers in them.
        model_bytes: Size of the model on disk.
        checkpoint_bytes: Of a checkpoint: the model, what trains and its average in float32, and
            moments.
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


@dataclass(frozen=True)
class FullWeights:
    """Weights of a model that train, with the methods of `TrainedAdapters`. They are float32.

    Attributes:
        components: The model.
        modules: The components that train, by name.
        trained: The parameters that train, by canonical name.
        config: Where the base is, and how the result is written.
        report: How much that is.
        base: Their values before training, where every step needs them.
        words: New words that train with them.
    """

    components: Components
    modules: dict[str, nn.Module]
    trained: dict[str, nn.Parameter]
    config: TrainConfig
    report: FullReport
    base: dict[str, Tensor] = field(default_factory=dict)
    words: TrainedTokens = field(default_factory=TrainedTokens)

    noun = "model"

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every trained parameter by canonical name."""
        return {**self.trained, **self.words.parameters()}

    def tensors(self) -> Mapping[str, Tensor]:
        return self.parameters()

    def projections(self) -> dict[str, str]:
        return {}

    @property
    def origin(self) -> dict[str, str]:
        return {}

    def start(self) -> dict[str, Any]:
        return {}

    def restore_start(self, start: Mapping[str, Any]) -> None:
        """Do nothing: the base model is what it starts from."""

    def groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """Parameters by component."""
        return weight_groups(self.trained, config) + self.words.groups(config)

    @contextmanager
    def base_weights(self) -> Iterator[None]:
        """The base's values are in the weights inside of the block; it may not train them."""
        base = self.base or self._read(self._source)
        trained: dict[str, Tensor] = {}
        caches = torch.is_autocast_cache_enabled()
        # Autocast caches casts by parameter, not by value: neither side may see the other's.
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
        """Return a function that writes the whole model as a Diffusers folder, in a given dtype.

        All processes call it where the model is sharded; the first one's writes.
        """
        values = {n: gather(p) if is_sharded(p) else p.detach() for n, p in self.trained.items()}
        return partial(self._export, values=values)

    def write_checkpoint(
        self, folder: Path, metadata: AdapterMetadata, values: Mapping[str, Tensor]
    ) -> Path:
        """The same as the result, with these values of what trains."""
        return self._export(folder, metadata, values)

    def check(self, written: Path) -> None:
        """Check what trains, one tensor at a time."""
        with open_model(str(written)) as model:
            wrong = [name for name in self.trained if not is_finite(model[name])]
        words = self.words.parameters()
        wrong += [name for name, rows in words.items() if not is_finite(rows.detach())]
        if wrong:
            raise ValueError(f"its {listing(wrong, 2)} holds numbers that are not finite")

    def result(self, folder: Path) -> Path:
        """The model's own folder in that of the run."""
        return folder / PIPELINE_NAME

    def write_copies(self, folder: Path, metadata: AdapterMetadata, write: Writer) -> None:
        """Write the whole model as one file in the original layout, where that was asked for."""
        if self.config.single_file:
            write(folder / f"{PIPELINE_NAME}.safetensors", metadata)

    def reload(self, written: Path) -> float:
        """Load the written values, which may be rounded.

        Returns:
            The share of what was learned that they keep, over all trained weights:
            ``1 - |written - trained| / |trained - base|``, and at least 0.

        Warns:
            UserWarning: If that is less than `MUCH`.
        """
        lost, moved = [0.0, 0.0], [0.0, 0.0]  # of weights that are sharded, and others
        with open_model(str(written)) as file, open_model(self._source) as base, torch.no_grad():
            for name, parameter in self.trained.items():
                own, other = local(parameter), not is_sharded(parameter)
                new, old = (own_part(parameter, model[name]).to(own) for model in (file, base))
                lost[other] += (new - own).square().sum().item()
                moved[other] += (own - old).square().sum().item()
                own.copy_(new)
            dtypes = {file.specs[name].dtype for name in self.trained}
        self.words.load(read_tokens(written))
        if any(map(is_sharded, self.trained.values())):
            sums = torch.tensor([lost[0], moved[0]], device=self.components.device)
            lost[0], moved[0] = add_up(sums).tolist()
        kept = max(0.0, 1 - (sum(lost) / sum(moved)) ** 0.5) if sum(moved) else 1.0
        if kept < MUCH:
            names = listing(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            warnings.warn(
                f"the model is saved in {names}, which keeps {kept:.0%} of what training changed: "
                "--save_precision float32 keeps all of it (a resumed run writes it again)",
                stacklevel=4,
            )
        return kept

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
        """The model that it was loaded from, where the hub's cache has it."""
        return replace(self.config.base_model, path=self.components.source)

    def _read(self, source: BaseModel) -> dict[str, Tensor]:
        """The values that a stored model has for what trains here, in float32 on its device."""
        device = self.components.device
        with open_model(source) as model:
            return {
                name: own_part(parameter, model[name]).to(device, torch.float32)
                for name, parameter in self.trained.items()
            }


TrainedWeights: TypeAlias = TrainedAdapters | FullWeights
"""Weights that a run trains."""


def select_weights(components: Components, config: TrainConfig) -> FullWeights:
    """Choose the weights that train, and put their components into training mode.

    Args:
        components: A model in float32.
        config: All settings.

    Raises:
        TargetError: If a target matches no layer.

    Warns:
        UserWarning: If the disk has no room for the result, or for a checkpoint.
    """
    modules, trained = components_that_train(components, config), {}
    for name, model in modules.items():
        wanted = _wanted(name, model, config)
        trained |= {canonical(name, path): parameter for path, parameter in wanted.items()}
        if components.device.type == "cpu" and config.mixed_precision == "bf16":
            widen_small_convolutions(model)
        enter_training(model, components, config)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    needs_base = config.holds_unmasked or any(s.is_image_free for s in config.subjects)
    base = {n: p.detach().clone() for n, p in trained.items()} if needs_base else {}
    count = sum(parameter.numel() for parameter in trained.values())
    with open_model(BaseModel(components.source, config.variant)) as stored:
        specs = MergedModel(stored, (), _dtype(config)).specs
        size = sum(spec.nbytes for spec in specs.values())
    is_averaged = config.is_schedule_free or config.ema_decay is not None
    checkpoint = size + count * (4 + 4 * is_averaged + _MOMENTS[config.optimizer_name])
    report = FullReport(len(trained), count, size, checkpoint)
    _check_disk(config, report)
    return FullWeights(components, modules, trained, config, report, base)


def widen_small_convolutions(model: nn.Module) -> None:
    """Make a model's convolutions compute as `convolve` does."""
    for module in model.modules():
        # Other modes pad before they convolve: every tap meets the map.
        if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros":
            module.forward = partial(_convolve, module)  # type: ignore[method-assign]


def _convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    settings = conv.stride, conv.padding, conv.dilation, conv.groups
    return convolve(x, conv.weight, conv.bias, *settings)


def check_weights(modules: Mapping[str, nn.Module], config: TrainConfig) -> None:
    """Check that targets name weights of each component.

    Raises:
        TargetError: If one matches no layer.
    """
    for name, model in modules.items():
        _wanted(name, model, config)


def _wanted(name: str, model: nn.Module, config: TrainConfig) -> dict[str, nn.Parameter]:
    """The parameters of a component that train: all, or those of the layers in its targets."""
    if config.full_weights != "targets":
        return dict(model.named_parameters())
    return {
        f"{path}.{own}": parameter
        for path in matched(name, model, config)
        for own, parameter in model.get_submodule(path).named_parameters()
    }


def _dtype(config: TrainConfig) -> torch.dtype | None:
    return None if config.save_precision is None else dtype_of(config.save_precision)


def _check_disk(config: TrainConfig, report: FullReport) -> None:
    """Warn before training of what will not fit on the disk after it."""
    output = Path(config.output_dir).resolve()
    place = next(folder for folder in (output, *output.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    needed = report.model_bytes * (2 if config.single_file else 1)
    if config.checkpointing_steps != 0:
        # A checkpoint is complete before the one that it replaces goes.
        kept = (config.checkpoints_total_limit or 1) + 1 + config.keep_best
        needed += kept * report.checkpoint_bytes
    if free < needed:
        warnings.warn(
            f"the disk has {_size(free)} free, and this run writes {_size(needed)} or more: free "
            "some space, set --checkpoints_total_limit 1, or --checkpointing_steps 0",
            stacklevel=3,
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
