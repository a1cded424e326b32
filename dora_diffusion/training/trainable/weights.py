"""Weights that a run trains, as its step, checkpoints and result use them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from dora_diffusion.config import TrainConfig
from dora_diffusion.formats.adapter.metadata import AdapterMetadata
from dora_diffusion.models.components import Components
from dora_diffusion.training.trainable.words import TrainedTokens

Writer = Callable[[Path, AdapterMetadata], Path]


@dataclass(frozen=True, kw_only=True)
class TrainedWeights(ABC):
    """Trained adapters, or weights of the model itself, with new words.

    Attributes:
        components: The model.
        modules: Trained components, by name.
        report: Summary of the weights.
        words: New words that train with them.
        trained: Trained weights of the model itself, by canonical name.
        origin: Metadata of the starting adapter: ``init_adapter`` and its SHA-256; empty if new.
    """

    components: Components
    modules: dict[str, nn.Module]
    report: Any
    words: TrainedTokens = field(default_factory=TrainedTokens)
    trained: dict[str, nn.Parameter] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)

    noun: ClassVar[str]

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """Return all trained parameters by name."""

    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """Return the tensors of a checkpoint."""

    def projections(self) -> dict[str, str]:
        """Return digests of random projections that a checkpoint does not hold, by component."""
        return {}

    def start(self) -> dict[str, Any]:
        """Return the state that replaces the file of the starting adapter in a resumed run."""
        return {}

    def restore_start(self, start: Mapping[str, Any]) -> None:  # noqa: B027
        """Restore the state of `start`."""

    @abstractmethod
    def groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """Return parameter groups of the optimizer."""

    @abstractmethod
    def base_weights(self, *, keep: bool = False) -> AbstractContextManager[None]:
        """Restore the base model inside the block. No training step may be taken inside.

        Args:
            keep: Keep the base's weights in memory, for steps that need them again.
        """

    @abstractmethod
    def writer(self) -> Writer:
        """Return a function that writes the present weights to a folder, and returns the result.

        All processes must call this method if the model is sharded. The first process writes. On a
        full disk the function raises `DiskFullError` and leaves existing files unchanged.
        """

    @abstractmethod
    def write_checkpoint(
        self, folder: Path, metadata: AdapterMetadata, values: Mapping[str, Tensor]
    ) -> Path:
        """Write the weights of a checkpoint, with the given values of the trained weights."""

    @abstractmethod
    def check(self, written: Path) -> None:
        """Check that the values of a written result are finite.

        Raises:
            ValueError: If they are not.
        """

    @abstractmethod
    def result(self, folder: Path) -> Path:
        """Return the place of the result for the output folder of the run."""

    @abstractmethod
    def write_copies(self, folder: Path, metadata: AdapterMetadata, write: Writer) -> object:
        """Write the result in further formats."""

    @abstractmethod
    def reload(self, written: Path) -> float | None:
        """Load the written result, so that samples show it.

        Returns:
            Share of the changes that the file preserves; None: all.
        """
