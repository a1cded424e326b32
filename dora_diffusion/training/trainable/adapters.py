"""The adapters that a run trains, and what all components that train are put into."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dora_diffusion.adapters.compiled import compile_blocks
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
from dora_diffusion.config.wording import listing
from dora_diffusion.data.sampler import generator_for
from dora_diffusion.formats.adapter.embeddings import Vectors
from dora_diffusion.formats.adapter.file import AdapterFile, read_adapter, write_adapter
from dora_diffusion.formats.adapter.metadata import AdapterMetadata
from dora_diffusion.formats.adapter.stored import StoredAdapter, adapter_hash
from dora_diffusion.formats.files.runs import KOHYA_FILE
from dora_diffusion.formats.layouts.dotted import DIFFUSERS
from dora_diffusion.formats.layouts.other import layout_named
from dora_diffusion.formats.layouts.vera import digest_of, write_vera
from dora_diffusion.formats.names.modules import UNetLayout
from dora_diffusion.models.components import Components
from dora_diffusion.models.locate import ModelNotFoundError, resolve_adapter
from dora_diffusion.numerics.devices import keeps_random_state, random_state, set_random_state
from dora_diffusion.numerics.weights import LayerWeights
from dora_diffusion.training.optimizer import parameter_groups
from dora_diffusion.training.trainable.words import TrainedTokens

Writer = Callable[[Path, AdapterMetadata], Path]


@dataclass(frozen=True)
class TrainedAdapters:
    """Adapters on a model, fresh or started from another's weights.

    Attributes:
        components: The model.
        modules: The components that carry them, by name.
        report: Which of their layers.
        key_format: Of their file: Diffusers', or kohya's for magnitudes on the input axis.
        words: New words that train with them.
        origin: What they started from, as metadata: ``init_adapter`` and its SHA-256; {} if fresh.
    """

    components: Components
    modules: dict[str, nn.Module]
    report: InjectionReport
    key_format: str = "diffusers"
    words: TrainedTokens = field(default_factory=TrainedTokens)
    origin: dict[str, str] = field(default_factory=dict)

    noun = "adapter"

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every trained parameter by component and path."""
        return self.words.parameters() | {
            f"{place}.{name}": parameter
            for place, adapters in self._adapters()
            for name, parameter in adapters.named_parameters()
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint: parameters, and where they started and the like."""
        return self.parameters() | {
            f"{place}.{name}": buffer
            for place, adapters in self._adapters()
            for name, buffer in adapters.named_buffers()
        }

    def projections(self) -> dict[str, str]:
        """Return the digests of a VeRA's random projections, by component."""
        layers = vera_state(self.modules)
        drawn = {name.partition(".")[0]: layer.projections for name, layer in layers.items()}
        return {component: digest_of(projections) for component, projections in drawn.items()}

    def start(self) -> dict[str, Any]:
        """Return what a resumed run needs of the adapter that this one started from: no file."""
        alpha = {place: next(iter(own.values())).alpha for place, own in self._adapters()}
        return {"origin": dict(self.origin), "alpha": alpha}

    def restore_start(self, start: Mapping[str, Any]) -> None:
        """Put back what `start` gave."""
        self.origin.update(start["origin"])
        for place, own in self._adapters():
            next(iter(own.values())).alpha = start["alpha"][place]

    def _adapters(self) -> Iterator[tuple[str, Any]]:
        """The adapters of each layer, by component and path."""
        for component, model in self.modules.items():
            for path, layer in adapted_layers(model):
                yield f"{component}.{path}", layer.adapters

    def groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """Parameters by component and role."""
        return parameter_groups(self.modules, config) + self.words.groups(config)

    @contextmanager
    def base_weights(self) -> Iterator[None]:
        """The adapters are off inside of the block, and new words as they were at first."""
        with disabled(*self.components.adaptable().values()), self.words.at_start():
            yield

    def writer(self) -> Writer:
        """Return a function that writes the present values into a folder, and returns the file.

        It raises `DiskFullError` if there is no room; nothing is changed then.
        """
        layers, tokens = adapter_state(self.modules), self.words.tokens()

        def write(folder: Path, metadata: AdapterMetadata) -> Path:
            adapter = AdapterFile(layers, metadata, tokens=tokens)
            file = folder / (KOHYA_FILE if self.key_format == "kohya" else DIFFUSERS.file_name)
            layout = UNetLayout.from_config(self.components.unet.config)
            return write_adapter(file, adapter, self.key_format, unet_layout=layout)

        return write

    def write_checkpoint(
        self, folder: Path, metadata: AdapterMetadata, values: Mapping[str, Tensor]
    ) -> Path:
        """Write the adapter; of a VeRA the compact file alone."""
        if vera_state(self.modules):
            return self.write_copies(folder, metadata)
        return self.writer()(folder, metadata)

    def check(self, written: Path) -> None:
        """Read back what was written, which looks at each of its numbers.

        Raises:
            ValueError: If it holds numbers that are not finite.
        """
        read_adapter(written)

    def result(self, folder: Path) -> Path:
        """The folder that the result is written into, from that of the run: the same."""
        return folder

    def write_copies(
        self, folder: Path, metadata: AdapterMetadata, write: Writer | None = None
    ) -> Path:
        """The compact file of a VeRA; ``dora-diffusion convert`` writes other forms."""
        if vectors := vera_state(self.modules):
            extra = {**metadata.extra, **self.words.write(folder)}
            return write_vera(folder, vectors, replace(metadata, extra=extra))
        return folder

    def reload(self, written: Path) -> float | None:
        """Replace the live adapter by what the file holds: what is sampled then shows the file.

        Returns None: unlike a model's, its numbers are float32 in the file, too.
        """
        components = self.components.adaptable()
        for model in self.modules.values():
            remove_adapters(model)
        adapter = read_adapter(written, LiveWeights(components))
        load_adapter_state(components, adapter.layers)
        self.words.load(adapter.tokens)
        return None


@dataclass(frozen=True)
class StartingAdapter:
    """An adapter that a run starts from.

    Attributes:
        path: Its file or folder.
        name: What the settings call it.
        layers: Its layers by component and path, once they were read for a model.
        tokens: Its trained tokens, which new words of the run start from.
    """

    path: Path
    name: str
    layers: Mapping[str, Mapping[str, LayerWeights]] = field(default_factory=dict)
    tokens: Mapping[str, Vectors] = field(default_factory=dict)

    @classmethod
    def of(cls, config: TrainConfig) -> StartingAdapter | None:
        """Find ``init_adapter``; None where there is none, or a checkpoint has it in it.

        Raises:
            ConfigError, AdapterFormatError: If it is not there, or is not an adapter.
        """
        name = config.init_adapter
        if not name or config.is_full or config.resume_from_checkpoint:
            return None
        try:
            return cls(StoredAdapter.open(resolve_adapter(name)).path, name)
        except (FileNotFoundError, ModelNotFoundError) as error:
            raise ConfigError(f"init_adapter: {error}", "init_adapter") from error

    def read(self, components: Components, config: TrainConfig) -> StartingAdapter:
        """Read its layers for a model, and check that those of the run can start from them.

        Raises:
            ConfigError, AdapterFormatError: If they cannot, with what to change.
        """
        live, trained = components.adaptable(), components_that_train(components, config)
        remedy = "write it with the right one first (dora-diffusion convert --alpha)"
        adapter = read_for(live, self.path, remedy, family=components.family.name)
        if lost := [token for token in adapter.tokens if token not in config.words]:
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
                "train; add --train_text_encoder (--text_encoder_lr 0 leaves them as they are)",
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
        """Name and digest, as metadata."""
        place = Path(self.name).expanduser()
        name = place.resolve().name if place.exists() else self.name  # of a hub id all of it
        return {"init_adapter": name, "init_adapter_sha256": adapter_hash(self.path)}


def adapter_configs(
    modules: Mapping[str, nn.Module], config: TrainConfig
) -> dict[str, AdapterConfig]:
    """The settings of each component's adapter, with the patterns that name layers of it.

    Raises:
        TargetError: If a target names no layer of a component, or a pattern none of any.
    """
    adapters = {
        name: config.unet_adapter if name == "unet" else config.text_encoder_adapter
        for name in modules
    }
    layers = {}
    for name, model in modules.items():
        layers[name] = {path: model.get_submodule(path) for path in matched(name, model, config)}
    for setting in (*PATTERNS, "lr_pattern"):
        check_pattern(setting, getattr(config, setting), layers.values())

    for name, adapter in adapters.items():
        own: dict[str, Any] = {}
        for setting in PATTERNS:
            pattern = getattr(adapter, setting)
            used = {first_naming(pattern, *layer) for layer in layers[name].items()}
            own[setting] = {target: pattern[target] for target in pattern if target in used}
        adapters[name] = replace(adapter, **own)
    return adapters


def matched(component: str, model: nn.Module, config: TrainConfig) -> list[str]:
    """Paths of the layers of a component that its targets name.

    Raises:
        TargetError: If one names none, with the setting.
    """
    setting = "targets" if component == "unet" else "text_encoder_targets"
    try:
        return match_targets(model, getattr(config, setting))
    except TargetError as error:
        raise TargetError(f"{setting}: {error}") from error


def inject_trained(
    components: Components, config: TrainConfig, start: StartingAdapter | None = None
) -> TrainedAdapters:
    """Inject adapters into the components that train, and set those to training mode.

    Args:
        components: The model.
        config: All settings.
        start: What the adapters start from; None: from their usual start.

    Raises:
        TargetError: If a target matches no layer.
        ValueError: If a rank is larger than a layer.
        AdapterFormatError: If the file that the run writes could not hold the adapter.
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
    key_format = "kohya" if on_input else "diffusers"
    trained = TrainedAdapters(components, modules, report, key_format, origin=origin)
    # Not after hours of training.
    layout_named(trained.key_format).check(adapter_state(modules))
    return trained


def _warn_of_unused_conv_settings(config: TrainConfig, report: InjectionReport) -> None:
    """Warn of settings of Conv2d layers without effect, since none is adapted."""
    if any(layer.kind in ("Conv1d", "Conv2d") for layer in report.layers):
        return
    given = {
        "conv_rank": config.conv_rank != TrainConfig().conv_rank,
        "conv_alpha": config.conv_alpha not in (None, config.conv_rank),
    }
    for name in (name for name in given if given[name]):
        warnings.warn(f"{name} has no effect because targets name no Conv2d layer", stacklevel=4)


def components_that_train(components: Components, config: TrainConfig) -> dict[str, nn.Module]:
    """The UNet, and text encoders where they train, by name."""
    models = components.adaptable().items()
    return {name: m for name, m in models if name == "unet" or config.train_text_encoder}


def enter_training(model: nn.Module, components: Components, config: TrainConfig) -> None:
    """Set a component to training mode, with gradient checkpointing and compiling as asked for.

    Blocks that are recomputed in the backward pass repeat their dropout.
    """
    model.train()
    if config.gradient_checkpointing:
        # The reentrant form needs an input that requires a gradient, and a prompt has none.
        settings: dict[str, Any] = {"use_reentrant": False}
        if not keeps_random_state(components.device.type):
            settings["context_fn"] = partial(_repeating_draws, components.device.type)
        own: Any = model
        if hasattr(model, "gradient_checkpointing_enable"):
            own.gradient_checkpointing_enable(settings)
        else:
            own.enable_gradient_checkpointing(partial(checkpoint, **settings))
    if config.compile and model is components.unet:
        compile_blocks(model)


def _repeating_draws(device_type: str) -> tuple[_Draws, _Draws]:
    """Contexts of a forward pass and its recomputation, which draws the same."""
    forward = _Draws(device_type)
    return forward, _Draws(device_type, forward)


class _Draws:
    """Record of a device's random state when entered; one that repeats another starts from its.

    Attributes:
        state: The random state that it started from.
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
