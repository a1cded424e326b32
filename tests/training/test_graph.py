"""Steps by graphs: with a stand-in for CUDA's, whose replay calls the function on fixed tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_diffusion.training import graph as graph_module
from dora_diffusion.training.graph import GraphedStep, Outputs, StepGraph
from dora_diffusion.training.run import Run
from tests.training.helpers import open_run

STEPS = 6


class StandIn:
    """Capture on a CPU. A replay reads fixed inputs and writes fixed outputs, as a graph does."""

    replays = 0

    def capture(self, function: Callable[[], Outputs], other: StandIn | None) -> Outputs:
        self.function, self.outputs = function, function()
        return self.outputs

    def replay(self) -> None:
        StandIn.replays += 1
        found = self.function()
        assert found.gradients.keys() == self.outputs.gradients.keys()
        torch._foreach_copy_(tensors_of(self.outputs), tensors_of(found))


def tensors_of(outputs: Outputs) -> list[torch.Tensor]:
    flags = [flagged for _, flagged, _ in outputs.flags]
    return [outputs.losses, *outputs.gradients.values(), *flags]


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[StandIn]]:
    """Capture on the CPU by the stand-in."""
    monkeypatch.setitem(graph_module.CAPTURES, "cpu", StandIn)
    StandIn.replays = 0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "cuda_graph")
        yield StandIn


@pytest.fixture
def opened(sd1_folder: Path, shaped_photos: Path, tmp_path: Path) -> Callable[..., Run]:
    """Opens runs with settings."""

    def make(name: str, folder: Path = sd1_folder, **settings: Any) -> Run:
        values = {"targets": ["attention+conv"], "learning_rate": 1e-3}
        return open_run(folder, shaped_photos, tmp_path / name, **{**values, **settings})

    return make


def records_of(run: Run, steps: int = STEPS) -> list[dict[str, float]]:
    records = [run.step(number) for number in range(1, steps + 1)]
    return [
        {name: float(value) for name, value in record.items() if name != "lr"} for record in records
    ]


def both(opened: Callable[..., Run], **settings: Any) -> tuple[Run, Run, list[Any], list[Any]]:
    runs = [opened(str(on), **settings, cuda_graph=on) for on in (False, True)]
    assert isinstance(runs[1].step, GraphedStep)
    plain, graphed = map(records_of, runs)
    return *runs, plain, graphed


PRIOR = {"with_prior_preservation": True, "prior_preservation_mode": "image-free"}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"mixed_precision": "bf16"},
    "lora": {"method": "lora"},
    "input axis": {"norm_axis": "input"},
    "prior": {**PRIOR, "class_word": "mug", "train_batch_size": 2, "masked_loss": True},
    "outside of masks": {"unmasked_prior": 0.5, "masked_loss": True, "train_batch_size": 2},
    "text encoders": {"train_text_encoder": True, "caption_dropout": 0.5, "clip_skip": 1},
    "ranks": {"rank_dropout": 0.5, "train_text_encoder": True},
    "dropout": {"lora_dropout": 0.5},
    "checkpointing": {"gradient_checkpointing": True, "train_text_encoder": True},
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_by_a_graph_is_the_ordinary_one(case: str, opened: Callable[..., Run]) -> None:
    """To the bit: losses, norms of gradients, and all parameters after some steps."""
    plain, graphed, expected, found = both(opened, **CASES[case])
    assert found == expected
    assert StandIn.replays >= 3
    for own, other in zip(plain.step.parameters, graphed.step.parameters, strict=True):
        assert torch.equal(own, other)
