"""The adapters that a run trains."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dora_diffusion.adapters.compiled import compile_blocks
from dora_diffusion.adapters.fresh import InjectionReport
from dora_diffusion.adapters.inject import disabled, inject_adapters, remove_adapters
from dora_diffusion.adapters.state import (
    LiveWeights,
    adapter_state,
    load_adapter_state,
    vera_state,
)
from dora_diffusion.config import TrainConfig
from dora_diffusion.data.sampler import generator_for
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.formats.layouts import layout_named
from dora_diffusion.formats.layouts.vera import VeraLayer, digest_of, write_vera
from dora_diffusion.formats.names.unet import UNetLayout
from dora_diffusion.models.components import Components
from dora_diffusion.training.card import KOHYA_FILE
from dora_diffusion.training.checkpoint import parameters_by_name, tensors_by_name
from dora_diffusion.training.optimizer import parameter_groups
from dora_diffusion.training.recompute import checkpoint_gradients
from dora_diffusion.training.weights import Writer


@dataclass(frozen=True)
class TrainedAdapters:
    """Fresh adapters on a model, as `TrainedWeights`.

    Attributes:
        components: The model.
        modules: The components that carry them, by name.
        report: Which of their layers.
        key_format: Of their file, as `key_format_of_run` says.
    """

    components: Components
    modules: dict[str, nn.Module]
    report: InjectionReport
    key_format: str = "diffusers"

    noun = "adapter"
    holds_thumbnail = True
    are_small = True

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every trained parameter by component and path."""
        return parameters_by_name(self.modules)

    def tensors(self) -> dict[str, Tensor]:
        """Those, and what adapters hold beside."""
        return tensors_by_name(self.modules)

    def projections(self) -> dict[str, str]:
        """The digests of a VeRA's, by component."""
        layers = self.vectors()
        drawn = {name.partition(".")[0]: layer.projections for name, layer in layers.items()}
        return {component: digest_of(projections) for component, projections in drawn.items()}

    def groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """Parameters by component and role."""
        return parameter_groups(self.modules, config)

    def untrained(self) -> AbstractContextManager[None]:
        """The adapters are off inside of the block."""
        return disabled(*self.components.adaptable().values())

    def writer(self) -> Writer:
        """Writes the adapter where every tool reads it exactly.

        An output-axis adapter is written in the key format of Diffusers. That cannot hold a
        magnitude on the input axis, which therefore is written in kohya's.
        """
        layers = adapter_state(self.modules)

        def write(folder: Path, metadata: AdapterMetadata) -> Path:
            adapter = AdapterFile(layers, metadata)
            if self.key_format == "kohya":
                layout = UNetLayout.from_config(self.components.unet.config)
                file = folder / KOHYA_FILE
                return write_adapter(file, adapter, self.key_format, unet_layout=layout)
            return write_adapter(folder, adapter, self.key_format)

        return write

    def write_checkpoint(self, folder: Path, metadata: AdapterMetadata) -> Path:
        """Write the adapter; of a VeRA the compact file alone."""
        if vectors := self.vectors():
            return write_vera(folder, vectors, metadata)
        return self.writer()(folder, metadata)

    def check(self, written: Path) -> None:
        """Reading an adapter looks at each of its numbers."""
        read_adapter(written)

    def result(self, folder: Path) -> Path:
        """The run's folder itself."""
        return folder

    def write_copies(self, folder: Path, metadata: AdapterMetadata) -> None:
        """The compact file of a VeRA; ``dora-diffusion convert`` writes other forms."""
        if vectors := self.vectors():
            write_vera(folder, vectors, metadata)

    def reload(self, written: Path) -> None:
        """Replace the live adapter by what the file holds."""
        components = self.components.adaptable()
        for model in self.modules.values():
            remove_adapters(model)
        load_adapter_state(components, read_adapter(written, LiveWeights(components)).layers)

    def vectors(self) -> dict[str, VeraLayer]:
        """Copies of a VeRA's vectors on the CPU, by canonical name; {} for all others."""
        return vera_state(self.modules)


def key_format_of_run(config: TrainConfig) -> str:
    """The key format that a run writes: Diffusers', which has no magnitudes on the input axis."""
    on_input = config.method_name == "dora" and config.norm_axis == "input"
    return "kohya" if on_input else "diffusers"


def inject_trained(components: Components, config: TrainConfig) -> TrainedAdapters:
    """Put adapters on the components that train, and those into training mode.

    Raises:
        TargetError: If a target matches no layer.
        ValueError: If a rank is larger than a layer.
        AdapterFormatError: If the file that the run writes could not hold the adapter.
    """
    modules, layers = {}, []
    for name, model in components.adaptable().items():
        if name != "unet" and not config.train_text_encoder:
            continue
        adapter = config.unet_adapter if name == "unet" else config.text_encoder_adapter
        generator = generator_for("adapter", config.seed, name)
        layers += inject_adapters(model, adapter, generator=generator).layers
        modules[name] = model.train()
        if config.gradient_checkpointing:
            checkpoint_gradients(model, components.device.type)
        if config.compile and name == "unet":
            compile_blocks(model)
    report = InjectionReport(tuple(layers))
    _warn_of_unused_conv_settings(config, report)
    trained = TrainedAdapters(components, modules, report, key_format_of_run(config))
    # Not after hours of training.
    layout_named(trained.key_format).check(adapter_state(modules))
    return trained


def _warn_of_unused_conv_settings(config: TrainConfig, report: InjectionReport) -> None:
    """Say which settings of Conv2d layers have no effect, since none is adapted."""
    if any(layer.kind in ("Conv1d", "Conv2d") for layer in report.layers):
        return
    given = {
        "conv_rank": config.conv_rank != TrainConfig().conv_rank,
        "conv_alpha": config.conv_alpha not in (None, config.conv_rank),
    }
    for name in (name for name in given if given[name]):
        warnings.warn(f"{name} has no effect because targets name no Conv2d layer", stacklevel=4)
