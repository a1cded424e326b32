"""Requests of clients, and one base model in memory that samples a batch of them."""

from __future__ import annotations

import math
import os
import threading
import time
import traceback
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import pydantic
from pydantic import Field, field_validator

from dora_diffusion.cli.console.errors import explain, explain_to_all, is_out_of_memory
from dora_diffusion.config.base import AnyModel, BaseModel
from dora_diffusion.config.images import PIXELS, SETTINGS, ImageRequest
from dora_diffusion.config.schedulers import SCHEDULERS
from dora_diffusion.config.wording import did_you_mean

if TYPE_CHECKING:
    from dora_diffusion.sampling.pool import AdapterPool
    from dora_diffusion.sampling.settings import AdapterRef

MAX_STEPS, MAX_SIDE = 200, 2048
_LIMITS = {"steps": MAX_STEPS, "guidance_scale": 100, "width": MAX_SIDE, "height": MAX_SIDE}
_LONGEST = 4000
# Settings of an image that a request may have, equal in a batch.
_SERVED = (
    "negative_prompt", "steps", "guidance_scale", "guidance_rescale", "scheduler", "width",
    "height",
)  # fmt: skip
_DEFAULT = "null is the model's own."


class ApiAnswer(NamedTuple):
    """A PNG with its generation parameters, its seed, and notes on the request."""

    png: bytes
    seed: int
    notes: tuple[str, ...] = ()


class Refusal(Exception):
    """Error response to a request.

    Args:
        status: The HTTP status.
        line: The reason, in one line.
        headers: Headers of the response.
        defect: A traceback for the server's log.
    """

    def __init__(
        self, status: int, line: str, headers: dict[str, str] | None = None, defect: str = ""
    ) -> None:
        super().__init__(status, line, headers, defect)
        self.status, self.line, self.headers, self.defect = status, line, headers, defect


def refusal_of(error: Exception, file: Path | None) -> Refusal:
    """Convert an error to a refusal, in one line without the server's folders.

    The status is 500 for defects and for lack of memory, else 422.
    """
    line = explain(error)[1]
    if line is None or is_out_of_memory(error):
        return Refusal(
            500, explain_to_all(error), defect="".join(traceback.format_exception(error))
        )
    return Refusal(422, line.replace(f"{file.parent}{os.sep}", "") if file else line)


def _field(name: str) -> tuple[Any, Any]:
    """Return a setting of an image as a field of a request, within the server's limits."""
    setting = SETTINGS[name]
    most = min(each for each in (_LIMITS.get(name), setting.most, math.inf) if each is not None)
    limits: dict[str, Any] = {"ge": setting.least, "le": most}
    if setting.choices:
        limits = {"json_schema_extra": {"enum": [None, *setting.choices]}}
    elif setting.kind is str:
        limits = {"max_length": _LONGEST}
    if name in ("width", "height"):
        limits["multiple_of"] = PIXELS
    is_optional = setting.default is None
    about = _DEFAULT if is_optional else None
    kind: Any = Optional[setting.kind] if is_optional else setting.kind  # noqa: UP045 - a value
    return kind, Field(setting.default, description=about, **limits)


_FIELDS: Any = {name: _field(name) for name in _SERVED}
_Settings: Any = pydantic.create_model(
    "_Settings",
    __config__=pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True),
    **_FIELDS,
)


class ApiRequest(_Settings):
    """Request for one image: an `ImageRequest` with the name and strength of its adapter."""

    prompt: str = Field(min_length=1, max_length=_LONGEST, examples=["a photo of a sks dog"])
    adapter: str | None = Field(
        None, max_length=255, description="A name that /v1/adapters lists; null is the base model."
    )
    strength: float = Field(1.0, ge=-3, le=3, description="Adapter strength; 0 is the base.")
    seed: int | None = Field(None, ge=0, lt=2**63, description="null draws one.")

    @field_validator("scheduler", check_fields=False)
    @classmethod
    def _is_known(cls, name: str | None) -> str | None:
        if name is not None and name not in SCHEDULERS:
            near = did_you_mean(name, SCHEDULERS)
            raise ValueError(f"it must be one of {', '.join(SCHEDULERS)}{near}")
        return name

    @property
    def shared(self) -> Hashable:
        """Settings that all requests of a batch share."""
        return tuple(getattr(self, name) for name in _SERVED)

    def wanted(self, seed: int, adapter: AdapterRef) -> ImageRequest:
        """Return the image with its seed and its adapter."""
        values = {name: getattr(self, name) for name in _SERVED}
        return ImageRequest(self.prompt, seed, adapter, **values)

    def without_effect(self, guidance_scale: float, *, guidance_is_input: bool) -> list[str]:
        """Return a note on each field that was changed but has no effect on the image.

        Args:
            guidance_scale: Guidance scale of the image.
            guidance_is_input: True if the model takes the guidance scale as an input, instead of
                a second pass with the negative prompt.
        """
        reasons = {} if self.adapter else {"strength": "no adapter is given"}
        unguided = f"guidance_scale {guidance_scale:g} is no guidance"
        if guidance_is_input:
            unguided = "this model was distilled to work without a negative prompt"
        if guidance_is_input or guidance_scale <= 1:
            reasons |= {"negative_prompt": unguided, "guidance_rescale": unguided}
        changed = self.model_dump(exclude_defaults=True)
        return [
            f"{name} has no effect because {reasons[name]}" for name in reasons if name in changed
        ]


