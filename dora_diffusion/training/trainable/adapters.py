"""Trained adapters of a run, and training mode of components."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dora_diffusion.adapters.fresh import InjectionReport
from dora_diffusion.adapters.inject import (
    disabled,
    inject_adapters,
    layers_to_adapt,
    remove_adapters,
)
from dora_diffusion.adapters.layers import adapted_layers
from dora_diffusion.adapters.state import (
    LiveWeights,
    adapter_state,
    by_component,
    load_adapter_state,
    read_for,
    vera_state,
)
from dora_diffusion.adapters.targets import (
    TargetError,
    check_pattern,
    first_naming,
    match_targets,
)
from dora_diffusion.config import AdapterConfig, ConfigError, TrainConfig
from dora_diffusion.config.adapter import PATTERNS
from dora_diffusion.config.families import DENOISERS
from dora_diffusion.config.wording import listing
from dora_diffusion.data.sampler import generator_for
from dora_diffusion.formats.adapter.embeddings import Vectors
from dora_diffusion.formats.adapter.file import AdapterFile, read_adapter, write_adapter
from dora_diffusion.formats.adapter.metadata import AdapterMetadata
from dora_diffusion.formats.adapter.stored import StoredAdapter, adapter_hash
from dora_diffusion.formats.files.runs import INPUT_AXIS_FILES
from dora_diffusion.formats.layouts import input_format
from dora_diffusion.formats.layouts.dotted import DIFFUSERS
from dora_diffusion.formats.layouts.layout import layout_named
from dora_diffusion.formats.names.modules import UNetLayout
from dora_diffusion.models.components import Components
from dora_diffusion.models.locate import ModelNotFoundError, resolve_adapter
from dora_diffusion.numerics.devices import keeps_random_state, random_state, set_random_state
from dora_diffusion.numerics.weights import LayerWeights
from dora_diffusion.training.optimizer import parameter_groups
from dora_diffusion.training.trainable.weights import TrainedWeights, Writer


@dataclass(frozen=True, kw_only=True)
class TrainedAdapters(TrainedWeights):
    """Trained adapters on a model, new or started from another adapter.

    Attributes:
        key_format: Key format of the adapter file: Diffusers' format, or for magnitudes on the
            input axis `input_format`.
    """

    report: InjectionReport
    key_format: str = "diffusers"

    noun = "adapter"

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.words.parameters() | {
            f"{path}.{name}": parameter
            for path, adapters in self._adapters()
            for name, parameter in adapters.named_parameters()
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint: parameters and buffers, such as initial factors."""
        return self.parameters() | {
            f"{path}.{name}": buffer
            for path, adapters in self._adapters()
            for name, buffer in adapters.named_buffers()
        }

    def projections(self) -> dict[str, str]:
        """Return digests of the random projections of VeRA, by component."""
        if not (layers := vera_state(self.modules)):
            return {}
        from dora_diffusion.formats.layouts.vera import digest_of

        drawn = {name.partition(".")[0]: layer.projections for name, layer in layers.items()}
        return {component: digest_of(projections) for component, projections in drawn.items()}

    def start(self) -> dict[str, Any]:
        alpha = {path: next(iter(adapters.values())).alpha for path, adapters in self._adapters()}
        return {"origin": dict(self.origin), "alpha": alpha}

    def restore_start(self, start: Mapping[str, Any]) -> None:
        self.origin.update(start["origin"])
        for path, adapters in self._adapters():
            next(iter(adapters.values())).alpha = start["alpha"][path]

    def _adapters(self) -> Iterator[tuple[str, Any]]:
        """Yield the adapters of each layer, by component and path."""
        for component, model in self.modules.items():
            for path, layer in adapted_layers(model):
                yield f"{component}.{path}", layer.adapters

    def groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        return parameter_groups(self.modules, config) + self.words.groups()

    @contextmanager
    def base_weights(self, *, keep: bool = False) -> Iterator[None]:
        """Disable adapters and restore the initial vectors of new words inside the block."""
        with disabled(*self.components.adaptable().values()), self.words.at_start():
            yield

    def writer(self) -> Writer:
        layers, tokens = adapter_state(self.modules), self.words.tokens()

        def write(folder: Path, metadata: AdapterMetadata) -> Path:
            adapter = AdapterFile(layers, metadata, tokens=tokens)
            file = folder / INPUT_AXIS_FILES.get(self.key_format, DIFFUSERS.file_name)
            layout = UNetLayout.of(self.components.denoiser.config)
            return write_adapter(file, adapter, self.key_format, unet_layout=layout)

        return write

    def write_checkpoint(
        self, folder: Path, metadata: AdapterMetadata, values: Mapping[str, Tensor]
    ) -> Path:
        """Write the adapter of a checkpoint; for VeRA only its compact file."""
        if vera_state(self.modules):
            return self.write_copies(folder, metadata)
        return self.writer()(folder, metadata)

    def check(self, written: Path) -> None:
        read_adapter(written)  # It checks all values.

    def result(self, folder: Path) -> Path:
        return folder

    def write_copies(
        self, folder: Path, metadata: AdapterMetadata, write: Writer | None = None
    ) -> Path:
        """Write the compact file of VeRA. Command ``convert`` writes other formats."""
        if vectors := vera_state(self.modules):
            from dora_diffusion.formats.layouts.vera import write_vera

            extra = {**metadata.extra, **self.words.write(folder)}
            return write_vera(folder, vectors, replace(metadata, extra=extra))
        return folder

    def reload(self, written: Path) -> float | None:
        components = self.components.adaptable()
        for model in self.modules.values():
            remove_adapters(model)
        adapter = read_adapter(written, LiveWeights(components))
        load_adapter_state(components, adapter.layers)
        self.words.load(adapter.tokens)
        return None


