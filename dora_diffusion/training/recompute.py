"""Gradient checkpointing: activations that are recomputed in the backward pass."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dora_diffusion.devices import keeps_random_state, random_state, set_random_state


def checkpoint_gradients(model: Any, device_type: str) -> None:
    """Have a model of Diffusers or transformers recompute its blocks, dropout included."""
    # The reentrant form needs an input that requires a gradient, and a prompt has none.
    settings: dict[str, Any] = {"use_reentrant": False}
    if not keeps_random_state(device_type):
        settings["context_fn"] = partial(_repeating_draws, device_type)
    if hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable(settings)
    else:
        model.enable_gradient_checkpointing(partial(checkpoint, **settings))


def _repeating_draws(device_type: str) -> tuple[_Draws, _Draws]:
    """Contexts of a forward pass and its recomputation, which draws the same."""
    forward = _Draws(device_type)
    return forward, _Draws(device_type, forward)


class _Draws:
    """Notes a device's random state when entered; one that repeats another starts from its.

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
