"""The app's HTTP API: the page's actions, with the same checks, logins and limits.

The routes are below `client.ROOT`, next to Gradio's. Responses are the dataclasses of
`dora_diffusion.studio.client`; an error is ``{"detail": LINE}``.
"""

from __future__ import annotations

import dataclasses
import hmac
import shutil
import threading
from base64 import b64encode
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from starlette.concurrency import run_in_threadpool

from dora_diffusion.cli.commands.generate import GenerateSettings
from dora_diffusion.cli.console.errors import explain_to_all
from dora_diffusion.cluster.serving.api import value_line
from dora_diffusion.config.wording import did_you_mean
from dora_diffusion.data.images import open_photo
from dora_diffusion.studio.app.context import Context
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
from dora_diffusion.studio.client import (
    NewConversion,
    NewImages,
    NewInput,
    NewSubject,
    NewTraining,
    RemoteImage,
    RemoteJob,
    RemotePromptFile,
    RemoteSubject,
)
from dora_diffusion.studio.jobs import inputs, subjects, tasks
from dora_diffusion.studio.jobs.queue import PERSON, delete_job, requeue_job, stop_job
from dora_diffusion.studio.jobs.records import log_tail
from dora_diffusion.studio.jobs.snapshot import Job, adapter_of, chosen_adapter
from dora_diffusion.studio.jobs.store import (
    BusyError,
    MissingError,
    UserError,
    Workspace,
    clean_text,
    confined,
    new_id,
)
from dora_diffusion.studio.jobs.uploads import MAX_BYTES, shown

MOST_BYTES = 2**20
"""Limit of a request's body, except for photos."""
MOST_WAITING = 8
"""Number of concurrent requests for images."""
# Most characters of an error.
_LONGEST = 1000
_MODEL, _SAMPLES = "pretrained_model_name_or_path", "validation_prompt"
_MISSING: dict[int | str, dict[str, Any]] = {404: {"description": "It is not there."}}


