"""Starting the app without a terminal: the start files, and what they call."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import start_app
from tools.start_app import INSTALLED, main, ready_environment, torch_index

ROOT = Path(__file__).parents[2]
PROJECT = 'dependencies = [\n    "torch>=2.4",\n    "torchvision",\n]\n'


class Machine:
    """Stand-ins for the programs that are started on a machine.

    Attributes:
        ran: The programs that were run, as their words.
        fails: A word of the programs that fail.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.ran, self.fails = root, [], ""
        self.python = root / ".venv" / "bin" / "python"
        self.answers = {"-L": 1}

    def wait(self, command: list[str]) -> int:
        self.ran.append(command)
        if self.fails and self.fails in command:
            return 1
        if "venv" in command:
            self.python.parent.mkdir(parents=True, exist_ok=True)
            self.python.touch()
        return 0

    def succeeds(self, command: list[str]) -> bool:
        if command[0] == "nvidia-smi":
            return True
        return Path(command[0]) == self.python and self.python.exists()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A folder with a space and an umlaut, no environment, and no GPU."""
    root = tmp_path / "meine Bücher"
    root.mkdir()
    (root / "pyproject.toml").write_text(PROJECT, encoding="utf-8")
    one = Machine(root)
    monkeypatch.setattr(start_app, "ROOT", root)
    monkeypatch.setattr(start_app, "_wait", one.wait)
    monkeypatch.setattr(start_app, "_succeeds", one.succeeds)
    monkeypatch.setattr(start_app.shutil, "which", lambda name: None)
    monkeypatch.setattr(start_app.sys, "platform", "darwin")
    monkeypatch.delenv("PIP_ARGS", raising=False)
    return one


def pip(machine: Machine, *words: str) -> list[str]:
    start = [str(machine.python), "-m", "pip", "install", "--disable-pip-version-check"]
    return [*start, *words]


def test_the_first_start_makes_an_environment_and_the_next_ones_use_it(machine: Machine) -> None:
    app = [str(machine.python), "-m", "dora_diffusion", "app", "--browser"]
    environment = [sys.executable, "-m", "venv", "--clear", str(machine.root / ".venv")]
    assert main() == 0
    assert machine.ran == [environment, pip(machine, "--editable", str(machine.root)), app]
    machine.ran.clear()
    assert main(["--port", "7900"]) == 0
    assert machine.ran == [[*app, "--port", "7900"]]


def test_an_environment_that_does_not_run_is_made_anew(machine: Machine) -> None:
    ready_environment(machine.root)
    machine.ran.clear()
    machine.python.unlink()
    (machine.root / ".venv" / INSTALLED).unlink()  # as --clear does
    ready_environment(machine.root)
    assert ["venv" in command for command in machine.ran] == [True, False]


@pytest.mark.parametrize(
    ("fails", "advice"), [("venv", "apt install python3-venv"), ("pip", "Is there a network")]
)
def test_what_fails_is_said_and_tried_again(
    fails: str, advice: str, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.fails = fails
    assert main() == 1
    assert advice in capsys.readouterr().err
    assert not any("dora_diffusion" in command for command in machine.ran)
    machine.fails = ""
    assert main() == 0
    assert any("--editable" in command for command in machine.ran)


def test_torch_for_an_nvidia_gpu_is_installed_first_and_from_pytorch_alone(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start_app, "torch_index", lambda: "https://example.org/cu1")
    ready_environment(machine.root)
    assert machine.ran[1:] == [
        pip(machine, "torch>=2.4", "--index-url", "https://example.org/cu1"),
        pip(
            machine, "--editable", str(machine.root),
            "--extra-index-url", "https://example.org/cu1",
        ),
    ]  # fmt: skip


def test_what_is_passed_on_to_pip_takes_the_place_of_an_index(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start_app, "torch_index", lambda: "https://example.org/cu1")
    monkeypatch.setenv("PIP_ARGS", "--find-links 'my wheels' --no-index")
    ready_environment(machine.root)
    words = ["--find-links", "my wheels", "--no-index", "--editable", str(machine.root)]
    assert machine.ran[1:] == [pip(machine, *words)]


OLD_DRIVER = 'Field "compute_cap" is not a valid field to query.'


@pytest.mark.parametrize(
    ("platform", "gpus", "build"),
    [
        ("darwin", None, None),
        ("win32", None, None),
        ("linux", None, "cpu"),
        ("win32", "8.6, 581.29\n", "cu130"),
        ("linux", "7.5, 580.65.06\n", "cu130"),
        ("win32", "8.9, 566.36\n", "cu126"),  # its driver is older than CUDA 13
        ("win32", "6.1, 581.29\n", "cu126"),  # Pascal
        ("win32", "12.0, 572.16\n", "cu130"),  # Blackwell, which CUDA 12.6 does not know
        ("linux", "6.1, 581.29\n9.0, 581.29\n", "cu130"),  # the best of several
        ("win32", OLD_DRIVER, "cu126"),
    ],
)
def test_torch_is_the_one_for_the_gpu(
    platform: str,
    gpus: str | None,
    build: str | None,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[0] == "nvidia-smi"
        return subprocess.CompletedProcess(command, 0, stdout=gpus or "")

    monkeypatch.setattr(start_app.sys, "platform", platform)
    monkeypatch.setattr(start_app.shutil, "which", lambda name: name if gpus else None)
    monkeypatch.setattr(start_app.subprocess, "run", run)
    expected = build and f"https://download.pytorch.org/whl/{build}"
    assert torch_index() == expected


def test_it_needs_nothing_that_is_not_installed_yet() -> None:
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); print(*sys.modules)"
    command = [sys.executable, "-I", "-S", "-c", code, str(ROOT / "tools" / "start_app.py")]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    tops = {name.partition(".")[0] for name in done.stdout.split()}
    assert tops - {"__main__", "__mp_main__"} <= sys.stdlib_module_names


# The start files themselves.

STUB = """#!/bin/sh
case "$1" in -c) exit {old} ;; esac
printf '%s\\n' "{name}" "$PWD" "$@"
exit {code}
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "meine Bücher & mehr"
    folder.mkdir()
    shutil.copy(ROOT / "start.command", folder)
    return folder