@dataclass(frozen=True)
class StartingAdapter:
    """Adapter that a run starts from.

    Attributes:
        path: File or folder of the adapter.
        name: Value of ``init_adapter``.
        layers: Weights by component and path, after `read`.
        tokens: Trained tokens, from which new words of the run start.
    """

    path: Path
    name: str
    layers: Mapping[str, Mapping[str, LayerWeights]] = field(default_factory=dict)
    tokens: Mapping[str, Vectors] = field(default_factory=dict)

    @classmethod
    def of(cls, config: TrainConfig) -> StartingAdapter | None:
        """Find ``init_adapter``. Returns None if it is not set or a checkpoint is resumed.

        Raises:
            ConfigError, AdapterFormatError: If it does not exist, is not an adapter, or is a LoKr.
        """
        name = config.init_adapter
        if not name or not config.trains_adapters or config.resume_from_checkpoint:
            return None
        try:
            stored = StoredAdapter.open(resolve_adapter(name))
        except (FileNotFoundError, ModelNotFoundError) as error:
            raise ConfigError(f"init_adapter: {error}", "init_adapter") from error
        if stored.layout.name == "lokr":
            raise ConfigError(
                f"init_adapter {name} is a LoKr, whose factors are not trained here; convert it "
                "first with 'dora-diffusion convert ADAPTER OUTPUT --to lora --rank RANK --base "
                "MODEL' (or --to smaller-rank, to a DoRA), and start from OUTPUT",
                "init_adapter",
            )
        return cls(stored.path, name)

    def read(self, components: Components, config: TrainConfig) -> StartingAdapter:
        """Read the weights for a model, and check that the run's adapters can start from them.

        Raises:
            ConfigError, AdapterFormatError: If they cannot.
        """
        live, trained = components.adaptable(), components_that_train(components, config)
        remedy = (
            "set the right one first with 'dora-diffusion convert ADAPTER OUTPUT --to diffusers "
            "--alpha ALPHA'"
        )
        adapter = read_for(live, self.path, remedy, family=components.family.name)
        words = config.describe().words
        if lost := [token for token in adapter.tokens if token not in words]:
            raise ConfigError(
                f"init_adapter {self.name} has trained tokens, {listing(lost)}, which the run "
                "would neither train nor write; add --train_text_encoder_ti --new_words "
                f"{' '.join(adapter.tokens)}",
                "init_adapter",
            )
        layers = {name: part for name, part in by_component(live, adapter.layers).items() if part}
        if left := layers.keys() - trained.keys():
            raise ConfigError(
                f"init_adapter {self.name} has layers of {listing(left)}, which the run does not "
                "train; add --train_text_encoder (--text_encoder_lr 0 leaves them unchanged)",
                "init_adapter",
            )
        adapters = adapter_configs(trained, config)
        for name, part in layers.items():
            try:
                layers_to_adapt(trained[name], adapters[name], part)
            except ValueError as error:
                raise ConfigError(
                    f"init_adapter {self.name} cannot start the {name}: {error}", "init_adapter"
                ) from error
        return StartingAdapter(self.path, self.name, layers, adapter.tokens)

    def origin(self) -> dict[str, str]:
        """Return name and digest as metadata."""
        path = Path(self.name).expanduser()
        name = path.resolve().name if path.exists() else self.name  # Keep a hub id as it is.
        return {"init_adapter": name, "init_adapter_sha256": adapter_hash(self.path)}


