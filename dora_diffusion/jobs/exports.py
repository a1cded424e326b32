"""What can be taken away: adapters in every format, merged models, cards, a place on the hub."""

from __future__ import annotations

import dataclasses
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dora_diffusion.console.programs import where_it_works
from dora_diffusion.formats.adapter.conversions import CONVERSIONS
from dora_diffusion.jobs.loading import ModelFiles
from dora_diffusion.jobs.queue import create_job
from dora_diffusion.jobs.snapshot import Job, adapter_of
from dora_diffusion.jobs.workspace import AppError, Workspace, clean_text

if TYPE_CHECKING:
    from dora_diffusion.export import ConversionReport

MERGED = "merged.safetensors"


def formats() -> dict[str, str]:
    """Adapter format -> where it is exact."""
    return {name: conversion.summary for name, conversion in CONVERSIONS.items()}


def chosen_adapter(job: Job, checkpoint: str = "") -> Path:
    """The adapter of a run or of one of its checkpoints.

    Raises:
        AppError: If the run has none.
    """
    path = adapter_of(job, checkpoint)
    if path is None:
        raise AppError("this run has no adapter yet; wait until it is done, or take a checkpoint")
    return path


@dataclass(frozen=True)
class Exported:
    """An adapter in a format, and what there is to say of it.

    Attributes:
        path: The file; a .zip where the format is a folder.
        facts: How exact it is, and in which programs, a line each.
        cautions: What to know before it is used.
    """

    path: Path
    facts: tuple[str, ...]
    cautions: tuple[str, ...]


def export_adapter(workspace: Workspace, job: Job, target: str) -> Exported:
    """Write a run's adapter in a format, and say what ``dora-diffusion convert`` says of it.

    Raises:
        AppError: If there is no adapter, or no such format.
        ExportError, AdapterFormatError: If the format cannot hold it.
    """
    from dora_diffusion.export import convert_adapter, inspect_adapter

    if target not in formats():
        raise AppError("there is no such format; choose one of the list")
    source = chosen_adapter(job)
    folder = workspace.exports / job.id / target
    # PEFT writes a folder per component; the other formats are one file each.
    name = file_name(job, target)
    output = folder / "adapter" if target == "peft" else folder / f"{name}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    report = convert_adapter(source, output, target, base=job.base or None, overwrite=True)
    exact, wrong = where_it_works(inspect_adapter(report.path).tools)
    cautions = [f"Wrong in {wrong}: choose another format for these, or merge."] if wrong else []
    path = _zipped(output, folder / f"{name}.zip") if output.is_dir() else output
    return Exported(path, (_exactness(report), *exact), (*report.notes, *cautions))


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


def _zipped(folder: Path, archive: Path) -> Path:
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                file.write(path, path.relative_to(folder))
    return archive


def start_merge(workspace: Workspace, job: Job, strength: float, checkpoint: str = "") -> str:
    """Queue a job that merges a run's adapter into its base, as one file. Returns its id.

    Raises:
        AppError: If the run has no adapter, or the strength is out of its limits.
    """
    if not -2 <= strength <= 3:
        raise AppError(f"the strength is {strength:g}; it must be between -2 and 3")
    adapter = chosen_adapter(job, checkpoint)
    # What is in the file, so that no merge replaces another one.
    content = file_name(job, f"strength-{strength:g}", checkpoint)
    facts = {
        "base": job.base,
        "adapter": str(adapter),
        "output": str(workspace.exports / job.id / f"{content}-{MERGED}"),
        "strength": float(strength),
        "run": job.id,
        "trigger": job.trigger,
        **dataclasses.asdict(ModelFiles.of(job.settings)),
    }
    return create_job(workspace, "merge", f"Merge {job.title}", facts)


def merge_command(job: Job) -> str:
    """The command that merges as the merge job does."""
    import shlex

    facts = job.facts
    words = ["--base", facts["base"], "--adapter", facts["adapter"], "--output", facts["output"]]
    if facts["strength"] != 1:
        words += ["--strength", f"{facts['strength']:g}"]
    for flag, name in (("--vae", "vae"), ("--config", "config"), ("--variant", "variant")):
        words += [flag, facts[name]] if facts.get(name) else []
    return "python -m dora_diffusion export " + " ".join(map(shlex.quote, words))


def card_of(job: Job) -> str:
    """The model card of what stands for a run: the trainer's, or one of the chosen checkpoint.

    Raises:
        AppError: If the run has no adapter.
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


def start_push(workspace: Workspace, job: Job, repository: object, private: bool) -> str:
    """Queue a job that publishes a run on the hub. Returns its id.

    Raises:
        AppError: If the run has no adapter.
        HubError: If it could not begin: no token, offline, or no name.
    """
    from dora_diffusion.hub import check

    name = clean_text(repository, 200, "repository")
    chosen_adapter(job)
    check(name)
    facts = {"run": job.id, "repository": name, "private": bool(private)}
    return create_job(workspace, "push", f"Publish {job.title}", facts)


def file_name(job: Job, what: str, checkpoint: str = "") -> str:
    """A file name without suffix that no other run, checkpoint or format has.

    Args:
        job: The run.
        what: The format, or what else the file is.
        checkpoint: One of the run's; default: what stands for it.
    """
    step = job.step_of(checkpoint or job.stands)
    return f"{_plain_trigger(job)}-{job.id[:15]}-step-{step}-{what}"


def _plain_trigger(job: Job) -> str:
    """The trigger words in plain letters, hyphenated."""
    plain = "".join(c if c.isascii() and c.isalnum() else "-" for c in job.trigger.lower())
    return "-".join(part for part in plain.split("-") if part)[:60] or "subject"
