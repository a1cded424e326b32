"""Caption encoder of a run. Captions are encoded once unless text encoders or new words train."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache, partial

import torch

from dora_diffusion.models.components import Components
from dora_diffusion.models.conditioning import Conditioning
from dora_diffusion.models.offload import on_device, send
from dora_diffusion.models.text import tokenize_prompts
from dora_diffusion.models.words import has_words

# For SDXL in half precision, each caption occupies a third of a megabyte.
KNOWN_CAPTIONS = 256


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
        """Encode B captions, with gradients for those that train; others are cached."""
        trains = [self.trains or self.has_words(caption) for caption in captions]
        pairs = list(zip(captions, trains, strict=True))
        cached = [self._cached(caption) for caption, is_trained in pairs if not is_trained]
        while len(self._cache) > KNOWN_CAPTIONS:  # Captions with shuffled tags rarely recur.
            del self._cache[next(iter(self._cache))]
        trained = [caption for caption, is_trained in pairs if is_trained]
        encoded = self._encode(trained) if trained else None
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
                self._cache[caption] = self._encode([caption])
        return self._cache[caption]

    def _encode(self, captions: Sequence[str]) -> Conditioning:
        components = self.components
        encoded = tokenize_prompts(components, captions).encode(components)
        if all(captions):
            return encoded
        if components.zeros_for_empty_prompt:
            dropped = torch.tensor([not caption for caption in captions])
            dropped = send(dropped, encoded.encoder_hidden_states.device)
            hidden = encoded.encoder_hidden_states.masked_fill(dropped.view(-1, 1, 1), 0)
            if encoded.pooled is None:
                return Conditioning(hidden)
            return Conditioning(hidden, encoded.pooled.masked_fill(dropped.view(-1, 1), 0))
        if not components.clip_skip:
            return encoded
        empty = tokenize_prompts(components, [""]).encode(components, clip_skip=0)
        rows = [encoded[row] if caption else empty for row, caption in enumerate(captions)]
        return Conditioning.cat(rows)
