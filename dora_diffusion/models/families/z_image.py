"""Z-Image: a transformer that is trained on a flow, with prompts read by a language model.

Names and conventions are those of Diffusers' `ZImagePipeline`: the transformer is told the share of
the image, 0 at pure noise, and predicts the velocity towards the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dora_diffusion.models.conditioning import Conditioning
from dora_diffusion.models.families import LoadedModel, chat
from dora_diffusion.models.offload import computing_device, send


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
    dtype = next(transformer.parameters()).dtype
    prompts = conditioning.to(noisy_latents.device, dtype).by_prompt()
    images = list(noisy_latents.to(dtype).unsqueeze(2))  # One frame of a video each.
    times = 1 - components.process.time(timesteps)
    (velocities,) = transformer(images, times, prompts, return_dict=False)
    return -torch.stack(velocities).squeeze(2)


class ChatTokens(NamedTuple):
    """Tokens of B prompts as messages of a user, padded at the end.

    Attributes:
        ids: Token ids, ``(B, tokens)``.
        mask: Attention mask, likewise.
    """

    ids: Tensor
    mask: Tensor

    def encode(self, components: LoadedModel, clip_skip: int | None = None) -> Conditioning:
        """Encode the tokens (`Tokens.encode`)."""
        skip = components.clip_skip if clip_skip is None else clip_skip
        (encoder,) = components.text_encoders
        device = computing_device(encoder)
        mask = send(self.mask, device)
        output = encoder(
            send(self.ids, device), attention_mask=mask, output_hidden_states=True, use_cache=False
        )
        states = output.hidden_states[-2 - skip]
        states = states.masked_fill(mask[:, :, None] == 0, 0)
        return Conditioning(states, None, tuple(self.mask.sum(dim=1).tolist()))


def tokenize_prompts(
    components: LoadedModel, prompts: Sequence[str], adapters: Sequence[str | None]
) -> ChatTokens:
    """Tokenize B prompts. Padding to 512 tokens would not change the states of a prompt."""
    tokens = chat.tokenize(components, prompts, "longest", thinks=True)
    return ChatTokens(tokens.input_ids, tokens.attention_mask)


def truncated_text(
    components: LoadedModel, prompt: str, own_tokens: Mapping[str, str] | None = None
) -> str:
    """Return the end of a prompt beyond the token limit."""
    return chat.truncated_text(components, prompt, thinks=True)


chunk_count, token_limit = chat.chunk_count, chat.token_limit


def embedding_arguments(positive: Conditioning, negative: Conditioning) -> dict[str, Any]:
    """Return encoded prompts as arguments of the pipeline."""
    return {
        "prompt_embeds": positive.by_prompt(),
        "negative_prompt_embeds": negative.by_prompt(),
    }
