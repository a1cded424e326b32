"""Tasks of the page: each is the arguments of a command, put into the queue."""

from __future__ import annotations

import dataclasses
import filecmp
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dora_diffusion.cli.commands.adapters import ConvertSettings, ExtractSettings
from dora_diffusion.cli.commands.prepare import PrepareSettings
from dora_diffusion.cli.commands.rank_checkpoints import RankCheckpointsSettings
from dora_diffusion.config import TrainConfig
from dora_diffusion.config.command import CommandSettings
from dora_diffusion.config.derived import as_yaml
from dora_diffusion.config.families import DEFAULT_FAMILY, FAMILIES
from dora_diffusion.config.wording import whole_word
from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.formats.files.runs import ADAPTER_FILES, file_stem
from dora_diffusion.formats.layouts import CONVERSIONS, FOLDERS, PROGRAMS
from dora_diffusion.lab.commands import CompareSettings
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
STUDY, TOKEN = "study.yaml", "sks"


def start_training(
    workspace: Workspace, config: TrainConfig, subjects: Sequence[StoredSubject], name: str = ""
) -> str:
    """Append a run to the queue, with a copy of its photos. Returns its id.

    Without a name it is called by its subjects, or what a slider moves, and the time.

    Args:
        workspace: The runs folder.
        config: Its settings.
        subjects: Of each entry of ``dataset_config``, or of the one subject; none of a slider.
        name: What it is called.

    Raises:
        UserError: If a run with the same photos and settings waits or runs: it would repeat it.
    """
    for job in snapshot(workspace.root):
        if job.state in ("waiting", "running") and _is_same(job, config, subjects):
            now = f"number {job.position} in the queue" if job.position else "running"
            raise UserError(
                f"{job.title} with the same photos and settings is {now} already; change a "
                "setting, such as seed, to start another run"
            )
    folder = workspace.new_job()
    titles = ", ".join([*(subject.title for subject in subjects), *config.target[:1]])
    clock = made_at(folder.name)[11:]  # `Job.label` looks for it.
    record = records.JobRecord(
        records.train_arguments(folder),
        clean_text(name, NAME_LIMIT, "name") or f"{titles[:NAME_LIMIT]} {clock}",
        base=config.pretrained_model_name_or_path,
        sample=subjects[0].sample if len(subjects) == 1 else "",
    )
    settings = as_yaml(_in_folder(config, folder))
    photos = {_photos(place): subject.folder for place, subject in enumerate(subjects)}
    return create_job(folder, record, {records.SETTINGS: settings, **photos})


def _photos(place: int) -> str:
    """The folder of a subject's photos in a job's."""
    return f"photos-{place + 1}" if place else "photos"


def _is_same(job: Job, config: TrainConfig, subjects: Sequence[StoredSubject]) -> bool:
    """Return whether a job trains with these settings on these photos, captions and masks."""
    if job.settings != _in_folder(config, job.folder).to_dict():
        return False
    pairs = ((subject.folder, job.folder / _photos(n)) for n, subject in enumerate(subjects))
    compared = [filecmp.dircmp(*pair) for pair in pairs]
    return not any(files.left_only or files.right_only or files.diff_files for files in compared)


def _in_folder(config: TrainConfig, folder: Path) -> TrainConfig:
    entries = [
        {**entry, "instance_data_dir": str(folder / _photos(place))}
        for place, entry in enumerate(config.dataset_config)
    ]
    if entries:
        return dataclasses.replace(config, output_dir=str(folder), dataset_config=entries)
    photos = None if config.is_slider else str(folder / _photos(0))
    return dataclasses.replace(config, output_dir=str(folder), instance_data_dir=photos)


def looks_at(jobs: Sequence[Job], subject: StoredSubject) -> list[Job]:
    """The jobs that look at a subject's photos, or have looked, newest first."""
    return [
        job for job in jobs
        if job.kind == "prepare" and subject.photos
        and job.record.arguments[1:2] == [str(subject.folder)]
    ]  # fmt: skip


