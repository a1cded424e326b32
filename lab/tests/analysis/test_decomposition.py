"""Changes of weights, against NumPy and changes that are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dora_diffusion.numerics.weights import NORM_AXES, LayerWeights, NormAxis
from lab.analysis import decomposition
from lab.analysis.decomposition import (
    decompose,
    effective_rank,
    low_rank_singular_values,
    singular_values,
)

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
    monkeypatch.setattr(decomposition, "_BLOCK", request.param)


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
