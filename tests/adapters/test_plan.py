"""Norms and gains of many layers together, against dense norms in float64."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from hypothesis import given
from hypothesis import strategies as st

from dora_diffusion.adapters.plan import Plan
from dora_diffusion.adapters.scales import make_scales
from dora_diffusion.adapters.shard import RowShard
from dora_diffusion.adapters.site import Site, WeightStatistics
from dora_diffusion.numerics.dora import weight_norm
from dora_diffusion.numerics.weights import LayerWeights
from tests.waiting import WAIT_SECONDS

AXES = ("output", "input")


def dense_norm(weight: torch.Tensor, axis: str) -> torch.Tensor:
    """The norm as a plain sum, kept broadcastable."""
    keep = 0 if axis == "output" else 1
    dims = [d for d in range(weight.ndim) if d != keep]
    return weight.pow(2).sum(dims, keepdim=True).sqrt()


def inputs_of(weight, down, up, scale, axis, magnitude=None, statistics=None):
    statistics = statistics or WeightStatistics(weight, axis)
    magnitude = torch.ones(len(statistics.squared_norm)) if magnitude is None else magnitude
    layer = LayerWeights(down, up, magnitude, scale * len(down), axis)
    return Site(weight, None, [layer], statistics)


@st.composite
def layers(draw):
    """A layer whose ranks or whose weight and update may cancel, in float32, with its scale."""
    axis, rank = draw(st.sampled_from(AXES)), draw(st.integers(1, 6))
    kernel = draw(st.sampled_from([(), (1, 1), (3, 3), (3,)]))
    shape = (draw(st.integers(1, 20)), draw(st.integers(1, 20)), *kernel)
    g = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    sizes = (shape, (rank, *shape[1:]), (shape[0], rank, *[1] * len(kernel)))
    weight, down, up = (torch.randn(n, generator=g, dtype=torch.float64) for n in sizes)
    scale = draw(st.sampled_from([-3.0, -0.8, 0.1, 0.8, 30.0]))
    if rank > 1 and draw(st.booleans()):
        down[1], up[:, 1] = down[0], -up[:, 0] * (1 + 1e-3)
    if draw(st.booleans()):
        delta = (up.flatten(1) @ down.flatten(1)).view_as(weight)
        weight = draw(st.sampled_from([1e-3, 0.1, 1.0])) * weight - scale * delta
    weight = weight.float()
    if not kernel and draw(st.booleans()):
        weight = weight.t().contiguous().t()  # as an Embedding and a Conv1D store it
    return weight, down.float(), up.float(), scale, axis


@given(st.lists(layers(), min_size=1, max_size=4))
def test_norms_of_many_layers_equal_the_dense_norms(several):
    """All together, whatever cancels in them."""
    inputs = [inputs_of(*layer) for layer in several]
    for (weight, down, up, scale, axis), scales in zip(several, make_scales(inputs), strict=True):
        delta = (up.double().flatten(1) @ down.double().flatten(1)).view_as(weight)
        expected = dense_norm(weight.double() + scale * delta, axis).flatten()
        torch.testing.assert_close(scales.norm.double(), expected, rtol=2e-5, atol=1e-6)


class Processes:
    """As many threads as processes, that add up what each of them has."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._parts: list[torch.Tensor] = [torch.empty(0)] * count
        self._barrier = threading.Barrier(count, timeout=WAIT_SECONDS)

    def shard(self, rank: int, rows: int) -> RowShard:
        each = -(-rows // self.count)
        start = min(rank * each, rows)

        def add_up(tensor: torch.Tensor) -> torch.Tensor:
            self._parts[rank] = tensor
            self._barrier.wait()
            total = torch.stack(self._parts).sum(dim=0)
            self._barrier.wait()
            return total

        return RowShard(start, min(each, rows - start), rows, add_up)

    def run(self, work):
        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(work, range(self.count)))


@given(st.lists(layers(), min_size=1, max_size=3), st.integers(2, 3))
def test_norms_of_sharded_weights_equal_the_dense_norms(several, count):
    """However few rows a process has, which may be none; a weight that has changed is noticed."""
    processes = Processes(count)

    def norms(rank):
        inputs = []
        for weight, down, up, scale, axis in several:
            shard = processes.shard(rank, len(weight))
            rows = shard.own(weight).clone()
            statistics = WeightStatistics(rows, axis, shard)
            made = inputs_of(weight, down, up, scale, axis, statistics=statistics)
            inputs.append(made._replace(weight=rows, shard=shard))
        first = [scales.norm for scales in make_scales(inputs)]
        for made in inputs:
            made.weight.data.mul_(0.5)
        return first, [scales.norm for scales in make_scales(inputs)]

    found = processes.run(norms)
    for number, (weight, down, up, scale, axis) in enumerate(several):
        delta = scale * (up.double().flatten(1) @ down.double().flatten(1)).view_as(weight)
        for time, factor in enumerate((1.0, 0.5)):
            expected = dense_norm(factor * weight.double() + delta, axis).flatten()
            for process in found:
                norm = process[time][number]
                torch.testing.assert_close(norm.double(), expected, rtol=2e-5, atol=1e-6)
                assert torch.equal(norm, found[0][time][number])


def test_statistics_of_a_weight_are_renewed_when_it_was_written_to(monkeypatch):
    """Once: a layer whose weight was written through ``.data`` is not looked at twice for ever."""
    weight, down, up = torch.randn(8, 6), torch.randn(2, 6), torch.randn(8, 2)
    statistics = WeightStatistics(weight, "output")
    recomputed = []
    plain = Plan._recompute
    monkeypatch.setattr(
        Plan, "_recompute", lambda self, *args: recomputed.append(1) or plain(self, *args)
    )
    for expected in (0, 1, 1):
        if expected:
            weight.data.mul_(1.0 if recomputed else 1.5)
        magnitude = weight_norm(weight, "output")
        inputs = inputs_of(weight, down, up, 0.5, "output", magnitude, statistics)
        (scales,) = make_scales([inputs])
        assert len(recomputed) == expected
        dense = (weight.double() + 0.5 * up.double() @ down.double()).norm(dim=1)
        torch.testing.assert_close(scales.norm.double(), dense, rtol=1e-5, atol=0)
