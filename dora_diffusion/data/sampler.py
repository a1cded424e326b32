"""The order of training samples: infinite, seeded, resumable, equal for any process count."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class EpochIndex:
    """A sample's index, and the epoch whose random draws it gets.

    A sample that an epoch has several times gets other draws each time, as if it were of as many
    epochs.
    """

    epoch: int
    index: int


def generator_for(*parts: object) -> torch.Generator:
    """A CPU generator seeded by a digest of the parts, such as seed, epoch and sample id."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    # torch reads 64 bits of a seed, signed.
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass(eq=False)
class EpochSampler:
    """Yield one process's batches of :class:`EpochIndex`, forever.

    Epochs follow each other without a gap: a batch at the end of one is filled from the next, so
    every batch is full and every photo is seen equally often. The stream of global batches
    (``num_processes * batch_size`` samples) depends only on its size, not on how many processes
    share it: process p takes the p-th slice of each.

    Iterating does not move the state, since data loaders read ahead: call :meth:`advance` for
    each batch that training has consumed (:func:`dora_diffusion.data.dataset.iterate_batches`
    does).

    Attributes:
        num_samples: Size of the dataset.
        batch_size: Samples per process and batch.
        seed: Of the shuffle.
        num_processes: How many processes train together.
        process_index: Which of them this is.
        groups: Per sample, what must be equal within a global batch (a bucket's size). A group's
            last batch is filled by repeating its own samples.
        repeats: Per sample, how many times an epoch has it; empty is once.
        state: Position of training: the epoch, and how many of its samples were consumed, counted
            over all processes.
    """

    num_samples: int
    _: KW_ONLY
    batch_size: int = 1
    seed: int = 0
    num_processes: int = 1
    process_index: int = 0
    groups: Sequence[object] | None = None
    repeats: Sequence[int] = ()
    state: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        count = self.num_samples
        self.repeats = self.repeats or [1] * count
        # What an epoch has: each sample, and how often it had it before.
        self._turns = [(i, turn) for i in range(count) for turn in range(self.repeats[i])]

    @property
    def global_batch_size(self) -> int:
        """Samples per batch over all processes."""
        return self.batch_size * self.num_processes

    @property
    def batches_per_epoch(self) -> int:
        """Batches after which every sample has been seen once, rounded up."""
        return -(-len(self.epoch_order(0)) // self.global_batch_size)

    def epoch_order(self, epoch: int) -> list[EpochIndex]:
        """The samples of one epoch, in order, over all processes."""
        generator, places = generator_for("order", self.seed, epoch), range(len(self._turns))
        is_grouped = self.groups is not None
        order = self._grouped(generator) if is_grouped else _permuted(places, generator)
        turns = (self._turns[place] for place in order)
        return [EpochIndex(epoch * self.repeats[i] + turn, i) for i, turn in turns]

    def _grouped(self, generator: torch.Generator) -> list[int]:
        """Places in `_turns`: whole global batches, each of one group, in shuffled order."""
        assert self.groups is not None
        members: dict[object, list[int]] = {}
        for place, (index, _) in enumerate(self._turns):
            members.setdefault(self.groups[index], []).append(place)
        size = self.global_batch_size
        batches: list[list[int]] = []
        for indices in members.values():
            order = _permuted(indices, generator)
            count = -(-len(order) // size) * size
            filled = [order[i % len(order)] for i in range(count)]
            batches += [filled[start : start + size] for start in range(0, count, size)]
        order_of_batches = _permuted(range(len(batches)), generator)
        return [index for batch in order_of_batches for index in batches[batch]]

    def __iter__(self) -> Iterator[list[EpochIndex]]:
        """Yield this process's batches from the current state on, without end."""
        state = self.state
        first = self.process_index * self.batch_size
        while True:
            batch, state = self._next_global_batch(*state)
            yield batch[first : first + self.batch_size]

    def _next_global_batch(
        self, epoch: int, position: int
    ) -> tuple[list[EpochIndex], tuple[int, int]]:
        """The global batch at a state, and the state after it."""
        batch: list[EpochIndex] = []
        order = self.epoch_order(epoch)
        while len(batch) < self.global_batch_size:
            if position >= len(order):
                epoch, position = epoch + 1, 0
                order = self.epoch_order(epoch)
            batch.append(order[position])
            position += 1
        return batch, (epoch, position)

    def advance(self, batches: int = 1) -> None:
        """Move the state past batches that training has consumed."""
        for _ in range(batches):
            _, self.state = self._next_global_batch(*self.state)

    def state_dict(self) -> dict[str, Any]:
        epoch, position = self.state
        order = {"num_samples": self.num_samples, "seed": self.seed}
        size = {"global_batch_size": self.global_batch_size}
        return {"epoch": epoch, "position": position, **order, **size}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint, with any number of processes.

        Where batches are of one group each, another global batch size continues with the next
        epoch: the place in this one would lie inside of a batch.

        Raises:
            ValueError: If it belongs to another dataset or seed: the order would differ silently.
        """
        for name, ours in (("num_samples", self.num_samples), ("seed", self.seed)):
            if state.get(name, ours) != ours:
                raise ValueError(
                    f"cannot resume: the checkpoint was trained with {name} {state[name]}, "
                    f"this run has {ours}"
                )
        size = state.get("global_batch_size", self.global_batch_size)
        self.state = int(state["epoch"]), int(state["position"])
        if self.groups is not None and size != self.global_batch_size:
            self.state = int(state["epoch"]) + 1, 0


def _permuted(indices: Sequence[int], generator: torch.Generator) -> list[int]:
    return [indices[i] for i in torch.randperm(len(indices), generator=generator).tolist()]
