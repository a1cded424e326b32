"""Encoding of prompts to the UNet's conditioning, equal to that of Diffusers' pipelines.

Diffusers truncates prompts at 75 tokens. With a larger `Components.max_token_length`, prompts are
encoded in chunks as in web UIs: each chunk is a text with its own start and end token, and the
hidden states of all chunks are concatenated.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dora_diffusion.config.wording import quoted
from dora_diffusion.models.emphasis import Chunk, weigh_states, weighted_chunks
from dora_diffusion.models.offload import computing_device, send
from dora_diffusion.models.words import own_words, write_out_words

if TYPE_CHECKING:
    from dora_diffusion.config.families import Family
    from dora_diffusion.models.components import Components


@dataclass(frozen=True)
class Conditioning:
    """Conditioning of the UNet on a batch of prompts.

    Attributes:
        encoder_hidden_states: Hidden states ``(B, tokens, C)``. For SDXL, the channels of both
            encoders are concatenated; for long prompts, the tokens of all chunks.
        pooled: Pooled output ``(B, P)``; None for families without it.
    """

    encoder_hidden_states: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        """Number of prompts."""
        return self.encoder_hidden_states.shape[0]

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Conditioning:
        """Select rows, always with a batch dimension."""
        rows = [index] if isinstance(index, int) else index
        return self._with(lambda tensor: tensor[rows])

    def to(self, *args: Any, **kwargs: Any) -> Conditioning:
        """Move or cast the tensors (``Tensor.to``)."""
        return self._with(lambda tensor: tensor.to(*args, **kwargs))

    def detach(self) -> Conditioning:
        """Detach the tensors from the autograd graph."""
        return self._with(Tensor.detach)

    def zeros(self) -> Conditioning:
        """Return zeros of the same shapes."""
        return self._with(torch.zeros_like)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        pooled = None if self.pooled is None else change(self.pooled)
        return Conditioning(change(self.encoder_hidden_states), pooled)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, for caches and files."""
        named = {"encoder_hidden_states": self.encoder_hidden_states}
        return named if self.pooled is None else named | {"pooled": self.pooled}

    def added_cond_kwargs(self, time_ids: Tensor | None) -> dict[str, Tensor] | None:
        """Return ``added_cond_kwargs`` for the UNet; None without pooled output or time ids."""
        if self.pooled is None or time_ids is None:
            return None
        # Time ids stay float32, since bfloat16 cannot represent all sizes above 256.
        return {"text_embeds": self.pooled, "time_ids": time_ids.to(self.pooled.device)}

    @staticmethod
    def cat(batches: Sequence[Conditioning]) -> Conditioning:
        """Concatenate batches of conditioning.

        Shorter sequences are repeated until all have the same length. Repeating all states k times
        does not change attention to them, so that no row depends on the other rows. Padding would
        change it.
        """
        if len(batches) == 1:
            return batches[0]
        pooled = [batch.pooled for batch in batches if batch.pooled is not None]
        if pooled and len(pooled) != len(batches):
            raise ValueError("some of the conditioning has a pooled output and some has none")
        states = [batch.encoder_hidden_states for batch in batches]
        tokens = math.lcm(*{s.shape[1] for s in states})
        hidden = torch.cat(
            [s if s.shape[1] == tokens else s.repeat(1, tokens // s.shape[1], 1) for s in states]
        )
        return Conditioning(hidden, torch.cat(pooled) if pooled else None)


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


class PromptTokens(NamedTuple):
    """Tokens of B prompts.

    Attributes:
        ids: Token ids of all chunks ``(chunks, tokens)``, for each text encoder.
        masks: Attention masks, likewise.
        counts: Number of chunks of each prompt.
    """

    ids: Sequence[Tensor]
    masks: Sequence[Tensor]
    counts: Sequence[int]

    def encode(self, components: Components, clip_skip: int | None = None) -> Conditioning:
        """Encode the tokens (`encode_prompts`)."""
        skip, encoders = clip_skip, components.text_encoders
        if skip is None:
            skip = components.clip_skip
        encoded = encode_tokens(components.family, encoders, self.ids, self.masks, skip)
        return _joined(encoded, self.counts) if max(self.counts) > 1 else encoded


def tokenize_prompts(
    components: Components, prompts: Sequence[str], adapters: Sequence[str | None] | None = None
) -> PromptTokens:
    """Tokenize B prompts for every text encoder, as `encode_prompts` does."""
    adapters = adapters or [None] * len(prompts)
    warn_of_truncation(components, prompts, adapters)
    counts = [1] * len(prompts)
    if components.most_chunks != 1:
        counts = [chunk_count(components, *row) for row in zip(prompts, adapters, strict=True)]
    is_long = any(count > 1 for count in counts)
    tokens = []
    for encoder, tokenizer in zip(components.text_encoders, components.tokenizers, strict=True):
        texts = [
            write_out_words(tokenizer, prompt, own_words(encoder, adapter))
            for prompt, adapter in zip(prompts, adapters, strict=True)
        ]
        chunks = _tokenize_chunks(tokenizer, texts, counts) if is_long else None
        tokens.append(tokenize(tokenizer, texts) if chunks is None else chunks)
    ids, masks = [t.input_ids for t in tokens], [t.attention_mask for t in tokens]
    return PromptTokens(ids, masks, counts)


def encode_weighted(
    components: Components,
    prompts: Sequence[str],
    *,
    clip_skip: int | None = None,
    adapters: Sequence[str | None] | None = None,
) -> Conditioning:
    """Encode prompts with weights (`models.emphasis`), otherwise as `encode_prompts`.

    The pooled output is that of the first chunk without weights. The token limit applies to each
    segment between breaks.

    Raises:
        ConfigError: If a weight is not a number.
    """
    adapters = adapters or [None] * len(prompts)
    skip, encoded = components.clip_skip if clip_skip is None else clip_skip, list[Conditioning]()
    by_encoder = [
        [
            weighted_chunks(tokenizer, prompt, own_words(encoder, adapter), components.most_chunks)
            for prompt, adapter in zip(prompts, adapters, strict=True)
        ]
        for encoder, tokenizer in zip(components.text_encoders, components.tokenizers, strict=True)
    ]
    counts = [max(map(len, chunks)) for chunks in zip(*by_encoder, strict=True)]
    pairs = zip(components.text_encoders, components.tokenizers, by_encoder, strict=True)
    for encoder, tokenizer, by_prompt in pairs:
        (start, _, end), rows = _content(tokenizer, ""), list[Chunk]()
        for chunks, count in zip(by_prompt, counts, strict=True):
            rows += [*chunks, *[Chunk([], [])] * (count - len(chunks))]
        tokens = tokenizer.pad(
            {"input_ids": [[start, *row.ids, end] for row in rows]},
            padding="max_length",
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        )
        ids, masks = [tokens.input_ids], [tokens.attention_mask]
        part = encode_tokens(components.family, [encoder], ids, masks, skip)
        states = weigh_states(part.encoder_hidden_states, [row.weights for row in rows])
        encoded.append(Conditioning(states, part.pooled))
    states = torch.cat([part.encoder_hidden_states for part in encoded], dim=-1)
    return _joined(Conditioning(states, encoded[-1].pooled), counts)


def _joined(chunks: Conditioning, counts: Sequence[int]) -> Conditioning:
    """Concatenate the chunks of each prompt, with the pooled output of the first chunk."""
    prompts = [chunks[sum(counts[:i]) : sum(counts[: i + 1])] for i in range(len(counts))]
    return Conditioning.cat(
        [Conditioning(p.encoder_hidden_states.flatten(0, 1)[None], p[0].pooled) for p in prompts]
    )


def chunk_count(components: Components, prompt: str, adapter: str | None = None) -> int:
    """Return the number of chunks of a prompt, the largest over all tokenizers."""
    most = 1
    for encoder, tokenizer in zip(components.text_encoders, components.tokenizers, strict=True):
        text = write_out_words(tokenizer, prompt, own_words(encoder, adapter))
        most = max(most, -(-len(_content(tokenizer, text)[1]) // (tokenizer.model_max_length - 2)))
    return min(most, components.most_chunks or most)


def _content(tokenizer: Any, text: str) -> tuple[int, list[int], int]:
    """Tokenize a text. Returns start token, token ids and end token."""
    start, *ids, end = tokenizer(text, truncation=False, verbose=False).input_ids
    return start, ids, end


def _tokenize_chunks(tokenizer: Any, prompts: Sequence[str], counts: Sequence[int]) -> Any:
    """Return ``input_ids`` and ``attention_mask`` of all chunks, ``(sum of counts, tokens)``."""
    rows, size = [], tokenizer.model_max_length - 2
    for prompt, count in zip(prompts, counts, strict=True):
        start, ids, end = _content(tokenizer, prompt)
        rows += [[start, *ids[size * k : size * (k + 1)], end] for k in range(count)]
    length = tokenizer.model_max_length
    return tokenizer.pad(
        {"input_ids": rows}, padding="max_length", max_length=length, return_tensors="pt"
    )


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> Any:
    """Return ``input_ids`` and ``attention_mask``, each ``(B, tokens)``, padded and truncated."""
    length = tokenizer.model_max_length
    return tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )


def encode_tokens(
    family: Family,
    encoders: Sequence[nn.Module],
    input_ids: Sequence[Tensor],
    attention_masks: Sequence[Tensor] | None = None,
    clip_skip: int = 0,
) -> Conditioning:
    """Encode the tokens of B prompts, ``(B, tokens)`` for each text encoder of the family.

    Attention masks are used only by encoders with ``use_attention_mask`` in their configuration.
    """
    encoded = []
    for index, (encoder, ids) in enumerate(zip(encoders, input_ids, strict=True)):
        device, mask = computing_device(encoder), None
        # A few models like Stable Diffusion 1 mask the padding; the released CLIP models do not.
        if attention_masks and getattr(encoder.config, "use_attention_mask", False):
            mask = send(attention_masks[index], device)
        encoded.append(family.encode_text(encoder, send(ids, device), mask, clip_skip))
    states, pooled = zip(*encoded, strict=True)
    return Conditioning(states[0] if len(states) == 1 else torch.cat(states, dim=-1), pooled[-1])


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
    *,
    weighted: bool = False,
) -> Conditioning:
    """Encode negative prompts without clip skip, as in Diffusers' pipelines."""
    encode = encode_weighted if weighted else encode_prompts
    return encode(components, prompts, clip_skip=0, adapters=adapters)


def truncated_text(
    tokenizer: Any,
    prompt: str,
    most_chunks: int | None = 1,
    own_tokens: Mapping[str, str] | None = None,
) -> str:
    """Return the end of a prompt beyond the token limit, or an empty string.

    Args:
        tokenizer: The tokenizer.
        prompt: The prompt.
        most_chunks: Number of chunks that are encoded; None: all.
        own_tokens: Tokens of one adapter (`own_words`).
    """
    if most_chunks is None:
        return ""
    _, ids, _ = _content(tokenizer, write_out_words(tokenizer, prompt, own_tokens))
    cut = str(tokenizer.decode(ids[(tokenizer.model_max_length - 2) * most_chunks :])).strip()
    for word, name in (own_tokens or {}).items():
        cut = cut.replace(name, word)
    return cut


def token_limit(components: Components) -> str:
    """Return the token limit as text."""
    if components.most_chunks == 1:
        return f"the model's {components.tokenizers[0].model_max_length} tokens"
    return f"{components.max_token_length} tokens (max_token_length)"


MORE_TOKENS = "; max_token_length reads more, in chunks"

# Prompts with a warning, by tokenizer, since captions recur in every epoch.
_WARNED: WeakKeyDictionary[Any, set[tuple[str, int | None]]] = WeakKeyDictionary()
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
    encoder, tokenizer = components.text_encoders[0], components.tokenizers[0]
    warned, chunks = _WARNED.setdefault(tokenizer, set()), components.most_chunks
    for prompt, adapter in dict.fromkeys(zip_longest(prompts, adapters)):
        tokens = own_words(encoder, adapter)
        known = (prompt, chunks) in warned
        if not known and (cut := truncated_text(tokenizer, prompt, chunks, tokens)):
            if len(warned) == _MOST_WARNED:  # Limits the memory of a server.
                warned.clear()
            warned.add((prompt, chunks))
            warnings.warn(
                f"the prompt is longer than {token_limit(components)}; the model will not see the "
                f"end: {quoted(cut)}{MORE_TOKENS}",
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
