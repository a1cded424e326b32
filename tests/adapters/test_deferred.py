"""Flags are read a step late where that spares a wait, and never from another set of layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dora_diffusion.adapters import flags as flags_module
from dora_diffusion.adapters.flags import DeferredFlags
from dora_diffusion.adapters.inject import adapter_parameters, inject_adapters
from dora_diffusion.adapters.plan import Plan
from dora_diffusion.adapters.scope import NormCache, norm_scope
from dora_diffusion.config import AdapterConfig

NONE = torch.tensor([False] * 5)
SECOND = torch.tensor([False, False, False, True, False])


class Event:
    """Stand-in for CUDA's events: a copy may be read after it."""

    waited = 0

    def synchronize(self) -> None:
        Event.waited += 1


@pytest.fixture
def as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flags_module, "record_event", lambda tensor: Event())
    monkeypatch.setattr(flags_module, "_DEFERRED", {"cpu"})


def test_a_cpu_reads_at_once():
    flags = DeferredFlags()
    assert flags.layers(NONE, [2, 3]) == set()
    assert flags.layers(SECOND, [2, 3]) == {1}
    assert flags.layers(NONE, [2, 3]) == set()


@pytest.mark.usefixtures("as_a_gpu")
def test_a_gpu_reads_the_step_before_and_the_first_at_once():
    flags = DeferredFlags()
    assert flags.layers(SECOND, [2, 3]) == {1}
    assert flags.layers(NONE, [2, 3]) == {1}
    assert flags.layers(SECOND, [2, 3]) == set()
    assert flags.layers(NONE, [4, 1]) == set(), "other layers: those flags say nothing of them"


def net() -> Any:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 9), torch.nn.Linear(9, 7))
    inject_adapters(model, AdapterConfig(targets=("full",), rank=2))
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.usefixtures("as_a_gpu")
def test_a_base_weight_written_through_data_is_noticed_in_the_next_step(monkeypatch):
    recomputed: list[int] = []
    plain = Plan._recompute
    monkeypatch.setattr(
        Plan, "_recompute", lambda self, n, *rest: recomputed.append(n) or plain(self, n, *rest)
    )
    model, x, cache = net(), torch.randn(3, 12), NormCache()
    expected = []
    for step in range(6):
        if step == 1:
            model[1].weight.data.mul_(1.5)
        with norm_scope(model, cache=cache):
            found = model(x)
        expected.append(len(recomputed))
        with norm_scope(model):
            recomputed.clear()
            exact = model(x) if step != 1 else None
        if exact is not None:
            torch.testing.assert_close(found, exact)
        recomputed.clear()
    assert expected[0] == expected[1] == 0
    assert expected[2] >= 1
    assert expected[4] == expected[5] == 0  # From then on it is the same weight again.


@pytest.mark.usefixtures("as_a_gpu")
def test_a_channel_is_flagged_before_it_is_ill_conditioned():
    """A gain that shrinks by a third each step takes its own path as soon as it must."""
    model, cache = net(), NormCache()
    magnitude = model[0].adapters["default"].magnitude
    assert magnitude is not None
    seen = []
    for _ in range(12):
        with norm_scope(model, cache=cache):
            scales = model[0].scales("default", model[0].adapters["default"])
            factors = scales.factors(torch.float32)
            gain = abs(factors.gain[4].item())
            seen.append((gain, factors.gain_in_graph))
        with torch.no_grad():
            magnitude[4] *= 0.4 if gain > 0.01 else 0.7
    assert any(value < 1e-3 for value, _ in seen)
    assert all(gain_in_graph for value, gain_in_graph in seen if value < 1e-3)
