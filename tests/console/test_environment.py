"""One paste for a bug report: whole where something is broken, and without secrets."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dora_diffusion import __version__
from dora_diffusion.console import environment as module
from dora_diffusion.console.environment import describe_environment
from dora_diffusion.console.packages import Package

ROOT = Path(__file__).parents[2]
GOOD = {"@build": "the CPU", "@cpu": "AVX2, 4 threads", "@devices": [], "@hub_cache": "/hub"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without packages to import, programs to ask, or variables."""
    answers(monkeypatch, {})
    monkeypatch.setattr(module, "packages", lambda: [Package("torch", "", ">=2", "2.5")])
    monkeypatch.setattr(module, "_output", lambda *command: "")
    for name in os.environ:
        monkeypatch.delenv(name)


def answers(monkeypatch: pytest.MonkeyPatch, problems: dict[str, str], **changes: Any) -> None:
    known: dict[str, Any] = GOOD | {f"@{name}": value for name, value in changes.items()}

    def ask(names: list[str]) -> dict[str, tuple[str, Any]]:
        return {name: (problems.get(name, ""), known.get(name)) for name in names}

    monkeypatch.setattr(module, "ask", ask)


def rows(text: object) -> list[list[str]]:
    return [re.split(r"  +", line, maxsplit=1) for line in str(text).splitlines()]


def test_each_fact_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = ["cuda:0 NVIDIA A, 8.0 GiB", "cuda:1 NVIDIA B, 6.0 GiB"]
    answers(monkeypatch, {}, build="CUDA 12.8", devices=devices)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("HF_HOME", "/somewhere")
    shown = rows(describe_environment(tmp_path))
    names = [row[0] for row in shown]
    assert names[:7] == [
        "dora-diffusion", "Python", "system", "processor", "memory", "torch for", "device",
    ]  # fmt: skip
    assert shown[0][1].startswith(__version__)
    assert shown[names.index("torch for")][1] == "CUDA 12.8"
    first = names.index("device")
    assert [row[1] for row in shown[first : first + 2]] == devices
    assert ["packages", "torch 2.5"] in shown
    assert [row for row in shown if row[-1] == "OMP_NUM_THREADS=3"] != []
    assert [row for row in shown if row[-1] == "HF_HOME is set"] != []
    assert re.fullmatch(r".*, \d+\.\d GiB free", shown[names.index("runs")][1])
    assert re.fullmatch(r"\d+\.\d GiB, \d+\.\d GiB free", shown[names.index("memory")][1])
    assert "PROBLEM" not in names


def test_json_says_the_same(tmp_path: Path) -> None:
    environment = describe_environment(tmp_path)
    facts = json.loads(json.dumps(environment.to_dict()))
    assert facts["facts"] == dict(environment.facts)
    assert facts["packages"] == [
        {"name": "torch", "extra": "", "bounds": ">=2", "version": "2.5"}
    ]  # fmt: skip
    assert facts["problems"] == facts["devices"] == []
    assert facts["folders"]["hub's cache"].startswith("/hub, ")
    assert facts["folders"]["hub's cache"].endswith("GiB free, not there yet")


def test_a_broken_torch_is_told_of_and_all_else_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "ann"
    monkeypatch.setenv("HOME", str(home))
    broken = f"OSError: {home}/lib/libtorch.so: cannot open"
    names = ("torch", "@build", "@cpu", "@devices")
    answers(monkeypatch, dict.fromkeys(names, broken), build=None, cpu=None, devices=None)
    environment = describe_environment(tmp_path)
    assert environment.problems == (
        "torch 2.5 cannot be imported: OSError: ~/lib/libtorch.so: cannot open",
    )
    shown = rows(environment)
    assert ["torch for", "unknown"] in shown
    assert ["device", "unknown"] in shown
    assert [row[0] for row in shown].count("hub's cache") == 1


def test_an_extra_that_is_not_there_is_not_said_package_by_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = [Package(name, "optimizers", "", None) for name in ("bitsandbytes", "prodigyopt")]
    there = [Package("peft", "test", "", "1"), Package("pytest", "test", "", None)]
    monkeypatch.setattr(module, "packages", lambda: [*absent, *there])
    shown = rows(describe_environment(tmp_path))
    assert ["extra optimizers", "none of bitsandbytes, prodigyopt"] in shown
    assert ["extra test", "peft 1, pytest is not installed"] in shown


