"""Client of the app's HTTP API, and the API's requests and responses.

from dora_diffusion.studio.client import Client

with Client("http://localhost:7860", ("ann", "PASSWORD")) as app:
    subject = app.upload("Rex", ["rex-1.jpg", "rex-2.jpg"], class_word="dog")
    run = app.wait(app.train([subject.id], settings={"max_train_steps": 200}).id)
    image, *_ = app.generate(run.id, "a photo of a {subject} at night", {"seed": 7})
    app.fetch_image(image.name, "night.png")
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from pydantic import ConfigDict, TypeAdapter

from dora_diffusion.cli.console.errors import explain
from dora_diffusion.formats.files.atomic import atomic_file, require_writable
from dora_diffusion.studio.jobs.store import UserError

ROOT = "/api/v1"
Answer = TypeVar("Answer")
_STRICT = ConfigDict(extra="forbid")


class ApiError(ValueError):
    """Error response of the app, with ``status``, the HTTP status."""

    def __init__(self, status: int, line: str) -> None:
        super().__init__(line)
        self.status = status


@dataclass(frozen=True)
class RemoteSubject:
    """A subject: photos with their captions. A style has neither ``class_word`` nor ``token``.

    Attributes:
        photos: Names of the photos.
        refused: A line for each refused file of an upload.
    """

    id: str
    title: str
    class_word: str
    token: str
    photos: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()


@dataclass(frozen=True)
class RemoteJob:
    """A job: a training run, or a command that processes one.

    Attributes:
        kind: The command, such as ``train`` or ``convert``.
        state: ``waiting``, ``running``, ``stopping``, ``done``, ``stopped``, ``failed``,
            ``crashed``, or ``damaged``.
        phase: Current phase.
        step: Steps done, or a count in the job's own unit.
        total: Number of steps, or total of that count; 0 while unknown.
        remaining_seconds: Time left at the measured pace; None if unknown.
        cause: Reason of a failure, with the fix.
        position: Position in the queue from 1; 0 if the job does not wait.
        owner: Name of the user who queued the job; empty if the app has no logins.
        is_mine: True if the owner is the client's user.
        checkpoints: Names of complete checkpoints, oldest first.
        samples: Names of sample images.
        has_adapter: True if an adapter can be fetched.
        trigger: Trigger words.
    """

    id: str
    kind: str
    title: str
    state: str
    phase: str = ""
    step: int = 0
    total: int = 0
    remaining_seconds: float | None = None
    cause: str = ""
    position: int = 0
    owner: str = ""
    is_mine: bool = True
    checkpoints: tuple[str, ...] = ()
    samples: tuple[str, ...] = ()
    has_adapter: bool = False
    trigger: str = ""

    @property
    def has_ended(self) -> bool:
        """True if the job neither waits nor runs."""
        return self.state not in ("waiting", "running", "stopping")


@dataclass(frozen=True)
class RemoteImage:
    """A generated image: file name, seed, generation parameters, and notes on problems."""

    name: str
    seed: int
    parameters: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RemotePromptFile:
    """A file of styles, or of wildcards.

    Attributes:
        name: ``styles.csv``, or a name such as ``colours.txt``.
        names: Names of the styles, or the wildcard as written in prompts: ``__colours__``.
        problem: Reason why the file cannot be used.
    """

    name: str
    names: tuple[str, ...]
    problem: str = ""


@dataclass(frozen=True)
class NewSubject:
    """Request for a subject."""

    __pydantic_config__ = _STRICT
    title: str
    class_word: str = ""
    token: str = "sks"


@dataclass(frozen=True)
class NewTraining:
    """Request for a training run.

    Attributes:
        subjects: Ids of the subjects to learn in one run; empty for a slider.
        name: Name of the run. Default: its subjects and the time.
        preset: Preset for all settings that are not in ``settings``.
        settings: Settings of ``train`` by name.
    """

    __pydantic_config__ = _STRICT
    subjects: list[str] = field(default_factory=list)
    name: str = ""
    preset: str = "balanced"
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NewImages:
    """Request for images.

    Attributes:
        model: A run's id, ``RUN/CHECKPOINT``, ``merged/JOB`` or ``base/MODEL``.
        prompt: Prompt; ``{subject}`` is replaced by the run's trigger words.
        settings: Settings of ``generate`` by name, as far as the Generate tab has them. Further
            adapters are ``adapter_second``, ``strength_second`` and so on.
    """

    __pydantic_config__ = _STRICT
    model: str
    prompt: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NewInput:
    """Name of an uploaded image, for the settings ``image`` and ``mask_image``."""

    name: str


@dataclass(frozen=True)
class NewConversion:
    """Request for the conversion of a run's adapter; ``program`` is a value of ``convert --to``."""

    __pydantic_config__ = _STRICT
    program: str


