"""What a run trains: the small interface that adapters and a model's own weights share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from dora_diffusion.config import TrainConfig
from dora_diffusion.formats.adapter.metadata import AdapterMetadata

Writer = Callable[[Path, AdapterMetadata], Path]


class TrainedWeights(Protocol):
    """The weights that a run trains: `TrainedAdapters`, or `FullWeights` of the model."""

    @property
    def noun(self) -> str:
        """What the result is: ``"adapter"`` or ``"model"``."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The components that train, by name."""

    @property
    def report(self) -> object:
        """What trains; ``str`` of it is one line."""

    @property
    def holds_thumbnail(self) -> bool:
        """Whether the result's file shows an image of it."""

    @property
    def are_small(self) -> bool:
        """Whether they are many small tensors, which an optimizer had better see as one."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every trained parameter by component and path."""

    def tensors(self) -> Mapping[str, Tensor]:
        """What a checkpoint holds: those, and what else decides what they compute."""

    def projections(self) -> dict[str, str]:
        """What tells the random projections that they train on from others, by component."""

    def groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """The optimizer's parameter groups, each with its name, rate and decay."""

    def untrained(self) -> AbstractContextManager[None]:
        """The model is its base inside of the block."""

    def writer(self) -> Writer:
        """What writes the values of this moment into a folder; returns where they are.

        It raises `DiskFullError` if there is no room; nothing is changed then.
        """

    def write_checkpoint(self, folder: Path, metadata: AdapterMetadata) -> Path:
        """Write the values of this moment into a checkpoint's folder; returns where they are."""

    def check(self, written: Path) -> None:
        """Read back what was written.

        Raises:
            ValueError: If it holds numbers that are not finite.
        """

    def result(self, folder: Path) -> Path:
        """The folder that a run's result is written into, from that of the run."""

    def write_copies(self, folder: Path, metadata: AdapterMetadata) -> None:
        """Write other forms of the result that were asked for into the run's folder."""

    def reload(self, written: Path) -> None:
        """Take on the values that were written: what is sampled then shows the file."""
