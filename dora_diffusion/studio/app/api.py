"""The app's functions for other programs, in Gradio's API: the page's checks, logins and limits.

An argument ``file`` is Gradio's description of an uploaded file, such as ``handle_file`` of
``gradio_client`` creates.
"""

# Annotations are not postponed: Gradio reads the types of results from them.

import asyncio
import dataclasses
import functools
import shutil
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import gradio as gr

from dora_diffusion.cli.commands.generate import GenerateSettings
from dora_diffusion.config import TrainConfig
from dora_diffusion.config.flag_map import refusal, removal
from dora_diffusion.config.train import learns_from_photos
from dora_diffusion.config.wording import did_you_mean
from dora_diffusion.data.images import open_photo
from dora_diffusion.sampling.images import adapter_name
from dora_diffusion.studio.app.context import Context, errors_as_lines
from dora_diffusion.studio.app.settings import (
    ADVANCED,
    EMBEDDED,
    PROMPTS,
    SETTINGS,
    preset_values,
    setting_text,
)
from dora_diffusion.studio.app.views.request import UNSET, make_request
from dora_diffusion.studio.app.views.restore import shown_value
from dora_diffusion.studio.app.views.results import DEVICE
from dora_diffusion.studio.jobs import subjects, tasks
from dora_diffusion.studio.jobs.image_store import keep_input
from dora_diffusion.studio.jobs.snapshot import Job, chosen_adapter
from dora_diffusion.studio.jobs.store import UserError, Workspace, clean_text, new_id
from dora_diffusion.studio.jobs.uploads import require_file, shown

_MODEL, _SAMPLES = "pretrained_model_name_or_path", "validation_prompt"
_PERIOD_SECONDS = 1.0
_MOST_WAITING = 50
_in_one_line = functools.partial(errors_as_lines, lambda line: shown(line, 1000))


def add_api(context: Context) -> None:
    """Add the functions to the page that is being built."""
    _add_training(context)
    _add_results(context)


def _add_training(context: Context) -> None:
    workspace = context.workspace

    def upload(
        title: str, files: list[dict], class_word: str = "", token: str = "sks"
    ) -> tuple[str, list[str]]:
        """Create a subject from photos and captions (`.txt` files named like their photos).

        A style has neither class_word nor token. Returns the subject's id, and a line for each
        refused file.
        """
        name = clean_text(title, tasks.NAME_LIMIT, "name")
        if not (name and files):
            raise UserError("give the new subject a name and photos")
        paths = [_uploaded(workspace, file) for file in files]
        subject = subjects.new_subject(workspace, name)
        try:
            subjects.keep_words(workspace, subject, class_word, token)
            added = subjects.add_photos(workspace, subject, paths)
            if not added.accepted:
                raise UserError("; ".join(added.refused))
        except BaseException:
            subjects.delete_subject(workspace, subject)
            raise
        return subject, list(added.refused)

    def train(subjects: list[str], settings: dict, preset: str = "balanced", name: str = "") -> str:
        """Queue a training run of subjects (none for a slider), with settings of `train` by name.

        The preset has the values of all other settings. Returns the run's id.
        """
        config, learned = _training(context, subjects, settings, preset)
        run = tasks.start_training(workspace, config, learned, name)
        context.queued()  # Start it at once if no other one runs.
        return run

    async def wait(job: str) -> AsyncIterator[dict[str, Any]]:
        """Wait for the end of a job; yield its state whenever it changes. A failure is an error."""
        with _in_one_line():
            current = await asyncio.to_thread(_now, context, job, fresh=True)
            yield (last := _state(current))
            while not current.has_ended:
                await asyncio.sleep(_PERIOD_SECONDS)
                current = await asyncio.to_thread(_now, context, job)
                if (state := _state(current)) != last:
                    yield (last := state)
            if current.shown_state != "done":
                cause = f": {current.cause}" if current.cause else ""
                raise UserError(f"{current.title} is {current.shown_state}{cause}")

    gr.api(_checked(upload))
    gr.api(_checked(train))
    gr.api(wait, concurrency_limit=_MOST_WAITING)