def adapter_configs(
    modules: Mapping[str, nn.Module], config: TrainConfig
) -> dict[str, AdapterConfig]:
    """Return the adapter settings of each component, with the patterns that match its layers.

    Raises:
        TargetError: If a target matches no layer of a component, or a pattern no layer at all.
    """
    adapters = {name: config.adapter(name) for name in modules}
    layers = {}
    for name, model in modules.items():
        layers[name] = {path: model.get_submodule(path) for path in matched(name, model, config)}
    for setting in (*PATTERNS, "lr_pattern"):
        check_pattern(setting, getattr(config, setting), layers.values())

    for name, adapter in adapters.items():
        patterns: dict[str, Any] = {}
        for setting in PATTERNS:
            pattern = getattr(adapter, setting)
            used = {first_naming(pattern, *layer) for layer in layers[name].items()}
            patterns[setting] = {target: pattern[target] for target in pattern if target in used}
        adapters[name] = replace(adapter, **patterns)
    return adapters


def matched(component: str, model: nn.Module, config: TrainConfig) -> list[str]:
    """Return the paths of a component's layers that the targets match.

    Raises:
        TargetError: If a target matches no layer.
    """
    setting = "targets" if component in DENOISERS else "text_encoder_targets"
    try:
        return match_targets(model, getattr(config, setting))
    except TargetError as error:
        raise TargetError(f"{setting}: {error}") from error


def inject_trained(
    components: Components, config: TrainConfig, start: StartingAdapter | None = None
) -> TrainedAdapters:
    """Inject adapters into the trained components, and set these to training mode.

    Args:
        components: The model.
        config: All settings.
        start: Adapter to start from. Default: adapters are initialized.

    Raises:
        TargetError: If a target matches no layer.
        ValueError: If a rank is larger than a layer.
        AdapterFormatError: If the key format of the result cannot represent the adapter.
    """
    modules, layers = components_that_train(components, config), []
    adapters = adapter_configs(modules, config)
    for name, model in modules.items():
        adapter, other = adapters[name], start.layers.get(name) if start else None
        generator = generator_for("adapter", config.seed, name)
        layers += inject_adapters(model, adapter, generator=generator, start=other).layers
        enter_training(model, components, config)
    origin = start.origin() if start else {}
    report = InjectionReport(tuple(layers))
    _warn_of_unused_conv_settings(config, report)
    on_input = config.method_name == "dora" and config.norm_axis == "input"
    key_format = input_format(components.family.denoiser) if on_input else "diffusers"
    trained = TrainedAdapters(
        components=components, modules=modules, report=report, key_format=key_format, origin=origin
    )
    # Check the key format now, not after hours of training.
    layout_named(trained.key_format).check(adapter_state(modules))
    return trained


def _warn_of_unused_conv_settings(config: TrainConfig, report: InjectionReport) -> None:
    """Warn of settings for convolutions if no convolution is adapted."""
    if any(layer.kind in ("Conv1d", "Conv2d") for layer in report.layers):
        return
    is_set = {
        "conv_rank": config.conv_rank != TrainConfig().conv_rank,
        "conv_alpha": config.conv_alpha not in (None, config.conv_rank),
    }
    for name in (name for name in is_set if is_set[name]):
        warnings.warn(f"{name} has no effect because targets name no Conv2d layer", stacklevel=4)


def components_that_train(components: Components, config: TrainConfig) -> dict[str, nn.Module]:
    """Return the denoiser and, if they train, the text encoders by name."""
    models = components.adaptable().items()
    return {name: m for name, m in models if name in DENOISERS or config.train_text_encoder}


def enter_training(model: nn.Module, components: Components, config: TrainConfig) -> None:
    """Set a component to training mode, with gradient checkpointing if configured.

    Blocks that are recomputed in the backward pass repeat their dropout.
    """
    model.train()
    if config.gradient_checkpointing:
        # Reentrant checkpointing needs an input that requires a gradient.
        settings: dict[str, Any] = {"use_reentrant": False}
        if not keeps_random_state(components.device.type):
            settings["context_fn"] = partial(_repeating_draws, components.device.type)
        module: Any = model
        if hasattr(model, "gradient_checkpointing_enable"):
            module.gradient_checkpointing_enable(settings)
        else:
            module.enable_gradient_checkpointing(partial(checkpoint, **settings))


def _repeating_draws(device_type: str) -> tuple[_Draws, _Draws]:
    """Return contexts of a forward pass and its recomputation with the same random numbers."""
    forward = _Draws(device_type)
    return forward, _Draws(device_type, forward)


class _Draws:
    """Context that records the random state of a device, or restores that of another context.

    Attributes:
        state: Random state when the context was entered.
    """

    def __init__(self, device_type: str, repeated: _Draws | None = None) -> None:
        self.device_type, self.repeated = device_type, repeated
        self.state: Tensor | None = None

    def __enter__(self) -> None:
        self.state = random_state(self.device_type)
        if self.repeated is not None and self.repeated.state is not None:
            set_random_state(self.device_type, self.repeated.state)

    def __exit__(self, *error: object) -> None:
        if self.repeated is not None and self.state is not None:
            set_random_state(self.device_type, self.state)
