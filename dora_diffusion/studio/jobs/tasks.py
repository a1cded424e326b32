"""The page's tasks. Each converts a request to the arguments of a command and queues it."""

from __future__ import annotations

import dataclasses
import filecmp
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dora_diffusion.cli.commands.adapters import ConvertSettings
from dora_diffusion.cli.commands.prepare import PrepareSettings
from dora_diffusion.cli.commands.rank_checkpoints import RankCheckpointsSettings
from dora_diffusion.cli.commands.results import ExportSettings
from dora_diffusion.config import TrainConfig
from dora_diffusion.config.command import CommandSettings
from dora_diffusion.config.derived import as_yaml
from dora_diffusion.config.fields import Setting
from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.formats.layouts import CONVERSIONS, FOLDERS, PROGRAMS
from dora_diffusion.models.locate import is_embedded
from dora_diffusion.numerics.weights import require_strength
from dora_diffusion.studio.jobs import records
from dora_diffusion.studio.jobs.bases import path_here
from dora_diffusion.studio.jobs.queue import create_job, delete_job, requeue_job
from dora_diffusion.studio.jobs.snapshot import Job, chosen_adapter, read_job, snapshot
from dora_diffusion.studio.jobs.store import UserError, Workspace, clean_text, made_at
from dora_diffusion.studio.jobs.subjects import StoredSubject

NAME_LIMIT = 60
MOST_STEPS = 1_000_000


def start_training(
    workspace: Workspace, config: TrainConfig, subjects: Sequence[StoredSubject], name: str = ""
) -> str:
    """Queue a training run with a copy of its photos. Returns its id.

    Args:
        workspace: The runs folder.
        config: Settings of the run.
        subjects: A subject for each entry of ``dataset_config``, or the only one; empty for a
            slider.
        name: Name of the run. Default: its subjects, or a slider's target, and the time.

    Raises:
        UserError: If a run with the same photos and settings already waits or runs.
    """
    for job in snapshot(workspace.root):
        if job.state in ("waiting", "running") and _is_same(job, config, subjects):
            now = f"number {job.position} in the queue" if job.position else "running"
            raise UserError(
                f"{job.title} with the same photos and settings is {now} already; change a "
                "setting, such as seed, to start another run"
            )
    titles = ", ".join([*(subject.title for subject in subjects), *config.target[:1]])[:NAME_LIMIT]
    name = clean_text(name, NAME_LIMIT, "name")
    folder = workspace.new_job(name or titles)
    clock = made_at(folder.name)[11:]  # `Job.label` expects it.
    record = records.JobRecord(
        records.train_arguments(folder),
        name or f"{titles} {clock}",
        base=config.pretrained_model_name_or_path,
        sample=subjects[0].sample if len(subjects) == 1 else "",
    )
    settings = as_yaml(_in_folder(config, folder))
    photos = {_photos(index): subject.folder for index, subject in enumerate(subjects)}
    return create_job(folder, record, {records.SETTINGS: settings, **photos})


def _photos(index: int) -> str:
    """Return the name of a subject's photo folder in a job's folder."""
    return f"photos-{index + 1}" if index else "photos"


def _is_same(job: Job, config: TrainConfig, subjects: Sequence[StoredSubject]) -> bool:
    """Return whether a job has the same settings, photos, captions and masks."""
    if job.settings != _in_folder(config, job.folder).to_dict():
        return False
    pairs = ((subject.folder, job.folder / _photos(n)) for n, subject in enumerate(subjects))
    compared = [filecmp.dircmp(*pair) for pair in pairs]
    return not any(files.left_only or files.right_only or files.diff_files for files in compared)


def _in_folder(config: TrainConfig, folder: Path) -> TrainConfig:
    entries = [
        {**entry, "instance_data_dir": str(folder / _photos(index))}
        for index, entry in enumerate(config.dataset_config)
    ]
    if entries:
        return dataclasses.replace(config, output_dir=str(folder), dataset_config=entries)
    photos = str(folder / _photos(0)) if config.has_photos else None
    return dataclasses.replace(config, output_dir=str(folder), instance_data_dir=photos)


def looks_at(jobs: Sequence[Job], subject: StoredSubject) -> list[Job]:
    """Return the jobs that check a subject's photos, active or ended, newest first."""
    return [
        job for job in jobs
        if job.kind == "prepare" and subject.photos
        and job.record.arguments[1:2] == [str(subject.folder)]
    ]  # fmt: skip


