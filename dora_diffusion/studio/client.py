"""Client of the app's HTTP API, and what the API answers.

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
    """Error that the app answered with: its line, and ``status``, the HTTP status."""

    def __init__(self, status: int, line: str) -> None:
        super().__init__(line)
        self.status = status


@dataclass(frozen=True)
class RemoteSubject:
    """A subject: photos with their captions. A style has neither ``class_word`` nor ``token``.

    Attributes:
        photos: Names of its photos.
        refused: A line for each file of this upload that was not taken.
    """

    id: str
    title: str
    class_word: str
    token: str
    photos: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()


@dataclass(frozen=True)
class RemoteJob:
    """A job as the app shows it: a training run, or what is made of one.

    Attributes:
        kind: The command that runs: ``train``, ``convert`` and others.
        state: ``waiting``, ``running``, ``stopping``, ``done``, ``stopped``, ``failed``,
            ``crashed``, or ``damaged``.
        phase: What it is doing.
        step: Steps done, or how much is done in a unit of its own.
        total: As ``step``, in all; 0 while that is unknown.
        remaining_seconds: Time left at the measured pace; None if unknown.
        cause: Why it failed, with what to do.
        position: Place in the queue from 1; 0 when it does not wait.
        owner: Who asked for it; empty where the app has no logins.
        is_mine: Whether that is who asks now.
        checkpoints: Names of its complete checkpoints, oldest first.
        samples: Names of its sample images.
        has_adapter: Whether an adapter can be fetched.
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
        """True if it neither waits nor runs."""
        return self.state not in ("waiting", "running", "stopping")


@dataclass(frozen=True)
class RemoteImage:
    """A generated image: its file's name, its seed, how it was made, and what had no effect."""

    name: str
    seed: int
    parameters: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RemotePromptFile:
    """A file of styles, or of wildcards.

    Attributes:
        name: ``styles.csv``, or a name such as ``colours.txt``.
        names: Of its styles, or of the wildcard as a prompt has it: ``__colours__``.
        problem: Why nothing of it can be used.
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
        subjects: Ids of the subjects that are learned in one run; none of a slider.
        name: What it is called; by default its subjects and the time.
        preset: Values of all settings that are not given.
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
        prompt: What to show; ``{subject}`` becomes the run's trigger words.
        settings: Settings of ``generate`` that the Generate tab has, by name; further adapters are
            ``adapter_second``, ``strength_second`` and so on.
    """

    __pydantic_config__ = _STRICT
    model: str
    prompt: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NewInput:
    """The name of an uploaded image, for the settings ``image`` and ``mask_image``."""

    name: str


@dataclass(frozen=True)
class NewConversion:
    """Request for a run's adapter as a program needs it: a name that ``convert --to`` takes."""

    __pydantic_config__ = _STRICT
    program: str


