"""The nearest DoRA: exact where there is one, else as near as NumPy's own alternation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dora_diffusion.numerics.dora import adapted_weight, weight_norm
from dora_diffusion.numerics.extract import best_dora, known_scale
from dora_diffusion.numerics.low_rank import low_rank
from dora_diffusion.numerics.weights import LayerWeights, NormAxis

AXES: tuple[NormAxis, ...] = ("output", "input")
SHAPES = [
    (32, 32), (16, 48), (48, 16), (300, 320),  # the last takes the randomised way
    (24, 16, 3, 3), (16, 24, 3, 3), (4, 24, 3, 3), (24, 4, 3, 3), (24, 32, 1, 1),
]  # fmt: skip
Array = np.ndarray[Any, np.dtype[np.float64]]
MakeLayer = Callable[..., LayerWeights]


def drawn(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.03


def array(tensor: Tensor) -> Array:
    values: Array = tensor.double().numpy()
    return values


def dense(weight: Array, layer: LayerWeights) -> Array:
    """``m (W + s B A) / norm(W + s B A)`` in float64, by NumPy."""
    up, down = array(layer.up).reshape(len(weight), -1), array(layer.down)
    product = up @ down.reshape(layer.rank, -1) * layer.alpha / layer.rank
    changed = weight + product.reshape(weight.shape)
    if layer.magnitude is None:
        return changed
    others = tuple(d for d in range(weight.ndim) if d != (layer.norm_axis == "input"))
    norm = np.sqrt((changed**2).sum(others, keepdims=True))
    return changed * array(layer.magnitude).reshape(norm.shape) / norm


def distance(weight: Tensor, tuned: Tensor, layer: LayerWeights) -> float:
    """``|W'' - T| / |T - W|`` in float64."""
    base, wanted = array(weight), array(tuned)
    left = np.linalg.norm(dense(base, layer) - wanted)
    return float(left / np.linalg.norm(wanted - base))


def least_distance(weight: Tensor, tuned: Tensor, rank: int, axis: NormAxis) -> float:
    """Error of the best ``D W + E``, by 400 turns of the two closed forms in NumPy's float64."""
    base, wanted = array(weight), array(tuned)
    others = tuple(d for d in range(base.ndim) if d != (axis == "input"))
    scale = np.ones([1 if d in others else n for d, n in enumerate(base.shape)])
    for _ in range(400):
        u, s, vh = np.linalg.svd((wanted - scale * base).reshape(len(base), -1), False)
        low = ((u[:, :rank] * s[:rank]) @ vh[:rank]).reshape(base.shape)
        product = ((wanted - low) * base).sum(others, keepdims=True)
        scale = product / (base**2).sum(others, keepdims=True)
    left = np.linalg.norm(wanted - scale * base - low)
    return float(left / np.linalg.norm(wanted - base))


def truncated_svd(weight: Tensor, tuned: Tensor, rank: int) -> float:
    """The distance of the best plain LoRA."""
    change = (array(tuned) - array(weight)).reshape(len(weight), -1)
    s = np.linalg.svd(change, compute_uv=False)
    return float(np.linalg.norm(s[rank:]) / np.linalg.norm(s))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [1, 4])
def test_a_dora_is_found_again(
    shape: tuple[int, ...], rank: int, axis: NormAxis, random_layer: MakeLayer
) -> None:
    """Of large updates: magnitudes moved by a fifth, directions by a third of the weight."""
    generator = torch.Generator().manual_seed(1)
    weight = drawn(shape)
    layer = random_layer(weight, generator, rank=rank, axis=axis)
    tuned = torch.from_numpy(dense(array(weight), layer)).float()
    found = best_dora(weight, tuned, rank, axis)
    assert (found.rank, found.scale, found.norm_axis) == (rank, 1.0, axis)
    assert found.magnitude is not None
    error = np.abs(dense(array(weight), found) - array(tuned)).max() / np.abs(array(tuned)).max()
    assert error < 2e-6
    assert torch.allclose(found.magnitude, weight_norm(tuned, axis), rtol=1e-5)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", [(24, 32), (16, 12, 3, 3), (300, 320)], ids=str)
@pytest.mark.parametrize("share", [0.02, 0.5])
def test_it_is_as_near_as_the_plain_alternation(
    shape: tuple[int, ...], share: float, axis: NormAxis
) -> None:
    """Of a change of full rank, small and as large as half the weight; and nearer than a LoRA."""
    weight, change, rank = drawn(shape), drawn(shape, 1), 5
    tuned = weight + share * change
    found = distance(weight, tuned, best_dora(weight, tuned, rank, axis))
    if weight.numel() < 10_000:
        assert found < least_distance(weight, tuned, rank, axis) * (1 + 1e-4)
    assert found < truncated_svd(weight, tuned, rank)


