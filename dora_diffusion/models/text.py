"""Encoding of prompts to the denoiser's conditioning, equal to that of Diffusers' pipelines."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dora_diffusion.config.wording import quoted
from dora_diffusion.models.conditioning import Conditioning
from dora_diffusion.models.families import Tokens
from dora_diffusion.models.words import own_words

if TYPE_CHECKING:
    from dora_diffusion.config.families import Family
    from dora_diffusion.models.components import Components


def encode_prompts(
    components: Components,
    prompts: Sequence[str],
    *,
    clip_skip: int | None = None,
    adapters: Sequence[str | None] | None = None,
) -> Conditioning:
    """Encode prompts as the pipeline of the family does, with gradients if the encoders train.

    Args:
        components: The loaded model.
        prompts: B prompts. The empty prompt is encoded like any other prompt
            (:func:`encode_unconditional` gives the conditioning of guidance).
        clip_skip: Number of layers to skip. Default: ``components.clip_skip``.
        adapters: Adapter of each prompt, whose own tokens are used in it.

    Returns:
        Conditioning with ``encoder_hidden_states (B, tokens, C)`` and, for SDXL, ``pooled (B, P)``
        of the first chunk.

    Warns:
        UserWarning: Once for each prompt beyond the token limit, with the truncated text.
    """
    if isinstance(prompts, str):
        raise TypeError("encode_prompts takes a list of prompts, got a single string")
    return tokenize_prompts(components, prompts, adapters).encode(components, clip_skip)


def tokenize_prompts(
    components: Components, prompts: Sequence[str], adapters: Sequence[str | None] | None = None
) -> Tokens:
    """Tokenize B prompts as `encode_prompts` does."""
    adapters = adapters or [None] * len(prompts)
    warn_of_truncation(components, prompts, adapters)
    return components.code.tokenize_prompts(components, prompts, adapters)


def encode_unconditional(components: Components, count: int = 1) -> Conditioning:
    """Return the unconditional conditioning for guidance without a negative prompt, ``count`` rows.

    The released SDXL was trained with zeros instead of an encoded empty prompt.
    """
    empty = encode_negative(components, [""] * count)
    return empty.zeros() if components.zeros_for_empty_prompt else empty


def encode_negative(
    components: Components,
    prompts: Sequence[str],
    adapters: Sequence[str | None] | None = None,
) -> Conditioning:
    """Encode negative prompts without clip skip, as in Diffusers' pipelines."""
    return encode_prompts(components, prompts, clip_skip=0, adapters=adapters)


def truncated_text(
    components: Components, prompt: str, own_tokens: Mapping[str, str] | None = None
) -> str:
    """Return the end of a prompt beyond the token limit, or an empty string.

    Args:
        components: The loaded model.
        prompt: The prompt.
        own_tokens: Tokens of one adapter (`own_words`), which are shown by their words.
    """
    cut = components.code.truncated_text(components, prompt, own_tokens)
    for word, name in (own_tokens or {}).items():
        cut = cut.replace(name, word)
    return cut


MORE_TOKENS = "; max_token_length reads more, in chunks"

# Prompts with a warning, by tokenizer, since captions recur in every epoch.
_WARNED: WeakKeyDictionary[Any, set[tuple[str, int]]] = WeakKeyDictionary()
_MOST_WARNED = 10_000


def warn_of_truncation(
    components: Components, prompts: Sequence[str], adapters: Sequence[str | None]
) -> None:
    """Warn once for each distinct prompt beyond the token limit.

    Args:
        components: The model.
        prompts: The prompts.
        adapters: Adapter of each prompt, for its own tokens. Further prompts have no adapter.
    """
    encoder, most = components.text_encoders[0], components.max_token_length
    warned = _WARNED.setdefault(components.tokenizers[0], set())
    for prompt, adapter in dict.fromkeys(zip_longest(prompts, adapters)):
        known = (prompt, most) in warned
        if not known and (cut := truncated_text(components, prompt, own_words(encoder, adapter))):
            if len(warned) == _MOST_WARNED:  # Limits the memory of a server.
                warned.clear()
            warned.add((prompt, most))
            limit = components.code.token_limit(components)
            more = "" if "max_token_length" in components.family.without_effect else MORE_TOKENS
            warnings.warn(
                f"the prompt is longer than {limit}; the model will not see the end: "
                f"{quoted(cut)}{more}",
                stacklevel=4,
            )


def time_ids(family: Family, crops: Sequence[Any]) -> Tensor | None:
    """Return the size and crop conditioning of B crops, ``(B, n)`` float32; None if not used.

    Args:
        family: Family of the model.
        crops: Crops with ``original_size``, ``crop_top_left`` and ``target_size``.
    """
    ids = torch.tensor([family.time_ids(crop) for crop in crops], dtype=torch.float32)
    return ids if ids.numel() else None