def test_an_nvidia_gpu_beside_a_torch_for_the_cpu_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = "570.1, NVIDIA GeForce RTX 3060, 12288 MiB"
    monkeypatch.setattr(module, "_output", lambda *c: gpu if c[0] == "nvidia-smi" else "")
    environment = describe_environment(tmp_path)
    assert environment.facts["NVIDIA driver"] == gpu
    assert "built for the CPU and cannot use the NVIDIA GPU" in environment.problems[0]
    answers(monkeypatch, {}, build="CUDA 12.8")
    assert describe_environment(tmp_path).problems == ()


def test_no_psutil_is_no_reason_to_say_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    memory = describe_environment(tmp_path).facts["memory"]
    assert memory.startswith("unknown (ModuleNotFoundError: ")


SECRETS = {
    "HF_TOKEN": "hf_telling",
    "HUGGING_FACE_HUB_TOKEN": "hf_telling",
    "HTTP_PROXY": "http://ann:telling@proxy.example:3128",
    "https_proxy": "http://ann:telling@proxy.example:3128",
    "WANDB_API_KEY": "telling",
    "DORA_DIFFUSION_AUTH": "ann:telling-password",
    "HF_ENDPOINT": "https://ann:telling@mirror.example",
    "PIP_INDEX_URL": "https://ann:telling@packages.example",
    "LOGNAME": "telling-name",
    "USER": "telling-name",
    "HF_HUB_OFFLINE": "1",
}


BROKEN = {"torch": "raise OSError('DLL load failed')", "gradio": "os._exit(9)"}


def test_the_whole_command_shows_every_requirement_and_nothing_private(tmp_path: Path) -> None:
    """In a process of its own, with a package that cannot be imported and one that ends Python."""
    home, stubs = tmp_path / "telling-home", tmp_path / "telling-name"
    for name, code in BROKEN.items():
        (stubs / name).mkdir(parents=True)
        (stubs / name / "__init__.py").write_text(f"import os; {code}", encoding="utf-8")
    private = {"HOME": str(home), "HF_HOME": str(home / "hub"), "TMPDIR": "/tmp/telling-name"}
    path = os.pathsep.join([str(ROOT), str(stubs)])
    done = subprocess.run(
        [sys.executable, "-m", "dora_diffusion", "env", "--runs_dir", str(home / "runs")],
        env={**SECRETS, **private, "PYTHONPATH": path, "PATH": os.defpath},
        cwd=ROOT, capture_output=True, text=True, check=True, encoding="utf-8",
    )  # fmt: skip
    assert "telling" not in done.stdout + done.stderr
    shown = rows(done.stdout)
    hidden = {"HF_HUB_OFFLINE", "PIP_INDEX_URL", "LOGNAME", "USER"}
    expected = sorted({*SECRETS, "HF_HOME", "PYTHONPATH", "TMPDIR"} - hidden)
    assert [row[-1] for row in shown if "is set" in row[-1]] == [f"{n} is set" for n in expected]
    for text in ("HF_HUB_OFFLINE=1\n", "~/hub/hub, ", "~/runs, "):
        assert text in done.stdout
    packages = [row[-1] for row in shown if re.match("packages|extra", row[0])]
    listed = re.findall(r"[\w-]+", " ".join(packages))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = project.partition("\ndependencies = [")[2].partition("[project.urls]")[0]
    required = re.findall(r'"([\w-]+)(?:[<>=!~; ].*?)?"', project)
    assert {"torch", "pillow-heif", "hypothesis", "codespell", "types-PyYAML"} <= {*required}
    assert [name for name in required if name not in listed] == []
    problems = [row[-1] for row in shown if "cannot be imported" in row[-1]]
    for name, reason in (
        ("torch", "OSError: DLL load failed"), ("gradio", "it ends Python, with exit code 9")
    ):  # fmt: skip
        assert any(re.match(rf"{name} \S+ cannot .*: {reason}$", problem) for problem in problems)
