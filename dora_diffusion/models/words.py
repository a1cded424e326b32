"""Trained words: tokens of a tokenizer, and their vectors beside a text encoder's own table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_diffusion.adapters.layers import AdaptedLayer
from dora_diffusion.formats.adapter.embeddings import Vectors
from dora_diffusion.models.components import Components
from dora_diffusion.wording import quoted


class WordEmbedding(nn.Embedding):
    """A text encoder's table, whose parameter it shares, with rows for the tokens behind it.

    The table is neither copied nor masked: no gradient, decay or moment of the words is in it.

    Args:
        table: What the encoder had.
        first: Id of the first word.
        rows: Its and the next ones' vectors ``(n, C)``.

    Attributes:
        rows: The same in float32, a parameter.
        trains: Whether gradients reach the rows.
    """

    def __init__(self, table: nn.Embedding, first: int, rows: Tensor) -> None:
        super().__init__(table.num_embeddings, table.embedding_dim, _weight=table.weight)
        self.weight = table.weight
        self.first, self.trains = first, True
        rows = rows.detach().to(table.weight.device, torch.float32, copy=True)
        self.rows = nn.Parameter(rows, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """Vectors ``(B, tokens, C)`` of ids ``(B, tokens)``, in the table's dtype."""
        is_word = input >= self.first
        known = F.embedding(input.masked_fill(is_word, 0), self.weight)
        rows = self.rows if self.trains else self.rows.detach()
        words = F.embedding((input - self.first).clamp(min=0), rows)
        return torch.where(is_word.unsqueeze(-1), words.to(known.dtype), known)


def add_tokens(components: Components, tokens: Mapping[str, Vectors]) -> dict[str, WordEmbedding]:
    """Add tokens to the tokenizers and text encoders; other prompts stay the same.

    A token of n vectors is n of the tokenizer, ``<x> <x>_1 <x>_2``, as Diffusers'
    ``load_textual_inversion`` adds it. One that was added before gets the new vectors.

    Args:
        components: The loaded model.
        tokens: By token: vectors ``(C,)``, or ``(n, C)``, of each text encoder.

    Returns:
        The table of each text encoder that has such tokens, by component.

    Raises:
        ValueError: If the model's vocabulary has such a token already, or an adapter is on a table
            of token vectors, which cannot grow then.
    """
    tables: dict[str, WordEmbedding] = {}
    names = components.family.text_encoder_names
    for name, encoder, tokenizer in zip(
        names, components.text_encoders, components.tokenizers, strict=True
    ):
        for token, vectors in tokens.items():
            if name in vectors:
                rows = vectors[name].view(-1, vectors[name].shape[-1])
                tables[name] = _add(encoder, tokenizer, token, rows)
    return tables


def _add(encoder: Any, tokenizer: Any, token: str, rows: Tensor) -> WordEmbedding:
    table, parts = encoder.get_input_embeddings(), token_parts(token, len(rows))
    if isinstance(table, AdaptedLayer):
        raise ValueError(
            f"the trained token {token} cannot be added to a token embedding that carries an "
            "adapter; export the adapter, which writes the token next to the merged model, or "
            "train it without the target token-embedding"
        )
    added = tokenizer.added_tokens_encoder
    if isinstance(table, WordEmbedding) and all(part in added for part in parts):
        with torch.no_grad():
            table.rows[added[token] - table.first :][: len(rows)] = rows.to(table.rows)
        return table
    if known := tokenizer.get_vocab().keys() & {*parts, f"{token}_{len(rows)}"}:
        raise ValueError(
            f"the model's vocabulary has the token {quoted(min(known))} already; "
            "a trained token needs a name of its own"
        )
    first = len(tokenizer)
    tokenizer.add_tokens(parts)
    if isinstance(table, WordEmbedding):
        first, rows = table.first, torch.cat([table.rows, rows.to(table.rows)])
    grown = WordEmbedding(table, first, rows)
    encoder.set_input_embeddings(grown)
    return grown


def token_parts(token: str, count: int) -> list[str]:
    """What a token of several vectors is to the tokenizer: ``<x>``, ``<x>_1``, ``<x>_2``."""
    return [token, *(f"{token}_{number}" for number in range(1, count))]


def has_words(components: Components, prompt: str) -> bool:
    """Whether a prompt holds a trained word, as the model's tokenizers read it."""
    for encoder, tokenizer in zip(components.text_encoders, components.tokenizers, strict=True):
        table = encoder.get_input_embeddings()
        if isinstance(table, WordEmbedding):
            ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
            if max(ids) >= table.first:
                return True
    return False
