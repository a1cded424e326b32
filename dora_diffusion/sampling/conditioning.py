"""Prompts of a batch as arguments of Diffusers' pipelines, and warnings of text that is cut."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dora_diffusion.config.wording import quoted
from dora_diffusion.data.captions import contains_token
from dora_diffusion.formats.adapter.metadata import AdapterMetadata, split_triggers
from dora_diffusion.models.components import Components
from dora_diffusion.models.text import (
    encode_negative,
    encode_prompts,
    encode_unconditional,
    warn_of_truncation,
)
from dora_diffusion.models.words import have_own_words
from dora_diffusion.sampling.settings import SamplingSettings

# Description of syntax of A1111 and ComfyUI -> pattern.
_SYNTAX = {
    "(word:1.2) and BREAK, which weigh words": r":\s*[+-]?[.\d]+\s*\)|\bBREAK\b",
    "[a:b:0.5] and [a|b], which change a prompt over the steps": (
        r"\[[^\[\]]*(?:\|[^\[\]]*|:\s*[.\d]+\s*)\]"
    ),
    "AND, which combines prompts": r"\bAND\b",
    "embedding:NAME, a trained word of ComfyUI": r"\bembedding:\S",
    "{a|b} and __file__, which draw words": r"{[^{}]*\|[^{}]*}|__\w+__",
}


@dataclass(frozen=True)
class Rows:
    """Rows of a batch.

    Attributes:
        prompt: One text for all rows, which is encoded once; or one for each.
        seeds: One for each row.
        adapters: Names of the rows' adapters; None where the same adapters are on for all.

    Raises:
        ValueError: If there are not as many prompts or adapters as seeds.
    """

    prompt: str | Sequence[str]
    seeds: Sequence[int]
    adapters: Sequence[str | None] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) and len(self.prompt) != len(self.seeds):
            raise ValueError(f"{len(self.prompt)} prompts for {len(self.seeds)} seeds")
        if self.adapters is not None and len(self.adapters) != len(self.seeds):
            raise ValueError(f"{len(self.adapters)} adapters for {len(self.seeds)} seeds")

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, batch: slice) -> Rows:
        prompt, adapters = self.prompt, self.adapters
        return Rows(
            prompt if isinstance(prompt, str) else list(prompt[batch]),
            self.seeds[batch],
            adapters and adapters[batch],
        )

    @property
    def is_shared(self) -> bool:
        """True if one prompt is encoded once, by the same text encoders for all rows."""
        return isinstance(self.prompt, str) and self.adapters is None

    @property
    def prompts(self) -> list[str]:
        """A prompt for each row."""
        return [self.prompt] * len(self) if isinstance(self.prompt, str) else list(self.prompt)


def lacks_trigger(prompt: str, metadata: AdapterMetadata) -> bool:
    """Return whether a prompt leaves out the adapter's trigger word, or all of several."""
    tokens = [trigger.partition(" ")[0] for trigger in split_triggers(metadata.trigger)]
    return bool(tokens) and not any(contains_token(prompt, token) for token in tokens)


def unread_syntax(prompt: str) -> list[str]:
    """Return the syntax of A1111 and ComfyUI in a prompt, which is text here, by description."""
    return [kind for kind, pattern in _SYNTAX.items() if re.search(pattern, prompt)]


def inactive_messages(components: Components, settings: SamplingSettings) -> list[str]:
    """Describe the settings without effect on a model."""
    given = {
        "scheduler": settings.scheduler,
        "guidance_scale": settings.guidance_scale > 1, "negative_prompt": settings.negative_prompt,
        "guidance_rescale": settings.guidance_rescale,
    }  # fmt: skip
    return [*components.family.inactive([name for name in given if given[name]]).values()]


def warn_of_settings(components: Components, rows: Rows, settings: SamplingSettings) -> None:
    """Warn of settings without effect, and of the parts of prompts that are not read."""
    prompts = [str(rows.prompt)] if rows.is_shared else rows.prompts
    adapters = [*(rows.adapters or ()), *(rows.adapters or ())]
    prompts += [settings.negative_prompt] * len(rows.adapters or "1")
    for line in inactive_messages(components, settings):
        warnings.warn(line, stacklevel=3)
    for text in dict.fromkeys(prompts):
        for kind in unread_syntax(text):
            message = f"syntax of web UIs is read as text here ({kind}): {quoted(text)}"
            warnings.warn(message, stacklevel=3)
    warn_of_truncation(components, prompts, adapters)


def prompt_arguments(
    components: Components, rows: Rows, settings: SamplingSettings, *, shared: bool
) -> dict[str, Any]:
    """Return the pipeline's arguments for prompts as they are, or encoded.

    Prompts are encoded if the pipeline would cut them, if they have an adapter's own tokens, and
    with clip skip, for which Diffusers' pipelines need a `text_model` that Transformers
    5 does not have.

    Args:
        components: The model.
        rows: Prompts and adapters.
        settings: With the negative prompt.
        shared: Let the pipeline encode the one prompt of all rows once.
    """
    prompts, count, negative = rows.prompts, len(rows), settings.negative_prompt
    is_short = components.most_chunks == 1 or all(
        components.code.chunk_count(components, text) == 1
        for text in dict.fromkeys([*prompts, negative])
    )
    has_own = have_own_words(components, rows.adapters or ())
    takes_text = components.family.takes_negative_text or not negative
    if is_short and takes_text and not (components.clip_skip or has_own):
        negatives = negative if shared else [negative] * count
        return {
            "prompt": rows.prompt if shared else prompts,
            **({"negative_prompt": negatives} if negative else {}),
            "num_images_per_prompt": count if shared else 1,
        }
    against = (
        encode_negative(components, [negative] * count, rows.adapters)
        if negative
        else encode_unconditional(components, count)
    )
    positive = encode_prompts(components, prompts, adapters=rows.adapters)
    return components.code.embedding_arguments(positive, against)
