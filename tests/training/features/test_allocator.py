"""Rank allocation against PEFT's allocator, on the same weights and gradients."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator
from torch import nn

from dora_diffusion.training.features.adalora import (
    BudgetSchedule,
    Sensitivity,
    kept_triplets,
    orthogonality_gradients,
    triplet_importance,
)

STEPS, WARMUP, FINAL, INTERVAL, RANK, TARGET = 20, 3, 6, 2, 5, 2


def peft_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(7, 9), "b": nn.Linear(4, 6), "c": nn.Linear(8, 5)})
    config = peft.AdaLoraConfig(
        init_r=RANK, target_r=TARGET, tinit=WARMUP, tfinal=FINAL, deltaT=INTERVAL,
        total_step=STEPS, target_modules=["a", "b", "c"], lora_alpha=RANK,
    )  # fmt: skip
    return peft.get_peft_model(model, config)


def test_the_budget_is_pefts() -> None:
    allocator: RankAllocator = peft_model().base_model.rankallocator
    schedule = BudgetSchedule(3 * RANK, 3 * TARGET, STEPS, WARMUP, FINAL, INTERVAL)
    assert (allocator.init_bgt, allocator.target_bgt) == (3 * RANK, 3 * TARGET)
    for step in range(1, STEPS + 1):
        budget, chooses = allocator.budget_schedule(step)
        assert schedule.budget(step) == budget
        if step != schedule.last:
            assert schedule.chooses(step) == (chooses and step < schedule.last)
    assert schedule.chooses(schedule.last)
    with pytest.raises(ValueError, match="leave none of 9 steps"):
        BudgetSchedule(15, 6, 9, 3, 6, 1)


def test_importance_and_choices_are_pefts_over_a_schedule() -> None:
    """The weights move and have random gradients; PEFT masks its own, and ours are masked alike."""
    model = peft_model()
    allocator: RankAllocator = model.base_model.rankallocator
    theirs = {n: p for n, p in model.named_parameters() if "lora_" in n}
    kinds = [[p for n, p in theirs.items() if f"lora_{part}" in n] for part in "EAB"]
    ours = [p.detach().clone() for kind in kinds for p in kind]
    sensitivity = Sensitivity.of(ours)
    schedule = BudgetSchedule(3 * RANK, 3 * TARGET, STEPS, WARMUP, FINAL, INTERVAL)
    generator = torch.Generator().manual_seed(1)
    kept, choices = None, 0
    for step in range(1, STEPS + 1):
        gradients = []
        for mine, one in zip(ours, (p for kind in kinds for p in kind), strict=True):
            moved = 0.3 * torch.randn(mine.shape, generator=generator)
            gradient = torch.randn(mine.shape, generator=generator)
            mine += moved
            one.data += moved
            one.grad = gradient
            gradients.append(gradient)
        model.base_model.update_and_allocate(step)
        if step < schedule.last:
            sensitivity.update(ours, gradients)
        scores = sensitivity.scores()
        if schedule.chooses(step):
            layers = zip(*(scores[i * 3 : i * 3 + 3] for i in range(3)), strict=True)
            importance = [triplet_importance(e.flatten(), q, p) for e, q, p in layers]
            kept = kept_triplets(importance, schedule.budget(step))
            choices += 1
        if kept is not None and (step >= schedule.last or schedule.chooses(step)):
            for diagonal, mask in zip(ours[:3], kept, strict=True):
                diagonal.masked_fill_(~mask[:, None], 0)
        if step < schedule.last:
            names = [n for part in "EAB" for n in theirs if f"lora_{part}" in n]
            for name, score in zip(names, scores, strict=True):
                expected = allocator._element_score(name.removeprefix("base_model.model."))
                torch.testing.assert_close(score, expected, rtol=1e-5, atol=1e-7)
        for mine, one in zip(ours, (p for kind in kinds for p in kind), strict=True):
            assert torch.equal(mine == 0, one == 0)
            torch.testing.assert_close(mine, one.detach(), rtol=0, atol=1e-5)
    assert choices == 6
    assert sum(int((diagonal != 0).sum()) for diagonal in ours[:3]) == 3 * TARGET
    assert len({int((diagonal != 0).sum()) for diagonal in ours[:3]}) > 1


def test_a_budget_of_all_keeps_all() -> None:
    importance = [torch.tensor([0.0, 1.0]), torch.tensor([2.0])]
    assert [mask.tolist() for mask in kept_triplets(importance, 3)] == [[True, True], [True]]
    assert [mask.tolist() for mask in kept_triplets(importance, 1)] == [[False, False], [True]]


def test_the_orthogonality_term_has_the_gradients_of_autograd() -> None:
    generator = torch.Generator().manual_seed(2)
    factors = [torch.randn(r, n, generator=generator).double().requires_grad_()
               for r, n in ((3, 7), (4, 5), (2, 2))]  # fmt: skip
    term = sum((f @ f.T - torch.eye(len(f), dtype=f.dtype)).norm() for f in factors) / 3
    (0.7 * term).backward()
    made = orthogonality_gradients([f.detach() for f in factors], 0.7)
    for factor, gradient in zip(factors, made, strict=True):
        torch.testing.assert_close(gradient, factor.grad, rtol=1e-10, atol=1e-12)