def _add_results(context: Context) -> None:
    workspace = context.workspace

    def generate(model: str, prompt: str, settings: dict) -> tuple[list[gr.FileData], list[str]]:
        """Generate images with settings of `generate` by name; they wait until no job runs.

        The model is the id of a run, `RUN/CHECKPOINT`, `merged/JOB` or `base/MODEL`. `{subject}` in
        the prompt is replaced by the run's trigger words. Further adapters are the settings
        `adapter_second`, `strength_second` and so on. Returns the images, and notes on problems.
        """
        request = make_request(context, model, _form(workspace, prompt, settings))
        images = context.generator.make(request)
        notes = [note for image in images for note in image.notes]
        return [_file(image.path) for image in images], [*dict.fromkeys(notes)]

    def fetch(run: str, checkpoint: str = "") -> gr.FileData:
        """Return the selected adapter of a run, or the adapter of a checkpoint."""
        path = chosen_adapter(context.job(run), checkpoint)
        # A copy in the cache: the folders of runs are not served.
        copy = workspace.cache / new_id() / f"{adapter_name(path)}{path.suffix}"
        copy.parent.mkdir()
        shutil.copyfile(path, copy)
        return _file(copy)

    device = {name: value for name, value in DEVICE.items() if name != "show"}
    gr.api(_checked(generate), **device)
    gr.api(_checked(fetch))


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that it checks the types of its arguments and reports errors as lines."""
    kinds = {name: get_origin(hint) or hint for name, hint in get_type_hints(function).items()}

    @functools.wraps(function)
    def run(*values: Any) -> Any:
        with _in_one_line():
            for (name, kind), value in zip(kinds.items(), values, strict=False):
                if not isinstance(value, kind):
                    raise UserError(f"{name} is {value!r:.80}; it must be a {kind.__name__}")
            return function(*values)

    return run


def _uploaded(workspace: Workspace, file: object) -> Path:
    """Return the path of an uploaded file.

    Raises:
        UserError: If this is not a file that was uploaded to this app.
    """
    path = Path(str(file.get("path", ""))) if isinstance(file, dict) else Path()
    if "\0" in str(path) or not path.resolve().is_relative_to(workspace.cache.resolve()):
        raise UserError(f"{file!r:.80} is not an uploaded file; give handle_file(PATH)")
    return path


def _file(path: Path) -> Any:
    return gr.FileData(path=str(path), orig_name=path.name).model_dump()


def _now(context: Context, job_id: str, *, fresh: bool = False) -> Job:
    """Return a job with its position in the queue."""
    listed = (job for job in context.jobs(fresh=fresh) if job.id == job_id)
    return next(listed, None) or context.job(job_id)


def _state(job: Job) -> dict[str, Any]:
    return {
        "state": job.shown_state, "phase": job.progress.phase, "step": job.step, "total": job.total,
        "remaining_seconds": job.remaining_seconds, "position": job.position,
        "owner": job.record.owner, "checkpoints": list(job.checkpoints), "trigger": job.trigger,
    }  # fmt: skip


def _training(
    context: Context, ids: list[str], settings: Mapping[str, Any], preset: str
) -> tuple[TrainConfig, list[subjects.StoredSubject]]:
    """Return the settings and subjects of a requested run.

    Raises:
        UserError, ConfigError: If the run cannot start with these settings.
    """
    requested = dict[str, Any]()
    for name, value in settings.items():
        if name not in (*ADVANCED, *PROMPTS, _MODEL, _SAMPLES):
            unknown = f"{name[:80]} is not a setting{did_you_mean(name, SETTINGS)}"
            reserved = f"{name} is set by the app itself, or by a subject; leave it out"
            if name == "feature":
                reserved = "feature is code, which the app does not run; leave it out"
            raise UserError(reserved if name in SETTINGS else refusal(name) or unknown)
        requested[name] = SETTINGS[name].cast(value)
    model = context.allowed_model(requested.pop(_MODEL, EMBEDDED))
    prompts = "\n".join(requested.pop(_SAMPLES, ()))
    values = preset_values(preset, model, context.device()) | requested
    texts = {name: setting_text(value) for name, value in values.items()}
    texts |= {name: "\n".join(requested.get(name, ())) for name in PROMPTS}
    if learns_from_photos(values):
        learned = context.learned(ids)
    elif ids:
        raise UserError("a run without photos learns from prompts alone; leave subjects out")
    else:
        learned = []
    token, word = (learned[0].token, learned[0].class_word) if learned else ("", "")
    return context.run_config(model, learned, token, word, prompts, texts, ask_hub=True), learned


def _form(workspace: Workspace, prompt: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Convert settings of ``generate`` to fields of the Generate tab.

    Raises:
        UserError, ConfigError, PhotoError: If a name or a value is invalid.
    """
    known = {setting.name: setting for setting in GenerateSettings.settings()}
    form, offered = {**UNSET, "prompt": prompt}, UNSET.keys() - {"prompt"}
    for name, value in settings.items():
        if name not in offered:
            unknown = f"{name[:80]} is not a setting of images{did_you_mean(name, offered)}"
            raise UserError(removal(name) or unknown)
        if name in ("image", "mask_image"):
            require_file(file := _uploaded(workspace, value))
            form[name] = keep_input(workspace, open_photo(file))
        elif value is not None:
            # Each further adapter has its own field, chosen like the first one.
            like = name if name in known else name.partition("_")[0].replace("adapter", "prompt")
            setting = dataclasses.replace(known[like], name=name)
            cast = setting.cast(value)
            setting.check(cast)
            form[name] = shown_value(name, cast)
    return form
