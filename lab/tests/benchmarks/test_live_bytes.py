"""The counter of live bytes (`benchmarks/live_bytes.py`), against sums made by hand."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

HOME = Path(__file__).parents[3] / "benchmarks" / "live_bytes.py"


@pytest.fixture
def count() -> Any:
    spec = importlib.util.spec_from_file_location("live_bytes", HOME)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LiveBytes("cpu")


def test_a_step_of_one_layer_is_what_a_sum_by_hand_says(count: Any) -> None:
    """Kept for the backward pass: the input and the output of the activation, no more."""
    layer = nn.Linear(64, 32, bias=False)
    x, upstream = torch.ones(10, 64), torch.ones(10, 32)
    count.add([layer.weight, x, upstream])
    weight, given = 4 * 64 * 32, 4 * 10 * (64 + 32)
    output = 4 * 10 * 32
    assert count.live == weight + given
    with count:
        y = torch.tanh(layer(x))
        assert count.live == weight + given + output  # The product itself is gone.
        assert count.peak == weight + given + 2 * output
        count.reset_peak()
        y.backward(upstream)
        assert count.live == 2 * weight + given + output
        # As the weight's gradient is made, its activation's is there.
        assert count.peak == 2 * weight + given + 2 * output
        del y
        layer.weight.grad = None
    assert count.live == weight + given


def test_the_peak_says_what_it_consists_of(count: Any) -> None:
    def made(label: str, numbers: int) -> Tensor:
        count.label = label
        return torch.zeros(numbers, dtype=torch.uint8)

    with count:
        kept = made("weights", 100)
        made("step", 50)
        made("step", 70)
        kept += 1
    assert count.peak == 170
    assert count.at_peak == {"weights": 100, "step": 70}
    assert count.live == 100
