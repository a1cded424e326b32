"""Interface of a hook: the moments of a step, and of a run, at which features act."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from dora_diffusion.adapters.stack import Masks
from dora_diffusion.training.prediction import Drawn

Record = dict[str, Any]
"""Numbers of a step by name, still on the device."""


class RankRoute(NamedTuple):
    """Masks of adapters' ranks for the rows of a batch, as `AdapterStack.of` takes them.

    Attributes:
        masks: Factor of each rank by layer: ``(N, r)`` in the UNet, ``(1, r)`` in text encoders,
            None if all are 1; N rows of all predictions that train. Empty: no layer has masks.
        active: Ranks that are in the norm, by layer, in the same shapes.
    """

    masks: Masks = ()
    active: Masks = ()


class Hook:
    """A feature of a run.

    Every moment does nothing unless a feature overrides it. Features act in the order of the list
    of hooks.

    Attributes:
        name: Name of its state in a checkpoint; empty if it has none.
    """

    name = ""

    def begin(self, number: int) -> None:
        """Before the batches of a step, counted from 1."""

    def route(self, drawn: Drawn, route: RankRoute) -> RankRoute:
        """Change the masks of adapters' ranks for a batch."""
        return route

    def gradients(self, number: int) -> None:
        """After the backward passes, before the gradients are gathered and clipped."""

    def clipped(self, record: Record) -> None:
        """After clipping, with the record of the step."""

    def moved(self, number: int) -> None:
        """After the optimizer's step, while the gradients are still there."""

    def done(self, number: int) -> None:
        """After the step."""

    def in_use(self) -> AbstractContextManager[object]:
        """Return a context in which the model is the one that the run's result has."""
        return nullcontext()

    def state_dict(self) -> Any:
        """Return the state for a checkpoint. All processes call it, before `in_use`."""

    def load_state_dict(self, state: Any) -> None:
        """Restore the state of a checkpoint, after parameters and optimizer."""
