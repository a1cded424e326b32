"""The Space: its front matter, what it requires, and the app that it starts."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from dora_diffusion.cli import main as cli
from dora_diffusion.studio.app.launch import Launch

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "notebooks" / "space"
AUTH = {"DORA_DIFFUSION_AUTH": "ann:long enough"}
COLORS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> Any:
    return runpy.run_path(str(SPACE / "app.py"))["arguments"]


def test_its_front_matter_is_what_a_space_reads_and_requirements_are_the_package_s() -> None:
    _, text, _ = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    front, project = (
        yaml.safe_load(text),
        tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8")),
    )
    assert {"title", "emoji", "license", "tags", "short_description"} < set(front)
    assert {front["colorFrom"], front["colorTo"]} <= COLORS
    assert len(front["short_description"]) <= 60
    assert (front["sdk"], front["license"]) == ("gradio", "apache-2.0")
    assert (SPACE / front["app_file"]).is_file()
    named = [Requirement(line) for line in project["project"]["dependencies"]]
    [gradio] = [one for one in named if one.name == "gradio"]
    lines = (SPACE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert lines == [project["project"]["name"], str(gradio)]
    assert gradio.specifier.contains(front["sdk_version"])
    versions = re.findall(r"Python :: (3\.\d+)", str(project["project"]["classifiers"]))
    assert front["python_version"] in versions


def test_a_space_without_a_password_does_not_start(arguments: Any) -> None:
    for environment in ({}, {"DORA_DIFFUSION_AUTH": ""}, {"SPACE_HOST": "ann-app.hf.space"}):
        with pytest.raises(SystemExit, match=r"no secret DORA_DIFFUSION_AUTH.*Settings"):
            arguments(environment)


def test_a_space_answers_to_its_own_address_and_keeps_runs_on_its_disk(
    arguments: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DORA_DIFFUSION_AUTH", AUTH["DORA_DIFFUSION_AUTH"])

    def launch(disk: Path, **more: str) -> Launch:
        words = arguments(AUTH | more, disk)
        settings = cli.read_settings(cli.build_parser().parse_args(words))
        assert isinstance(settings, Launch)
        return settings

    space = launch(tmp_path, SPACE_HOST="ann-app.hf.space", BASE_MODELS="a/b c/d")
    assert (space.host, space.port, space.is_open) == ("0.0.0.0", 7860, True)
    assert (space.models, space.runs_dir) == (["a/b", "c/d"], tmp_path / "runs")
    assert space.refusal({"host": ["ann-app.hf.space"]}) == ""
    assert "not an address of the app" in space.refusal({"host": ["other.hf.space"]})
    plain = launch(tmp_path / "none", GRADIO_SERVER_NAME="127.0.0.1", GRADIO_SERVER_PORT="0")
    assert (plain.host, plain.port, plain.runs_dir) == ("127.0.0.1", 0, Path("runs"))


def test_the_space_starts_the_app_behind_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(cli, "main", lambda words: started.append(words) or 0)
    monkeypatch.setenv("DORA_DIFFUSION_AUTH", AUTH["DORA_DIFFUSION_AUTH"])
    monkeypatch.setenv("SPACE_HOST", "ann-app.hf.space")
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SPACE / "app.py"), run_name="__main__")
    assert ended.value.code == 0
    [words] = started
    settings = cli.read_settings(cli.build_parser().parse_args(words))
    assert isinstance(settings, Launch)
    assert settings.logins == {"ann": "long enough"}
    assert settings.refusal({"host": ["ann-app.hf.space"]}) == ""