class Client:
    """Client of a running app, local or remote.

    Args:
        url: URL of the app's page: ``http://localhost:7860``.
        auth: Name and password, if the app has logins.
        timeout: Seconds until a response begins. Default: no limit, because images may wait for a
            job.
        http: HTTP client to use instead of a new one.

    Raises:
        ApiError: From all methods, if the app refuses a request, with its line and status.
        httpx.HTTPError: From all methods, if the app cannot be reached.
        UserError: From methods with a path, before any request, if a file cannot be read or
            written.
    """

    def __init__(
        self,
        url: str,
        auth: tuple[str, str] | None = None,
        timeout: float | None = None,
        http: httpx.Client | None = None,
    ) -> None:
        self._http = http or httpx.Client(timeout=httpx.Timeout(timeout, connect=10))
        self._root, self._auth = url.rstrip("/") + ROOT, auth

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def upload(
        self,
        title: str,
        files: str | Path | Sequence[str | Path],
        class_word: str = "",
        token: str = "sks",
    ) -> RemoteSubject:
        """Create a subject from photos and their captions (``.txt``).

        Returns:
            The subject, with the refused files in ``refused``.

        Raises:
            ApiError: If all files were refused; then no subject is created.
        """
        paths = _readable(files)
        new = {"title": title, "class_word": class_word, "token": token}
        subject = self._ask("POST", "subjects", RemoteSubject, json=new)
        try:
            return self._add_photos(subject.id, paths)
        except BaseException:
            self.delete_subject(subject.id)
            raise

    def add_photos(
        self, subject_id: str, files: str | Path | Sequence[str | Path]
    ) -> RemoteSubject:
        """Add photos and captions to a subject, one request each.

        Raises:
            ApiError: If all files were refused.
        """
        return self._add_photos(subject_id, _readable(files))

    def _add_photos(self, subject_id: str, paths: Sequence[Path]) -> RemoteSubject:
        refused = list[ApiError]()
        subject: RemoteSubject | None = None
        # Photos first: a caption needs its photo.
        for path in sorted(paths, key=lambda path: path.suffix == ".txt"):
            try:
                subject = self._upload(f"subjects/{subject_id}/photos", path, RemoteSubject)
            except ApiError as error:
                if error.status not in (413, 422):
                    raise
                line = str(error) if path.name in str(error) else f"{path.name}: {error}"
                refused.append(ApiError(error.status, line))
        lines = tuple(map(str, refused))
        if subject is None:
            raise refused[0]
        return replace(subject, refused=lines)

    def subjects(self) -> list[RemoteSubject]:
        """Return all subjects, newest first."""
        return self._ask("GET", "subjects", list[RemoteSubject])

    def delete_subject(self, subject_id: str) -> None:
        """Delete a subject; runs keep their copies."""
        self._send("DELETE", f"subjects/{subject_id}")

    def train(
        self,
        subjects: Sequence[str],
        settings: Mapping[str, Any] | None = None,
        preset: str = "balanced",
        name: str = "",
    ) -> RemoteJob:
        """Queue a training run, see `NewTraining`."""
        new = {"subjects": [*subjects], "name": name, "preset": preset, "settings": settings or {}}
        return self._ask("POST", "trainings", RemoteJob, json=new)

    def convert(self, job_id: str, program: str) -> RemoteJob:
        """Queue the conversion of a run's adapter for a program."""
        address = f"jobs/{job_id}/conversions"
        return self._ask("POST", address, RemoteJob, json={"program": program})

    def jobs(self) -> list[RemoteJob]:
        """Return all jobs, newest first."""
        return self._ask("GET", "jobs", list[RemoteJob])

    def queue(self) -> list[RemoteJob]:
        """Return the running job, then the waiting jobs in their order."""
        return self._ask("GET", "queue", list[RemoteJob])

    def job(self, job_id: str) -> RemoteJob:
        """Return the current state of a job."""
        return self._ask("GET", f"jobs/{job_id}", RemoteJob)

    def wait(
        self,
        job_id: str,
        on_change: Callable[[RemoteJob], None] = lambda job: None,
        period: float = 2.0,
    ) -> RemoteJob:
        """Poll a job until it has ended.

        Args:
            job_id: The job.
            on_change: Called with the job whenever it has changed.
            period: Seconds between two requests.

        Returns:
            The finished job.

        Raises:
            ApiError: If the job failed, crashed or was stopped, with the cause and status 0.
        """
        last = None
        while True:
            job = self.job(job_id)
            if job != last:
                on_change(job)
            if job.state == "done":
                return job
            if job.has_ended:
                raise ApiError(0, f"{job.title} is {job.state}{job.cause and ': '}{job.cause}")
            last = job
            time.sleep(period)

    def stop(self, job_id: str) -> RemoteJob:
        """Make a running job save and stop, or remove a waiting job from the queue."""
        return self._ask("POST", f"jobs/{job_id}/stop", RemoteJob)

    def resume(self, job_id: str) -> RemoteJob:
        """Return an ended job to the queue."""
        return self._ask("POST", f"jobs/{job_id}/resume", RemoteJob)

    def delete(self, job_id: str) -> None:
        """Delete a job with all its files."""
        self._send("DELETE", f"jobs/{job_id}")

    def log(self, job_id: str) -> str:
        """Return the last lines of a job's log."""
        return self._send("GET", f"jobs/{job_id}/log").text

    def generate(
        self, model: str, prompt: str, settings: Mapping[str, Any] | None = None
    ) -> list[RemoteImage]:
        """Generate images, see `NewImages`. They wait for a running job."""
        new = {"model": model, "prompt": prompt, "settings": settings or {}}
        return self._ask("POST", "images", list[RemoteImage], json=new)

    def upload_input(self, file: str | Path) -> str:
        """Upload an input image or mask. Returns its name for ``image`` or ``mask_image``."""
        return self._upload("inputs", _readable(file)[0], NewInput).name

    def upload_prompt_file(self, file: str | Path) -> RemotePromptFile:
        """Upload styles (``.csv``, replacing earlier ones) or wildcards (``.txt``)."""
        return self._upload("prompt-files", _readable(file)[0], RemotePromptFile)

    def prompt_files(self) -> list[RemotePromptFile]:
        """Return all files of styles and wildcards."""
        return self._ask("GET", "prompt-files", list[RemotePromptFile])

    def delete_prompt_file(self, name: str) -> None:
        """Delete a file of styles or wildcards."""
        self._send("DELETE", f"prompt-files/{quote(name, safe='')}")

    def fetch_image(self, name: str, output: str | Path) -> Path:
        """Download a generated image, bit for bit."""
        return self._fetch(f"images/{quote(name, safe='')}", output)

    def fetch_sample(self, job_id: str, name: str, output: str | Path) -> Path:
        """Download a sample image of a run."""
        return self._fetch(f"jobs/{job_id}/samples/{quote(name, safe='')}", output)

    def fetch_adapter(self, job_id: str, output: str | Path, checkpoint: str = "") -> Path:
        """Download the adapter of a run, or of one of its checkpoints."""
        more = f"?checkpoint={quote(checkpoint, safe='')}" if checkpoint else ""
        return self._fetch(f"jobs/{job_id}/adapter{more}", output)

    def fetch_output(self, job_id: str, output: str | Path) -> Path:
        """Download the output file of a job, such as a conversion."""
        return self._fetch(f"jobs/{job_id}/output", output)

    def _fetch(self, address: str, output: str | Path) -> Path:
        path = Path(output).expanduser()
        try:
            require_writable(path)
            content = self._send("GET", address).content
            with atomic_file(path) as temporary:
                temporary.write_bytes(content)
        except OSError as error:
            raise _file_error(error) from error
        return path

    def _upload(self, address: str, path: Path, kind: type[Answer]) -> Answer:
        name = quote(path.name, safe="")
        return self._ask("PUT", f"{address}/{name}", kind, content=path.read_bytes())

    def _ask(self, method: str, address: str, kind: type[Answer], **body: Any) -> Answer:
        return TypeAdapter(kind).validate_json(self._send(method, address, **body).content)

    def _send(self, method: str, address: str, **body: Any) -> httpx.Response:
        answer = self._http.request(method, f"{self._root}/{address}", auth=self._auth, **body)
        if answer.is_success:
            return answer
        try:
            line = str(answer.json()["detail"])
        except (ValueError, KeyError, TypeError):
            line = answer.text.strip()[:300] or answer.reason_phrase
        raise ApiError(answer.status_code, line)


def _readable(files: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the paths of one file or several, after checking that they can be read.

    Raises:
        UserError: If a file cannot be read, or there are no files.
    """
    paths = [Path(f).expanduser() for f in ([files] if isinstance(files, (str, Path)) else files)]
    if not paths:
        raise UserError("no files were given")
    for path in paths:
        if path.is_dir():
            raise UserError(f"{path} is a folder; give the files in it")
        try:
            path.open("rb").close()
        except OSError as error:
            raise _file_error(error) from error
    return paths


def _file_error(error: OSError) -> UserError:
    return UserError(explain(error)[1] or str(error))
