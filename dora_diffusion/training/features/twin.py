"""Twins in a run: samples on another model, and an adapter under a distilled base."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_diffusion.adapters.inject import check_fit
from dora_diffusion.adapters.state import by_component, read_for
from dora_diffusion.config import ConfigError
from dora_diffusion.config.families import DENOISERS
from dora_diffusion.config.wording import listing
from dora_diffusion.formats.adapter.metadata import AdapterMetadata
from dora_diffusion.models.components import Components
from dora_diffusion.models.load import load_empty
from dora_diffusion.models.locate import ModelNotFoundError, resolve_adapter
from dora_diffusion.models.offload import HOST, on_device
from dora_diffusion.models.precision import PRECISION_DTYPES
from dora_diffusion.numerics.devices import release_memory
from dora_diffusion.numerics.weights import LayerWeights
from dora_diffusion.sampling.load import load_adapted
from dora_diffusion.training.features.code import FeatureCode, Select
from dora_diffusion.training.hook import Hook
from dora_diffusion.training.trainable.adapters import StartingAdapter
from dora_diffusion.training.trainable.weights import TrainedWeights

if TYPE_CHECKING:
    from dora_diffusion.training.run import Run
    from dora_diffusion.training.step import Step


class SampleModelCode(FeatureCode):
    """Samples of a run on another model."""

    @cached_property
    def _twin(self) -> Components:
        assert self.config.sample_base is not None
        return load_empty(self.config.sample_base)

    def check_model(self, components: Components) -> None:
        twin = self._twin
        if twin.family.name != components.family.name:
            raise ConfigError(
                f"sample_model {twin.name} is {twin.family.title}, and the base model is "
                f"{components.family.title}; choose one of its family",
                "sample_model",
            )

    def weights(
        self, select: Select, components: Components, start: StartingAdapter | None
    ) -> TrainedWeights:
        trained, twin = select(), self._twin.adaptable()
        for name, model in trained.modules.items():
            try:
                check_fit(model, twin[name])
            except ValueError as error:
                raise ConfigError(
                    f"sample_model {self.config.sample_model}: {error}", "sample_model"
                ) from error
        return trained


@contextmanager
def sampled_on(run: Run, metadata: AdapterMetadata | None) -> Iterator[Components]:
    """Load the model of a run's samples inside the block, with the present adapter.

    The frozen weights of the run's own model are on the host meanwhile.

    Args:
        run: The run.
        metadata: Metadata of the adapter; None: without the adapter.
    """
    config, own = run.config, run.components
    assert config.sample_base is not None
    modules = own.modules().values()
    with tempfile.TemporaryDirectory() as folder, on_device(HOST, *modules):
        adapter = None
        if metadata is not None:
            adapter = run.weights.writer()(run.weights.result(Path(folder)), metadata)
        twin, _ = load_adapted(
            config.sample_base,
            adapter,
            dtype=PRECISION_DTYPES[config.mixed_precision],
            device=own.device,
            offload=config.offload,
        )
        try:
            yield twin
        finally:
            twin.to(HOST)  # A caller may still have it when the run's own model comes back.
            release_memory()


class AssistantCode(FeatureCode):
    """Frozen adapter in the steps of a run."""

    def check_model(self, components: Components) -> None:
        self._layers(components)

    def hooks(self, step: Step) -> Sequence[Hook]:
        return [Assistant(step.components, self._layers(step.components))]

    def _layers(self, components: Components) -> Mapping[str, LayerWeights]:
        """Read the adapter: its weights by path in the denoiser.

        Raises:
            ConfigError, AdapterFormatError: If it does not exist, is not a LoRA of the denoiser, or
                does not fit.
        """
        name = self.config.assistant_adapter
        assert name is not None
        try:
            path = resolve_adapter(name)
        except (FileNotFoundError, ModelNotFoundError) as error:
            raise ConfigError(f"assistant_adapter: {error}", "assistant_adapter") from error
        live = components.adaptable()
        remedy = (
            "write its alpha first with 'dora-diffusion convert ADAPTER OUTPUT --to diffusers "
            "--alpha ALPHA'"
        )
        adapter = read_for(live, path, remedy, family=components.family.name)
        layers = {
            part: found for part, found in by_component(live, adapter.layers).items() if found
        }
        problem = ""
        if others := layers.keys() - DENOISERS.keys():
            problem = f"has layers of {listing(others)}, whose outputs are cached without it"
        elif any(w.magnitude is not None for part in layers.values() for w in part.values()):
            problem = "is a DoRA"
        elif any(w.kind != "plain" for part in layers.values() for w in part.values()):
            problem = "adapts other layers than Linear layers and convolutions"
        if problem:
            raise ConfigError(
                f"assistant_adapter {name} {problem}; give a LoRA of the denoiser alone, as "
                "training adapters of distilled models are",
                "assistant_adapter",
            )
        return layers[components.family.denoiser]


class Assistant(Hook):
    """Frozen LoRA that changes the outputs of layers from a step's first prediction to its last.

    Args:
        components: The model.
        layers: Weights of the LoRA by path in the denoiser.
    """

    def __init__(self, components: Components, layers: Mapping[str, LayerWeights]) -> None:
        device = components.device
        self._changes = [
            (components.denoiser.get_submodule(path), _change(layer, device))
            for path, layer in layers.items()
        ]
        self._handles = list[Any]()

    def drawn(self, number: int, batches: Sequence[Any]) -> None:
        self._handles = [module.register_forward_hook(change) for module, change in self._changes]

    def gradients(self, number: int) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _change(layer: LayerWeights, device: torch.device) -> Callable[..., Tensor]:
    """Return a forward hook that adds the change of a plain LoRA to the output of a layer."""
    down, up = (tensor.detach().to(device) for tensor in (layer.down, layer.scale * layer.up))

    def add(module: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        (x,) = inputs
        if down.ndim == 2:
            return output + F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))
        hidden = module._conv_forward(x, down.to(x.dtype), None)
        return output + F.conv2d(hidden, up.to(x.dtype))

    return add
