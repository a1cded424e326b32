"""Parameter groups, optimizers and schedules; AdamW over flat parameters, as over the many."""

from __future__ import annotations

import copy
import json
import math
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

from dora_diffusion.adapters.inject import inject_adapters
from dora_diffusion.config import TrainConfig
from dora_diffusion.config.learning import LR_SCHEDULES, OPTIMIZERS, PRODIGIES, SCHEDULE_FREE
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.models.load import load_components
from dora_diffusion.training.optimizer import (
    FlatParameters,
    build_lr_schedule,
    build_optimizer,
    learning_rates,
    parameter_groups,
    restore_optimizer,
)
from dora_diffusion.training.recipe import train
from tests.refusal import refused
from tests.training.helpers import losses, make_config, needs_library


def rates(config):
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["lr"]["unet/down"] for line in lines]


# What a schedule makes of the rate, after warm-up: by the share of the steps after it that is done.
FACTORS = {
    "constant": lambda done: 1,
    "constant_with_warmup": lambda done: 1,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "cosine_with_restarts": lambda done: (1 + math.cos(math.pi * (2 * done % 1))) / 2,
    "polynomial": lambda done: (1 - done) ** 2,
}


@pytest.mark.parametrize("warmup", [0, 2, 8])
@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [
        (optimizer, schedule)
        for optimizer, schedule in product(OPTIMIZERS, LR_SCHEDULES)
        if optimizer not in SCHEDULE_FREE or schedule.startswith("constant")
    ],
)
def test_every_schedule_goes_with_every_optimizer(optimizer, schedule, warmup):
    needs_library(optimizer)
    rate, steps = 1.0 if optimizer in PRODIGIES else 1e-2, 8
    config = TrainConfig(
        optimizer=optimizer, lr_scheduler=schedule, learning_rate=rate, max_train_steps=steps,
        lr_warmup_steps=warmup, lr_num_cycles=2, lr_power=2.0,
    )  # fmt: skip
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    chosen = build_optimizer([{"name": "unet/up", "params": [parameter], "lr": rate}], config)
    if warmup < steps:
        changes = build_lr_schedule(chosen, config)
    else:
        with pytest.warns(UserWarning, match="the learning rate never reaches"):
            changes = build_lr_schedule(chosen, config)
    for step in range(steps):
        rising = step < warmup
        share = step / warmup if rising else FACTORS[schedule]((step - warmup) / (steps - warmup))
        assert learning_rates(chosen.param_groups)["lr"]["unet/up"] == pytest.approx(
            rate * share, rel=1e-6, abs=1e-4 * rate
        )
        before = parameter.detach().clone()
        parameter.square().sum().backward()
        chosen.step()
        changes.step()
        chosen.zero_grad()
        assert torch.equal(before, parameter) == (share == 0)
        assert parameter.isfinite().all()


def test_prodigy_gets_its_settings():
    pytest.importorskip("prodigyopt")
    config = TrainConfig(
        optimizer="prodigy", learning_rate=1.0, prodigy_beta3=0.7, prodigy_decouple=False,
        prodigy_use_bias_correction=True, prodigy_safeguard_warmup=False,
    )  # fmt: skip
    group = {"name": "x", "params": [torch.nn.Parameter(torch.ones(2))], "lr": 1.0}
    chosen = build_optimizer([group], config).param_groups[0]
    names = ("beta3", "decouple", "use_bias_correction", "safeguard_warmup")
    assert [chosen[name] for name in names] == [0.7, False, True, False]


def test_magnitudes_do_not_decay_and_rates_are_separate(sd1_folder):
    components = load_components(str(sd1_folder))
    config = TrainConfig(
        rank=2, conv_rank=2, learning_rate=1e-4, text_encoder_lr=1e-5, magnitude_lr=3e-4,
        loraplus_ratio=4.0, adam_weight_decay=0.1, adam_weight_decay_text_encoder=0.3,
    )  # fmt: skip
    inject_adapters(components.denoiser, config.adapter("unet"))
    inject_adapters(components.text_encoders[0], config.adapter("text_encoder"))
    groups = {g["name"]: g for g in parameter_groups(components.adaptable(), config)}
    assert {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()} == {
        "unet/down": (1e-4, 0.1),
        "unet/up": (4e-4, 0.1),
        "unet/magnitude": (3e-4, 0.0),
        "text_encoder/down": (1e-5, 0.3),
        "text_encoder/up": (4e-5, 0.3),
        "text_encoder/magnitude": (3e-4, 0.0),
    }


