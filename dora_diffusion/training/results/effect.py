"""Effect of training: change of the model's predictions at fixed inputs.

The inputs are noise at three timesteps, at most 128 pixels wide, and three captions of the run. The
predictions are computed in float32 regardless of the run's precision: in half precision, rounding
alone changes a prediction by more than a short run does. For SDXL, a measurement takes 3% of the
operations of a training step on one image of 1024 pixels. It needs less memory than a step: the
weights are converted to float32 one layer at a time, and with offloading, text encoders and
denoiser are on the device at different times.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.compiler import set_stance
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from dora_diffusion.adapters.scope import norm_scope
from dora_diffusion.config.families import DENOISERS
from dora_diffusion.data.crops import plan_crop
from dora_diffusion.data.sampler import generator_for
from dora_diffusion.models.components import Components
from dora_diffusion.models.conditioning import Conditioning
from dora_diffusion.models.offload import HOST, on_device
from dora_diffusion.models.text import encode_prompts, time_ids

if TYPE_CHECKING:
    from dora_diffusion.training.trainable.full import TrainedWeights

NOTHING = 1e-6
"""Largest relative change that float32 rounding explains."""

_TIMESTEPS = 3
_MOST_LATENTS = 16
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Effect:
    """Relative changes at fixed inputs, as ``|after - before| / |before|``.

    Attributes:
        prediction: Change of the denoiser's predictions by all trained weights.
        denoiser: Change of the predictions by its own weights, with the initial encodings.
        text_encoders: Change of the text encoders' outputs by their weights; None if not trained.
        words: Change of the text encoders' outputs by new words; None if there are none.
        component: Component name of the denoiser (`DENOISERS`).
    """

    prediction: float
    denoiser: float
    text_encoders: float | None = None
    words: float | None = None
    component: str = "unet"

    @property
    def is_nothing(self) -> bool:
        """True if no prediction changed by more than rounding."""
        return not self.prediction > NOTHING

    @property
    def figures(self) -> dict[str, float]:
        """Changes that were measured, by name."""
        values = {
            "prediction": self.prediction,
            self.component: self.denoiser,
            "text_encoders": self.text_encoders,
            "words": self.words,
        }
        return {name: value for name, value in values.items() if value is not None}

    def __str__(self) -> str:
        denoiser = DENOISERS[self.component]
        names = {self.component: f"{denoiser} alone", "text_encoders": "text encoders' outputs"}
        names["words"] = "words'"
        changes = [f"{names[n]} {100 * v:.2g}%" for n, v in self.figures.items() if n in names]
        moved = f"training moved the {denoiser}'s predictions at fixed inputs by"
        details = f" ({', '.join(changes)})" if len(changes) > 1 else ""
        return f"{moved} {100 * self.prediction:.2g}%{details}"


class Probe:
    """Fixed inputs of a run's model, with its predictions before the first step.

    Args:
        components: The model, with the trained adapters.
        weights: Trained weights.
        captions: Captions of the run.
        is_sharded: Whether the model is sharded. It then computes in its own precision.

    Attributes:
        effect: Result of `measure`; None before.
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
        distinct, rows = sorted(set(captions)), _TIMESTEPS
        self._captions = [distinct[row * len(distinct) // rows] for row in range(rows)]
        self._before: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return inputs and initial predictions."""
        return {"captions": self._captions, "before": self._before, "dtype": str(self._dtype)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the initial predictions of a checkpoint.

        If they are missing or have another precision, the predictions of the base model replace
        them.
        """
        self._captions = state.get("captions", self._captions)
        if state.get("dtype") == str(self._dtype):
            self._before = state["before"]
            return
        with self._weights.base_weights():
            self._before = {}
            self.begin()

    def begin(self) -> None:
        """Compute the initial predictions, unless they are known."""
        if not self._before:
            hidden = self._encoded()
            outputs = {"prediction": self._predicted(hidden)}
            encodings = hidden.tensors() if self._trains_text else {}
            self._before = {name: tensor.cpu() for name, tensor in (outputs | encodings).items()}

    def measure(self) -> Effect:
        """Compute the effect of the model's present weights."""
        before, text, words = self._before, None, None
        hidden = self._encoded()
        moved = alone = _relative(self._predicted(hidden), before["prediction"])
        if self._trains_text:
            names = ("encoder_hidden_states", "pooled")
            at_first = Conditioning(*map(before.get, names))  # type: ignore[arg-type]
            device = hidden.encoder_hidden_states.device
            alone = _relative(self._predicted(at_first.to(device)), before["prediction"])
            with self._weights.words.at_start():
                without = self._encoded()
            if self._weights.modules.keys() - set(DENOISERS):
                text = _distance(without, at_first)
            if self._weights.words.tables:
                words = _distance(hidden, without)
        denoiser = self._components.family.denoiser
        self.effect = Effect(moved, alone, text, words, component=denoiser)
        return self.effect

    @property
    def _dtype(self) -> torch.dtype:
        return next(self._components.denoiser.parameters()).dtype

    @property
    def _trains_text(self) -> bool:
        return bool(self._weights.modules.keys() - set(DENOISERS) or self._weights.words.tables)

    @contextmanager
    def _computing(self, *modules: nn.Module) -> Iterator[None]:
        """Compute in float32. Weights must not be moved inside, or they would remain float32."""
        evaluating, scope = self._components.eval_mode(), norm_scope(*modules)
        tensors = (t for one in modules for t in (*one.parameters(), *one.buffers()))
        is_half = any(tensor.dtype in _HALF for tensor in tensors)
        wide = _Float32() if is_half and not self._is_sharded else nullcontext()
        with torch.no_grad(), evaluating, set_stance("force_eager"), scope, wide:
            yield

    def _encoded(self) -> Conditioning:
        components, encoders = self._components, self._components.text_encoders
        away = [components.denoiser] if components.offload_to is not None else []
        present = on_device(components.device, *encoders)
        with on_device(HOST, *away), present, self._computing(*encoders):
            return encode_prompts(components, self._captions)

    def _predicted(self, hidden: Conditioning) -> Tensor:
        """Return the denoiser's predictions ``(3, C, h, w)``."""
        components, device = self._components, self._components.device
        config, side = components.denoiser.config, components.default_resolution
        size = min(_MOST_LATENTS, side // components.vae_factor)
        shape = (_TIMESTEPS, config.in_channels, size, size)
        noise = torch.randn(shape, generator=generator_for("effect", shape))
        crop = plan_crop((side, side), side, multiple=components.size_step)
        ids = time_ids(components.family, [crop] * _TIMESTEPS)
        timesteps = components.process.spaced(_TIMESTEPS)
        with self._computing(components.denoiser):
            return components.predict(
                noise.to(device),
                timesteps.to(device),
                hidden,
                None if ids is None else ids.to(device),
            )


def _distance(a: Conditioning, b: Conditioning) -> float:
    """Return the relative distance between two outputs of the text encoders."""
    pairs = zip(a.tensors().values(), b.tensors().values(), strict=True)
    return max(_relative(one, other) for one, other in pairs)


def _relative(a: Tensor, b: Tensor) -> float:
    a, b = a.cpu().double(), b.cpu().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


class _Float32(TorchFunctionMode):
    """Mode in which all operations read half-precision tensors as float32.

    Attributes report float32 too, since models cast their inputs to the dtype of their weights. A
    float32 copy of the model would not fit into the memory of a run in half precision.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "__get__":
            value = func(*args)
            return torch.float32 if isinstance(value, torch.dtype) and value in _HALF else value

        def wide(tensor: Tensor) -> Tensor:
            return tensor.float() if tensor.dtype in _HALF else tensor

        return func(*tree_map_only(Tensor, wide, args), **tree_map_only(Tensor, wide, kwargs or {}))
