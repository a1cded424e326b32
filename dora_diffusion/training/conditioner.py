"""Caption encoder of a run. Captions are encoded once unless text encoders or new words train."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from dora_diffusion.models.components import Components
from dora_diffusion.models.conditioning import Conditioning
from dora_diffusion.models.families import Tokens
from dora_diffusion.models.offload import on_device, send
from dora_diffusion.models.text import tokenize_prompts
from dora_diffusion.models.words import has_words

# For SDXL in half precision, each caption occupies a third of a megabyte.
KNOWN_CAPTIONS = 256


class Tokenized(NamedTuple):
    """Tokens of captions that train.

    Attributes:
        tokens: Tokens of all captions.
        zeros: ``(B,)`` bool, captions whose conditioning is zeros; None if there are none.
        kept: Captions that are not replaced by the empty prompt; only with ``empty``.
        empty: Tokens of the empty prompt, if it is encoded differently (clip skip).
    """

    tokens: Tokens
    zeros: Tensor | None = None
    kept: tuple[bool, ...] = ()
    empty: Tokens | None = None


class Reading(NamedTuple):
    """Tensors from which captions are encoded in a step.

    Attributes:
        trains: For each caption, whether it is encoded in the step.
        cached: Conditioning of the other captions.
        tokenized: Tokens of the captions that are encoded; None if there are none.
    """

    trains: tuple[bool, ...]
    cached: Sequence[Conditioning]
    tokenized: Tokenized | None


class Conditioner:
    """Encoder of a run's captions, with a cache of the conditioning that no step changes.

    A dropped caption is empty. It is encoded like the unconditional prompt of classifier-free
    guidance, so that caption dropout trains the prediction that sampling uses: zeros if the
    pipeline has ``force_zeros_for_empty_prompt`` (SDXL), else the encoded empty prompt.

    Args:
        components: The model.
        trains: Whether the text encoders train.
    """

    def __init__(self, components: Components, trains: bool) -> None:
        self.components = components
        self.trains = trains
        self.has_words = lru_cache(KNOWN_CAPTIONS)(partial(has_words, components))
        self._cache: dict[str, Conditioning] = {}

    def __call__(self, captions: Sequence[str]) -> Conditioning:
        """Encode B captions."""
        return self.encode(self.read(captions))

    def read(self, captions: Sequence[str]) -> Reading:
        """Tokenize captions that train, and look up the conditioning of others in the cache."""
        trains = tuple(self.trains or self.has_words(caption) for caption in captions)
        pairs = list(zip(captions, trains, strict=True))
        cached = [self._cached(caption) for caption, is_trained in pairs if not is_trained]
        while len(self._cache) > KNOWN_CAPTIONS:  # Captions with shuffled tags rarely recur.
            del self._cache[next(iter(self._cache))]
        trained = [caption for caption, is_trained in pairs if is_trained]
        return Reading(trains, cached, self._tokenized(trained) if trained else None)

    def encode(self, reading: Reading) -> Conditioning:
        """Encode the result of `read`, with gradients for captions that train."""
        trains, cached, tokenized = reading
        encoded = None if tokenized is None else self._encode(tokenized)
        if encoded is not None and not cached:
            return encoded
        rows = iter(() if encoded is None else (encoded[row] for row in range(len(encoded))))
        others = iter(cached)
        return Conditioning.cat([next(rows if is_trained else others) for is_trained in trains])

    def cache(self, captions: Collection[str]) -> bool:
        """Encode captions before training.

        Returns:
            Whether the captions were encoded. They are not if the text encoders or a word of a
            caption train, or if there are more captions than the cache keeps.
        """
        if self.trains or len(captions) > KNOWN_CAPTIONS or any(map(self.has_words, captions)):
            return False
        for caption in captions:
            self._cached(caption)
        return True

    def _cached(self, caption: str) -> Conditioning:
        if caption not in self._cache:
            components = self.components
            with torch.no_grad(), on_device(components.device, *components.text_encoders):
                self._cache[caption] = self._encode(self._tokenized([caption]))
        return self._cache[caption]

    def _tokenized(self, captions: Sequence[str]) -> Tokenized:
        components, tokens = self.components, tokenize_prompts(self.components, captions)
        if all(captions):
            return Tokenized(tokens)
        if components.zeros_for_empty_prompt:
            return Tokenized(tokens, torch.tensor([not caption for caption in captions]))
        if not components.clip_skip:
            return Tokenized(tokens)
        kept = tuple(map(bool, captions))
        return Tokenized(tokens, None, kept, tokenize_prompts(components, [""]))

    def _encode(self, tokenized: Tokenized) -> Conditioning:
        tokens, zeros, kept, empty = tokenized
        encoded = tokens.encode(self.components)
        if zeros is not None:
            zeros = send(zeros, encoded.encoder_hidden_states.device)
            hidden = encoded.encoder_hidden_states.masked_fill(zeros.view(-1, 1, 1), 0)
            if encoded.pooled is None:
                return Conditioning(hidden)
            return Conditioning(hidden, encoded.pooled.masked_fill(zeros.view(-1, 1), 0))
        if empty is None:
            return encoded
        dropped = empty.encode(self.components, clip_skip=0)
        rows = [encoded[row] if is_kept else dropped for row, is_kept in enumerate(kept)]
        return Conditioning.cat(rows)
