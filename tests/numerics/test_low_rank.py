"""The best plain LoRA of a change, against the full decomposition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dora_diffusion.numerics.low_rank import (
    low_rank,
    random_start,
    truncated,
)
from dora_diffusion.numerics.weights import LayerWeights


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (12, 8, 3, 3), (400, 300)])
@pytest.mark.parametrize("rank", [1, 8])
def test_approximations_are_the_best_ones(shape: tuple[int, ...], rank: int) -> None:
    """Against the full decomposition; the large shape takes the randomised way."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(shape, generator=generator)
    layer = low_rank(target, rank)
    found = (layer.scale * layer.up.flatten(1) @ layer.down.flatten(1)).view_as(target)
    singular = torch.linalg.svdvals(target.flatten(1).double())
    best = singular[rank:].norm().item()
    assert layer.weight_shape == shape
    assert best * (1 - 1e-5) <= (target - found).norm().item() <= best * (1 + 1e-6)


@pytest.mark.parametrize("shape", [(400, 300), (150, 16, 3, 3)])
@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("power", [0.0, -0.5])
def test_the_randomised_way_ends_at_the_best(
    shape: tuple[int, ...], rank: int, power: float
) -> None:
    """Of noise, where it converges slowest; and of values that fall, where the product is, too."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).flatten(1)
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s if power == 0 else torch.arange(1, len(s) + 1).double() ** power
    target = ((u * s) @ vh).float().view(shape)
    assert random_start(target.flatten(1), rank) is not None
    layer = low_rank(target, rank)
    found = layer.scale * layer.up.flatten(1).double() @ layer.down.flatten(1).double()
    left = torch.linalg.norm(target.flatten(1).double() - found).item()
    assert left == pytest.approx(s[rank:].norm().item(), rel=2e-7)
    if power:
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        assert torch.linalg.norm(found - best) < 1e-4 * torch.linalg.norm(best)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (12, 8, 3, 3)])
def test_factors_are_truncated_as_their_product_would_be(
    shape: tuple[int, ...], random_layer: Callable[..., LayerWeights]
) -> None:
    """Against the decomposition of the dense update; what has a small rank is the same object."""
    layer = random_layer(torch.randn(shape), torch.Generator().manual_seed(0), rank=6)
    delta = (layer.scale * layer.up.flatten(1) @ layer.down.flatten(1)).double()
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    smaller, lost, size = truncated(layer, 2)
    found = (smaller.scale * smaller.up.flatten(1) @ smaller.down.flatten(1)).double()
    assert (smaller.rank, smaller.weight_shape) == (2, shape)
    assert smaller.magnitude is layer.magnitude
    assert torch.allclose(found, (u[:, :2] * s[:2]) @ vh[:2], atol=1e-5 * s[0].item())
    assert lost == pytest.approx(s[2:6].norm().item(), rel=1e-5)
    assert size == pytest.approx(s.norm().item(), rel=1e-5)
    assert truncated(layer, 6)[0] is layer
    held = s.square().cumsum(0) / s.square().sum()
    wanted = int((held < 0.7).sum()) + 1
    assert truncated(layer, 6, energy=0.7)[0].rank == wanted < 6
    assert truncated(layer, 1, energy=0.7)[0].rank == 1
    assert truncated(layer, 6, energy=1 - 1e-12)[0] is layer
