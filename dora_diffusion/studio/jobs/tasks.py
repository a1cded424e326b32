"""The page's tasks. Each converts a request to the arguments of a command and queues it."""

from __future__ import annotations

import dataclasses
import filecmp
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dora_diffusion.cli.commands.adapters import ConvertSettings, ExtractSettings
from dora_diffusion.cli.commands.prepare import PrepareSettings
from dora_diffusion.cli.commands.rank_checkpoints import RankCheckpointsSettings
from dora_diffusion.config import TrainConfig
from dora_diffusion.config.command import CommandSettings
from dora_diffusion.config.derived import as_yaml
from dora_diffusion.config.families import DEFAULT_FAMILY, FAMILIES
from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.formats.files.runs import ADAPTER_FILES, file_stem
from dora_diffusion.formats.layouts import CONVERSIONS, FOLDERS, PROGRAMS
from dora_diffusion.models.locate import is_embedded
from dora_diffusion.numerics.weights import require_strength
from dora_diffusion.studio.jobs import records
from dora_diffusion.studio.jobs.bases import path_here
from dora_diffusion.studio.jobs.queue import create_job, delete_job, requeue_job
from dora_diffusion.studio.jobs.records import FORMS
from dora_diffusion.studio.jobs.snapshot import Job, chosen_adapter, read_job, snapshot
from dora_diffusion.studio.jobs.store import UserError, Workspace, clean_text, made_at
from dora_diffusion.studio.jobs.subjects import StoredSubject
from dora_diffusion.studio.jobs.uploads import MAX_FILE, require_file, shown

NAME_LIMIT = 60
MOST_STEPS = 1_000_000
MOST_TEXT = 1000
MOST_STARS = 5


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
    photos = None if config.is_slider else str(folder / _photos(0))
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
    return _start(folder, settings, title, output=output)


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


def annotate_run(workspace: Workspace, job_id: object, note: object, stars: object) -> None:
    """Save a user's note and rating of a run.

    Raises:
        UserError: If the run does not exist, or the note is too long.
    """
    folder = workspace.job(job_id)
    lines = (clean_text(line, MOST_TEXT, "note") for line in str(note or "").splitlines())
    text = "\n".join(lines)
    if len(text) > MOST_TEXT:
        raise UserError(f"the note has {len(text)} characters; at most {MOST_TEXT} are taken")
    rating = stars if isinstance(stars, int) and 0 <= stars <= MOST_STARS else 0
    record = dataclasses.replace(records.read_record(folder), note=text, stars=rating)
    records.write_record(folder, record)


def import_adapter(
    workspace: Workspace, file: Path, name: object, base: str, allowed: Callable[[str], str]
) -> str:
    """Create a run from an adapter file, which is copied unchanged. Returns its id.

    Args:
        workspace: The runs folder.
        file: A .safetensors file in any key format.
        name: Name of the run. Default: the file's name.
        base: Base model. Default: the model in the file's metadata, else its family's released one.
        allowed: Returns the name of a base model that may be loaded, or raises an error.

    Raises:
        UserError: If the file is not a regular file, is too large, or has another suffix.
        AdapterFormatError: If the file is not an adapter, with the reason.
    """
    from dora_diffusion.formats.adapter.inspect import report_on

    if file.suffix.lower() != ".safetensors":
        raise UserError(
            f"{shown(file.name)}: only .safetensors files are taken; other kinds can run a program"
        )
    require_file(file, MAX_FILE)
    metadata = report_on(file).metadata
    # Other programs record a path on the machine that they ran on.
    stated = metadata.base_model if metadata.format_version else ""
    base = base or stated or FAMILIES.get(metadata.family, DEFAULT_FAMILY).released_id
    title = clean_text(name, NAME_LIMIT, "name") or shown(file.stem, NAME_LIMIT)
    record = records.JobRecord(
        [records.IMPORT, shown(file.name)],
        title,
        base=allowed(base),
        trigger=metadata.trigger,
    )
    now = time.time()
    result = dataclasses.asdict(records.JobResult(0, now, now))
    files: dict[str, str | Path] = {records.RESULT: json.dumps(result), ADAPTER_FILES[0]: file}
    return create_job(workspace.new_job(title), record, files)


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


