"""Base class of hooks, which add optional features to a training step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dora_diffusion.training.batch import Batch

Record = dict[str, Any]
"""Metrics of a step by name, still on the device."""


class Hook:
    """Optional feature of a run.

    The methods do nothing by default. A step calls them in the order of its list of hooks.

    Attributes:
        name: Name of the hook's state in a checkpoint; empty if the hook has no state.
    """

    name = ""

    def drawn(self, number: int, batches: Sequence[Batch]) -> None:
        """Act on the batches of a step, before predictions; parameters may change here.

        Steps are counted from 1.
        """

    def gradients(self, number: int) -> None:
        """Act after the backward passes, before gradients are averaged and clipped.

        ``step.weights.parameters()`` have the gradients: scaled with fp16, and each
        process's own. ``step.parameters`` gets them afterwards.
        """

    def clipped(self, record: Record) -> None:
        """Act after clipping, with the metrics of the step."""

    def moved(self, number: int) -> None:
        """Act after the optimizer's step, before gradients are reset."""

    def done(self, number: int) -> None:
        """Act at the end of the step."""

    def in_use(self) -> AbstractContextManager[object]:
        """Return a context in which the model has the weights of the run's result."""
        return nullcontext()

    def state_dict(self) -> Any:
        """Return the state for a checkpoint. All processes call this method, outside `in_use`."""

    def load_state_dict(self, state: Any) -> None:
        """Restore a checkpoint's state. Parameters and optimizer are restored before."""