def start_look(
    workspace: Workspace, subject: StoredSubject, resolution: int, caption_model: str = ""
) -> str:
    """Queue a job that looks at a subject's photos in the place of earlier ones. Returns its id.

    Args:
        workspace: The runs folder.
        subject: Whose photos; nothing is written beside them but captions.
        resolution: What they will be trained at; the next lower multiple of 64 is taken.
        caption_model: Writes the missing captions: folder or hub id.

    Raises:
        UserError: If there are no photos, or another look is not over.
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
    """Call a run by another name, and what was made of it too.

    Raises:
        UserError: If there is no such run, or the name is empty or too long.
    """
    folder, title = workspace.job(job_id), clean_text(name, NAME_LIMIT, "name")
    if not title:
        raise UserError("write a name for the run")
    run = records.read_record(folder)
    for job in workspace.job_folders:
        record, called = records.read_record(job), title
        if folder.name not in (job.name, record.run):
            continue
        if job != folder:  # "Convert NAME to kohya": a verb, and the run's name.
            verb, _, about = record.title.partition(" ")
            if not about.startswith(run.title):
                continue
            called = f"{verb} {title}{about.removeprefix(run.title)}"
        records.write_record(job, dataclasses.replace(record, title=called))


def annotate_run(workspace: Workspace, job_id: object, note: object, stars: object) -> None:
    """Keep what somebody thinks of a run.

    Raises:
        UserError: If there is no such run, or the note is too long.
    """
    folder = workspace.job(job_id)
    lines = (clean_text(line, MOST_TEXT, "note") for line in str(note or "").splitlines())
    text = "\n".join(lines)
    if len(text) > MOST_TEXT:
        raise UserError(f"the note has {len(text)} characters; at most {MOST_TEXT} are taken")
    known = stars if isinstance(stars, int) and 0 <= stars <= MOST_STARS else 0
    record = dataclasses.replace(records.read_record(folder), note=text, stars=known)
    records.write_record(folder, record)


def import_adapter(
    workspace: Workspace, file: Path, name: object, base: str, allowed: Callable[[str], str]
) -> str:
    """Make a run of an adapter that was made elsewhere, kept byte by byte. Returns its id.

    Args:
        workspace: The runs folder.
        file: A .safetensors file in any key format.
        name: What it is called; empty: by its file.
        base: What it was trained on; empty: what the file says, else its family's released model.
        allowed: Returns the name of a base that may be loaded, or raises an error.

    Raises:
        UserError: If it is no ordinary file, too large, or of another kind.
        AdapterFormatError: If it is no adapter, with the reason.
    """
    from dora_diffusion.formats.adapter.inspect import report_on

    if file.suffix.lower() != ".safetensors":
        raise UserError(
            f"{shown(file.name)}: only .safetensors files are taken; other kinds can run a program"
        )
    require_file(file, MAX_FILE)
    metadata = report_on(file).metadata
    # Others name a file of their own machine.
    stated = metadata.base_model if metadata.format_version else ""
    base = base or stated or FAMILIES.get(metadata.family, DEFAULT_FAMILY).released_id
    record = records.JobRecord(
        [records.IMPORT, shown(file.name)],
        clean_text(name, NAME_LIMIT, "name") or shown(file.stem, NAME_LIMIT),
        base=allowed(base),
        trigger=metadata.trigger,
    )
    now = time.time()
    result = dataclasses.asdict(records.JobResult(0, now, now))
    files: dict[str, str | Path] = {records.RESULT: json.dumps(result), ADAPTER_FILES[0]: file}
    return create_job(workspace.new_job(), record, files)


def can_continue(job: Job) -> bool:
    """Return whether a run is finished and has a checkpoint of its last step."""
    return job.state == "done" and f"checkpoint-{job.step}" in job.checkpoints


def continue_run(folder: Path, more: object) -> None:
    """Return a finished run to the queue to train ``more`` steps from its last one on.

    Raises:
        UserError: If it cannot be continued, or that is not a number of steps.
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
    if job.step < job.total:  # Its patience was at an end: it would stop again at once.
        config = dataclasses.replace(config, early_stopping_patience=None)
    save_text(folder / records.SETTINGS, as_yaml(config))
    requeue_job(folder)


def start_task(name: str, workspace: Workspace, run: Job, *values: object) -> str:
    """Queue a job that has a form in the Library. Returns its id.

    Its settings called base, variant, revision, vae, adapter, input, adapters, folder, source,
    title, output and overwrite are filled in, as far as it has them.

    Args:
        name: Of `FORMS`.
        workspace: The runs folder.
        run: What it is about.
        values: Of its fields, in their order; empty ones are the defaults. The first one is another
            run where it is about two.

    Raises:
        UserError: If a run has no adapter, the two have not one base model, or nothing is said of
            the size that an adapter is to have.
        ConfigError: If a value cannot work.
        HubError: If publishing could not begin: no token, offline, or no name.
    """
    from dora_diffusion.export import hub

    kind, job = FORMS[name]
    others = [] if not job.with_other else [_of_one_base(run, values[0])]
    filled, titles = _about(kind, run, others), [one.title for one in (run, *others)]
    if name == "push" and run.kind == records.IMPORT:
        raise UserError("this adapter was imported; publish the runs that you trained")
    fields = [setting for setting in kind.settings() if setting.name in job.asked]
    for setting, value in zip(fields, values[len(others) :], strict=True):
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
    # What is in the file, so that no result replaces another one.
    folder, end = workspace.new_job(), job.output.format_map(filled)
    if others or job.fixed:  # more than a name can say
        end = f"{folder.name[-6:]}-{end}"
    output = str(workspace.exports / run.id / file_name(run, end)) if job.output else ""
    settings = kind.read({**filled, "output": output})
    trigger = run.trigger if name == "export" else ""  # of what can be prompted
    about = {"run": run.id, "base": run.base, "output": output, "trigger": trigger}
    return _start(folder, settings, f"{job.verb} {' and '.join(titles)}", **about)