def start_task(name: str, workspace: Workspace, run: Job, *values: object) -> str:
    """Queue a job that has a form in the Library. Returns its id.

    The settings base, variant, revision, vae, adapter, input, adapters, folder, output and
    overwrite are filled in, as far as the command has them.

    Args:
        name: Name of the form in `FORMS`.
        workspace: The runs folder.
        run: The run to process.
        values: Values of the form's fields, in order; empty ones are the defaults. If the job
            processes two runs, the first value is the other run.

    Raises:
        UserError: If a run has no adapter, two runs have different base models, or the new size of
            an adapter is missing.
        ConfigError: If a value is invalid.
        HubError: If publishing cannot start: no token, offline, or no name.
    """
    from dora_diffusion.export import hub

    kind, job = FORMS[name]
    other_runs = [] if not job.with_other else [_of_one_base(run, values[0])]
    filled, titles = _about(kind, run, other_runs), [one.title for one in (run, *other_runs)]
    if name == "push" and run.kind == records.IMPORT:
        raise UserError("this adapter was imported; publish the runs that you trained")
    fields = [setting for setting in kind.settings() if setting.name in job.asked]
    for setting, value in zip(fields, values[len(other_runs) :], strict=True):
        text = clean_text(value, MOST_TEXT, setting.name) if isinstance(value, str) else value
        if text not in ("", None):
            filled[setting.name] = setting.cast(str(text).split() if setting.is_list else text)
        elif not setting.is_required:
            filled[setting.name] = setting.default
    filled |= job.fixed
    if name == "resize" and not any(filled[setting.name] for setting in fields):
        raise UserError("give a smaller rank, or an energy, first")
    if name == "push":
        hub.check(str(filled.get("repository", "")))
    require_strength("strength", float(filled.get("strength", 1.0)))
    # The name contains the settings, so that no result replaces another one.
    folder, end = workspace.new_job(), job.output.format_map(filled)
    if other_runs or job.fixed:  # too many settings for a name
        end = f"{folder.name[-6:]}-{end}"
    output = str(workspace.exports / run.id / file_name(run, end)) if job.output else ""
    settings = kind.read({**filled, "output": output})
    trigger = run.trigger if name == "export" else ""  # Only an exported model can be prompted.
    about = {"run": run.id, "base": run.base, "output": output, "trigger": trigger}
    return _start(folder, settings, f"{job.verb} {' and '.join(titles)}", **about)


def _of_one_base(run: Job, other: object) -> Job:
    """Return another run of the same base model, or raise a `UserError`."""
    if not isinstance(other, Job):
        raise UserError("choose another adapter of the library first")
    if other.base != run.base:
        raise UserError(
            f"{run.title} was trained on {run.base}, and {other.title} on {other.base}; choose "
            "two of one base model"
        )
    return other


def _about(kind: type[CommandSettings], run: Job, other_runs: Sequence[Job]) -> dict[str, Any]:
    """Return the settings of a command that follow from the runs to process."""
    adapter = str(chosen_adapter(run))
    filled = {
        **_of_base(run, "vae"), "adapter": adapter, "input": adapter, "folder": str(run.folder),
        "adapters": [adapter, *(str(chosen_adapter(other)) for other in other_runs)],
        "overwrite": True,
    }  # fmt: skip
    if kind is ConvertSettings and path_here(run.base_model) is None:
        filled |= dict.fromkeys(("base", "variant", "revision"))  # A conversion never downloads.
    return filled


def start_extraction(workspace: Workspace, base: str, tuned: str, rank: object) -> str:
    """Queue a job that extracts an adapter from a fine-tuned model. Returns its id.

    Raises:
        ConfigError: If a value is invalid.
    """
    folder = workspace.new_job()
    name = f"{file_stem(Path(tuned).stem, 'model')}-extracted.safetensors"
    output = str(workspace.exports / folder.name / name)
    values = {"base": base, "tuned": tuned, "rank": rank, "output": output}
    title = f"Extract {Path(tuned).name}"[:NAME_LIMIT]
    return _start(folder, ExtractSettings.read(values), title, base=base, output=output)


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
    settings = RankCheckpointsSettings(
        **_of_base(run), run=run.folder, subject=sample or None,
        checkpoints=list(run.candidates), output=output, overwrite=True,
    )  # fmt: skip
    about = {"run": run.id, "base": run.base, "output": str(output)}
    return _start(workspace.new_job(), settings, title, **about)


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
    [setting] = (one for one in ConvertSettings.settings() if one.name == "strength")
    factor = setting.cast(strength or str(setting.default))
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
        words = _words(ConvertSettings(**values, **_of_base(run)))
        raise UserError(
            f"{needs}, and {run.base or 'this one'} is not on this machine as the run loaded it. "
            f"This downloads it, and converts the adapter: {records.JobRecord(words).command}"
        )
    variant = run.base_model.variant if base else None
    settings = ConvertSettings(**values, base=base, variant=variant, overwrite=True)
    title = f"Convert {run.title} for {targets()[target].partition(' (')[0]}"
    about = {"run": run.id, "base": run.base, "output": output}
    return _start(workspace.new_job(), settings, title, **about)


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


def _start(
    folder: Path, settings: CommandSettings, title: str, files: Any = None, **about: Any
) -> str:
    """Queue a command with further fields of its record. Returns its id."""
    return create_job(folder, records.JobRecord(_words(settings), title, **about), files)


def _words(settings: CommandSettings) -> list[str]:
    assert settings.job is not None
    return [settings.job.command, *settings.to_arguments()]


def file_name(job: Job, what: str) -> str:
    """Return a file name unique to a run and its selected checkpoint, ending in ``what``."""
    return f"{job.id}-step-{job.step_of(job.stands)}-{what}"
