"""The best plain LoRA of a change, and its analysis against NumPy and changes that are known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dora_diffusion import numerics
from dora_diffusion.numerics.low_rank import (
    decompose,
    effective_rank,
    low_rank,
    low_rank_singular_values,
    random_start,
    singular_values,
    truncated,
)
from dora_diffusion.numerics.weights import NORM_AXES, LayerWeights, NormAxis


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


SHAPES = [(6, 6), (5, 9), (9, 5), (6, 4, 3, 3), (3, 7, 1, 1)]


def pair(shape: tuple[int, ...], seed: int = 0, change: float = 1e-2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    return weight, weight + change * torch.randn(shape, generator=generator, dtype=torch.float64)


def channels(weight: Tensor, axis: NormAxis) -> NDArray[np.float64]:
    """One row per channel."""
    array = weight.double().numpy()
    array = array if axis == "output" else np.swapaxes(array, 0, 1)
    return array.reshape(array.shape[0], -1)


@pytest.fixture(params=[2**18, 8], ids=["whole", "in blocks"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics.low_rank, "_BLOCK", request.param)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("axis", NORM_AXES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("change", [1.0, 1e-2, 1e-4])
def test_it_is_the_paper_s_formula(shape: tuple[int, ...], axis: NormAxis, change: float) -> None:
    weight, tuned = pair(shape, change=change)
    before, after = channels(weight, axis), channels(tuned, axis)
    norms = np.linalg.norm(before, axis=1), np.linalg.norm(after, axis=1)
    cosines = (before * after).sum(1) / (norms[0] * norms[1])
    found = decompose(weight, tuned, axis)
    assert found.delta_m == pytest.approx(np.abs(norms[1] - norms[0]).mean(), rel=1e-9)
    # NumPy's own line takes a cosine from 1, which leaves 1e-16 / 1e-9 of it.
    assert found.delta_d == pytest.approx((1 - cosines).mean(), rel=1e-6)
    assert found.norm == pytest.approx(norms[0].mean(), rel=1e-12)
    assert found.squared_change == pytest.approx(((after - before) ** 2).sum(), rel=1e-12)
    assert found.squared_norm == pytest.approx((before**2).sum(), rel=1e-12)


@pytest.mark.parametrize("axis", NORM_AXES)
def test_turning_every_channel_moves_no_magnitude(axis: NormAxis) -> None:
    """By a rotation of the space that the channels lie in, through one known angle."""
    weight, _ = pair((6, 8) if axis == "output" else (8, 6))
    angle = torch.tensor(0.3, dtype=torch.float64)
    turn = torch.eye(8, dtype=torch.float64)
    turn[:2, :2] = torch.stack(
        [torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])]
    )
    # Channels that lie in the plane of the rotation turn by the whole angle.
    keep = torch.zeros(8, dtype=torch.float64)
    keep[:2] = 1
    weight = weight * (keep if axis == "output" else keep[:, None])
    tuned = weight @ turn.t() if axis == "output" else turn @ weight
    found = decompose(weight, tuned, axis)
    assert found.delta_m < 1e-15
    assert found.delta_d == pytest.approx(1 - np.cos(0.3), rel=1e-12)


def test_a_channel_without_a_direction_is_left_out() -> None:
    weight, tuned = pair((3, 4))
    rest = decompose(weight[1:], tuned[1:], "output")
    for hurt in (weight, tuned):
        hurt[0] = 0
        found = decompose(weight, tuned, "output")
        assert found.delta_d == pytest.approx(rest.delta_d, rel=1e-12)
        assert np.isfinite(found.delta_m)
    zero = torch.zeros(2, 3)
    assert decompose(zero, torch.ones(2, 3), "output").delta_d == 0
    assert decompose(zero, zero, "input").delta_m == 0


def test_weights_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(3, 2\)"):
        decompose(torch.ones(2, 3), torch.ones(3, 2), "output")
    with pytest.raises(ValueError, match="two dimensions"):
        decompose(torch.ones(2), torch.ones(2), "output")


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_are_numpy_s(shape: tuple[int, ...]) -> None:
    weight, tuned = pair(shape)
    expected = np.linalg.svd((tuned - weight).numpy().reshape(shape[0], -1), compute_uv=False)
    found = singular_values(weight, tuned).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7 * expected[0])


@pytest.mark.parametrize("kernel", [(), (3, 3)])
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_factors_tell_the_singular_values_of_their_product(
    kernel: tuple[int, ...], rank: int
) -> None:
    generator = torch.Generator().manual_seed(rank)
    down = torch.randn(rank, 5, *kernel, generator=generator)
    up = torch.randn(6, rank, *[1] * len(kernel), generator=generator)
    layer = LayerWeights(down, up, None, 3.0)
    product = 3.0 / rank * up.double().flatten(1).numpy() @ down.double().flatten(1).numpy()
    expected = np.linalg.svd(product, compute_uv=False)
    found = low_rank_singular_values(layer).numpy()
    np.testing.assert_allclose(found, expected[: len(found)], rtol=0, atol=1e-12 * expected[0])
    np.testing.assert_allclose(expected[len(found) :], 0, atol=1e-12 * expected[0])


def test_the_effective_rank_counts_what_is_equal() -> None:
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0]).double()) == pytest.approx(3)
    assert effective_rank(torch.tensor([5.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(4)) == 0
    shares = np.array([0.5, 0.25, 0.25])
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert effective_rank(torch.tensor(4 * shares)) == pytest.approx(expected, rel=1e-12)
