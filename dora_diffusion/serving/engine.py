"""One base model in memory, and what it answers to a batch of requests."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dora_diffusion.console.errors import explain, explain_to_all, is_out_of_memory
from dora_diffusion.serving.request import ApiAnswer, Refusal

if TYPE_CHECKING:
    from dora_diffusion.pool import AdapterPool, ImageRow
    from dora_diffusion.serving.request import ApiRequest

_LOG = logging.getLogger("dora_diffusion.serving")


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
    """Answers batches, one at a time.

    Args:
        pool: The model, and the adapters that are on it.
        name: What images say that the model is.
    """

    def __init__(self, pool: AdapterPool, name: str) -> None:
        self.pool, self.name = pool, name
        # A batch that nobody waits for any longer is still sampled to its end.
        self._lock = threading.Lock()

    @classmethod
    def load(cls, base: str, budget: int, options: dict[str, Any]) -> Engine:
        """Load a model, with what `load_adapted` takes besides base and adapter.

        Raises:
            ModelNotFoundError, UnsupportedModelError, ValueError: As there.
        """
        from dora_diffusion.generate import load_adapted
        from dora_diffusion.pool import AdapterPool

        components, _ = load_adapted(base, **options)
        reading = {name: options[name] for name in ("schedule", "clip_skip", "max_token_length")}
        return cls(AdapterPool(components, budget, **reading), base)

    def answer(self, asked: Sequence[BatchItem]) -> Reply:
        """Images for requests whose settings are the same.

        What is wrong with one of them is its answer alone, and the others do not depend on it.
        """
        from dora_diffusion.pool import ImageRow

        answers: dict[int, ApiAnswer | Exception] = {}
        with self._lock:
            before, rows = self.pool.loads, {}
            for number, (request, seed, file) in enumerate(asked):
                row = ImageRow(request.prompt, seed, file and (file, request.strength))
                try:
                    self.pool.names([row.adapter])
                    rows[number] = row
                except Exception as error:
                    answers[number] = _refusal(error, file)
            answers |= self._sample(asked, rows)
        ordered = [answers[number] for number in range(len(asked))]
        return Reply(ordered, self.pool.loads - before)

    def _sample(
        self, asked: Sequence[BatchItem], rows: dict[int, ImageRow]
    ) -> dict[int, ApiAnswer | Exception]:
        """Together; where that fails, each by itself."""
        if not rows:
            return {}
        request = asked[next(iter(rows))].request
        try:
            images = self.pool.generate(
                list(rows.values()), request.settings(), batch_size=len(rows), require_finite=True
            )
        except Exception as error:
            if len(rows) == 1:
                return {number: _refusal(error, asked[number].file) for number in rows}
            alone = [self._sample(asked, {number: row}) for number, row in rows.items()]
            return {number: answer for part in alone for number, answer in part.items()}
        return {
            number: self._answer(asked[number], rows[number], image)
            for number, image in zip(rows, images, strict=True)
        }

    def _answer(self, asked: BatchItem, row: ImageRow, image: Any) -> ApiAnswer:
        from dora_diffusion.generate import lacks_trigger
        from dora_diffusion.images import parameters_text, png_bytes
        from dora_diffusion.models.text import token_limit, truncated_text
        from dora_diffusion.numerics.weights import Strengths

        request, components = asked.request, self.pool.components_for(row.adapter)
        text = parameters_text(
            row.prompt, row.seed, request.settings(), image.size, self.name, request.adapter,
            Strengths(request.strength), extra=components.clip_skip_parameter,
        )  # fmt: skip
        notes, metadata = [], self.pool.metadata(row.adapter)
        if lacks_trigger(row.prompt, metadata):
            notes.append(f"the prompt lacks the adapter's trigger word, {metadata.trigger!r}")
        for what, prompt in (("prompt", row.prompt), ("negative prompt", request.negative_prompt)):
            end = truncated_text(components.tokenizers[0], prompt, components.most_chunks)
            if end:
                limit = token_limit(components)
                notes.append(f"the {what} is longer than {limit}; its end was not read: {end}")
        return ApiAnswer(png_bytes(image, text), row.seed, tuple(notes))


def _refusal(error: Exception, file: Path | None) -> Refusal:
    """One line for whoever asked, without the server's folders; 422 where the request is at fault.

    Defects, and memory that ran out, are 500.
    """
    line = explain(error)[1]
    if line is None or is_out_of_memory(error):
        _LOG.error("a request failed", exc_info=error)
        return Refusal(500, explain_to_all(error))
    return Refusal(422, line.replace(f"{file.parent}{os.sep}", "") if file else line)
