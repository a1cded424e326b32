"""Rank allocation as a run does it: against PEFT's AdaLoRA, and what it leaves."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from torch import nn

from dora_diffusion.adapters.inject import inject_adapters, layer_adapters, merge_adapters
from dora_diffusion.adapters.layers import adapted_layers
from dora_diffusion.adapters.state import adapter_state
from dora_diffusion.config import AdapterConfig
from dora_diffusion.formats.adapter.file import AdapterMetadata, read_adapter, write_adapter
from dora_diffusion.training.features.adalora import Allocation, BudgetSchedule, RankAllocation
from dora_diffusion.training.inputs.plan import plan_run
from dora_diffusion.training.optimizer import FlatParameters
from dora_diffusion.training.processes import make_accelerator
from dora_diffusion.training.recipe import assemble, train
from tests.adapters.test_parametrizations import batches, merged_weights, two_linears
from tests.training.helpers import accelerator_of_fp16, hook_of, open_run

RANK, TARGET, STEPS = 4, 2, 14


def orthogonality(model: nn.Module) -> torch.Tensor:
    """PEFT's term, which it adds to losses of transformers' models only."""
    factors = [p if "lora_A" in n else p.T for n, p in model.named_parameters()
               if "lora_A" in n or "lora_B" in n]  # fmt: skip
    return sum((f @ f.T - torch.eye(len(f))).norm() for f in factors) / len(factors)


def test_it_trains_to_the_weights_and_ranks_of_pefts() -> None:
    ours, theirs = two_linears(), two_linears()
    inject_adapters(ours, AdapterConfig(targets=("*",), rank=RANK, alpha=6.0, use_dora=False,
                                        parametrization="adalora"))  # fmt: skip
    adapters = list(layer_adapters(ours))
    schedule = BudgetSchedule(2 * RANK, 2 * TARGET, STEPS, warmup=2, final=4, interval=2)
    allocation = RankAllocation(adapters, schedule, 0.5)
    # PEFT divides by the rank and a hundred-thousandth.
    theirs = peft.get_peft_model(theirs, peft.AdaLoraConfig(
        init_r=RANK, target_r=TARGET, tinit=2, tfinal=4, deltaT=2, total_step=STEPS,
        lora_alpha=6.0 * (RANK + 1e-5) / RANK, target_modules=["first", "second"],
    ))  # fmt: skip
    pairs = []
    for name, layer in adapted_layers(ours):
        mine, other = layer.adapters["default"], theirs.base_model.model.get_submodule(name)
        pairs += [(mine.down, other.lora_A["default"]), (mine.up, other.lora_B["default"]),
                  (mine.parametrization.diagonal, other.lora_E["default"])]  # fmt: skip
    for mine, one in pairs:
        one.data.copy_(mine.view(one.shape))
    steps = [torch.optim.AdamW([p[i] for p in pairs], lr=0.02, weight_decay=0) for i in (0, 1)]
    for number, x in enumerate(batches(STEPS, 10), 1):
        target = x[:, :6].cos()
        (ours(x) - target).square().mean().backward()
        allocation.add_orthogonality()
        steps[0].step()
        allocation.after_step(number)
        steps[0].zero_grad()
        ((theirs(x) - target).square().mean() + 0.5 * orthogonality(theirs)).backward()
        steps[1].step()
        theirs.base_model.update_and_allocate(number)
        steps[1].zero_grad()
    for mine, one in pairs:
        assert torch.equal(mine.view(one.shape) == 0, one == 0)
        torch.testing.assert_close(mine.view(one.shape), one, rtol=0, atol=1e-5)
    state = adapter_state({"unet": ours})
    assert sum(layer.rank for layer in state.values()) == 2 * TARGET
    merge_adapters(ours)
    expected = merged_weights(theirs.merge_and_unload())
    for name, weight in merged_weights(ours).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5)


def test_a_run_ends_with_its_budget_as_ranks_of_an_ordinary_dora(tiny_run, tmp_path):
    config = tiny_run(
        parametrization="adalora", rank=4, target_rank=2, max_train_steps=8, allocation_interval=2,
        targets=["attention", "*.resnets.0.conv1"], conv_rank=2, checkpointing_steps=4,
    )  # fmt: skip
    train(config)
    layers = read_adapter(tmp_path / "out").layers
    state = torch.load(tmp_path / "out" / "checkpoint-8" / "training_state.pt", weights_only=True)
    kept = state["allocation"]["kept"]
    start = sum(len(mask) for mask in kept)
    assert sum(int(mask.sum()) for mask in kept) == start // 2
    assert {4 if layer.down.ndim == 2 else 2 for layer in layers.values()} == {2, 4}
    folder = write_adapter(tmp_path / "peft", read_adapter(tmp_path / "out"), "peft")
    text = (folder / "unet" / "adapter_config.json").read_text(encoding="utf-8")
    assert json.loads(text)["use_dora"]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "ranks allocated to layers, from 4" in card


def test_switched_off_rows_are_not_in_the_file_and_the_scale_stays(sd1_folder, photos, tmp_path):
    session = open_run(sd1_folder, photos, tmp_path, targets=["attention"],
                       parametrization="adalora", lora_alpha=3.0)  # fmt: skip
    for number, (_, layer) in enumerate(adapted_layers(session.components.denoiser)):
        adapter = layer.adapters["default"]
        expected = adapter.weights()
        with torch.no_grad():
            adapter.parametrization.diagonal[: 1 + number % 2] = 0
        made, full = adapter.used_weights(), adapter.weights()
        assert made.rank == 1
        assert made.scale == expected.scale == 1.5
        torch.testing.assert_close(made.up @ made.down, full.up @ full.down, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("alpha", "is_exact"), [(4.0, True), (1.0, True), (3.0, False)])
@pytest.mark.parametrize("parametrization", ["adalora", "low-rank"])
def test_a_file_holds_the_factors_to_the_bit_where_their_scale_is_a_power_of_two(
    sd1_folder, photos, tmp_path, alpha, is_exact, parametrization
):
    """Those of the triplets that are on, without the others; else ``B`` is rounded once."""
    session = open_run(sd1_folder, photos, tmp_path, targets=["attention"], rank=4,
                       parametrization=parametrization, lora_alpha=alpha)  # fmt: skip
    session.step(1)
    live = {}
    for number, (path, layer) in enumerate(adapted_layers(session.components.denoiser)):
        adapter = layer.adapters["default"]
        on = torch.ones(4, dtype=torch.bool)
        if parametrization == "adalora":
            on[: 1 + number % 2] = False
            adapter.parametrization.diagonal.data[~on] = 0
        full = adapter.weights()
        live[f"unet.{path}"] = (full.down[on], full.scale * full.up[:, on].double())
    written = session.weights.writer()(tmp_path / "file", AdapterMetadata("sd1"))
    for name, layer in read_adapter(written).layers.items():
        down, up = live[name]
        assert torch.equal(layer.down, down)
        assert layer.scale == 1
        torch.testing.assert_close(layer.up.double(), up, rtol=1.2e-7, atol=0)
        assert torch.equal(layer.up.double(), up) == (is_exact or not up.any())


def test_it_weighs_the_gradients_that_the_optimizer_gets(sd1_folder, photos, tmp_path, monkeypatch):
    """Clipped ones, also where the optimizer sees all parameters as a few flat ones."""
    session = open_run(sd1_folder, photos, tmp_path, targets=["attention"],
                       parametrization="adalora", max_grad_norm=1e-3)  # fmt: skip
    allocation, norms = hook_of(session.step, Allocation).ranks, []
    assert isinstance(session.step.parameters, FlatParameters)

    def note(step: int) -> None:
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in allocation._parameters]))

    monkeypatch.setattr(allocation, "after_step", note)
    session.step(1)
    assert 1e-4 < norms[0] <= 1.001e-3


def test_a_step_that_fp16_skips_tells_it_nothing(tiny_run):
    config = tiny_run(
        parametrization="adalora", rank=4, target_rank=2, mixed_precision="fp16",
        max_train_steps=12,
        allocation_interval=1, allocation_warmup=1, allocation_final=2,
    )  # fmt: skip
    accelerator = accelerator_of_fp16(config, scale=2.0**60)
    session = assemble(plan_run(config), accelerator)
    allocation = hook_of(session.step, Allocation).ranks
    before = [p.detach().clone() for p in allocation._parameters]
    session.step(1)
    session.step(2)  # where triplets would be chosen
    seen = [*allocation._sensitivity.mean, *allocation._sensitivity.uncertainty]
    assert not any(tensor.any() for tensor in seen)
    assert all(map(torch.equal, before, allocation._parameters))
    accelerator.scaler.update(2.0**10)
    session.step(3)
    assert any(tensor.any() for tensor in seen)
    assert all(tensor.isfinite().all() for tensor in seen)
    assert any((diagonal == 0).any() for diagonal in allocation._diagonals)


def test_prodigy_does_not_see_the_term(tiny_run):
    """It takes its step size from gradients; the term acts beside it, at the rate that it found."""
    pytest.importorskip("prodigyopt")
    steps, rate = [], 1e-3
    for weight in (0.0, 0.3):
        config = tiny_run(parametrization="adalora", rank=4, optimizer="prodigy", learning_rate=1.0,
                          orthogonality_weight=weight, max_train_steps=20)  # fmt: skip
        session = assemble(plan_run(config), make_accelerator(config))
        for group in session.step.optimizer.param_groups:
            group |= {"d": rate, "d0": rate, "d_max": rate}
        session.step(1)
        steps.append(session.step)
    without, beside = (list(hook_of(step, Allocation).ranks._adapters) for step in steps)
    for plain, other in zip(without, beside, strict=True):
        for name, is_up in (("down", False), ("up", True)):
            start = getattr(plain, name).detach().clone().requires_grad_()
            rows = start.flatten(1).t() if is_up else start.flatten(1)
            (0.3 * (rows @ rows.t() - torch.eye(len(rows))).norm()).backward()
            moved = getattr(other, name) - start
            torch.testing.assert_close(moved, -rate * start.grad, rtol=1e-3, atol=1e-7)
    plain, other = (step.optimizer.state_dict() for step in steps)
    assert [g["d"] for g in other["param_groups"]] == [g["d"] for g in plain["param_groups"]]
    for index, moments in plain["state"].items():
        assert torch.equal(other["state"][index]["exp_avg"], moments["exp_avg"])


def test_in_fp16_the_term_is_scaled_as_the_losses_gradients_are(tiny_run) -> None:
    config = tiny_run(parametrization="adalora", rank=4, mixed_precision="fp16")
    gradients = []
    for scale in (1.0, 2.0**10):
        step = assemble(plan_run(config), accelerator_of_fp16(config, scale=scale)).step
        hook_of(step, Allocation).gradients(1)
        gradients.append([adapter.down.grad for adapter in step.adapters.trained()])
    assert any(bool(gradient.any()) for gradient in gradients[0])
    for plain, scaled in zip(*gradients, strict=True):
        torch.testing.assert_close(scaled, plain * 2.0**10, rtol=1e-5, atol=0)
