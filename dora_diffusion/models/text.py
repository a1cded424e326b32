"""Prompts to the UNet's conditioning, computed exactly as diffusers' pipelines compute it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dora_diffusion.models.offload import send
from dora_diffusion.wording import quoted

if TYPE_CHECKING:
    from dora_diffusion.families import Family
    from dora_diffusion.models.load import Components


@dataclass(frozen=True)
class Conditioning:
    """What the UNet receives of a batch of prompts.

    Attributes:
        encoder_hidden_states: ``(B, tokens, C)``; of SDXL both encoders' states side by side.
        pooled: ``(B, P)``, or None for families without a pooled output.
    """

    encoder_hidden_states: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        """Number of prompts."""
        return self.encoder_hidden_states.shape[0]

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Conditioning:
        """The chosen rows, always with a batch dimension."""
        rows = [index] if isinstance(index, int) else index
        return self._with(lambda tensor: tensor[rows])

    def to(self, *args: Any, **kwargs: Any) -> Conditioning:
        """Move or cast the tensors, as ``Tensor.to`` does."""
        return self._with(lambda tensor: tensor.to(*args, **kwargs))

    def detach(self) -> Conditioning:
        """Cut the tensors from the autograd graph."""
        return self._with(Tensor.detach)

    def zeros(self) -> Conditioning:
        """Zeros of the same shapes."""
        return self._with(torch.zeros_like)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        pooled = None if self.pooled is None else change(self.pooled)
        return Conditioning(change(self.encoder_hidden_states), pooled)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, as caches and files store them."""
        named = {"encoder_hidden_states": self.encoder_hidden_states}
        return named if self.pooled is None else named | {"pooled": self.pooled}

    def added_cond_kwargs(self, time_ids: Tensor | None) -> dict[str, Tensor] | None:
        """The UNet's ``added_cond_kwargs`` with time ids ``(B, 6)``; None without pooled output."""
        if self.pooled is None or time_ids is None:
            return None
        # Time ids stay float32: bfloat16 cannot hold sizes above 256 exactly.
        return {"text_embeds": self.pooled, "time_ids": time_ids.to(self.pooled.device)}

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Stack batches of conditioning in order."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        if pooled and len(pooled) != len(parts):
            raise ValueError("some of the conditioning has a pooled output and some has none")
        hidden = torch.cat([part.encoder_hidden_states for part in parts])
        return Conditioning(hidden, torch.cat(pooled) if pooled else None)


def encode_prompts(components: Components, prompts: Sequence[str]) -> Conditioning:
    """Encode prompts as the family's pipeline does; gradients flow when the encoders train.

    Args:
        components: The loaded model.
        prompts: B prompts. The empty prompt is encoded like any other (see
            :func:`encode_unconditional` for what the pipeline uses under guidance).

    Returns:
        Conditioning with ``encoder_hidden_states (B, tokens, C)`` and, of SDXL, ``pooled (B, P)``.

    Warns:
        UserWarning: Once for each prompt beyond the token limit, naming the text that was cut.
    """
    if isinstance(prompts, str):
        raise TypeError("encode_prompts takes a list of prompts, got a single string")
    warn_of_truncation(components.tokenizers[0], prompts)
    tokens = [tokenize(tokenizer, prompts) for tokenizer in components.tokenizers]
    ids, masks = [t.input_ids for t in tokens], [t.attention_mask for t in tokens]
    return encode_tokens(components.family, components.text_encoders, ids, masks)


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> Any:
    """The prompts' ``input_ids`` and ``attention_mask``, each ``(B, tokens)``.

    Padded and cut to the tokenizer's limit; embeddings of several vectors are written out.
    """
    return tokenizer(
        [expand_multi_vector_tokens(tokenizer, prompt) for prompt in prompts],
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )


def encode_tokens(
    family: Family,
    encoders: Sequence[nn.Module],
    input_ids: Sequence[Tensor],
    attention_masks: Sequence[Tensor] | None = None,
) -> Conditioning:
    """Encode B prompts' tokens, for each text encoder of the family its own ``(B, tokens)``.

    An attention mask is used where its encoder's config asks for it.
    """
    encoded = []
    for index, (encoder, ids) in enumerate(zip(encoders, input_ids, strict=True)):
        device, mask = next(encoder.parameters()).device, None
        # A few SD1-style models ask for the padding to be masked; CLIP's own configs never do.
        if attention_masks and getattr(encoder.config, "use_attention_mask", False):
            mask = send(attention_masks[index], device)
        encoded.append(family.encode_text(encoder, send(ids, device), mask))
    states, pooled = zip(*encoded, strict=True)
    return Conditioning(states[0] if len(states) == 1 else torch.cat(states, dim=-1), pooled[-1])


def expand_multi_vector_tokens(tokenizer: Any, prompt: str) -> str:
    """Expand trained tokens of several vectors: ``<x>`` becomes ``<x> <x>_1 <x>_2``.

    This is the diffusers convention for embeddings that were learned with more than one vector.
    """
    added = tokenizer.added_tokens_encoder
    for token in added:
        if f"{token}_1" in added and token in prompt and f"{token}_1" not in prompt:
            vectors, index = [token], 1
            while f"{token}_{index}" in added:
                vectors.append(f"{token}_{index}")
                index += 1
            prompt = prompt.replace(token, " ".join(vectors))
    return prompt


def encode_unconditional(components: Components, count: int = 1) -> Conditioning:
    """Encode what guidance uses where no negative prompt is given: ``count`` empty prompts.

    The released SDXL was trained with zeros instead of an encoded empty prompt.
    """
    empty = encode_prompts(components, [""] * count)
    return empty.zeros() if components.zeros_for_empty_prompt else empty


def truncated_text(tokenizer: Any, prompt: str) -> str:
    """The end of the prompt that does not fit the token limit, or an empty string."""
    ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
    return str(tokenizer.decode(ids[tokenizer.model_max_length - 1 : -1])).strip()


# Prompts that were warned of, by tokenizer: a caption comes again with every epoch.
_WARNED: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


def warn_of_truncation(tokenizer: Any, prompts: Sequence[str]) -> None:
    """Warn once of each distinct prompt that is too long, naming what the model will not see."""
    warned = _WARNED.setdefault(tokenizer, set())
    for prompt in dict.fromkeys(prompts):
        cut = "" if prompt in warned else truncated_text(tokenizer, prompt)
        if cut:
            warned.add(prompt)
            warnings.warn(
                f"the prompt is longer than the model's {tokenizer.model_max_length} tokens; "
                f"it will not see the end: {quoted(cut)}",
                stacklevel=3,
            )


def time_ids(family: Family, crops: Sequence[Any]) -> Tensor | None:
    """The family's size and crop conditioning of B crops, ``(B, n)`` float32; None if it has none.

    Args:
        family: The model's family.
        crops: Each with ``original_size``, ``crop_top_left`` and ``target_size``.
    """
    ids = torch.tensor([family.time_ids(crop) for crop in crops], dtype=torch.float32)
    return ids if ids.numel() else None
