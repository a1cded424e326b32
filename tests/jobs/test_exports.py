"""Adapters in every format, and model cards."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_diffusion.cli import build_parser, main
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.formats.layouts import CONVERSIONS
from dora_diffusion.jobs.checkpoints import chosen_adapter
from dora_diffusion.jobs.errors import RequestError
from dora_diffusion.jobs.exports import export_adapter, formats, write_card
from dora_diffusion.jobs.snapshot import Job
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


def with_base(job: Job, base: Path | str, **settings: str) -> Job:
    """A run that was trained on another base, as far as its settings say."""
    changes = {"pretrained_model_name_or_path": str(base), **settings}
    return dataclasses.replace(job, settings={**job.settings, **changes})


def test_a_download_is_computed_from_the_variant_of_the_run(
    finished: tuple[Workspace, str], tmp_path: Path, sd1_folder: Path
) -> None:
    base = shutil.copytree(sd1_folder, tmp_path / "base")
    for path in list(base.rglob("*.safetensors")):
        shutil.copy(path, path.with_name(f"{path.stem}.other.safetensors"))
        save_file({n: 0.5 * t for n, t in load_file(path).items()}, path, {"format": "pt"})
    job = job_of(finished)

    def made(base: Path, **settings: str) -> dict[str, torch.Tensor]:
        file = export_adapter(finished[0], with_base(job, base, **settings), "dense").path
        # Copies: while a file is mapped, Windows does not replace it.
        return {name: tensor.clone() for name, tensor in load_file(file).items()}

    wanted, plain = made(sd1_folder), made(base)
    for name, tensor in made(base, variant="other").items():
        assert torch.equal(tensor, wanted[name])
        assert not torch.equal(tensor, plain[name])


def test_no_download_begins_in_the_app(
    finished: tuple[Workspace, str], sd1_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A base that is not on the disk is told of with the command; what needs none is written."""
    cached: list[Path] = []

    def snapshot_download(name: str, **options: Any) -> str:
        assert (name, options["revision"]) == ("someone/model", "v2")
        assert options["local_files_only"]
        if not cached:
            raise FileNotFoundError("not in the cache")
        return str(cached[0])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    workspace, job = finished[0], job_of(finished)
    job = with_base(job, "someone/model", revision="v2")
    configs = shutil.copytree(
        sd1_folder, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors")
    )
    for there in ([], [configs]):
        cached[:] = there
        for target in ("dense", "lora"):
            with pytest.raises(RequestError, match="is not on this machine") as raised:
                export_adapter(workspace, job, target)
            command = str(raised.value).partition("python -m dora_diffusion ")[2]
            args = build_parser().parse_args(shlex.split(command))
            assert (args.base, args.revision, args.to) == ("someone/model", "v2", target)
            assert args.input == str(chosen_adapter(job))
        assert export_adapter(workspace, job, "kohya").path.is_file()
    cached[:] = [sd1_folder]
    assert export_adapter(workspace, job, "dense").path.is_file()


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