def test_prodigy_takes_one_rate_near_one(sd1_folder, photos, tmp_path):
    pytest.importorskip("prodigyopt")
    config = {"optimizer": "prodigy", "train_text_encoder": True}
    with refused("learning_rate", "Prodigy estimates the rate"):
        make_config(sd1_folder, photos, tmp_path / "out", **config)
    config["learning_rate"] = 1.0
    with refused("optimizer", "one rate for all parameters"):
        make_config(sd1_folder, photos, tmp_path / "out", loraplus_ratio=2.0, **config)
    train(make_config(sd1_folder, photos, tmp_path / "out", checkpointing_steps=2, **config))
    rates = losses(tmp_path / "out", "lr")[4]
    assert set(rates.values()) == {1.0}
    assert {name.partition("/")[0] for name in rates} == {"unet", "text_encoder"}
    resumed = make_config(
        sd1_folder, photos, tmp_path / "out",
        resume_from_checkpoint="latest", max_train_steps=6, **config,
    )  # fmt: skip
    train(resumed)
    moved = [layer.up.abs().max() for layer in read_adapter(tmp_path / "out").layers.values()]
    assert max(moved) > 0


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


def take_steps(members, seen, optimizer, flat, steps, unused=None) -> list[torch.Tensor]:
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
    norms = take_steps(members, seen, adamw(flat.groups), flat, range(5), unused)
    wanted = take_steps(expected, expected, adamw(plain), None, range(5), unused)
    torch.testing.assert_close(norms, wanted)
    for one, other in zip(members, expected, strict=True):
        torch.testing.assert_close(one, other)
        assert one.grad is None
    if unused is not None:
        assert torch.equal(members[unused], parameters(groups_of())[unused])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer_that_was_restored_continues_to_the_last_bit(optimizer):
    """Also what it keeps in other dtypes than its parameters have."""
    needs_library(optimizer)
    rate = 1.0 if optimizer in PRODIGIES else 1e-3
    config = TrainConfig(optimizer=optimizer, learning_rate=rate, max_train_steps=6)

    def made():
        groups = groups_of()
        for group in groups:
            group |= {"name": f"unet/{group['name']}", "lr": rate}
        chosen = build_optimizer(groups, config)
        return groups, chosen, build_lr_schedule(chosen, config)

    def stepped(groups, chosen, schedule, steps):
        members = parameters(groups)
        for step in steps:
            take_steps(members, members, chosen, None, [step])
            schedule.step()

    whole, first, second = made(), made(), made()
    stepped(*whole, range(6))
    stepped(*first, range(3))
    with torch.no_grad():
        for before, after in zip(parameters(first[0]), parameters(second[0]), strict=True):
            after.copy_(before)
    state = {"optimizer": first[1].state_dict(), "lr_schedule": first[2].state_dict()}
    restore_optimizer(second[1], second[2], copy.deepcopy(state))
    stepped(*second, range(3, 6))
    assert all(map(torch.equal, parameters(whole[0]), parameters(second[0])))
    states = [list(run[1].state.values()) for run in (whole, second)]
    for ours, theirs in zip(*states, strict=True):
        for key, value in ours.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == theirs[key].dtype, key
                assert torch.equal(value, theirs[key]), key


def test_moments_of_other_parameters_are_refused():
    plain = groups_of()
    optimizer = adamw(plain)
    take_steps(parameters(plain), parameters(plain), optimizer, None, range(1), unused=0)
    second = adamw(FlatParameters(groups_of()).groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(second, lambda step: 1.0)
    state = {"optimizer": optimizer.state_dict(), "lr_schedule": schedule.state_dict()}
    with refused("resume_from_checkpoint", "optimizer does not fit"):
        restore_optimizer(second, schedule, state)


def test_the_order_in_memory_changes_neither_a_step_nor_a_state():
    """A state has the order of the groups, so that every order resumes it."""
    plain, ordered = groups_of(), groups_of()
    order = list(reversed(parameters(ordered)))
    runs = []
    for groups, flat in ((plain, FlatParameters(plain)), (ordered, FlatParameters(ordered, order))):
        members, seen = parameters(groups), parameters(flat.groups)
        optimizer = adamw(flat.groups)
        take_steps(members, seen, optimizer, flat, range(3))
        runs.append((members, flat, optimizer, flat.gather_state(optimizer.state_dict())))
    (one, _, _, state), (other, flat, optimizer, own) = runs
    for ours, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(ours, theirs)
    for index, moments in state["state"].items():
        for key, value in moments.items():
            torch.testing.assert_close(own["state"][index][key], value)
    restored = flat.own_state(own)["state"]
    for index, moments in optimizer.state_dict()["state"].items():
        for key, value in moments.items():
            assert torch.equal(restored[index][key], value), key
    assert any(len(group["params"]) > 1 for group in plain)


def test_a_member_without_a_gradient_has_none_of_the_step_before():
    groups = groups_of()
    members, flat = parameters(groups), FlatParameters(groups)
    give_gradients(members, 0)
    flat.take_gradients()
    flat.finish()
    give_gradients(members, 1)
    members[1].grad = None
    flat.take_gradients()
    for member in members:
        assert bool(flat.memory[member].any()) == (member is not members[1])


def test_a_member_that_was_moved_is_not_trained_in_silence():
    groups = groups_of()
    members = parameters(groups)
    flat = FlatParameters(groups)
    give_gradients(members, 0)
    members[1].data = members[1].data.clone()
    with pytest.raises(RuntimeError, match="moved or replaced during training"):
        flat.take_gradients()