def make_api(context: Context) -> FastAPI:
    """Create the API of an app."""
    api = FastAPI(
        title="DoRA studio",
        version="1",
        description="Photos, training runs and images of the app.",
        redirect_slashes=False,
        # FastAPI's documentation pages would load scripts from other sites.
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    api.add_middleware(_Access, logins=context.launch.logins)

    async def refuse(_: Request, error: Exception) -> JSONResponse:
        known = ((MissingError, 404), (BusyError, 429), (ValueError, 422), (OSError, 422))
        status = next((code for kind, code in known if isinstance(error, kind)), 500)
        return JSONResponse({"detail": shown(explain_to_all(error, "generate"), _LONGEST)}, status)

    async def refuse_values(_: Request, error: RequestValidationError) -> JSONResponse:
        line = "; ".join(map(value_line, error.errors()))
        return JSONResponse({"detail": shown(line, _LONGEST)}, 422)

    for kind in (ValueError, OSError, Exception):
        api.add_exception_handler(kind, refuse)
    api.add_exception_handler(RequestValidationError, refuse_values)  # type: ignore[arg-type]

    @api.get("/openapi.json")
    def describe() -> dict[str, Any]:
        """Describe these routes in OpenAPI's format."""
        return api.openapi()

    for add in (_add_subjects, _add_jobs, _add_files, _add_images, _add_prompt_files):
        add(api, context)
    return api


class _Access:
    """ASGI middleware that authenticates users, and refuses large bodies before reading them.

    Args:
        app: ASGI app for accepted requests.
        logins: Passwords by name; empty for no authentication.
    """

    def __init__(self, app: Any, logins: Mapping[str, str]) -> None:
        self._app = app
        self._basic = {b64encode(f"{n}:{word}".encode()): n for n, word in logins.items()}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and (refusal := self._refusal(scope)):
            await refusal(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Any) -> JSONResponse | None:
        headers, most = dict(scope["headers"]), MOST_BYTES
        scheme, _, credentials = headers.get(b"authorization", b"").partition(b" ")
        is_right = partial(hmac.compare_digest, credentials.strip())
        names = [name for expected, name in self._basic.items() if is_right(expected)]
        if self._basic and not (names and scheme.lower() == b"basic"):
            line = "give a name and a password of the app, as HTTP Basic"
            return JSONResponse({"detail": line}, 401, {"WWW-Authenticate": "Basic"})
        PERSON.set("".join(names))
        if scope["method"] == "PUT":
            most = MAX_BYTES
        length = headers.get(b"content-length", b"0")
        if b"transfer-encoding" in headers or not length.isdigit() or int(length) > most:
            line = f"a request has a Content-Length, here of at most {most} bytes"
            return JSONResponse({"detail": line}, 413)
        return None


@asynccontextmanager
async def _received(workspace: Workspace, name: str, request: Request) -> AsyncIterator[Path]:
    """Save a request's body to a file with a name, which is deleted after the block."""
    is_name = PureWindowsPath(name).name == name != ".." and name.isprintable()
    if not is_name or len(name.encode()) > 200:
        raise UserError(f"{name[:80]!r} is not the name of a file")
    folder = workspace.cache / new_id()
    folder.mkdir()
    try:
        with (folder / name).open("wb") as file:
            async for chunk in request.stream():
                file.write(chunk)
        yield folder / name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _add_subjects(api: FastAPI, context: Context) -> None:
    workspace = context.workspace

    def stored(subject_id: object) -> RemoteSubject:
        subject = subjects.read_subject(workspace, subject_id)
        names = tuple(photo.name for photo in subject.photos)
        return RemoteSubject(subject.id, subject.title, subject.class_word, subject.token, names)

    @api.get("/subjects")
    def list_subjects() -> list[RemoteSubject]:
        """List the subjects, newest first."""
        return [stored(subject.id) for subject in subjects.subjects_in(workspace)]

    @api.post("/subjects", status_code=201)
    def make_subject(new: NewSubject) -> RemoteSubject:
        """Create a subject without photos."""
        title = clean_text(new.title, tasks.NAME_LIMIT, "name")
        if not title:
            raise UserError("give the new subject a name first")
        subject_id = subjects.new_subject(workspace, title)
        subjects.keep_words(workspace, subject_id, new.class_word, new.token)
        return stored(subject_id)

    @api.put("/subjects/{subject}/photos/{name}", responses=_MISSING)
    async def add_photo(subject: str, name: str, request: Request) -> RemoteSubject:
        """Add a photo, or a caption (named like its photo, ending in `.txt`), as the body."""
        await run_in_threadpool(workspace.subject, subject)
        async with _received(workspace, name, request) as file:
            added = await run_in_threadpool(subjects.add_photos, workspace, subject, [file])
        if added.refused:
            raise UserError(added.refused[0])
        return stored(subject)

    @api.delete("/subjects/{subject}", status_code=204, responses=_MISSING)
    def delete_subject(subject: str) -> None:
        """Delete a subject; runs keep their copies."""
        subjects.delete_subject(workspace, subject)


def _add_jobs(api: FastAPI, context: Context) -> None:
    workspace = context.workspace

    def now(job_id: str) -> RemoteJob:
        workspace.job(job_id)
        jobs = (job for job in context.queued() if job.id == job_id)
        return _shown(next(jobs, None) or context.job(job_id))

    @api.post("/trainings", status_code=201)
    def train(new: NewTraining) -> RemoteJob:
        """Append a training run to the queue."""
        config, learned = _training(context, new)
        return now(tasks.start_training(workspace, config, learned, new.name))

    @api.get("/jobs")
    def list_jobs() -> list[RemoteJob]:
        """List all jobs, newest first."""
        return [_shown(job) for job in context.jobs()]

    @api.get("/queue")
    def list_queue() -> list[RemoteJob]:
        """List the running job, then the waiting jobs in their order."""
        jobs = [job for job in context.jobs(fresh=True) if not job.has_ended]
        return [_shown(job) for job in sorted(jobs, key=lambda job: job.position)]

    @api.get("/jobs/{job}", responses=_MISSING)
    def show_job(job: str) -> RemoteJob:
        """Show the current state of a job."""
        return now(job)

    @api.get("/jobs/{job}/log", responses=_MISSING, response_class=PlainTextResponse)
    def show_log(job: str) -> str:
        """Show the last lines of a job's log."""
        return log_tail(workspace.job(job))

    @api.post("/jobs/{job}/stop", responses=_MISSING)
    def stop(job: str) -> RemoteJob:
        """Make a running job save and stop, or remove a waiting job from the queue."""
        stop_job(workspace.job(job))
        return now(job)

    @api.post("/jobs/{job}/resume", responses=_MISSING)
    def resume(job: str) -> RemoteJob:
        """Return an ended job to the queue; training resumes from the last checkpoint."""
        requeue_job(workspace.job(job))
        return now(job)

    @api.delete("/jobs/{job}", status_code=204, responses=_MISSING)
    def delete(job: str) -> None:
        """Delete a job with all its files."""
        delete_job(workspace, job)
        context.jobs(fresh=True)

    @api.post("/jobs/{job}/conversions", status_code=201, responses=_MISSING)
    def convert(job: str, new: NewConversion) -> RemoteJob:
        """Queue the conversion of a run's adapter for a program."""
        return now(tasks.start_conversion(workspace, context.job(job), new.program))


def _shown(job: Job) -> RemoteJob:
    return RemoteJob(
        id=job.id, kind=job.kind, title=job.title, state=job.shown_state,
        phase=job.progress.phase, step=job.step, total=job.total,
        remaining_seconds=job.remaining_seconds, cause=job.cause, position=job.position,
        owner=job.record.owner, is_mine=job.record.owner == PERSON.get(),
        checkpoints=job.checkpoints, samples=tuple(path.name for path in job.samples),
        has_adapter=adapter_of(job) is not None, trigger=job.trigger,
    )  # fmt: skip


def _training(context: Context, new: NewTraining) -> tuple[Any, list[subjects.StoredSubject]]:
    """Return the settings and subjects of a requested run.

    Raises:
        UserError, ConfigError: If the run cannot start with these settings.
    """
    requested = dict[str, Any]()
    for name, value in new.settings.items():
        if name not in (*ADVANCED, *PROMPTS, _MODEL, _SAMPLES):
            reserved = "is set by the app itself, or by a subject; leave it out"
            unknown = f"is not a setting{did_you_mean(name, SETTINGS)}"
            raise UserError(f"{name[:80]} {reserved if name in SETTINGS else unknown}")
        requested[name] = SETTINGS[name].cast(value)
    model = context.allowed_model(requested.pop(_MODEL, EMBEDDED))
    prompts = "\n".join(requested.pop(_SAMPLES, ()))
    values = preset_values(new.preset, model, context.device()) | requested
    texts = {name: setting_text(value) for name, value in values.items()}
    texts |= {name: "\n".join(requested.get(name, ())) for name in PROMPTS}
    learned = list[subjects.StoredSubject]()
    if values["teach"] != "slider":
        learned = context.learned(new.subjects)
    elif new.subjects:
        raise UserError("a slider learns from prompts alone; leave subjects out")
    token, word = (learned[0].token, learned[0].class_word) if learned else ("", "")
    config = context.run_config(model, learned, token, word, prompts, texts, ask_hub=True)
    return config, learned


def _add_files(api: FastAPI, context: Context) -> None:
    workspace = context.workspace
    options: dict[str, Any] = {"response_class": FileResponse, "responses": _MISSING}

    @api.get("/jobs/{job}/adapter", **options)
    def fetch_adapter(job: str, checkpoint: str = "") -> FileResponse:
        """Fetch the selected adapter of a run, or the adapter of a checkpoint."""
        from dora_diffusion.sampling.images import adapter_name

        path = chosen_adapter(context.job(job), checkpoint)
        return FileResponse(path, filename=f"{adapter_name(path)}{path.suffix}")

    @api.get("/jobs/{job}/samples/{name}", **options)
    def fetch_sample(job: str, name: str) -> FileResponse:
        """Fetch a sample image of a run."""
        samples = {path.name: path for path in context.job(job).samples}
        if name not in samples:
            raise MissingError("this file no longer exists; choose another one")
        return FileResponse(samples[name])

    @api.get("/jobs/{job}/output", **options)
    def fetch_output(job: str) -> FileResponse:
        """Fetch the output file of a job, such as a conversion."""
        path = Path(context.job(job).record.output)
        if not path.is_file() or workspace.exports.resolve() not in path.resolve().parents:
            raise MissingError("this job has made no file; wait until it is done")
        return FileResponse(path, filename=path.name)

    @api.get("/images/{name}", **options)
    def fetch_image(name: str) -> FileResponse:
        """Fetch a generated image, with its generation parameters."""
        return FileResponse(confined(workspace.images, name))


def _form(new: NewImages) -> dict[str, Any]:
    """Convert settings of ``generate`` to fields of the Generate tab."""
    known = {setting.name: setting for setting in GenerateSettings.settings()}
    form, offered = {**UNSET, "prompt": new.prompt}, UNSET.keys() - {"prompt"}
    for name, value in new.settings.items():
        if name not in offered:
            raise UserError(f"{name[:80]} is not a setting of images{did_you_mean(name, offered)}")
        # Each further adapter has its own field, chosen like the first one.
        like = name if name in known else name.partition("_")[0].replace("adapter", "prompt")
        setting = dataclasses.replace(known[like], name=name)
        if value is not None:
            cast = setting.cast(value)
            setting.check(cast)
            form[name] = shown_value(name, cast)
    return form


def _add_images(api: FastAPI, context: Context) -> None:
    waiting = threading.Semaphore(MOST_WAITING)

    @api.put("/inputs/{name}", status_code=201)
    async def add_input(name: str, request: Request) -> NewInput:
        """Add an input image or mask, as the body. Settings of images refer to it by its name."""
        async with _received(context.workspace, name, request) as file:
            image = await run_in_threadpool(open_photo, file)
            return NewInput(await run_in_threadpool(inputs.keep_input, context.workspace, image))

    @api.post("/images", status_code=201)
    def generate(new: NewImages) -> list[RemoteImage]:
        """Generate images; they wait until no job runs."""
        request = make_request(context, new.model, _form(new))
        if not waiting.acquire(blocking=False):
            raise BusyError(f"{MOST_WAITING} requests for images wait already; try again later")
        try:
            images = context.generator.make(request)
        finally:
            waiting.release()
        return [RemoteImage(i.path.name, i.seed, i.parameters, i.notes) for i in images]


def _add_prompt_files(api: FastAPI, context: Context) -> None:
    workspace = context.workspace

    @api.get("/prompt-files")
    def list_prompt_files() -> list[RemotePromptFile]:
        """List the files of styles and wildcards, with the names in each."""
        return inputs.list_prompt_files(workspace)

    @api.put("/prompt-files/{name}")
    async def keep_prompt_file(name: str, request: Request) -> RemotePromptFile:
        """Store wildcards (`.txt`) or styles (`.csv`, replacing earlier ones), as the body."""
        async with _received(workspace, name, request) as file:
            (stored,) = await run_in_threadpool(inputs.keep_prompt_files, workspace, [file])
        return stored

    @api.delete("/prompt-files/{name:path}", status_code=204, responses=_MISSING)
    def delete_prompt_file(name: str) -> None:
        """Delete a file of styles or wildcards."""
        inputs.delete_prompt_file(workspace, name)