class Client:
    """Client of an app that runs, here or elsewhere.

    Args:
        url: Where the app is, as its page: ``http://localhost:7860``.
        auth: Name and password, where the app asks for them.
        timeout: Seconds until an answer begins. Images wait for a job's end: None waits for ever.
        http: What sends the requests, in place of a connection of its own.

    Raises:
        ApiError: By every method, if the app refuses, with its line and status.
        httpx.HTTPError: By every method, if the app cannot be reached.
        UserError: By every method that is given a path, before anything is sent, if there is no
            file that can be read, or none can be written.
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
        """Make a subject of photos, with the captions (``.txt``) that lie beside them.

        Returns:
            The subject; ``refused`` says which files were not taken.

        Raises:
            ApiError: If none was; then no subject is left.
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
            ApiError: If none of them was taken.
        """
        return self._add_photos(subject_id, _readable(files))

    def _add_photos(self, subject_id: str, paths: Sequence[Path]) -> RemoteSubject:
        refused = list[ApiError]()
        subject: RemoteSubject | None = None
        # A caption is that of a photo which is there.
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
        """All subjects, newest first."""
        return self._ask("GET", "subjects", list[RemoteSubject])

    def delete_subject(self, subject_id: str) -> None:
        """Delete a subject; runs keep what they have of it."""
        self._send("DELETE", f"subjects/{subject_id}")

    def train(
        self,
        subjects: Sequence[str],
        settings: Mapping[str, Any] | None = None,
        preset: str = "balanced",
        name: str = "",
    ) -> RemoteJob:
        """Append a training run to the queue; see `NewTraining`."""
        new = {"subjects": [*subjects], "name": name, "preset": preset, "settings": settings or {}}
        return self._ask("POST", "trainings", RemoteJob, json=new)

    def convert(self, job_id: str, program: str) -> RemoteJob:
        """Append to the queue: write a run's adapter as a program needs it."""
        address = f"jobs/{job_id}/conversions"
        return self._ask("POST", address, RemoteJob, json={"program": program})

    def jobs(self) -> list[RemoteJob]:
        """All jobs, newest first."""
        return self._ask("GET", "jobs", list[RemoteJob])

    def queue(self) -> list[RemoteJob]:
        """The job that runs, then those that wait, in the order of their turns."""
        return self._ask("GET", "queue", list[RemoteJob])

    def job(self, job_id: str) -> RemoteJob:
        """A job as it is now."""
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
            on_change: Called with the job each time that it is another.
            period: Seconds between two looks.

        Returns:
            The job; it is done.

        Raises:
            ApiError: If it failed, crashed or was stopped, with the cause; its status is 0.
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
        """Ask a running job to save and leave; remove a waiting one from the queue."""
        return self._ask("POST", f"jobs/{job_id}/stop", RemoteJob)

    def resume(self, job_id: str) -> RemoteJob:
        """Return a job that ended to the queue."""
        return self._ask("POST", f"jobs/{job_id}/resume", RemoteJob)

    def delete(self, job_id: str) -> None:
        """Delete a job with everything it made."""
        self._send("DELETE", f"jobs/{job_id}")

    def log(self, job_id: str) -> str:
        """The last lines that a job printed."""
        return self._send("GET", f"jobs/{job_id}/log").text

    def generate(
        self, model: str, prompt: str, settings: Mapping[str, Any] | None = None
    ) -> list[RemoteImage]:
        """Images; they wait for a job that runs. See `NewImages`."""
        new = {"model": model, "prompt": prompt, "settings": settings or {}}
        return self._ask("POST", "images", list[RemoteImage], json=new)

    def upload_input(self, file: str | Path) -> str:
        """Upload an image to start from, or a mask; its name is for ``image``, ``mask_image``."""
        return self._upload("inputs", _readable(file)[0], NewInput).name

    def upload_prompt_file(self, file: str | Path) -> RemotePromptFile:
        """Upload styles (``.csv``), which replace those before, or wildcards (``.txt``)."""
        return self._upload("prompt-files", _readable(file)[0], RemotePromptFile)

    def prompt_files(self) -> list[RemotePromptFile]:
        """All files of styles and wildcards."""
        return self._ask("GET", "prompt-files", list[RemotePromptFile])

    def delete_prompt_file(self, name: str) -> None:
        """Delete a file of styles or wildcards."""
        self._send("DELETE", f"prompt-files/{quote(name, safe='')}")

    def fetch_image(self, name: str, output: str | Path) -> Path:
        """Write a generated image to a file, bit for bit."""
        return self._fetch(f"images/{quote(name, safe='')}", output)

    def fetch_sample(self, job_id: str, name: str, output: str | Path) -> Path:
        """Write a sample image of a run to a file."""
        return self._fetch(f"jobs/{job_id}/samples/{quote(name, safe='')}", output)

    def fetch_adapter(self, job_id: str, output: str | Path, checkpoint: str = "") -> Path:
        """Write the adapter of a run, or of one of its checkpoints, to a file."""
        more = f"?checkpoint={quote(checkpoint, safe='')}" if checkpoint else ""
        return self._fetch(f"jobs/{job_id}/adapter{more}", output)

    def fetch_output(self, job_id: str, output: str | Path) -> Path:
        """Write the file that a job has made, such as a conversion, to a file."""
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
    """The paths of one file or several, all of which can be read.

    Raises:
        UserError: If one cannot, or there is none.
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
