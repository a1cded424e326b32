"""Requests of clients, and one base model in memory that answers a batch of them."""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pydantic
from pydantic import Field, field_validator

from dora_diffusion.cli.console.errors import explain, explain_to_all, is_out_of_memory
from dora_diffusion.config.base import AnyModel, BaseModel
from dora_diffusion.config.run import SampleSettings
from dora_diffusion.models.schedulers import SCHEDULERS

if TYPE_CHECKING:
    from dora_diffusion.sampling.pool import AdapterPool
    from dora_diffusion.sampling.settings import ImageRow, SamplingSettings

MAX_STEPS, MAX_SIDE = 200, 2048
# What requests of one batch have each for itself.
_OWN = {"prompt", "adapter", "strength", "seed"}


class ApiAnswer(NamedTuple):
    """A PNG that says how it was made, its seed, and what of the request had no effect."""

    png: bytes
    seed: int
    notes: tuple[str, ...] = ()


class Refusal(Exception):
    """A request that is not answered with an image.

    Args:
        status: The HTTP status.
        line: Why, in one line.
        headers: Of the answer.
        defect: A traceback for the server's log.
    """

    def __init__(
        self, status: int, line: str, headers: dict[str, str] | None = None, defect: str = ""
    ) -> None:
        super().__init__(status, line, headers, defect)
        self.status, self.line, self.headers, self.defect = status, line, headers, defect


def refusal_of(error: Exception, file: Path | None) -> Refusal:
    """One line for whoever asked, without the server's folders; 422 where the request is at fault.

    Defects, and memory that ran out, are 500.
    """
    line = explain(error)[1]
    if line is None or is_out_of_memory(error):
        return Refusal(
            500, explain_to_all(error), defect="".join(traceback.format_exception(error))
        )
    return Refusal(422, line.replace(f"{file.parent}{os.sep}", "") if file else line)


class ApiRequest(pydantic.BaseModel):
    """One image."""

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, strict=True
    )

    prompt: str = Field(min_length=1, max_length=4000, examples=["a photo of a sks dog"])
    adapter: str | None = Field(
        None, max_length=255, description="A name that /v1/adapters lists; null is the base model."
    )
    strength: float = Field(1.0, ge=-3, le=3, description="Adapter strength; 0 is the base.")
    seed: int | None = Field(None, ge=0, lt=2**63, description="null draws one.")
    negative_prompt: str = Field("", max_length=4000)
    steps: int = Field(SampleSettings.validation_inference_steps, ge=1, le=MAX_STEPS)
    guidance_scale: float = Field(SampleSettings.validation_guidance_scale, ge=0, le=100)
    guidance_rescale: float = Field(0.0, ge=0, le=1)
    scheduler: str | None = Field(
        None,
        description="null is the model's own.",
        json_schema_extra={"enum": [None, *SCHEDULERS]},
    )
    width: int | None = Field(None, ge=64, le=MAX_SIDE, multiple_of=8)
    height: int | None = Field(None, ge=64, le=MAX_SIDE, multiple_of=8)

    @field_validator("scheduler")
    @classmethod
    def _is_known(cls, name: str | None) -> str | None:
        if name is not None and name not in SCHEDULERS:
            raise ValueError(f"it must be one of {', '.join(SCHEDULERS)}")
        return name

    def shared(self) -> Hashable:
        """Return the settings that all requests of a batch share."""
        return tuple(self.model_dump(exclude=_OWN).values())

    def settings(self) -> SamplingSettings:
        """Return the sampling settings of the request."""
        from dora_diffusion.sampling.settings import SamplingSettings

        return SamplingSettings(**self.model_dump(exclude=_OWN))


class BatchItem(NamedTuple):
    """A request, with the seed that it gets and the file of its adapter."""

    request: ApiRequest
    seed: int
    file: Path | None


class Reply(NamedTuple):
    """The answers to a batch, and how many adapters were read for it."""

    answers: list[ApiAnswer | Exception]
    loads: int


