"""Prompts as messages to a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dora_diffusion.models.conditioning import Conditioning
from dora_diffusion.models.families import LoadedModel


def tokenize(components: LoadedModel, prompts: Sequence[str], padding: str, *, thinks: bool) -> Any:
    """Return ``input_ids`` and ``attention_mask`` of B prompts, each ``(B, tokens)``.

    Args:
        components: The loaded model.
        prompts: B prompts.
        padding: ``"longest"`` or ``"max_length"``, at the end.
        thinks: Whether the chat template lets the model think.
    """
    (tokenizer,) = components.tokenizers
    return tokenizer(
        [_message(tokenizer, prompt, thinks) for prompt in prompts],
        padding=padding,
        padding_side="right",
        max_length=components.family.most_tokens,
        truncation=True,
        return_tensors="pt",
    )


def _message(tokenizer: Any, prompt: str, thinks: bool) -> str:
    messages = [{"role": "user", "content": prompt}]
    text: str = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinks
    )
    return text


def truncated_text(components: LoadedModel, prompt: str, *, thinks: bool) -> str:
    """Return the end of a prompt beyond the token limit, or an empty string."""
    (tokenizer,) = components.tokenizers
    text = _message(tokenizer, prompt, thinks)
    ids = tokenizer(text, truncation=False, verbose=False).input_ids
    end = _message(tokenizer, "\0", thinks).partition("\0")[2]
    cut = str(tokenizer.decode(ids[components.family.most_tokens :]))
    return cut.removesuffix(end).strip() if len(cut) > len(end) else ""


def chunk_count(components: LoadedModel, prompt: str, adapter: str | None = None) -> int:
    """Return 1: prompts are not read in chunks."""
    return 1


def token_limit(components: LoadedModel) -> str:
    """Return the token limit as text."""
    return f"the model's {components.family.most_tokens} tokens"


def embedding_arguments(positive: Conditioning, negative: Conditioning) -> dict[str, Any]:
    """Return encoded prompts as arguments of the pipeline."""
    return {
        "prompt_embeds": positive.encoder_hidden_states,
        "negative_prompt_embeds": negative.encoder_hidden_states,
    }