class BatchItem(NamedTuple):
    """A request with its seed and the file of its adapter."""

    request: ApiRequest
    seed: int
    file: Path | None


class Reply(NamedTuple):
    """The answers to a batch, and the number of adapters that were read for it."""

    answers: list[ApiAnswer | Exception]
    loads: int


class Engine:
    """Samples batches, one at a time.

    Args:
        pool: The model with its adapters.
        name: Name of the model in the images' parameters.

    Attributes:
        defaults: Sampling settings of the model for fields that a request leaves out.
        busy_since: Start of the current batch by the monotonic clock; None while idle.
    """

    def __init__(self, pool: AdapterPool, name: str) -> None:
        from dora_diffusion.sampling.load import sampling_defaults

        self.pool, self.name = pool, name
        self.defaults = sampling_defaults(pool.components)
        self.busy_since: float | None = None
        # A cancelled batch may still be running when the next one arrives.
        self._lock = threading.Lock()

    @classmethod
    def load(cls, base: AnyModel, budget: int, options: dict[str, Any]) -> Engine:
        """Load a model with further options of `load_adapted`.

        Raises:
            ModelNotFoundError, UnsupportedModelError, ValueError: From `load_adapted`.
        """
        from dora_diffusion.sampling.load import load_adapted
        from dora_diffusion.sampling.pool import AdapterPool

        components, _ = load_adapted(base, **options)
        reading = {name: options[name] for name in ("clip_skip", "max_token_length")}
        return cls(AdapterPool(components, budget, **reading), str(BaseModel.of(base).path))

    def answer(
        self, batch: Sequence[BatchItem], is_given_up: Callable[[], bool] = lambda: False
    ) -> Reply:
        """Generate images for requests with the same settings.

        An error in one request is the answer to that request alone. Each adapter's file is read
        once, so later changes of the file do not matter.

        Args:
            batch: The requests.
            is_given_up: Returns whether the batch was cancelled; sampling then ends.
        """
        answers: dict[int, ApiAnswer | Exception] = {}
        rows = {}
        with self._lock:
            before, self.busy_since = self.pool.loads, time.monotonic()
            try:
                for number, (request, seed, file) in enumerate(batch):
                    try:
                        adapter = self.pool.pin(file and (file, request.strength))
                        rows[number] = request.wanted(seed, adapter)
                    except Exception as error:
                        answers[number] = refusal_of(error, file)
                answers |= self._sample(batch, rows, is_given_up)
            finally:
                self.busy_since = None
            return Reply([answers[n] for n in range(len(batch))], self.pool.loads - before)

    def _sample(
        self,
        batch: Sequence[BatchItem],
        rows: dict[int, ImageRequest],
        is_given_up: Callable[[], bool],
    ) -> dict[int, ApiAnswer | Exception]:
        """Sample the requests together, or one by one if that fails."""
        if not rows:
            return {}

        def show(done: int, steps: int) -> None:
            if is_given_up():
                raise TimeoutError("the request was cancelled")

        from dora_diffusion.sampling.settings import SamplingSettings

        try:
            show(0, 0)
            images = self.pool.generate(
                list(rows.values()),
                SamplingSettings(**self.defaults),
                batch_size=len(rows),
                on_step=show,
                require_finite=True,
            )
            # After a failure here, the requests are sampled one by one.
            return {
                number: self._answer(batch[number], rows[number], image)
                for number, image in zip(rows, images, strict=True)
            }
        except Exception as error:
            if len(rows) == 1:
                return {number: refusal_of(error, batch[number].file) for number in rows}
            results = [self._sample(batch, {n: row}, is_given_up) for n, row in rows.items()]
            return {number: answer for result in results for number, answer in result.items()}

    def _answer(self, item: BatchItem, row: ImageRequest, image: Any) -> ApiAnswer:
        from dora_diffusion.models.text import truncated_text
        from dora_diffusion.sampling.conditioning import inactive_messages, lacks_trigger
        from dora_diffusion.sampling.images import RecordedAdapter, image_bytes, parameters_text
        from dora_diffusion.sampling.pool import PinnedAdapter
        from dora_diffusion.sampling.settings import SamplingSettings

        request, components = item.request, self.pool.components_for(row.adapter)
        settings = SamplingSettings.of(row, **self.defaults)
        use, used = row.adapter, list[RecordedAdapter]()
        if isinstance(use, PinnedAdapter):
            used = [RecordedAdapter(request.adapter or "", use.strengths, use.hash)]
        text = parameters_text(
            row, settings.for_model(components), image.size, self.name, used,
            extra=components.clip_skip_parameter,
        )  # fmt: skip
        prompts = (row.prompt, request.negative_prompt)
        is_input = bool(components.denoiser.config.get("time_cond_proj_dim"))
        notes = request.without_effect(settings.guidance_scale, guidance_is_input=is_input)
        notes += inactive_messages(components, settings)
        metadata = self.pool.metadata(row.adapter)
        if lacks_trigger(row.prompt, metadata):
            notes.append(f"the prompt lacks the adapter's trigger word, {metadata.trigger!r}")
        words = self.pool.own_words(row.adapter)
        for field, prompt in zip(("prompt", "negative prompt"), prompts, strict=True):
            end = truncated_text(components, prompt, words)
            if end:
                limit = components.code.token_limit(components)
                notes.append(f"the {field} is longer than {limit}; its end was not read: {end}")
        return ApiAnswer(image_bytes(image, text), item.seed, tuple(notes))
