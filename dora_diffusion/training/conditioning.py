"""Captions to what conditions the UNet."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from dora_diffusion.models.components import Components
from dora_diffusion.models.offload import on_device
from dora_diffusion.models.text import Conditioning, encode_prompts
from dora_diffusion.models.transfer import send

KNOWN_CAPTIONS = 256
"""Captions whose conditioning is kept, a third of a megabyte each for SDXL in half precision."""


class Conditioner:
    """Captions to conditioning: encoded once each, unless the text encoders train.

    The empty caption is the dropped one. It becomes what the pipeline's guidance uses where no
    negative prompt is given, so that caption dropout trains what is sampled: zeros where the
    pipeline says ``force_zeros_for_empty_prompt`` (SDXL), else the encoded empty prompt.
    """

    def __init__(self, components: Components, trains: bool) -> None:
        self.components = components
        self.trains = trains
        self._known: dict[str, Conditioning] = {}

    def __call__(self, captions: Sequence[str]) -> Conditioning:
        """Conditioning of B captions."""
        if self.trains:
            return self._encode(captions)
        encoded = {caption: self._encoded(caption) for caption in captions}
        while len(self._known) > KNOWN_CAPTIONS:  # Shuffled tags hardly ever recur.
            del self._known[next(iter(self._known))]
        return Conditioning.cat([encoded[caption] for caption in captions])

    def keep(self, captions: Collection[str]) -> bool:
        """Encode captions now, so that no later call with them does.

        Returns:
            Whether that holds: not if the text encoders train, or captions are too many to keep.
        """
        if self.trains or len(captions) > KNOWN_CAPTIONS:
            return False
        for caption in captions:
            self._encoded(caption)
        return True

    def _encoded(self, caption: str) -> Conditioning:
        if caption not in self._known:
            components = self.components
            with torch.no_grad(), on_device(components.device, *components.text_encoders):
                self._known[caption] = self._encode([caption])
        return self._known[caption]

    def _encode(self, captions: Sequence[str]) -> Conditioning:
        encoded = encode_prompts(self.components, captions)
        if not self.components.zeros_for_empty_prompt or all(captions):
            return encoded
        device = encoded.encoder_hidden_states.device
        dropped = send(torch.tensor([not caption for caption in captions]), device)
        hidden = encoded.encoder_hidden_states.masked_fill(dropped.view(-1, 1, 1), 0)
        pooled = encoded.pooled
        return Conditioning(
            hidden, None if pooled is None else pooled.masked_fill(dropped.view(-1, 1), 0)
        )
