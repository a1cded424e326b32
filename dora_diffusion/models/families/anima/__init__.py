"""Anima: a transformer of videos that makes one frame, with prompts read by two tokenizers.

Names and conventions are those of Diffusers' `AnimaModularPipeline`: a language model reads the
prompt, a conditioner reads T5's tokens of the prompt and the language model's states, and the
transformer, which is told the share of noise, predicts the velocity from image to noise. It attends
to the padding of the conditioner's output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from dora_diffusion.models.conditioning import Conditioning
from dora_diffusion.models.families import LoadedModel, chat
from dora_diffusion.models.families.anima.modules import (
    AnimaTextConditioner,
    AutoencoderKLQwenImage,
    CosmosTransformer3DModel,
)
from dora_diffusion.models.families.anima.pipeline import AnimaModularPipeline
from dora_diffusion.models.offload import computing_device, send

__all__ = [
    "AnimaModularPipeline", "AnimaTextConditioner", "AutoencoderKLQwenImage",
    "CosmosTransformer3DModel", "chunk_count", "embedding_arguments", "predict", "token_limit",
    "tokenize_prompts", "truncated_text",
]  # fmt: skip


def predict(
    components: LoadedModel,
    noisy_latents: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    time_ids: Tensor | None = None,
    condition: Tensor | None = None,
) -> Tensor:
    """Return the velocity from image to noise, ``(B, C, h, w)`` (`FamilyCode.predict`)."""
    transformer = components.denoiser
    dtype, device = next(transformer.parameters()).dtype, noisy_latents.device
    (velocity,) = transformer(
        noisy_latents.to(dtype).unsqueeze(2),  # One frame.
        components.process.time(timesteps).to(dtype),
        conditioning.to(device, dtype).encoder_hidden_states,
        return_dict=False,
    )
    prediction: Tensor = velocity.squeeze(2)
    return prediction


class TwoTokenizations(NamedTuple):
    """Tokens of B prompts for the language model and for the conditioner, padded at the end.

    Attributes:
        ids: Token ids of the language model, ``(B, tokens)``. An empty text has one, masked.
        mask: Its attention mask, likewise.
        t5_ids: Token ids of T5, ``(B, T5's tokens)``.
        t5_mask: Their attention mask, likewise.
    """

    ids: Tensor
    mask: Tensor
    t5_ids: Tensor
    t5_mask: Tensor

    def encode(self, components: LoadedModel, clip_skip: int | None = None) -> Conditioning:
        """Encode the tokens (`Tokens.encode`)."""
        encoder, conditioner = components.text_encoders
        device = computing_device(encoder)
        ids, mask = send(self.ids, device), send(self.mask, device)
        states = encoder(ids, attention_mask=mask, use_cache=False).last_hidden_state
        states = states * mask[:, :, None]
        inputs = (states, send(self.t5_ids, device), send(self.t5_mask, device), mask)
        device = computing_device(conditioner)
        return Conditioning(conditioner(*(send(tensor, device) for tensor in inputs)))


def tokenize_prompts(
    components: LoadedModel, prompts: Sequence[str], adapters: Sequence[str | None]
) -> TwoTokenizations:
    """Tokenize B prompts."""
    tokens = list[Tensor]()
    for tokenizer in components.tokenizers:
        batch = tokenizer(
            list(prompts),
            padding="longest",
            padding_side="right",
            max_length=components.family.most_tokens,
            truncation=True,
            return_tensors="pt",
        )
        ids, mask = batch.input_ids.long(), batch.attention_mask.long()
        if not ids.shape[1]:
            ids, mask = ids.new_zeros(len(prompts), 1), mask.new_zeros(len(prompts), 1)
        tokens += [ids, mask]
    return TwoTokenizations(*tokens)


def truncated_text(
    components: LoadedModel, prompt: str, own_tokens: Mapping[str, str] | None = None
) -> str:
    """Return the end of a prompt beyond the token limit, the longest of both tokenizers."""
    ends = (
        tokenizer.decode(
            tokenizer(prompt, truncation=False, verbose=False).input_ids[
                components.family.most_tokens :
            ],
            skip_special_tokens=True,
        )
        for tokenizer in components.tokenizers
    )
    return max(map(str.strip, ends), key=len)


chunk_count, token_limit = chat.chunk_count, chat.token_limit
embedding_arguments = chat.embedding_arguments
