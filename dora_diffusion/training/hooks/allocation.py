"""AdaLoRA (arXiv:2303.10512) in a training step: orthogonality term and rank allocation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dora_diffusion.training.hooks.hook import Hook, Record
from dora_diffusion.training.trainable.allocation import build_allocation

if TYPE_CHECKING:
    from dora_diffusion.training.step import Step


class Allocation(Hook):
    """Reallocates ranks between layers.

    Args:
        step: Step of a run with AdaLoRA.
    """

    name = "allocation"

    def __init__(self, step: Step) -> None:
        self.ranks = build_allocation(step.weights.modules, step.config)
        self._parameters, self._scaler = step.parameters, step.accelerator.scaler
        # Prodigy estimates its step size from gradients. The term would distort the estimate.
        self._is_decoupled = "d" in step.optimizer.param_groups[0]
        self._rate, self._scale = 0.0, 1.0

    def gradients(self, number: int) -> None:
        if not self._is_decoupled:
            self.ranks.add_orthogonality(self._loss_scale())

    def clipped(self, record: Record) -> None:
        self._parameters.share_gradients()
        self._rate = max(record.get("effective_lr", {"": 0.0}).values())
        self._scale = self._loss_scale()

    def moved(self, number: int) -> None:
        # The scaler lowers its scale after an fp16 overflow, for which it skips the step.
        if self._loss_scale() < self._scale:
            return
        if self._is_decoupled:
            self.ranks.make_orthogonal(self._rate)
        self.ranks.after_step(number)

    def state_dict(self) -> Any:
        return self.ranks.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.ranks.load_state_dict(state)

    def _loss_scale(self) -> float:
        return 1.0 if self._scaler is None else float(self._scaler.get_scale())
