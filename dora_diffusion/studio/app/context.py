"""Shared context of the tabs: folders, queue, the model in memory, and the display of errors."""

from __future__ import annotations

import functools
import html
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from dora_diffusion.cli.console.errors import asking_for_report, explain, explain_to_all
from dora_diffusion.config import TrainConfig
from dora_diffusion.data.images import PhotoError
from dora_diffusion.models.memory import Device, describe_device
from dora_diffusion.studio.app.launch import Launch
from dora_diffusion.studio.app.settings import (
    ADVANCED,
    EMBEDDED,
    EMBEDDED_MODELS,
    LABELS,
    SETTINGS,
    make_config,
    sentence,
)
from dora_diffusion.studio.jobs.bases import (
    Base,
    bases,
    check_model,
    named_bases,
)
from dora_diffusion.studio.jobs.image_generator import ImageGenerator
from dora_diffusion.studio.jobs.image_store import ImageStore
from dora_diffusion.studio.jobs.queue import PERSON, JobQueue
from dora_diffusion.studio.jobs.snapshot import Job, adapter_of, chosen_adapter, read_run, snapshot
from dora_diffusion.studio.jobs.store import (
    GONE,
    MissingError,
    UserError,
    Withdrawn,
    Workspace,
    ids_in,
)
from dora_diffusion.studio.jobs.subjects import StoredSubject, read_subject, uses_masks
from dora_diffusion.training.inputs.subject import subjects_of, token_messages

Handler = TypeVar("Handler", bound=Callable[..., Any])
_FRESH_SECONDS = 0.8


