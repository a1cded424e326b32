"""The adapters that a run trains."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import nn

from dora_diffusion.adapters.compiled import compile_blocks
from dora_diffusion.adapters.fresh import InjectionReport
from dora_diffusion.adapters.inject import inject_adapters
from dora_diffusion.adapters.state import adapter_state, vera_state
from dora_diffusion.config import TrainConfig
from dora_diffusion.data.sampler import generator_for
from dora_diffusion.formats.adapter.targets.registry import check_target
from dora_diffusion.formats.adapter.vera import VeraLayer
from dora_diffusion.models.components import Components
from dora_diffusion.numerics.weights import LayerWeights
from dora_diffusion.training.recompute import checkpoint_gradients


@dataclass(frozen=True)
class TrainedAdapters:
    """Where fresh adapters are.

    Attributes:
        modules: The components that carry them, by name.
        report: Which of their layers.
    """

    modules: dict[str, nn.Module]
    report: InjectionReport

    def state(self) -> dict[str, LayerWeights]:
        """Copies of their tensors on the CPU, by canonical name."""
        return adapter_state(self.modules)

    def vectors(self) -> dict[str, VeraLayer]:
        """The same of a VeRA, compact; {} for all others."""
        return vera_state(self.modules)


def key_format_of_run(config: TrainConfig) -> str:
    """The key format that a run writes: Diffusers', which has no magnitudes on the input axis."""
    return "kohya" if config.use_dora and config.norm_axis == "input" else "diffusers"


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
    trained = TrainedAdapters(modules, report)
    # Not after hours of training.
    check_target(trained.state(), key_format_of_run(config))
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
