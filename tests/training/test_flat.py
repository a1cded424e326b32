"""AdamW and clipping over flat parameters: the same as over the many that they are made of."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dora_diffusion.config import ConfigError
from dora_diffusion.training.checkpoint import restore_optimizer
from dora_diffusion.training.flat import FlatParameters, join_states

SHAPES = {"down": [(3, 5), (2, 4, 3, 3)], "magnitude": [(7,), (6,)]}


def groups_of(seed: int = 0) -> list[dict]:
    g = torch.Generator().manual_seed(seed)
    return [
        {
            "name": name,
            "params": [nn.Parameter(torch.randn(shape, generator=g)) for shape in shapes],
            "lr": 1e-2 if name == "down" else 3e-2,
            "weight_decay": 0.3 if name == "down" else 0.0,
        }
        for name, shapes in SHAPES.items()
    ]


def parameters(groups: list[dict]) -> list[nn.Parameter]:
    return [p for group in groups for p in group["params"]]


def give_gradients(members: list[nn.Parameter], step: int, unused: int | None = None) -> None:
    g = torch.Generator().manual_seed(step)
    for number, member in enumerate(members):
        gradient = torch.randn(member.shape, generator=g)
        member.grad = None if number == unused else gradient


def train(members, seen, optimizer, flat, steps, unused=None) -> list[torch.Tensor]:
    norms = []
    for step in steps:
        give_gradients(members, step, unused)
        if flat is not None:
            flat.take_gradients()
        norms.append(torch.nn.utils.clip_grad_norm_(seen, 1.0))
        optimizer.step()
        optimizer.zero_grad()
        if flat is not None:
            flat.finish()
    return norms


def adamw(groups: list[dict]) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, fused=True)


@pytest.mark.parametrize("unused", [None, 1])
def test_steps_are_those_of_the_members(unused):
    """Weight decay leaves alone what had no gradient."""
    plain, own = groups_of(), groups_of()
    members, expected = parameters(own), parameters(plain)
    flat = FlatParameters(own)
    assert [len(group["params"]) for group in flat.groups] == [1, 1]
    seen = parameters(flat.groups)
    norms = train(members, seen, adamw(flat.groups), flat, range(5), unused)
    wanted = train(expected, expected, adamw(plain), None, range(5), unused)
    torch.testing.assert_close(norms, wanted)
    for one, other in zip(members, expected, strict=True):
        torch.testing.assert_close(one, other)
        assert one.grad is None
    if unused is not None:
        assert torch.equal(members[unused], parameters(groups_of())[unused])


def test_moments_that_were_kept_apart_are_joined():
    """A checkpoint of an earlier version, read by a run that has flat parameters."""
    plain, whole = groups_of(), groups_of()
    expected = parameters(whole)
    train(expected, expected, adamw(whole), None, range(6))
    before = parameters(plain)
    first = adamw(plain)
    train(before, before, first, None, range(3))
    saved = copy.deepcopy(first.state_dict())
    members = parameters(plain)
    flat = FlatParameters(plain)
    second = adamw(flat.groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(second, lambda step: 1.0)
    state = {"optimizer": saved, "lr_schedule": schedule.state_dict()}
    restore_optimizer(second, schedule, state)
    train(members, parameters(flat.groups), second, flat, range(3, 6))
    torch.testing.assert_close(members, expected)


def test_moments_of_other_parameters_are_refused():
    plain = groups_of()
    optimizer = adamw(plain)
    train(parameters(plain), parameters(plain), optimizer, None, range(1), unused=0)
    flat = FlatParameters(groups_of())
    second = adamw(flat.groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(second, lambda step: 1.0)
    state = {"optimizer": optimizer.state_dict(), "lr_schedule": schedule.state_dict()}
    with pytest.raises(ConfigError, match="optimizer does not fit this run's: some of its param"):
        restore_optimizer(second, schedule, state)


def test_flat_moments_are_left_as_they_are():
    flat = FlatParameters(groups_of())
    optimizer = adamw(flat.groups)
    state = optimizer.state_dict()
    assert join_states(state, flat.groups) is state


def test_a_member_that_was_moved_is_not_trained_in_silence():
    groups = groups_of()
    members = parameters(groups)
    flat = FlatParameters(groups)
    give_gradients(members, 0)
    members[1].data = members[1].data.clone()
    with pytest.raises(RuntimeError, match="moved or replaced while it trains"):
        flat.take_gradients()
