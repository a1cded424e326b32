"""FLUX.2-klein: a transformer over patches of latents, with prompts read by a language model.

Names and conventions are those of Diffusers' `Flux2KleinPipeline`: the transformer is told the
share of noise, and predicts the velocity from image to noise. It attends to the padding of prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dora_diffusion.models.conditioning import Conditioning
from dora_diffusion.models.families import LoadedModel, chat
from dora_diffusion.models.offload import computing_device, send

# Layers of the language model whose states are the conditioning, side by side.
LAYERS = (9, 18, 27)


def predict(
    components: LoadedModel,
    noisy_latents: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    time_ids: Tensor | None = None,
    condition: Tensor | None = None,
) -> Tensor:
    """Return the velocity from image to noise, ``(B, C, h, w)`` (`FamilyCode.predict`)."""
    transformer, (height, width) = components.denoiser, noisy_latents.shape[2:]
    dtype, device = next(transformer.parameters()).dtype, noisy_latents.device
    states = conditioning.to(device, dtype).encoder_hidden_states
    (velocity,) = transformer(
        noisy_latents.to(dtype).flatten(2).transpose(1, 2),
        encoder_hidden_states=states,
        timestep=components.process.time(timesteps),
        img_ids=_positions(height, width, 1, device),
        txt_ids=_positions(1, 1, states.shape[1], device),
        return_dict=False,
    )
    prediction: Tensor = velocity.transpose(1, 2).unflatten(2, (height, width))
    return prediction


def _positions(height: int, width: int, length: int, device: torch.device) -> Tensor:
    """Return the positions of tokens: time, row, column and place in a text, ``(n, 4)``."""
    ranges = (torch.arange(size, device=device) for size in (1, height, width, length))
    return torch.cartesian_prod(*ranges)


class PaddedTokens(NamedTuple):
    """Tokens of B prompts as messages of a user, padded to the token limit.

    Attributes:
        ids: Token ids, ``(B, tokens)``.
        mask: Attention mask, likewise.
    """

    ids: Tensor
    mask: Tensor

    def encode(self, components: LoadedModel, clip_skip: int | None = None) -> Conditioning:
        """Encode the tokens (`Tokens.encode`)."""
        (encoder,) = components.text_encoders
        device = computing_device(encoder)
        ids, mask = send(self.ids, device), send(self.mask, device)
        output = encoder(ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        states = [output.hidden_states[layer] for layer in LAYERS]
        return Conditioning(torch.cat(states, dim=-1))


def tokenize_prompts(
    components: LoadedModel, prompts: Sequence[str], adapters: Sequence[str | None]
) -> PaddedTokens:
    """Tokenize B prompts."""
    tokens = chat.tokenize(components, prompts, "max_length", thinks=False)
    return PaddedTokens(tokens.input_ids, tokens.attention_mask)


def truncated_text(
    components: LoadedModel, prompt: str, own_tokens: Mapping[str, str] | None = None
) -> str:
    """Return the end of a prompt beyond the token limit."""
    return chat.truncated_text(components, prompt, thinks=False)


chunk_count, token_limit = chat.chunk_count, chat.token_limit
embedding_arguments = chat.embedding_arguments
