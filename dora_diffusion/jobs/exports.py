"""What can be taken away of a run: its adapter in every format, and its model card."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dora_diffusion.console.programs import where_it_works
from dora_diffusion.console.shell import shown_command
from dora_diffusion.formats.files.names import file_stem
from dora_diffusion.formats.layouts import CONVERSIONS
from dora_diffusion.jobs.checkpoints import chosen_adapter
from dora_diffusion.jobs.errors import RequestError
from dora_diffusion.jobs.loading import ModelFiles
from dora_diffusion.jobs.snapshot import Job
from dora_diffusion.jobs.workspace import Workspace

if TYPE_CHECKING:
    from dora_diffusion.export import ConversionReport


def formats() -> dict[str, str]:
    """Adapter format -> where it is exact; those alone for which nothing else is asked."""
    return {name: kind.summary for name, kind in CONVERSIONS.items() if not kind.needs_rank}


@dataclass(frozen=True)
class Exported:
    """An adapter in a format, and what there is to say of it.

    Attributes:
        path: The file; a .zip where the format is a folder.
        exactness: How exact it is, and in which programs, a line each.
        cautions: What to know before it is used.
    """

    path: Path
    exactness: tuple[str, ...]
    cautions: tuple[str, ...]


def export_adapter(workspace: Workspace, job: Job, target: str) -> Exported:
    """Write a run's adapter in a format, and say what ``dora-diffusion convert`` says of it.

    The base model is never downloaded for it.

    Raises:
        RequestError: If there is no adapter, or no such format, or it needs a base model that is
            not on this machine.
        ExportError, AdapterFormatError: If the format cannot hold it.
    """
    from dora_diffusion.export import convert_adapter, inspect_adapter

    if target not in formats():
        raise RequestError("there is no such format; choose one of the list")
    source = chosen_adapter(job)
    folder = workspace.exports / job.id / target
    # PEFT writes a folder per component; the other formats are one file each.
    name = file_name(job, target)
    output = folder / "adapter" if target == "peft" else folder / f"{name}.safetensors"
    files = ModelFiles.of(job.settings)
    base = files.here(job.base) if job.base else None
    if base is None and CONVERSIONS[target].for_one_base:
        raise RequestError(
            f"{target} files are made for one base model, and {job.base or 'this one'} is not on "
            f"this machine as the run loaded it. This downloads it, and converts the adapter: "
            f"{convert_command(source, output, target, job.base, files)}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    report = convert_adapter(
        source, output, target, base=base, variant=files.variant, overwrite=True
    )
    exact, wrong = where_it_works(inspect_adapter(report.path).tools)
    cautions = [f"Wrong in {wrong}: choose another format for these, or merge."] if wrong else []
    path = output
    if output.is_dir():
        path = Path(shutil.make_archive(str(folder / name), "zip", output))
    return Exported(path, (_exactness(report), *exact), (*report.notes, *cautions))


def convert_command(source: Path, output: Path, target: str, base: str, files: ModelFiles) -> str:
    """The command that converts as the app does."""
    words = [source, output, "--to", target, "--base", base]
    words += ModelFiles(variant=files.variant, revision=files.revision).flags
    return shown_command([["python", "-m", "dora_diffusion", "convert", *words]])


def _exactness(report: ConversionReport) -> str:
    """Layers, where they are exact, and the error of an approximation."""
    text = f"{report.layers} layers; {formats()[report.target]}"
    if report.worst is None:
        return text
    name, error = report.worst
    return (
        f"{text}; relative error of the change: median {report.median_error:.2%}, largest "
        f"{error:.2%} in {name}, in total {report.total_error:.2%}"
    )


def card_of(job: Job) -> str:
    """The model card of what stands for a run: the trainer's, or one of the chosen checkpoint.

    Raises:
        RequestError: If the run has no adapter.
    """
    written, chosen = job.folder / "README.md", chosen_adapter(job)
    if chosen.parent == job.folder and written.is_file():
        return written.read_text(encoding="utf-8")
    from dora_diffusion.config import TrainConfig
    from dora_diffusion.export import inspect_adapter
    from dora_diffusion.training.card import model_card
    from dora_diffusion.training.subject import subject_of

    config, report = TrainConfig.from_dict(job.settings), inspect_adapter(chosen)
    steps = int(report.metadata.extra["training_steps"])
    sample = job.folder / "samples" / f"step-{steps:06d}.png"
    samples = {f"At step {steps}": f"samples/{sample.name}"} if sample.is_file() else {}
    layers = f"{sum(report.layers.values())} layers"
    return model_card(config, subject_of(config), report.metadata, chosen, layers, samples)


def write_card(workspace: Workspace, job: Job) -> Path:
    """The model card where it may be downloaded."""
    target = workspace.exports / job.id / f"{file_name(job, 'README')}.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(card_of(job), encoding="utf-8")
    return target


def file_name(job: Job, what: str, checkpoint: str = "") -> str:
    """A file name without suffix that no other run, checkpoint or format has.

    Args:
        job: The run.
        what: The format, or what else the file is.
        checkpoint: One of the run's; default: what stands for it.
    """
    step = job.step_of(checkpoint or job.stands)
    return f"{file_stem(job.trigger, 'subject')}-{job.id[:15]}-step-{step}-{what}"