class Context:
    """The app's state in memory, none of which needs to survive a restart."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        # Absolute, because jobs store paths and may resume from another working directory.
        self.workspace = Workspace(launch.runs_dir.resolve()).make()
        self.generator = ImageGenerator(self.workspace)
        self.images = ImageStore(self.workspace)
        self.queue = JobQueue(self.workspace, before_start=self.generator.release)
        self._lock = threading.Lock()
        self._jobs: tuple[Job, ...] = ()
        self._read_at = -1e9

    def jobs(self, *, fresh: bool = False) -> tuple[Job, ...]:
        """Return all jobs. Pages that refresh within a second share one read of the disk."""
        with self._lock:
            if fresh or time.monotonic() - self._read_at > _FRESH_SECONDS:
                self._jobs = snapshot(self.workspace.root)
                self._read_at = time.monotonic()
            return self._jobs

    def queued(self) -> tuple[Job, ...]:
        """Return all jobs after the queue has started the next one, if it can."""
        self.queue.tick()
        return self.jobs(fresh=True)

    def job(self, job_id: object, field: str = "") -> Job:
        """Read a job, see `read_run`. An error begins with the label of the job's ``field``."""
        try:
            return read_run(self.workspace, job_id)
        except MissingError as error:
            raise MissingError(f"{field}: {error}" if field else str(error)) from error

    @property
    def models(self) -> list[str]:
        """Base models that may be used by name, downloaded or not."""
        return [*dict.fromkeys((*EMBEDDED_MODELS, *self.launch.models))]

    def bases(self) -> list[Base]:
        """Return the base models to offer. A shared app does not offer models found on disk."""
        if self.launch.is_open:
            return named_bases(self.launch.models)
        return bases(self.workspace.root, self.launch.models, self.launch.model_folders)

    def device(self) -> Device:
        """Return the device for training, with its free memory."""
        return describe_device()

    def allowed_model(self, name: object) -> str:
        """Return a base model's name if it may be loaded.

        Raises:
            UserError: If the app is shared and the model is not on its list.
        """
        model = str(name or "").strip() or EMBEDDED
        if model == GONE:
            raise UserError("the base model that was chosen is no longer here; choose another one")
        if not self.launch.allows_model(model):
            raise UserError(
                f"this app is shared, and offers only {', '.join(self.models)}; its operator "
                "can add models with --models"
            )
        return model

    def starting_adapter(self, choice: object) -> str:
        """Return a run's adapter if ``choice`` is an id, else ``choice`` itself, such as a file."""
        name = str(choice or "").strip()
        is_run = name == GONE or name in ids_in(self.workspace.root)
        return str(chosen_adapter(self.job(name, LABELS["init_adapter"]))) if is_run else name

    def learned(self, ids: Sequence[object], words: str | None = None) -> list[StoredSubject]:
        """Return the subjects of a run by their ids.

        Args:
            ids: Ids, the main subject first; empty if there is no subject yet.
            words: Token and class of the main subject, empty for a style. Default: the stored ones.

        Raises:
            UserError: If a subject does not exist, or the first has no photos or lacks captions.
        """
        if not ids or not ids[0]:
            raise UserError(
                "there is no subject yet: add photos in the Subject tab, or take a sample"
            )
        learned = [read_subject(self.workspace, subject_id) for subject_id in ids]
        photos = learned[0].photos
        if not photos:
            raise UserError("the subject has no photos yet; add some in the Subject tab")
        if words is None:
            words = learned[0].token + learned[0].class_word
        if not words.strip() and not all(photo.with_suffix(".txt").is_file() for photo in photos):
            raise UserError(
                "the token must be one rare word, such as sks; a style needs neither token nor "
                "class, but a caption for every image"
            )
        return learned

    def run_config(
        self, model: Any, learned: Sequence[StoredSubject], token: Any, class_word: Any,
        prompts: str, advanced: Mapping[str, Any], *, ask_hub: bool = False,
    ) -> TrainConfig:  # fmt: skip
        """Return the settings of a run, checked as far as possible before it starts.

        Args:
            model: Base model.
            learned: Subjects to learn; empty for a slider.
            token: Token of the first subject.
            class_word: Class of the first subject.
            prompts: Prompts of the sample images, one per line.
            advanced: Values by setting name, see `make_config`.
            ask_hub: Query the hub for models that are not on this machine, and check that no photo
                belongs to two subjects.

        Raises:
            UserError, ConfigError: If the run cannot start with these settings.
        """
        masked = [uses_masks(subject, advanced["masked_loss"]) for subject in learned]
        masked = masked or [advanced["masked_loss"]]
        entries = [
            {"instance_data_dir": str(subject.folder), "token": subject.token,
             "class_word": subject.class_word,
             **({} if is_masked is masked[0] else {"masked_loss": is_masked})}
            for subject, is_masked in zip(learned[1:], masked[1:], strict=True)
        ]  # fmt: skip
        config = make_config(
            self.allowed_model(model), learned[0].folder if learned else Path(),
            self.workspace.root / "new-run", token, class_word, prompts.splitlines()[:8],
            {
                **advanced,
                "init_adapter": self.starting_adapter(advanced["init_adapter"]),
                # A painted mask implies masked_loss, for the photos of its subject.
                "masked_loss": masked[0],
            },
            entries,
        )  # fmt: skip
        self.check_paths(config)
        check_model(config, ask_hub=ask_hub)
        config.with_sample_prompts()  # which checks them
        # The worker would refuse a subject without a name. Sample prompts are checked in the plan.
        named = subjects_of(replace(config, validation_prompt=[]))
        if ask_hub:  # Not at each change of a field: this reads all photos of all subjects.
            token_messages(named)  # Captions must contain the token of the field.
            from dora_diffusion.training.inputs.dataset import list_subjects

            try:
                list_subjects(named)
            except PhotoError as error:
                line = str(error).removesuffix(" with --instance_data_dir")
                for subject in learned:
                    for path in (subject.folder.absolute(), subject.folder):
                        line = line.replace(str(path), subject.title)
                raise UserError(line) from error
        return config

    def check_paths(self, config: TrainConfig) -> None:
        """Check that a shared app only uses the models and folders from its command line.

        Raises:
            UserError: If the app is shared and a setting is another model or folder.
        """
        if not self.launch.is_open:
            return
        models = ("pretrained_vae_model_name_or_path", "sample_model")
        for name in models:
            if model := getattr(config, name):
                self.allowed_model(model)
        if config.report_to == "wandb":
            raise UserError(
                "a shared app does not report to wandb, because that would use its operator's "
                "account; choose tensorboard or none for report_to"
            )
        named = {name: getattr(config, name) for name in ADVANCED if SETTINGS[name].is_path}
        for name in models:
            del named[name]
        if named["init_adapter"] in [str(adapter_of(job)) for job in self.jobs()]:
            del named["init_adapter"]
        for name, value in named.items():
            if value:
                raise UserError(
                    f"this app is shared, and accepts no folder for {name}; leave it empty"
                )


@contextmanager
def errors_as_lines(written: Callable[[str], str]) -> Iterator[None]:
    """Raise each error of the block as one plain line; ``written`` makes it safe to show.

    Unexpected errors print their traceback on the server. `PERSON` is the logged-in user.
    """
    import gradio as gr
    from gradio.context import LocalContext

    PERSON.set(getattr(LocalContext.request.get(None), "username", None) or "")
    try:
        yield
    except gr.Error:
        raise
    except Exception as error:
        line = explain_to_all(error, "generate")
        if explain(error)[1] is None:
            traceback.print_exc(file=sys.stderr)
            print(f"error: {asking_for_report(error)}", file=sys.stderr)
        raise gr.Error(
            written(sentence(line)), title="That did not work", print_exception=False
        ) from None


def plain(handler: Handler) -> Handler:
    """Wrap a handler of the page, see `errors_as_lines`. A cancelled request changes nothing."""

    @functools.wraps(handler)
    def run(*args: Any, **kwargs: Any) -> Any:
        import gradio as gr

        with errors_as_lines(html.escape):
            try:
                return handler(*args, **kwargs)
            except Withdrawn as end:
                gr.Info(html.escape(sentence(str(end))), title="")
                return gr.skip()

    return run  # type: ignore[return-value]
