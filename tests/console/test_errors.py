"""How errors end a command: exit codes, and one plain line."""

from __future__ import annotations

import pytest
import torch

from dora_diffusion.config import ConfigError
from dora_diffusion.console import errors
from dora_diffusion.training.metrics import TrainingError


def last_line(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


def ending(error, command="train", debug=False):
    with errors.reporting_errors(command, debug=debug) as outcome:
        raise error
    return outcome.code


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.2 GB, other allocations: 0)"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    ],
)
def test_out_of_memory_has_its_own_code_and_advice(error, capsys):
    assert ending(error) == 3
    assert "--gradient_checkpointing" in last_line(capsys)
    assert ending(error, "generate") == 3
    assert "--batch_size" in last_line(capsys)


def test_the_cpu_allocator_is_recognised():
    with pytest.raises(RuntimeError) as failure:
        torch.empty(10**15)
    assert errors.is_out_of_memory(failure.value)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConfigError("rank is 0"), "error: rank is 0"),
        (TrainingError("the loss is nan\nat step 3"), "error: the loss is nan at step 3"),
        (FileNotFoundError(2, "No such file", "x.png"), "error: x.png does not exist"),
        (PermissionError(13, "Permission denied", "x"), "error: x: Permission denied"),
        (
            OSError(28, "the disk is full: x could not be written"),
            "error: the disk is full: x could not be written",
        ),
    ],
)
def test_what_a_user_can_mend_is_one_line(error, line, capsys):
    assert ending(error) == 1
    assert capsys.readouterr().err == f"{line}\n"


def test_defects_keep_their_traceback():
    with pytest.raises(TypeError):
        ending(TypeError("a defect"))


def test_debug_shows_every_traceback(monkeypatch):
    with pytest.raises(ConfigError):
        ending(ConfigError("rank is 0"), debug=True)
    monkeypatch.setenv("DORA_DIFFUSION_DEBUG", "1")
    with pytest.raises(ConfigError):
        ending(ConfigError("rank is 0"))


def test_an_interrupt_is_130(capsys):
    assert ending(KeyboardInterrupt()) == 130
    assert "interrupted" in last_line(capsys)
