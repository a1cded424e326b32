"""Prompts to the UNet's conditioning, computed exactly as diffusers' pipelines compute it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dora_diffusion.adapters.layers import AdaptedLayer
from dora_diffusion.models.transfer import send
from dora_diffusion.models.weights import quiet_libraries
from dora_diffusion.wording import listing, quoted

if TYPE_CHECKING:
    from dora_diffusion.families import Family, HiddenState
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
    state = components.family.hidden_state
    encoded = [
        encode_tokens(encoder, token.input_ids, state, token.attention_mask)
        for encoder, token in zip(components.text_encoders, tokens, strict=True)
    ]
    return join_encoders(encoded, components.family)


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
    encoder: nn.Module,
    input_ids: Tensor,
    choice: HiddenState,
    attention_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One encoder's states ``(B, tokens, C)`` and pooled (projected, where it has one) output.

    Args:
        encoder: A CLIP text encoder, with or without a projection.
        input_ids: ``(B, tokens)`` int64.
        choice: Which hidden state conditions the UNet (`Family.hidden_state`).
        attention_mask: ``(B, tokens)``, used where the encoder's config asks for it.
    """
    device = next(encoder.parameters()).device
    input_ids = send(input_ids, device)
    if choice == "penultimate":
        output = encoder(input_ids, output_hidden_states=True)
        return output.hidden_states[-2], output[0]
    # A few SD1-style models ask for the padding to be masked; CLIP's own configs never do.
    mask = attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
    output = encoder(input_ids, attention_mask=None if mask is None else send(mask, device))
    return output[0], output[1]


def join_encoders(encoded: Sequence[tuple[Tensor, Tensor]], family: Family) -> Conditioning:
    """The family's conditioning from what `encode_tokens` made of each of its text encoders."""
    states = [state for state, _ in encoded]
    hidden = states[0] if len(states) == 1 else torch.cat(states, dim=-1)
    return Conditioning(hidden, encoded[-1][1] if family.has_pooled else None)


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


def add_tokens(components: Components, tokens: Mapping[str, Tensor]) -> None:
    """Add trained tokens to the first text encoder and its tokenizer; other prompts stay the same.

    Args:
        components: The loaded model.
        tokens: Vectors ``(C,)``, or ``(n, C)``, by token.

    Raises:
        ValueError: If the model's vocabulary has such a token already, or an adapter is on the
            table of its token vectors, which cannot grow then.
    """
    if not tokens:
        return
    if isinstance(components.text_encoders[0].get_input_embeddings(), AdaptedLayer):
        raise ValueError(
            f"trained tokens ({listing(tokens)}) cannot be added to a token embedding that carries "
            "an adapter; export the adapter, which writes the tokens beside the merged model"
        )
    pipeline = components.pipeline()
    with quiet_libraries():
        for token, vectors in tokens.items():
            pipeline.load_textual_inversion({token: vectors})


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


def time_ids(
    original_size: tuple[int, int], crop_top_left: tuple[int, int], target_size: tuple[int, int]
) -> Tensor:
    """SDXL's size and crop conditioning of one image, ``(6,)`` float32.

    All pairs are (height, width) or (top, left) in pixels (arXiv:2307.01952, section 2.2): the
    photo's own size, the crop's corner in the resized photo, and the size trained on.
    """
    return torch.tensor([*original_size, *crop_top_left, *target_size], dtype=torch.float32)
