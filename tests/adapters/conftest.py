"""Fixtures of the tests of adapters."""

from __future__ import annotations

import pytest
import torch

from tests.adapters.helpers import (
    Net,
)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    # Kernels may differ, in the last bit, between a weight that trains and one that does not.
    return Net().requires_grad_(False)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(1))
