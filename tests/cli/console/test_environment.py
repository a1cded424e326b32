"""`dora-diffusion doctor`: packages, device, one step, and the files of a base model."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from dora_diffusion import __version__
from dora_diffusion.cli.console import environment
from dora_diffusion.cli.console.environment import Environment, Finding, describe_environment
from dora_diffusion.cli.main import main
from dora_diffusion.config.base import BaseModel

PARTS = "unet, vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2"
TRAINED = Finding("training", "one step")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step, and no text of torch."""

    def device(system: list[str]) -> Iterator[Finding]:
        system.append(f"CUDA in {Path.home()}/cuda\n")
        yield Finding("device", "cpu")

    monkeypatch.setattr(environment, "_check_device", device)
    monkeypatch.setattr(environment, "_check_training", lambda: iter([TRAINED]))


@pytest.mark.usefixtures("quick")
def test_it_is_text_to_paste_or_json(capsys, monkeypatch):
    monkeypatch.setattr(metadata, "requires", lambda name: ["numpy>=1"])
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"dora-diffusion  {__version__}",
        "ok              packages: all have matching versions",
        "                device: cpu",
        "                training: one step",
        f"packages        numpy {metadata.version('numpy')}",
        "",
        "CUDA in ~/cuda",
        "",
    ]
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts) == ["version", "packages", "findings", "system"]
    assert facts["findings"][2] == {"check": "training", "result": "one step", "fix": ""}


def test_the_machine_is_described_and_a_step_is_taken() -> None:
    found = describe_environment()
    assert [finding.check for finding in found.findings] == ["packages", "device", "training"]
    assert wrong(found) == []
    _, device, training = (finding.result for finding in found.findings)
    assert device == "cpu (CPU), which trains in float32 by default"
    assert training.startswith("one step, and an image of ")
    assert found.system.startswith("PyTorch version: ")
    assert "Flags:" not in found.system
    assert {"torch", "diffusers", "gradio"} <= found.packages.keys()


def wrong(found: Environment) -> list[tuple[str, str, str]]:
    return [(f.check, f.result, f.fix) for f in found.findings if f.state == "PROBLEM"]


@pytest.mark.usefixtures("quick")
def test_packages_that_are_missing_or_of_other_versions_are_problems(monkeypatch):
    version = metadata.version("numpy")
    lines = [
        "numpy<1", "no-such-package>=2", 'no-such-extra>=2; extra == "x"',
        'other-python>=2; python_version < "3"',
    ]  # fmt: skip
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    assert wrong(describe_environment()) == [
        ("packages", f"numpy is {version}; <1 is needed", "pip install 'numpy<1'"),
        ("packages", "no-such-package is not installed", "pip install 'no-such-package>=2'"),
    ]


def test_a_broken_torch_is_reported_and_the_packages_too(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.collect_env", None)
    monkeypatch.setitem(sys.modules, "dora_diffusion.training.recipe", None)
    found = describe_environment()
    assert [(check, result.partition(":")[0]) for check, result, _ in wrong(found)] == [
        ("device", "ModuleNotFoundError"), ("training", "ModuleNotFoundError"),
    ]  # fmt: skip
    assert "torch" in found.packages


@pytest.mark.usefixtures("quick")
def test_no_finding_names_the_home_folder(monkeypatch):
    def broken() -> Iterator[Finding]:
        raise RuntimeError(f"{Path.home()}/libc10.so is damaged")

    monkeypatch.setattr(environment, "_check_training", broken)
    [(_, result, _)] = wrong(describe_environment())
    assert result == "RuntimeError: ~/libc10.so is damaged"


@pytest.mark.usefixtures("quick")
def test_a_base_model_that_is_not_whole_would_fail(sdxl_folder, tmp_path, capsys):
    model = shutil.copytree(sdxl_folder, tmp_path / "model")
    flags = ["doctor", "--base", str(model)]
    assert main(flags) == 0
    assert f"base model: {model} is complete: {PARTS}\n" in capsys.readouterr().out
    (model / "unet" / "config.json").write_text("{", encoding="utf-8")
    assert main(flags) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "PROBLEM" in line]
    assert "unet/config.json is damaged; download the model again" in line
    shutil.rmtree(model)
    assert main(flags) == 1
    assert f"base model: ModelNotFoundError: {model} does not exist" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_a_base_of_the_hub_is_not_downloaded() -> None:
    found = describe_environment(BaseModel("some/model"))
    assert found.findings[-1] == Finding(
        "base model", "some/model is not downloaded yet; `train` downloads it"
    )
