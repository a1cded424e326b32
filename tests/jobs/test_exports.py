"""Adapters in every format, and model cards."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from dora_diffusion.cli import main
from dora_diffusion.formats.adapter.conversions import CONVERSIONS
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.jobs.checkpoints import chosen_adapter
from dora_diffusion.jobs.errors import RequestError
from dora_diffusion.jobs.exports import export_adapter, formats, write_card
from dora_diffusion.jobs.workspace import Workspace
from tests.jobs.helpers import (
    job_of,
)


@pytest.mark.parametrize("target", ["diffusers", "kohya", "lora", "peft"])
def test_the_library_gives_every_format(finished: tuple[Workspace, str], target: str) -> None:
    workspace, job = finished[0], job_of(finished)
    made = export_adapter(workspace, job, target)
    path = made.path
    assert path.is_relative_to(workspace.exports / job.id)
    suffix = ".zip" if target == "peft" else ".safetensors"
    assert path.name == f"sks-dog-{job.id[:15]}-step-3-{target}{suffix}"
    adapter = chosen_adapter(job)
    assert made.exactness[0].startswith(f"{len(read_adapter(adapter).layers)} layers; ")
    if target == "peft":
        assert any("adapter_model" in name for name in zipfile.ZipFile(path).namelist())


@pytest.mark.parametrize("target", ["kohya", "comfyui", "lora"])
def test_a_download_says_what_the_command_line_says(
    finished: tuple[Workspace, str],
    target: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    workspace, job = finished[0], job_of(finished)
    made = export_adapter(workspace, job, target)
    output = tmp_path / "a.safetensors"
    words = ["convert", str(chosen_adapter(job)), str(output), "--to", target, "--base", job.base]
    assert main(words) == 0
    _, *said = capsys.readouterr().out.splitlines()  # the first line names the file
    exact = [line for line in said if line.startswith("exact")]
    assert list(made.exactness[1:]) == exact
    wrong = [line.removeprefix("wrong: ") for line in said if line.startswith("wrong: ")]
    assert bool(wrong) == (target != "lora") == bool(made.cautions)
    if wrong:
        assert made.cautions[-1].startswith(f"Wrong in {wrong[0].partition(';')[0]}: ")
    for line in said:
        if line.startswith("relative error"):
            assert made.exactness[0].endswith(line)


def test_what_needs_a_rank_is_not_offered() -> None:
    """There is no field to say it in; `convert` is for that."""
    assert set(CONVERSIONS) - set(formats()) == {"dora"}


def test_an_unknown_format_is_refused(finished: tuple[Workspace, str]) -> None:
    with pytest.raises(RequestError):
        export_adapter(finished[0], job_of(finished), "../../etc")


def test_the_model_card_can_be_downloaded(finished: tuple[Workspace, str]) -> None:
    job = job_of(finished)
    card = write_card(finished[0], job)
    assert card.name == f"sks-dog-{job.id[:15]}-step-3-README.md"
    assert "sks dog" in card.read_text(encoding="utf-8")
