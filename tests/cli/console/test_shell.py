"""Commands to be pasted: in a POSIX shell, and in PowerShell."""

from __future__ import annotations

import doctest
import shlex

import pytest

from dora_diffusion import system
from dora_diffusion.cli.console import output as shell
from dora_diffusion.cli.console.output import shown_command


def test_the_documented_example_is_true() -> None:
    assert doctest.testmod(shell).failed == 0


def test_a_posix_shell_reads_the_words_back() -> None:
    words = ["python", "--a", "it's", "b c", "C:\\x", "$HOME", ""]
    assert shlex.split(shown_command([words[:2], words[2:]]).replace("\\\n", "")) == words
    assert shown_command([["a", "b"]], "N=1") == "N=1 a b"


def test_windows_has_powershell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "is_windows", lambda: True)
    shown = shown_command([["python", "-m", "x"], ["--dir", "C:\\Ann's runs\\1"]], "N=1")
    assert shown == "$env:N = 1; python -m x `\n    --dir 'C:\\Ann''s runs\\1'"
    assert shown_command([["--dir", "C:\\runs", "$x", ""]]) == "--dir C:\\runs '$x' ''"