def start(clone: Path, tmp_path: Path, pythons: dict[str, dict[str, int]], *flags: str):
    """Run start.command where these are the Pythons there are; as a double click does, from /."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("dirname", "uname", "cat"):
        (programs / name).symlink_to(str(shutil.which(name)))
    for name, does in pythons.items():
        text = STUB.format(name=name, **{"old": 0, "code": 0, **does})
        (programs / name).write_text(text, encoding="utf-8")
        (programs / name).chmod(0o755)
    text = (clone / "start.command").read_text(encoding="utf-8")
    # What the machine of this test has there is not asked for.
    text = text.replace(":/opt/homebrew/bin:/usr/local/bin", "")
    (clone / "start.command").write_text(text, encoding="utf-8")
    return subprocess.run(
        [clone / "start.command", *flags], cwd="/", stdin=subprocess.DEVNULL,
        env={"PATH": str(programs)}, capture_output=True, encoding="utf-8",
    )  # fmt: skip


posix = pytest.mark.skipif(os.name == "nt", reason="start.command is for macOS and Linux")


@posix
def test_it_starts_with_the_first_python_that_is_new_enough(clone: Path, tmp_path: Path) -> None:
    pythons = {"python3.12": {"old": 1}, "python3": {}, "python": {}}
    done = start(clone, tmp_path, pythons, "--port", "1 2")
    assert done.stdout.splitlines() == [
        "python3", str(clone), "tools/start_app.py", "--port", "1 2",
    ]  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_windows_can_read_its_start_file() -> None:
    """It cannot be run here: what breaks such files is looked for."""
    data = (ROOT / "start.bat").read_bytes()
    text = data.decode("ascii")
    assert data.count(b"\n") == data.count(b"\r\n") > 20
    attributes = (ROOT / ".gitattributes").read_text(encoding="utf-8")
    assert "start.bat text eol=crlf" in attributes
    lines = text.splitlines()
    # Folders with spaces.
    assert [line for line in lines if "%~dp0" in line] == ['pushd "%~dp0"']
    # Within a block in brackets, variables have the values from before it.
    code = [line for line in lines if not line.startswith(("rem", "echo", "set"))]
    assert not any(line.rstrip().endswith("(") for line in code)
    labels = {line[1:] for line in lines if line.startswith(":")}
    assert set(re.findall(r"goto (\w+)", text)) == {"found", "failed"} == labels
    # Every variable that is read is set, with the name in the quotes.
    read = set(re.findall(r"%(\w+)%", text)) - {"ERRORLEVEL"}
    assert read == set(re.findall(r'^ *(?:.* )?set "(\w+)=', text, re.MULTILINE)) - {"PYTHONUTF8"}
    assert lines[-2:] == ["pause", "exit /b %CODE%"]


def test_both_start_files_run_the_same_program_with_the_oldest_python_that_is_supported() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    oldest = re.search(r'^requires-python = ">=3\.(\d+)"$', project, re.MULTILINE)[1]
    for name, program in (
        ("start.bat", r"tools\start_app.py"), ("start.command", "tools/start_app.py")
    ):  # fmt: skip
        text = (ROOT / name).read_text(encoding="utf-8")
        assert program in text
        assert f"sys.version_info < (3, {oldest})" in text
        assert f"Python 3.{oldest} or later" in text
