"""State of a run that is ready for its next step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dora_diffusion.config import TrainConfig
from dora_diffusion.data.dataset import DreamBoothDataset
from dora_diffusion.data.sampler import EpochSampler
from dora_diffusion.models.components import Components
from dora_diffusion.training.inputs.subject import Subject, triggers_of
from dora_diffusion.training.processes import gather
from dora_diffusion.training.step import Step

if TYPE_CHECKING:
    from dora_diffusion.training.features.validation import Validation
    from dora_diffusion.training.trainable.weights import TrainedWeights


@dataclass
class Run:
    """Run that is ready for its next step.

    Attributes:
        config: Resolved settings.
        subjects: The subjects.
        accelerator: Devices and processes (`make_accelerator`).
        components: The model, with the run's adapters.
        weights: Trained weights.
        dataset: Photos and class images.
        sampler: Order of this process's batches.
        step: The optimizer step.
        validation: Measures the loss on held-out photos; None if there are none.
        activate: Attaches the run's adapters if several runs share the model.
        initial: Digest of the trained weights before the first step; empty if unknown.
    """

    config: TrainConfig
    subjects: Sequence[Subject]
    accelerator: Any
    components: Components
    weights: TrainedWeights
    dataset: DreamBoothDataset
    sampler: EpochSampler
    step: Step
    validation: Validation | None = None
    activate: Callable[[], None] = lambda: None
    initial: str = ""

    @property
    def report(self) -> str:
        """Summary of the trained parameters."""
        words = [str(self.weights.words)] if self.weights.words.tables else []
        return " and ".join([str(self.weights.report), *words])

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Training resolutions in pixels, in ascending order."""
        sides = {s.settings.resolution or self.config.resolution for s in self.subjects}
        return tuple(sorted(filter(None, sides)))

    @property
    def trigger(self) -> str:
        """Trigger words of all subjects."""
        return triggers_of(self.subjects)

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps."""
        assert self.config.max_train_steps is not None
        return self.config.max_train_steps

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Use the weights of the run's result, such as an average, inside the block."""
        self.activate()
        with ExitStack() as stack:
            for hook in self.step.hooks:
                stack.enter_context(hook.in_use())
            yield

    def digest(self) -> str:
        """Return the SHA-256 of the trained weights, in the first process of a sharded model.

        All processes of a sharded model must call this method.
        """
        digest = hashlib.sha256()
        for parameter in self.weights.parameters().values():
            numbers: Any = gather(parameter).contiguous().flatten().view(torch.uint8).numpy()
            digest.update(numbers)
        return digest.hexdigest()

    def data_position(self) -> dict[str, Any]:
        """Return the run's position in its data, for a checkpoint."""
        return {"sampler": self.sampler.state_dict(), "batches": self.step.batches.index}