class Engine:
    """Engine that answers batches, one at a time.

    Args:
        pool: The model, and the adapters that are on it.
        name: What images say that the model is.

    Attributes:
        busy_since: When the batch began that is sampled now, by the monotonic clock.
    """

    def __init__(self, pool: AdapterPool, name: str) -> None:
        self.pool, self.name = pool, name
        self.busy_since: float | None = None
        # A batch that nobody waits for any longer is still sampled to its end.
        self._lock = threading.Lock()

    @classmethod
    def load(cls, base: AnyModel, budget: int, options: dict[str, Any]) -> Engine:
        """Load a model, with what `load_adapted` takes besides base and adapter.

        Raises:
            ModelNotFoundError, UnsupportedModelError, ValueError: As there.
        """
        from dora_diffusion.sampling.load import load_adapted
        from dora_diffusion.sampling.pool import AdapterPool

        components, _ = load_adapted(base, **options)
        reading = {name: options[name] for name in ("clip_skip", "max_token_length")}
        return cls(AdapterPool(components, budget, **reading), str(BaseModel.of(base).path))

    def answer(
        self, asked: Sequence[BatchItem], is_given_up: Callable[[], bool] = lambda: False
    ) -> Reply:
        """Images for requests whose settings are the same.

        What is wrong with one of them is its answer alone, and the others do not depend on it: each
        adapter's file is read once, and what becomes of it then does not matter.

        Args:
            asked: The requests.
            is_given_up: Whether nobody waits for the answers any longer; sampling then ends.
        """
        from dora_diffusion.sampling.settings import ImageRow

        answers: dict[int, ApiAnswer | Exception] = {}
        rows = {}
        with self._lock:
            before, self.busy_since = self.pool.loads, time.monotonic()
            try:
                for number, (request, seed, file) in enumerate(asked):
                    try:
                        adapter = self.pool.pin(file and (file, request.strength))
                        rows[number] = ImageRow(request.prompt, seed, adapter)
                    except Exception as error:
                        answers[number] = refusal_of(error, file)
                answers |= self._sample(asked, rows, is_given_up)
            finally:
                self.busy_since = None
            return Reply([answers[n] for n in range(len(asked))], self.pool.loads - before)

    def _sample(
        self, asked: Sequence[BatchItem], rows: dict[int, ImageRow], is_given_up: Callable[[], bool]
    ) -> dict[int, ApiAnswer | Exception]:
        """Sample the requests together; where that fails, each by itself."""
        if not rows:
            return {}

        def show(done: int, steps: int) -> None:
            if is_given_up():
                raise TimeoutError("nobody waits for this image any longer")

        try:
            show(0, 0)
            images = self.pool.generate(
                list(rows.values()),
                asked[next(iter(rows))].request.settings(),
                batch_size=len(rows),
                on_step=show,
                require_finite=True,
            )
            # One that fails here is sampled again by itself.
            return {
                number: self._answer(asked[number], rows[number], image)
                for number, image in zip(rows, images, strict=True)
            }
        except Exception as error:
            if len(rows) == 1:
                return {number: refusal_of(error, asked[number].file) for number in rows}
            alone = [self._sample(asked, {n: row}, is_given_up) for n, row in rows.items()]
            return {number: answer for part in alone for number, answer in part.items()}

    def _answer(self, asked: BatchItem, row: ImageRow, image: Any) -> ApiAnswer:
        from dora_diffusion.models.text import token_limit, truncated_text
        from dora_diffusion.sampling.conditioning import lacks_trigger
        from dora_diffusion.sampling.images import RecordedAdapter, image_bytes, parameters_text
        from dora_diffusion.sampling.pool import PinnedAdapter

        request, components = asked.request, self.pool.components_for(row.adapter)
        use, used = row.adapter, list[RecordedAdapter]()
        if isinstance(use, PinnedAdapter):
            used = [RecordedAdapter(request.adapter or "", use.strengths, use.hash)]
        text = parameters_text(
            row, request.settings(), image.size, self.name, used,
            extra=components.clip_skip_parameter,
        )  # fmt: skip
        notes, metadata = [], self.pool.metadata(row.adapter)
        if lacks_trigger(row.prompt, metadata):
            notes.append(f"the prompt lacks the adapter's trigger word, {metadata.trigger!r}")
        own = self.pool.own_words(row.adapter)
        for what, prompt in (("prompt", row.prompt), ("negative prompt", request.negative_prompt)):
            end = truncated_text(components.tokenizers[0], prompt, components.most_chunks, own)
            if end:
                limit = token_limit(components)
                notes.append(f"the {what} is longer than {limit}; its end was not read: {end}")
        return ApiAnswer(image_bytes(image, text), row.seed, tuple(notes))
