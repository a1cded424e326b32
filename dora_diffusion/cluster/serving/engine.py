"""One base model in memory, and what it answers to a batch of requests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dora_diffusion.cluster.serving.request import ApiAnswer, refusal_of
from dora_diffusion.config.base import AnyModel, BaseModel

if TYPE_CHECKING:
    from dora_diffusion.cluster.serving.request import ApiRequest
    from dora_diffusion.sampling.pool import AdapterPool, ImageRow


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
        from dora_diffusion.sampling.generate import load_adapted
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
        with self._lock:
            before, self.busy_since = self.pool.loads, time.monotonic()
            try:
                answers = self._answers(asked, is_given_up)
            finally:
                self.busy_since = None
            return Reply([answers[n] for n in range(len(asked))], self.pool.loads - before)

    def _answers(
        self, asked: Sequence[BatchItem], is_given_up: Callable[[], bool]
    ) -> dict[int, ApiAnswer | Exception]:
        from dora_diffusion.sampling.pool import ImageRow

        answers: dict[int, ApiAnswer | Exception] = {}
        rows = {}
        for number, (request, seed, file) in enumerate(asked):
            try:
                adapter = self.pool.pin(file and (file, request.strength))
                rows[number] = ImageRow(request.prompt, seed, adapter)
            except Exception as error:
                answers[number] = refusal_of(error, file)
        return answers | self._sample(asked, rows, is_given_up)

    def _sample(
        self,
        asked: Sequence[BatchItem],
        rows: dict[int, ImageRow],
        is_given_up: Callable[[], bool],
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
        from dora_diffusion.numerics.weights import Strengths
        from dora_diffusion.sampling.generate import lacks_trigger
        from dora_diffusion.sampling.images import parameters_text, png_bytes

        request, components = asked.request, self.pool.components_for(row.adapter)
        text = parameters_text(
            row.prompt, row.seed, request.settings(), image.size, self.name, request.adapter,
            Strengths(request.strength), extra=components.clip_skip_parameter,
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
        return ApiAnswer(png_bytes(image, text), row.seed, tuple(notes))
