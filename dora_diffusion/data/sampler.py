"""Order of training samples: infinite, seeded, resumable, the same for any process count."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class EpochIndex:
    """Index of a sample, and the epoch that seeds its random draws.

    Repeats of a sample within an epoch get different draws, as if each were a separate epoch.
    """

    epoch: int
    index: int


def generator_for(*key: object) -> torch.Generator:
    """Return a CPU generator seeded by a digest of a key, such as seed, epoch and sample id."""
    digest = hashlib.sha256("/".join(str(item) for item in key).encode()).digest()
    # torch expects a signed 64-bit seed.
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def stratum_of(row: int, rows: int, step: int, steps: int, *seed: object) -> tuple[int, int]:
    """Return the stratum of a draw, from 0, and the number of strata ``rows * steps``.

    The strata form ``rows`` parts of ``steps`` strata each. The rows of a step draw one stratum
    from each part. A window of ``steps`` consecutive steps draws each stratum once. The order of
    rows is permuted again for each step.

    Args:
        row: Index of the row in its step.
        rows: Number of rows, over all batches and processes of the step.
        step: Index of the step in the run.
        steps: Number of steps of a window.
        seed: Seed of the permutations.
    """
    window, turn = divmod(step, steps)
    part = _permuted(range(rows), generator_for("part", *seed, step))[row]
    inner = _permuted(range(steps), generator_for("stratum", *seed, window, part))[turn]
    return part * steps + inner, rows * steps


@dataclass(eq=False)
class EpochSampler:
    """Yield one process's batches of :class:`EpochIndex`, forever.

    The last batch of an epoch is filled from the next epoch, so all batches are full and all
    photos are used equally often. The stream of global batches (``num_processes * batch_size``
    samples) depends only on the global batch size, not on the number of processes: process p gets
    the p-th slice of each batch.

    Iteration does not change the state, since data loaders prefetch: call :meth:`advance` for each
    batch that training has consumed (:func:`dora_diffusion.data.dataset.iterate_batches` does).

    Attributes:
        num_samples: Size of the dataset.
        batch_size: Samples per process and batch.
        seed: Seed of the shuffle.
        num_processes: Number of training processes.
        process_index: Index of this process.
        groups: For each sample, a value that must be equal within a global batch (the size of its
            bucket). The last batch of a group is filled by repeating samples of the group.
        repeats: For each sample, its number of repeats per epoch; empty: one each.
        state: Position of training: the epoch, and the number of consumed samples in it, over all
            processes.
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
        # Samples of an epoch, with the number of earlier repeats of each.
        self._turns = [(i, turn) for i in range(count) for turn in range(self.repeats[i])]

    @property
    def global_batch_size(self) -> int:
        """Samples per batch over all processes."""
        return self.batch_size * self.num_processes

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches per epoch, rounded up."""
        return -(-len(self.epoch_order(0)) // self.global_batch_size)

    def epoch_order(self, epoch: int) -> list[EpochIndex]:
        """Samples of one epoch, in order, over all processes."""
        generator, indices = generator_for("order", self.seed, epoch), range(len(self._turns))
        is_grouped = self.groups is not None
        order = self._grouped(generator) if is_grouped else _permuted(indices, generator)
        turns = (self._turns[index] for index in order)
        return [EpochIndex(epoch * self.repeats[i] + turn, i) for i, turn in turns]

    def _grouped(self, generator: torch.Generator) -> list[int]:
        """Shuffle whole global batches, each of one group; returns indices into `_turns`."""
        assert self.groups is not None
        members: dict[object, list[int]] = {}
        for position, (index, _) in enumerate(self._turns):
            members.setdefault(self.groups[index], []).append(position)
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
        """Yield this process's batches without end, starting from the current state."""
        state = self.state
        first = self.process_index * self.batch_size
        while True:
            batch, state = self._next_global_batch(*state)
            yield batch[first : first + self.batch_size]

    def _next_global_batch(
        self, epoch: int, position: int
    ) -> tuple[list[EpochIndex], tuple[int, int]]:
        """Return the global batch at a state, and the state after it."""
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
        """Advance the state by consumed batches."""
        for _ in range(batches):
            _, self.state = self._next_global_batch(*self.state)

    def state_dict(self) -> dict[str, Any]:
        epoch, position = self.state
        order = {"num_samples": self.num_samples, "seed": self.seed}
        size = {"global_batch_size": self.global_batch_size}
        return {"epoch": epoch, "position": position, **order, **size}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state of a checkpoint, which may have another number of processes.

        With groups, a changed global batch size skips to the next epoch, since the position in the
        current one would be inside of a batch.

        Raises:
            ValueError: If dataset size or seed differ, which would change the order silently.
        """
        for name, value in (("num_samples", self.num_samples), ("seed", self.seed)):
            if state.get(name, value) != value:
                raise ValueError(
                    f"cannot resume: the checkpoint was trained with {name} {state[name]}, "
                    f"but this run has {value}"
                )
        size = state.get("global_batch_size", self.global_batch_size)
        self.state = int(state["epoch"]), int(state["position"])
        if self.groups is not None and size != self.global_batch_size:
            self.state = int(state["epoch"]) + 1, 0


def _permuted(indices: Sequence[int], generator: torch.Generator) -> list[int]:
    return [indices[i] for i in torch.randperm(len(indices), generator=generator).tolist()]
