"""Errors that end a command: exit codes, and one plain line."""

from __future__ import annotations

import os
import sys
import warnings

import pytest
import torch

from dora_diffusion.cli.console import errors
from dora_diffusion.config import ConfigError
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


def test_a_defect_keeps_its_traceback_and_ends_with_asking_for_a_report(capsys):
    assert ending(TypeError("a\ndefect")) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-3:-1] == ["TypeError: a", "defect"]
    assert lines[-1].startswith("error: unexpected TypeError: a defect; this is a bug: please ")
    assert "output of `dora-diffusion doctor`" in lines[-1]


def test_an_installation_that_is_not_whole_is_no_bug(capsys):
    missing = ModuleNotFoundError("No module named 'numpy'", name="numpy")
    assert ending(missing) == 1
    line = capsys.readouterr().err
    assert line.startswith("error: No module named 'numpy'; a package is missing or does not fit")
    assert "run `dora-diffusion doctor` to find it" in line
    assert line.count("\n") == 1
    ending(ImportError("cannot import name 'x'", name="dora_diffusion.cli.main"))
    assert "this is a bug" in last_line(capsys)


def test_a_long_message_of_a_defect_is_cut():
    line = errors.asking_for_report(RuntimeError("a key is missing " * 999))
    assert line.startswith("unexpected RuntimeError: a key is missing a key ")
    assert len(line) < 600
    assert "dora-diffusion doctor" in line


def test_debug_shows_every_traceback(monkeypatch):
    with pytest.raises(ConfigError):
        ending(ConfigError("rank is 0"), debug=True)
    with pytest.raises(TypeError):
        ending(TypeError("a defect"), debug=True)
    monkeypatch.setenv("DORA_DIFFUSION_DEBUG", "1")
    with pytest.raises(ConfigError):
        ending(ConfigError("rank is 0"))


def test_a_warning_is_printed_once_wherever_it_is_raised(capsys):
    """Also by modules that know nothing of each other, and again in the next command."""

    def warn(text, module):
        warnings.warn_explicit(text, UserWarning, f"{module}.py", 1, f"dora_diffusion.{module}")

    for _ in range(2):
        with errors.reporting_errors(debug=False):
            for module in ("training", "prepare"):
                warn("keep_tags has no effect", module)
                warn(f"a warning of {module}", module)
    lines = ["warning: keep_tags has no effect", "warning: a warning of training",
             "warning: a warning of prepare"]  # fmt: skip
    assert capsys.readouterr().err.splitlines() == 2 * lines


def test_an_interrupt_is_130(capsys):
    assert ending(KeyboardInterrupt()) == 130
    assert "interrupted" in last_line(capsys)


def test_a_path_that_is_too_long_for_windows_is_said_to_be(monkeypatch, capsys):
    path = "C:/" + "a" * 257
    error = FileNotFoundError(2, "No such file or directory", path)
    assert ending(error) == 1
    assert last_line(capsys) == f"error: {path} does not exist"
    monkeypatch.setattr(errors, "is_windows", lambda: True)
    assert ending(error) == 1
    assert "260 characters" in last_line(capsys)
    assert ending(FileNotFoundError(2, "No such file or directory", path[:-1])) == 1
    assert last_line(capsys) == f"error: {path[:-1]} does not exist"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGPIPE")
@pytest.mark.parametrize(("lines", "code"), [(1, 0), (10_000, 141)])
def test_output_that_nobody_reads_any_more_is_no_error(lines, code, monkeypatch, capsys):
    """As after ``| head``: silent, with the code of SIGPIPE where the command was not done."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with errors.reporting_errors("inspect", debug=False) as outcome:
            for _ in range(lines):
                print("a line")
        assert outcome.code == code
        monkeypatch.undo()
    assert capsys.readouterr().err == ""
    # Another pipe's end is an error like any other.
    assert ending(BrokenPipeError(32, "Broken pipe")) == 1


def test_a_command_without_an_output_ends_as_any_other(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with errors.reporting_errors("inspect", debug=False) as outcome:
        pass
    assert outcome.code == 0
