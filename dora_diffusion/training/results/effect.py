"""Distance that a run has moved its model: predictions at fixed inputs, before and after.

The inputs are noise at three timesteps, 128 pixels wide or less, and three captions of the run.
Whatever the run's precision, they are computed in float32: in half precision, rounding alone moves
a prediction by more than a short run does. Of SDXL, a measurement has 3% of the operations of a
training step of one image of 1024 pixels. It takes less memory than a step: one layer's weight is
float32 at a time, and offloaded text encoders are on the device while the UNet is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from dora_diffusion.adapters.compiled import uncompiled
from dora_diffusion.adapters.scope import norm_scope
from dora_diffusion.data.crops import plan_crop
from dora_diffusion.data.sampler import generator_for
from dora_diffusion.models.components import Components
from dora_diffusion.models.latents import predict
from dora_diffusion.models.offload import HOST, on_device
from dora_diffusion.models.text import Conditioning, encode_prompts, time_ids

if TYPE_CHECKING:
    from dora_diffusion.training.trainable.full import TrainedWeights

NOTHING = 1e-6
"""Relative change that rounding of float32 may make."""

_TIMESTEPS = (1 / 6, 1 / 2, 5 / 6)
_MOST_LATENTS = 16
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Effect:
    """Change of a model's predictions at fixed inputs, as ``|after - before| / |before|``.

    Attributes:
        prediction: The UNet's predictions, by all that was trained.
        unet: The same by the UNet's layers alone: prompts are encoded as before training.
        text_encoders: The text encoders' outputs, by their layers; None where these do not train.
        words: The same outputs, by new words; None without any.
    """

    prediction: float
    unet: float
    text_encoders: float | None = None
    words: float | None = None

    @property
    def is_nothing(self) -> bool:
        """True if no prediction moved by more than rounding."""
        return not self.prediction > NOTHING

    @property
    def figures(self) -> dict[str, float]:
        """The parts that there are, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def __str__(self) -> str:
        names = {"unet": "UNet alone", "text_encoders": "text encoders' outputs", "words": "words'"}
        parts = [f"{names[n]} {100 * v:.2g}%" for n, v in self.figures.items() if n in names]
        moved = "training moved the UNet's predictions at fixed inputs by"
        apart = f" ({', '.join(parts)})" if len(parts) > 1 else ""
        return f"{moved} {100 * self.prediction:.2g}%{apart}"


class Probe:
    """Fixed inputs of a run's model, and what it made of them before the first step.

    Args:
        components: The model, with what trains on it.
        weights: What trains.
        captions: Those of the run.
        is_sharded: The model is in parts, and computed as it is by all processes.

    Attributes:
        effect: What `measure` found; None before.
    """

    def __init__(
        self,
        components: Components,
        weights: TrainedWeights,
        captions: Sequence[str],
        is_sharded: bool = False,
    ) -> None:
        self.effect: Effect | None = None
        self._components, self._weights, self._is_sharded = components, weights, is_sharded
        distinct, rows = sorted(set(captions)), len(_TIMESTEPS)
        self._captions = [distinct[row * len(distinct) // rows] for row in range(rows)]
        self._before: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run compares with."""
        return {"captions": self._captions, "before": self._before, "dtype": str(self._dtype)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compare with what the run began with.

        Compare with the base model in another precision, and where a checkpoint does not know it.
        """
        self._captions = state.get("captions", self._captions)
        if state.get("dtype") == str(self._dtype):
            self._before = state["before"]
            return
        with self._weights.base_weights():
            self._before = {}
            self.begin()

    def begin(self) -> None:
        """Compute what there is before the first step, where it is not known yet."""
        if not self._before:
            hidden = self._encoded()
            made = {"prediction": self._predicted(hidden)}
            kept = hidden.tensors() if self._trains_text else {}
            self._before = {name: tensor.cpu() for name, tensor in (made | kept).items()}

    def measure(self) -> Effect:
        """Compute the effect of all steps, whose weights are on the model."""
        before, text, words = self._before, None, None
        hidden = self._encoded()
        moved = unet = _relative(self._predicted(hidden), before["prediction"])
        if self._trains_text:
            names = ("encoder_hidden_states", "pooled")
            at_first = Conditioning(*map(before.get, names))  # type: ignore[arg-type]
            device = hidden.encoder_hidden_states.device
            unet = _relative(self._predicted(at_first.to(device)), before["prediction"])
            with self._weights.words.at_start():
                without = self._encoded()
            if self._weights.modules.keys() - {"unet"}:
                text = _distance(without, at_first)
            if self._weights.words.tables:
                words = _distance(hidden, without)
        self.effect = Effect(moved, unet, text, words)
        return self.effect

    @property
    def _dtype(self) -> torch.dtype:
        return next(self._components.unet.parameters()).dtype

    @property
    def _trains_text(self) -> bool:
        return bool(self._weights.modules.keys() - {"unet"} or self._weights.words.tables)

    @contextmanager
    def _computing(self, *modules: nn.Module) -> Iterator[None]:
        """Compute in float32; what moves weights stays outside, or they would stay so."""
        evaluating, scope = self._components.eval_mode(), norm_scope(*modules)
        tensors = (t for one in modules for t in (*one.parameters(), *one.buffers()))
        is_half = any(tensor.dtype in _HALF for tensor in tensors)
        wide = _Float32() if is_half and not self._is_sharded else nullcontext()
        with torch.no_grad(), evaluating, uncompiled(), scope, wide:
            yield

    def _encoded(self) -> Conditioning:
        components, encoders = self._components, self._components.text_encoders
        away = [components.unet] if components.offload_to is not None else []
        present = on_device(components.device, *encoders)
        with on_device(HOST, *away), present, self._computing(*encoders):
            return encode_prompts(components, self._captions)

    def _predicted(self, hidden: Conditioning) -> Tensor:
        """Return the UNet's predictions ``(3, C, h, w)``."""
        components, device = self._components, self._components.device
        config, side = components.unet.config, components.default_resolution
        size = min(_MOST_LATENTS, side // components.vae_factor)
        shape = (len(_TIMESTEPS), config.in_channels, size, size)
        noise = torch.randn(shape, generator=generator_for("effect", shape))
        steps = components.scheduler.config.num_train_timesteps
        crop = plan_crop((side, side), side, multiple=components.vae_factor)
        ids = time_ids(components.family, [crop] * len(_TIMESTEPS))
        timesteps = torch.tensor([int(place * steps) for place in _TIMESTEPS])
        with self._computing(components.unet):
            return predict(
                components.unet,
                noise.to(device),
                timesteps.to(device),
                hidden,
                None if ids is None else ids.to(device),
            )


def _distance(a: Conditioning, b: Conditioning) -> float:
    """Return the relative distance of a text encoders' output from another one."""
    pairs = zip(a.tensors().values(), b.tensors().values(), strict=True)
    return max(_relative(one, other) for one, other in pairs)


def _relative(a: Tensor, b: Tensor) -> float:
    a, b = a.cpu().double(), b.cpu().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


class _Float32(TorchFunctionMode):
    """Tensors of half precision are read as float32 by whatever is computed inside."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "__get__":
            found = func(*args)
            return torch.float32 if isinstance(found, torch.dtype) and found in _HALF else found

        def wide(tensor: Tensor) -> Tensor:
            return tensor.float() if tensor.dtype in _HALF else tensor

        return func(*tree_map_only(Tensor, wide, args), **tree_map_only(Tensor, wide, kwargs or {}))
