"""The sampler: infinite, fair, resumable, and equal however many processes share it."""

from __future__ import annotations

from collections import Counter
from itertools import chain, islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_diffusion.data.sampler import EpochIndex, EpochSampler


def batches(sampler: EpochSampler, count: int) -> list[list[EpochIndex]]:
    return list(islice(iter(sampler), count))


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99), st.booleans())
def test_processes_share_one_stream_of_global_batches(
    samples: int, batch: int, processes: int, seed: int, grouped: bool
) -> None:
    groups = [index % 2 for index in range(samples)] if grouped else None
    whole = EpochSampler(samples, batch_size=processes * batch, seed=seed, groups=groups)
    parts = [
        EpochSampler(
            samples,
            batch_size=batch,
            seed=seed,
            num_processes=processes,
            process_index=process,
            groups=groups,
        )
        for process in range(processes)
    ]
    shards = zip(*(batches(part, 12) for part in parts), strict=True)
    assert [list(chain.from_iterable(shard)) for shard in shards] == batches(whole, 12)


def test_every_epoch_sees_every_sample_once_in_a_new_order() -> None:
    stream = [
        item for batch in batches(EpochSampler(5, batch_size=2, seed=1), 50) for item in batch
    ]
    orders = set()
    for epoch in range(20):
        indices = [item.index for item in stream if item.epoch == epoch]
        assert sorted(indices) == [0, 1, 2, 3, 4]
        orders.add(tuple(indices))
    assert len(orders) > 10
    assert [item.epoch for item in stream] == sorted(item.epoch for item in stream)


@pytest.mark.parametrize("consumed", [0, 1, 3, 10])
def test_a_resumed_sampler_continues_the_stream(consumed: int) -> None:
    expected = batches(EpochSampler(7, batch_size=3, seed=5), 20)
    first = EpochSampler(7, batch_size=3, seed=5)
    reading_ahead = iter(first)
    for _ in range(consumed + 4):  # data loaders prefetch: only what is consumed may count
        next(reading_ahead)
    first.advance(consumed)
    resumed = EpochSampler(7, batch_size=3, seed=5)
    resumed.load_state_dict(first.state_dict())
    assert batches(resumed, 20 - consumed) == expected[consumed:]


def test_a_checkpoint_resumes_with_another_number_of_processes() -> None:
    expected = batches(EpochSampler(5, batch_size=4, seed=2), 9)
    one = EpochSampler(5, batch_size=4, seed=2)
    one.advance(3)
    two = [EpochSampler(5, batch_size=2, seed=2, num_processes=2, process_index=p) for p in (0, 1)]
    for sampler in two:
        sampler.load_state_dict(one.state_dict())
    pairs = zip(batches(two[0], 6), batches(two[1], 6), strict=True)
    assert [left + right for left, right in pairs] == expected[3:]


def test_a_checkpoint_of_another_dataset_or_seed_is_refused() -> None:
    state = EpochSampler(5, seed=1).state_dict()
    with pytest.raises(ValueError, match="num_samples 5, but this run has 6"):
        EpochSampler(6, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="seed 1, but this run has 2"):
        EpochSampler(5, seed=2).load_state_dict(state)


def test_groups_never_mix_and_all_samples_appear() -> None:
    groups = ["wide", "tall", "wide", "square", "wide", "tall"]
    sampler = EpochSampler(6, batch_size=2, seed=3, groups=groups)
    assert sampler.batches_per_epoch == 4
    epoch = batches(sampler, 4)
    for batch in epoch:
        assert len({groups[item.index] for item in batch}) == 1
    counts = Counter(item.index for batch in epoch for item in batch)
    assert set(counts) == set(range(6))
    assert max(counts.values()) == 2
    assert {item.epoch for batch in epoch for item in batch} == {0}


def test_another_batch_size_goes_on_with_whole_groups():
    """A place between two batches of the old size is inside one of the new."""
    groups = ["wide"] * 5 + ["tall"] * 5
    before = EpochSampler(10, batch_size=1, seed=3, groups=groups)
    before.advance(3)
    after = EpochSampler(10, batch_size=2, seed=3, groups=groups)
    after.load_state_dict(before.state_dict())
    batches = iter(after)
    for _ in range(12):
        batch = next(batches)
        assert len({groups[one.index] for one in batch}) == 1
        assert batch[0].epoch >= 1
    same = EpochSampler(10, batch_size=1, seed=3, groups=groups)
    same.load_state_dict(before.state_dict())
    assert next(iter(same)) == next(iter(before))


@pytest.mark.parametrize("grouped", [False, True])
def test_a_repeated_sample_is_drawn_anew_each_time(grouped: bool) -> None:
    """As if it were of as many epochs: no draw comes twice, and none is left out."""
    repeats = [3, 1]
    groups = ["wide", "tall"] if grouped else None
    sampler = EpochSampler(2, seed=4, repeats=repeats, groups=groups)
    assert sampler.batches_per_epoch == 4
    stream = [item for (item,) in batches(sampler, 12)]
    for epoch in range(3):
        part = stream[4 * epoch : 4 * epoch + 4]
        assert sorted(item.epoch for item in part if item.index == 0) == [
            3 * epoch, 3 * epoch + 1, 3 * epoch + 2,
        ]  # fmt: skip
        assert [item.epoch for item in part if item.index == 1] == [epoch]
    assert batches(EpochSampler(5, seed=4), 9) == batches(
        EpochSampler(5, seed=4, repeats=[1] * 5), 9
    )