def _of_one_base(run: Job, other: object) -> Job:
    """Another run, whose adapter is one of the same base model."""
    if not isinstance(other, Job):
        raise UserError("choose another adapter of the library first")
    if other.base != run.base:
        raise UserError(
            f"{run.title} was trained on {run.base}, and {other.title} on {other.base}; choose "
            "two of one base model"
        )
    return other


def _about(kind: type[CommandSettings], run: Job, others: Sequence[Job]) -> dict[str, Any]:
    """The settings of a command that follow from the runs that it is about."""
    adapter = str(chosen_adapter(run))
    filled = {
        **_of_base(run, "vae"), "adapter": adapter, "input": adapter, "folder": str(run.folder),
        "source": [adapter if run.kind == records.IMPORT else str(run.folder)],
        "adapters": [adapter, *(str(chosen_adapter(other)) for other in others)],
        "title": [run.title], "overwrite": True,
    }  # fmt: skip
    if kind is ConvertSettings and path_here(run.base_model) is None:
        filled |= dict.fromkeys(("base", "variant", "revision"))  # It is not downloaded for it.
    return filled


def start_extraction(workspace: Workspace, base: str, tuned: str, rank: object) -> str:
    """Queue a job that makes an adapter of a fine-tuned model. Returns its id.

    Raises:
        ConfigError: If a value cannot work.
    """
    folder = workspace.new_job()
    name = f"{file_stem(Path(tuned).stem, 'model')}-extracted.safetensors"
    output = str(workspace.exports / folder.name / name)
    given = {"base": base, "tuned": tuned, "rank": rank, "output": output}
    title = f"Extract {Path(tuned).name}"[:NAME_LIMIT]
    return _start(folder, ExtractSettings.read(given), title, base=base, output=output)


def start_ranking(workspace: Workspace, run: Job) -> str:
    """Queue a job that ranks a run's checkpoints. Returns its id.

    Raises:
        UserError: If there is nothing to rank.
    """
    if not run.candidates:
        raise UserError("this run has no checkpoint yet; wait until it has saved one")
    # The truth of a sample subject is known; others have photos.
    sample = run.record.sample if is_embedded(run.base) else ""
    output, title = workspace.ranking(run.id), f"Rank {run.title}"
    settings = RankCheckpointsSettings(
        **_of_base(run), run=run.folder, subject=sample or None,
        checkpoints=list(run.candidates), output=output, overwrite=True,
    )  # fmt: skip
    about = {"run": run.id, "base": run.base, "output": str(output)}
    return _start(workspace.new_job(), settings, title, **about)


def targets() -> dict[str, str]:
    """Return the targets of a conversion: a value of `--to` -> its title on the page."""
    named = {name: f"{program.title} ({program.place})" for name, program in PROGRAMS.items()}
    return named | {name: one.title for name, one in CONVERSIONS.items() if one.title}


def start_conversion(workspace: Workspace, run: Job, target: str) -> str:
    """Queue a job that writes a run's adapter as a program needs it. Returns its id.

    The base model is never downloaded for it.

    Raises:
        UserError: If there is no adapter, or no such program, or its file needs a base model that
            is not on this machine.
    """
    from dora_diffusion.export.convert import conversion_of
    from dora_diffusion.formats.adapter.file import read_adapter

    if target not in targets():
        raise UserError("there is no such program; choose one of the list")
    adapter = str(chosen_adapter(run))
    # PEFT writes a folder per component; the others are one file each.
    name = f"{file_name(run, target)}.{'zip' if target in FOLDERS else 'safetensors'}"
    output = str(workspace.exports / run.id / target / name)
    given: Any = {"input": adapter, "output": output, "to": target}
    base = path_here(run.base_model) if run.base else None
    if base is None and CONVERSIONS[conversion_of(target, read_adapter(adapter))].for_one_base:
        words = _words(ConvertSettings(**given, **_of_base(run)))
        raise UserError(
            f"a file for {target} is made for one base model, and {run.base or 'this one'} is not "
            "on this machine as the run loaded it. This downloads it, and converts the adapter: "
            f"{records.JobRecord(words).command}"
        )
    variant = run.base_model.variant if base else None
    settings = ConvertSettings(**given, base=base, variant=variant, overwrite=True)
    title = f"Convert {run.title} for {targets()[target].partition(' (')[0]}"
    about = {"run": run.id, "base": run.base, "output": output}
    return _start(workspace.new_job(), settings, title, **about)