def start_look(
    workspace: Workspace, subject: StoredSubject, resolution: int, caption_model: str = ""
) -> str:
    """Queue a job that checks a subject's photos, and delete earlier ones. Returns its id.

    Args:
        workspace: The runs folder.
        subject: The subject. Only captions are written to its folder.
        resolution: Training resolution, rounded down to a multiple of 64.
        caption_model: Model that writes the missing captions: a folder or hub id.

    Raises:
        UserError: If the subject has no photos, or an earlier check has not ended.
    """
    if not subject.photos:
        raise UserError("the subject has no photos yet; add some first")
    earlier = looks_at(snapshot(workspace.root), subject)
    if any(not job.has_ended for job in earlier):
        raise UserError("its photos are already being checked; wait until that is done")
    for job in earlier:
        delete_job(workspace, job.id)
    folder = workspace.new_job()
    sheets = workspace.exports / folder.name
    settings = PrepareSettings(
        photos=[str(subject.folder)],
        sheets=str(sheets),
        resolution=max(64, resolution // 64 * 64),
        token=subject.token,
        class_word=subject.class_word,
        caption_model=caption_model or None,
        in_place=bool(caption_model),
    )
    output = str(sheets / f"{subject.folder.name}-sheet.jpg")
    title = f"{'Caption' if caption_model else 'Check'} {subject.title}"
    return _start(folder, "prepare", settings, title, output=output)


def rename_run(workspace: Workspace, job_id: object, name: object) -> None:
    """Rename a run, and the jobs that process it.

    Raises:
        UserError: If the run does not exist, or the name is empty or too long.
    """
    folder, title = workspace.job(job_id), clean_text(name, NAME_LIMIT, "name")
    if not title:
        raise UserError("write a name for the run")
    run = records.read_record(folder)
    for job in workspace.job_folders:
        record, new_title = records.read_record(job), title
        if folder.name not in (job.name, record.run):
            continue
        if job != folder:  # "Convert NAME to kohya": a verb, and the run's name.
            verb, _, about = record.title.partition(" ")
            if not about.startswith(run.title):
                continue
            new_title = f"{verb} {title}{about.removeprefix(run.title)}"
        records.write_record(job, dataclasses.replace(record, title=new_title))


def can_continue(job: Job) -> bool:
    """Return whether a run is done and has a checkpoint of its last step."""
    return job.state == "done" and f"checkpoint-{job.step}" in job.checkpoints


def continue_run(folder: Path, more: object) -> None:
    """Return a finished run to the queue to train ``more`` steps after its last one.

    Raises:
        UserError: If the run cannot be continued, or ``more`` is not a number of steps.
    """
    job = read_job(folder)
    if job is None or not can_continue(job):
        raise UserError(
            "only a finished run that kept a checkpoint of its last step can be continued"
        )
    if not isinstance(more, (int, float)) or not 1 <= more <= MOST_STEPS:
        raise UserError(f"more steps is {more}; it must be between 1 and {MOST_STEPS}")
    config = TrainConfig.from_dict(job.settings)
    config = dataclasses.replace(config, max_train_steps=job.step + int(more))
    save_text(folder / records.SETTINGS, as_yaml(config))
    requeue_job(folder)


def start_merge(workspace: Workspace, run: Job, strength: str = "") -> str:
    """Queue a job that merges a run's adapter into its base model. Returns its id.

    Args:
        workspace: The runs folder.
        run: The run.
        strength: Strength of the adapter; empty: 1.

    Raises:
        UserError: If the run has no adapter.
        ConfigError: If the strength is not a valid number.
    """
    adapter, factor = str(chosen_adapter(run)), _strength(ExportSettings, strength)
    require_strength("strength", factor)
    # The name contains the settings, so that no result replaces another one.
    name = file_name(run, f"strength-{factor:g}-merged.safetensors")
    output = str(workspace.exports / run.id / name)
    settings = ExportSettings.of(
        **_of_base(run, "vae"), adapter=[adapter], strength=factor, output=output,
        overwrite=True,
    )  # fmt: skip
    about = {"run": run.id, "base": run.base, "output": output, "trigger": run.trigger}
    return _start(workspace.new_job(), "export", settings, f"Merge {run.title}", **about)


def _strength(kind: type[CommandSettings], text: str) -> float:
    """Return a typed strength for a command; its default if the text is empty.

    Raises:
        ConfigError: If it is not a valid number.
    """
    setting = strength_setting(kind)
    return float(setting.cast(text.strip() or str(setting.default)))


def strength_setting(kind: type[CommandSettings]) -> Setting:
    """Return the setting of an adapter's strength in a command."""
    return next(setting for setting in kind.settings() if setting.name == "strength")


def start_ranking(workspace: Workspace, run: Job) -> str:
    """Queue a job that ranks a run's checkpoints. Returns its id.

    Raises:
        UserError: If the run has no checkpoints.
    """
    if not run.candidates:
        raise UserError("this run has no checkpoint yet; wait until it has saved one")
    # A sample subject has a known ground truth; other subjects have photos.
    sample = run.record.sample if is_embedded(run.base) else ""
    output, title = workspace.ranking(run.id), f"Rank {run.title}"
    base = {} if run.settings.get("sample_model") else _of_base(run)
    settings = RankCheckpointsSettings(
        **base, run=run.folder, subject=sample or None,
        checkpoints=list(run.candidates), output=output, overwrite=True,
    )  # fmt: skip
    about = {"run": run.id, "base": run.base, "output": str(output)}
    return _start(workspace.new_job(), "rank-checkpoints", settings, title, **about)


def targets() -> dict[str, str]:
    """Return the targets of a conversion: value of `--to` -> title on the page."""
    titles = {name: f"{program.title} ({program.place})" for name, program in PROGRAMS.items()}
    return titles | {name: one.title for name, one in CONVERSIONS.items() if one.title}


def start_conversion(workspace: Workspace, run: Job, target: str, strength: str = "") -> str:
    """Queue a job that converts a run's adapter for a program. Returns its id.

    The conversion never downloads the base model.

    Args:
        workspace: The runs folder.
        run: The run.
        target: A key of `targets`.
        strength: Strength of the written adapter; empty: 1.

    Raises:
        UserError: If the run has no adapter, the program is unknown, or the conversion needs a base
            model that is not on this machine.
        ConfigError: If the strength is not a number above 0.
    """
    from dora_diffusion.export.convert import conversion_of
    from dora_diffusion.formats.adapter.file import read_adapter
    from dora_diffusion.formats.layouts.layout import norm_axes
    from dora_diffusion.sampling.images import adapter_name

    if target not in targets():
        raise UserError("there is no such program; choose one of the list")
    path = str(chosen_adapter(run))
    factor = _strength(ConvertSettings, strength)
    end = f"-strength-{factor:g}" if factor != 1 else ""
    # PEFT has a folder per component; other formats are a single file.
    name = f"{adapter_name(path)}{end}.{'zip' if target in FOLDERS else 'safetensors'}"
    output = str(workspace.exports / run.id / target / name)
    values: Any = {"input": path, "output": output, "to": target, "strength": factor}
    base = path_here(run.base_model) if run.base else None
    adapter = read_adapter(path)
    needs = ""
    if CONVERSIONS[conversion_of(target, adapter)].for_one_base:
        needs = f"a file for {target} is made for one base model"
    elif factor != 1 and norm_axes(adapter.layers.values()):
        needs = f"strength {factor:g} of a DoRA depends on its base model"
    if base is None and needs:
        words = ["convert", *ConvertSettings(**values, **_of_base(run)).to_arguments()]
        raise UserError(
            f"{needs}, and {run.base or 'this one'} is not on this machine as the run loaded it. "
            f"This downloads it, and converts the adapter: {records.JobRecord(words).command}"
        )
    variant = run.base_model.variant if base else None
    settings = ConvertSettings(**values, base=base, variant=variant, overwrite=True)
    title = f"Convert {run.title} for {targets()[target].partition(' (')[0]}"
    about = {"run": run.id, "base": run.base, "output": output}
    return _start(workspace.new_job(), "convert", settings, title, **about)


def write_card(workspace: Workspace, run: Job) -> Path:
    """Write the model card of a run's selected adapter, for download. Returns its path.

    Raises:
        UserError: If the run has no adapter.
    """
    from dora_diffusion.training.results.card import card_of

    target = workspace.exports / run.id / f"{file_name(run, 'README')}.md"
    return save_text(target, card_of(run.folder, chosen_adapter(run)))


def _of_base(run: Job, *more: str) -> dict[str, Any]:
    """Return a run's base model as settings of commands."""
    names = ("variant", "revision", *more)
    return {"base": run.base or None, **{name: getattr(run.base_model, name) for name in names}}


def _start(folder: Path, kind: str, settings: CommandSettings, title: str, **about: Any) -> str:
    """Queue a command with further fields of its record. Returns its id."""
    arguments = [kind, *settings.to_arguments()]
    return create_job(folder, records.JobRecord(arguments, title, **about))


def file_name(job: Job, what: str) -> str:
    """Return a file name unique to a run and its selected checkpoint, ending in ``what``."""
    return f"{job.id}-step-{job.step_of(job.stands)}-{what}"
