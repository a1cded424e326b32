"""The record of what a run's bits depend on, and what resuming with another says."""

from __future__ import annotations

import json
import platform
import warnings
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch

from dora_diffusion import __version__
from dora_diffusion.training.recipe import train
from dora_diffusion.training.results import resume
from dora_diffusion.training.results.checkpoint import STATE_FILE, read_state
from dora_diffusion.training.results.record import changed_conditions
from tests.training.helpers import same

NAMES = [
    "dora-diffusion", "torch", "diffusers", "transformers", "tokenizers", "accelerate", "numpy",
    "pillow", "device", "threads", "processes", "weights", "deterministic algorithms",
    "cuDNN benchmark",
]  # fmt: skip


def recorded(folder: Path) -> list[dict[str, object]]:
    return json.loads((folder / "run.json").read_text("utf-8"))["conditions"]


def test_a_run_records_versions_device_and_flags(tiny_run, tmp_path):
    train(tiny_run(max_train_steps=1))
    (found,) = recorded(tmp_path / "out")
    assert list(found) == ["from_step", *NAMES]
    assert found["from_step"] == 1
    assert found["dora-diffusion"] == __version__
    # Torch's own version names its build too, which the package's may leave out.
    assert found["torch"] == str(torch.__version__)
    for name in NAMES[2:8]:
        assert found[name] == metadata.version(name)
    assert str(found["device"]).startswith("CPU with ")
    assert found["threads"] == str(torch.get_num_threads())
    flags = [found[name] for name in ("processes", "weights", *NAMES[-2:])]
    assert flags == ["1", "float32", "False", "False"]
    assert platform.node() not in json.dumps(found)


@pytest.fixture
def half(tiny_run):
    """The settings of a run of one step with a checkpoint, as it continues to its second."""
    config = tiny_run(max_train_steps=1, checkpointing_steps=1)
    train(config)
    return replace(config, max_train_steps=2, resume_from_checkpoint="latest")


def rewritten(half, **changes: str) -> None:
    """Change what a checkpoint says that it was written with."""
    path = Path(half.output_dir) / "checkpoint-1"
    state = read_state(path)
    state["conditions"][-1] |= changes
    torch.save(state, path / STATE_FILE)


def said(config) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not train(config).interrupted, "a signal from outside of the test"
    lines = [str(each.message) for each in caught]
    return [line for line in lines if "was written with" in line]


def test_resuming_with_other_versions_is_said_in_one_line_with_both(half, tmp_path):
    rewritten(half, torch="2.4.0", diffusers="0.30.0")
    (line,) = said(half)
    torch_now, diffusers_now = str(torch.__version__), metadata.version("diffusers")
    assert line == (
        "checkpoint-1 was written with torch 2.4.0, diffusers 0.30.0, but this run has torch "
        f"{torch_now}, diffusers {diffusers_now}: the resumed run will not be bitwise identical"
    )
    before, after = recorded(tmp_path / "out")
    assert (before["from_step"], before["torch"]) == (1, "2.4.0")
    assert (after["from_step"], after["torch"]) == (2, torch_now)
    state = read_state(tmp_path / "out" / "checkpoint-2")
    assert state["conditions"] == [before, after]


def test_resuming_with_the_same_says_nothing_and_gives_the_same_bits(half, tiny_run, tmp_path):
    assert said(half) == []
    assert len(recorded(tmp_path / "out")) == 1
    whole = tiny_run(max_train_steps=2, output_dir=str(tmp_path / "whole"))
    assert not train(whole).interrupted, "a signal from outside of the test"
    assert same(tmp_path / "out", tmp_path / "whole")


def test_each_condition_counts_but_the_one_that_a_setting_tells(tiny_run, tmp_path):
    train(tiny_run(max_train_steps=1))
    (now,) = recorded(tmp_path / "out")
    now = {name: str(now[name]) for name in NAMES}
    told = {n: changed_conditions("checkpoint-1", {**now, n: "other"}, now) for n in NAMES}
    assert told.pop("weights") == ""
    for name, line in told.items():
        assert line.startswith(f"checkpoint-1 was written with {name} other, but this run has ")
        assert f"{name} {now[name]}: " in line
    older = {name: now[name] for name in NAMES if name != "torch"}
    assert "with torch unknown, but" in changed_conditions("checkpoint-1", older, now)


def test_the_present_conditions_are_asked_for_when_a_run_starts(half, tmp_path, monkeypatch):
    real = resume.conditions_of
    monkeypatch.setattr(resume, "conditions_of", lambda *given: real(*given) | {"threads": "64"})
    (line,) = said(half)
    assert "this run has threads 64: " in line