def write_card(workspace: Workspace, run: Job) -> Path:
    """The model card of what is selected for a run, where it may be downloaded.

    Raises:
        UserError: If the run has no adapter.
    """
    from dora_diffusion.training.results.card import card_of

    target = workspace.exports / run.id / f"{file_name(run, 'README')}.md"
    return save_text(target, card_of(run.folder, chosen_adapter(run)))


def _of_base(run: Job, *more: str) -> dict[str, Any]:
    """A run's base as the settings of commands have it."""
    names = ("variant", "revision", *more)
    return {"base": run.base or None, **{name: getattr(run.base_model, name) for name in names}}


def _start(
    folder: Path, settings: CommandSettings, title: str, files: Any = None, **about: Any
) -> str:
    """Queue a command in a new folder, with further fields of its record. Returns its id."""
    return create_job(folder, records.JobRecord(_words(settings), title, **about), files)


def _words(settings: CommandSettings) -> list[str]:
    """The arguments of a job."""
    assert settings.job is not None
    return [settings.job.command, *settings.to_arguments()]


def file_name(job: Job, what: str) -> str:
    """A file name that no other run, checkpoint or format has, ending with what the file is."""
    stem, step = file_stem(job.trigger, "subject"), job.step_of(job.stands)
    return f"{stem}-{job.id[:15]}-step-{step}-{what}"


def start_study(
    workspace: Workspace, study: Mapping[str, Any], subjects: Sequence[StoredSubject]
) -> str:
    """Queue a job that compares methods of training. Returns its id.

    Every fourth photo of a subject, or its last one, is held out; a sample's truth is known.

    Args:
        workspace: The runs folder.
        study: As its YAML file has it, without subjects.
        subjects: What is learned; the job has copies of their photos.

    Raises:
        UserError: If there is no subject, or one cannot be learned.
        ConfigError: If it makes no study.
    """
    import yaml

    from dora_diffusion.lab.study.config import Study
    from dora_diffusion.models.metric_models import LITE

    if not subjects:
        raise UserError("choose at least one subject; they are made in the Subject tab")
    folder, base = workspace.new_job(), str(study["base"])
    files: dict[str, str | Path] = {}
    given, titles = list[Any](), [subject.title for subject in subjects]
    for place, subject in enumerate(subjects):
        if subject.sample and is_embedded(base):
            given.append(subject.sample)
            continue
        if len(subject.photos) < 2 or not subject.class_word:
            raise UserError(f"{subject.title} needs two photos, and a class in the Train tab")
        held_out = subject.photos[3::4] or subject.photos[-1:]
        for photo in subject.photos:
            part = f"subjects/{place}/{'held_out' if photo in held_out else 'photos'}/{photo.name}"
            files[part] = photo
            if (caption := photo.with_suffix(".txt")).is_file():
                own = caption.read_text(encoding="utf-8")
                text = whole_word(subject.token).sub(TOKEN, own)
                files[str(Path(part).with_suffix(".txt"))] = text
        title, where = subject.title, folder / "subjects" / str(place)
        given.append({
            "name": f"{title} {place + 1}" if titles.count(title) > 1 else title,
            "photos": str(where / "photos"), "held_out": str(where / "held_out"),
            "class_word": subject.class_word,
            "instance_prompt": f"a photo of a {TOKEN} {subject.class_word}",
        })  # fmt: skip
    models = [LITE] if files else []
    values = {**study, "subjects": given, "asked": {**study["asked"], "metric_models": models}}
    Study.from_dict(values)
    output = str(workspace.exports / folder.name / "study")
    files[STUDY] = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    settings = CompareSettings(study=str(folder / STUDY), output=output)
    title = f"{', '.join(study['methods'])} on {', '.join(titles)}"
    return _start(folder, settings, title[:NAME_LIMIT], files, output=output, base=base)
