"""Stable Diffusion 1, 2 and XL: predictions of a UNet, and prompts encoded by CLIP.

Diffusers truncates prompts at 75 tokens. With a larger `Components.max_token_length`, prompts are
encoded in chunks as in web UIs: each chunk is a text with its own start and end token, and the
hidden states of all chunks are concatenated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from dora_diffusion.models.conditioning import Conditioning
from dora_diffusion.models.families import LoadedModel
from dora_diffusion.models.offload import computing_device, send
from dora_diffusion.models.words import own_words, write_out_words

if TYPE_CHECKING:
    from dora_diffusion.config.families import Family


def predict(
    components: LoadedModel,
    noisy_latents: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    time_ids: Tensor | None = None,
    condition: Tensor | None = None,
) -> Tensor:
    """Predict as `FamilyCode.predict`."""
    return predict_by_unet(
        components.denoiser, noisy_latents, timesteps, conditioning, time_ids, condition
    )


def predict_by_unet(
    unet: Any,
    noisy_latents: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    time_ids: Tensor | None = None,
    condition: Tensor | None = None,
) -> Tensor:
    """Return the UNet's prediction of noise or velocity (by prediction type), ``(B, C, h, w)``.

    Args:
        unet: A ``UNet2DConditionModel``, with or without adapters. Inputs are cast to its dtype.
        noisy_latents: ``(B, C, h, w)``.
        timesteps: ``(B,)`` int64.
        conditioning: Conditioning of B prompts.
        time_ids: Size and crop conditioning of SDXL, ``(B, 6)``; None for other families.
        condition: Further input channels (`condition_from_moments`), ``(B, n, h, w)``.
    """
    # The dtype of the first weight, since `unet.dtype` of Diffusers visits every module.
    dtype = next(unet.parameters()).dtype
    conditioning = conditioning.to(noisy_latents.device, dtype)
    if condition is not None:
        noisy_latents = torch.cat([noisy_latents, condition], dim=1)
    prediction: Tensor = unet(
        noisy_latents.to(dtype),
        timesteps,
        conditioning.encoder_hidden_states,
        added_cond_kwargs=conditioning.added_cond_kwargs(time_ids),
    ).sample
    return prediction


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

    def encode(self, components: LoadedModel, clip_skip: int | None = None) -> Conditioning:
        """Encode the tokens (`encode_prompts`)."""
        skip, encoders = clip_skip, components.text_encoders
        if skip is None:
            skip = components.clip_skip
        encoded = encode_tokens(components.family, encoders, self.ids, self.masks, skip)
        return _joined(encoded, self.counts) if max(self.counts) > 1 else encoded


def tokenize_prompts(
    components: LoadedModel, prompts: Sequence[str], adapters: Sequence[str | None]
) -> PromptTokens:
    """Tokenize B prompts for every text encoder."""
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


def _joined(chunks: Conditioning, counts: Sequence[int]) -> Conditioning:
    """Concatenate the chunks of each prompt, with the pooled output of the first chunk."""
    prompts = [chunks[sum(counts[:i]) : sum(counts[: i + 1])] for i in range(len(counts))]
    return Conditioning.cat(
        [Conditioning(p.encoder_hidden_states.flatten(0, 1)[None], p[0].pooled) for p in prompts]
    )


def chunk_count(components: LoadedModel, prompt: str, adapter: str | None = None) -> int:
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
        encoded.append(encode_text(family, encoder, send(ids, device), mask, clip_skip))
    states, pooled = zip(*encoded, strict=True)
    return Conditioning(states[0] if len(states) == 1 else torch.cat(states, dim=-1), pooled[-1])


def encode_text(
    family: Family, encoder: Any, input_ids: Any, attention_mask: Any, clip_skip: int = 0
) -> tuple[Any, Any]:
    """Compute a text encoder's states ``(B, tokens, C)`` and pooled output ``(B, P)`` or None.

    Args:
        family: Family of the model.
        encoder: A CLIP text encoder, with or without a projection.
        input_ids: ``(B, tokens)`` int64.
        attention_mask: ``(B, tokens)``; None: the padding is attended to.
        clip_skip: Number of further layers to skip at the end, as in Diffusers' pipelines.
    """
    if family.hidden_state == "penultimate":
        output = encoder(input_ids, output_hidden_states=True)
        states = output.hidden_states[-2 - clip_skip]
        return states, output[0] if family.has_pooled else None
    if clip_skip:
        output = encoder(input_ids, attention_mask=attention_mask, output_hidden_states=True)
        # The encoders of Transformers 5 have no `text_model`.
        norm = getattr(encoder, "text_model", encoder).final_layer_norm
        states = norm(output.hidden_states[-1 - clip_skip])
        return states, output[1] if family.has_pooled else None
    output = encoder(input_ids, attention_mask=attention_mask)
    return output[0], output[1] if family.has_pooled else None


def truncated_text(
    components: LoadedModel, prompt: str, own_tokens: Mapping[str, str] | None = None
) -> str:
    """Return the end of a prompt beyond the token limit of the first text encoder."""
    tokenizer, chunks = components.tokenizers[0], components.most_chunks
    if chunks is None:
        return ""
    _, ids, _ = _content(tokenizer, write_out_words(tokenizer, prompt, own_tokens))
    return str(tokenizer.decode(ids[(tokenizer.model_max_length - 2) * chunks :])).strip()


def token_limit(components: LoadedModel) -> str:
    """Return the token limit as text."""
    if components.most_chunks == 1:
        return f"the model's {components.tokenizers[0].model_max_length} tokens"
    return f"{components.max_token_length} tokens (max_token_length)"


def embedding_arguments(positive: Conditioning, negative: Conditioning) -> dict[str, Any]:
    """Return encoded prompts as arguments of the pipeline."""
    both = Conditioning.cat([positive, negative])
    parts = {"prompt_embeds": both.encoder_hidden_states, "pooled_prompt_embeds": both.pooled}
    return {
        prefix + name: tensors
        for name, tensor in parts.items()
        if tensor is not None
        for prefix, tensors in (
            ("", tensor[: len(positive)]),
            ("negative_", tensor[len(positive) :]),
        )
    }
