"""Random projections: the same bits as the generator's definition, in plain whole numbers."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch

from dora_diffusion.numerics.projections import Projections, uniform

MASK = (1 << 64) - 1
STEP = 0x9E3779B97F4A7C15


def splitmix(state: int) -> int:
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def number(seed: int, stream: int, place: int) -> float:
    start = splitmix((seed * STEP + stream) & MASK)
    bits = splitmix((start + (place + 1) * STEP) & MASK) >> 40
    return (2 * bits + 1 - 2**24) / 2**24


@pytest.mark.parametrize("seed", [0, 3, 2**63 - 1])
@pytest.mark.parametrize("stream", [0, 2])
def test_numbers_are_the_generators(seed: int, stream: int) -> None:
    drawn = uniform(seed, stream, 4000)
    for place in (0, 1, 2, 1000, 3999):
        assert drawn[place].item() == number(seed, stream, place)
    assert abs(drawn.mean().item()) < 0.03
    assert abs(drawn.std().item() - 1 / math.sqrt(3)) < 0.02
    assert drawn.abs().max() < 1


def test_layers_take_parts_of_what_all_share() -> None:
    shapes = [(6, 4), (3, 8), (5, 2, 3, 3), (9, 3, 3, 3), (7, 5, 1, 1)]
    projections = Projections.of(shapes, rank=11, seed=2)
    assert projections.outputs == 9
    assert projections.inputs == {(1, 1): 8, (3, 3): 3}
    cpu = torch.device("cpu")
    for shape in shapes:
        down, up = projections.factors(shape, cpu)
        assert down.shape == (11, *shape[1:])
        assert up.shape == (shape[0], 11, *[1] * (len(shape) - 2))
    wide, whole = projections.factors((1, 8), cpu)[0], projections.factors((9, 1), cpu)[1]
    down, up = projections.factors((6, 4), cpu)
    assert torch.equal(down, wide[:, :4])
    assert torch.equal(up, whole[:6])
    bound = torch.tensor(math.sqrt(6 / 8), dtype=torch.float32)
    assert wide[1, 2] == torch.tensor(number(2, 1, 8 + 2), dtype=torch.float32) * bound
    assert whole.abs().max() <= math.sqrt(6 / 11)
    assert not projections.has((10, 4))
    assert not projections.has((4, 4, 5, 5))


def test_the_bits_are_those_that_files_were_written_with() -> None:
    """If this fails, no VeRA file that exists can be read any more: draw them as before."""
    matrices = Projections(7, 5, 6, {(1, 1): 4, (3, 3): 2}).matrices
    data = b"".join(matrices[key].numpy().tobytes() for key in ((1, 1), (3, 3), None))
    assert hashlib.sha256(data).hexdigest() == DIGEST


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"seed": -1}, {"inputs": {}}, {"outputs": 0}])
def test_impossible_sizes_are_refused(wrong: dict[str, object]) -> None:
    sizes = {"seed": 0, "rank": 2, "outputs": 3, "inputs": {(1, 1): 4}}
    with pytest.raises(ValueError, match="sizes must be positive"):
        Projections(**{**sizes, **wrong})


DIGEST = "ede871bf2a39a72dbf31d4197c0d1c868a2c158c25a325807a82970ad474df29"