@pytest.mark.parametrize("axis", AXES)
def test_changes_of_nearly_low_rank_stay_low(axis: NormAxis) -> None:
    """The scales that are best alone would hide that in every channel."""
    for seed in range(5):
        weight = drawn((32, 32), seed)
        u, _, vh = np.linalg.svd(array(drawn((32, 32), seed + 10)), False)
        tuned = weight + torch.from_numpy((u * 0.05 * 0.5 ** np.arange(32)) @ vh)
        found = distance(weight, tuned, best_dora(weight, tuned, 4, axis))
        assert found < truncated_svd(weight, tuned, 4)


@pytest.mark.parametrize("axis", AXES)
def test_channels_of_zeros_and_channels_that_turn_around(axis: NormAxis) -> None:
    """Nothing is divided by zero, and no magnitude is negative."""
    weight, tuned = drawn((24, 32)), drawn((24, 32)) + 0.1 * drawn((24, 32), 1)
    channels = (weight, tuned) if axis == "output" else (weight.t(), tuned.t())
    channels[0][3] = 0  # grown from nothing
    channels[1][5] = 0  # pruned
    channels[1][7] = -channels[0][7]
    layer = best_dora(weight, tuned, 6, axis)
    assert layer.magnitude is not None
    assert layer.magnitude.min() >= 0
    found = adapted_weight(weight, layer)
    along = found if axis == "output" else found.t()
    assert torch.isfinite(found).all()
    assert along[5].norm() < 1e-5
    assert distance(weight, tuned, layer) < truncated_svd(weight, tuned, 6)


@pytest.mark.parametrize("shape", [(32, 24), (300, 320)], ids=str)
def test_energy_chooses_the_smallest_rank_that_holds_it(shape: tuple[int, ...]) -> None:
    """Of what is left once every row has its best scale; never more than the rank."""
    weight = drawn(shape)
    u, _, vh = np.linalg.svd(array(drawn(shape, 1)), False)
    values = 0.01 / np.arange(1, len(u[0]) + 1)
    tuned = weight + torch.from_numpy((u * values) @ vh)
    base, change = array(weight), array(tuned) - array(weight)
    excess = (change * base).sum(1, keepdims=True) / (base**2).sum(1, keepdims=True)
    squares = np.linalg.svd(change - excess * base, compute_uv=False) ** 2
    held = squares.cumsum() / squares.sum()
    for energy in (0.5, 0.8, 0.9):
        wanted = int(np.searchsorted(held, energy)) + 1
        assert best_dora(weight, tuned, 40, energy=energy).rank == min(wanted, 40)
        assert best_dora(weight, tuned, 2, energy=energy).rank == min(wanted, 2)
    squares = values**2
    wanted = int(np.searchsorted(squares.cumsum() / squares.sum(), 0.9)) + 1
    assert low_rank((tuned - weight).float(), 40, 0.9).rank == wanted


@pytest.mark.parametrize("axis", AXES)
def test_the_scales_of_a_sum_are_known(axis: NormAxis, random_layer: MakeLayer) -> None:
    """``T - D W`` has no more than the sum of the ranks, so that the sum is found at once."""
    weight = drawn((24, 16, 3, 3))
    generator = torch.Generator().manual_seed(1)
    other_axis = AXES[axis == "output"]
    layers = [
        (random_layer(weight, generator, rank=2, axis=axis), 0.7),
        (random_layer(weight, generator, rank=3, axis=axis), -0.4),
        (random_layer(weight, generator, rank=2, axis=None), 0.5),
    ]
    base = array(weight)
    tuned = base + sum(strength * (dense(base, layer) - base) for layer, strength in layers)
    scale = known_scale(weight, layers, axis)
    shape = (-1, 1, 1, 1) if axis == "output" else (1, -1, 1, 1)
    left = tuned - array(scale).reshape(shape) * base
    s = np.linalg.svd(left.reshape(24, -1), compute_uv=False)
    assert s[7:].max() < 1e-6 * s[0] < s[6]
    found = best_dora(weight, torch.from_numpy(tuned), 7, axis, start=scale)
    assert distance(weight, torch.from_numpy(tuned), found) < 1e-5
    elsewhere = known_scale(weight, layers[:2], other_axis)
    assert torch.equal(elsewhere, torch.ones_like(elsewhere))
