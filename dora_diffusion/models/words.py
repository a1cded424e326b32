"""Trained words: tokens of a tokenizer, and their vectors beside a text encoder's own table."""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from tokenizers import AddedToken
from torch import Tensor, nn

from dora_diffusion.adapters.layers import AdaptedLayer
from dora_diffusion.config.families import Family
from dora_diffusion.config.wording import quoted, whole_word
from dora_diffusion.formats.adapter.embeddings import Vectors


class Encoders(Protocol):
    """Part of a loaded model that reads prompts (`models.components.Components`)."""

    @property
    def family(self) -> Family: ...
    @property
    def text_encoders(self) -> tuple[Any, ...]: ...
    @property
    def tokenizers(self) -> tuple[Any, ...]: ...


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
        own: Of each adapter that has tokens of its own (`add_own_tokens`): what the tokenizer calls
            the parts of each.
        free: Tokens of the tokenizer that were an adapter's own.
    """

    own: dict[str, dict[str, str]]
    free: list[str]

    def __init__(self, table: nn.Embedding, first: int, rows: Tensor) -> None:
        super().__init__(table.num_embeddings, table.embedding_dim, _weight=table.weight)
        self.weight = table.weight
        self.first, self.trains = first, True
        self.own, self.free = {}, []
        if isinstance(table, WordEmbedding):
            self.own, self.free = table.own, table.free
        rows = rows.detach().to(table.weight.device, torch.float32, copy=True)
        self.rows = nn.Parameter(rows, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """Vectors ``(B, tokens, C)`` of ids ``(B, tokens)``, in the table's dtype."""
        is_word = input >= self.first
        known = F.embedding(input.masked_fill(is_word, 0), self.weight)
        rows = self.rows if self.trains else self.rows.detach()
        words = F.embedding((input - self.first).clamp(min=0), rows)
        return torch.where(is_word.unsqueeze(-1), words.to(known.dtype), known)


def add_tokens(model: Encoders, tokens: Mapping[str, Vectors]) -> dict[str, WordEmbedding]:
    """Add tokens to the tokenizers and text encoders; other prompts stay the same.

    A token of n vectors is n of the tokenizer, ``<x> <x>_1 <x>_2``, as Diffusers'
    ``load_textual_inversion`` adds it. One that was added before gets the new vectors.

    Args:
        model: The loaded model.
        tokens: By token: vectors ``(C,)``, or ``(n, C)``, of each text encoder.

    Returns:
        The table of each text encoder that has such tokens, by component.

    Raises:
        ValueError: If the model's vocabulary has such a token already, or an adapter is on a table
            of token vectors, which cannot grow then.
    """
    return {
        name: _add(encoder, tokenizer, token, rows)
        for name, encoder, tokenizer, token, rows in _by_encoder(model, tokens)
    }


def add_own_tokens(model: Encoders, adapter: str, tokens: Mapping[str, Vectors]) -> None:
    """Add tokens that only the prompts of one adapter have (`own_words`).

    So adapters that have trained one token with different vectors are on one model, and a prompt
    of any other adapter reads the token's letters. To the tokenizer each part of a token is a
    word that nobody can guess.

    Args:
        model: The loaded model.
        adapter: The adapter's name.
        tokens: As in `add_tokens`.

    Raises:
        ValueError: As `add_tokens` raises it; then none of them is added.
    """
    try:
        for _, encoder, tokenizer, token, rows in _by_encoder(model, tokens):
            parts = token_parts(token, len(rows))
            # A word that was trained into the base may be trained again.
            taken = tokenizer.get_vocab().keys() - tokenizer.added_tokens_encoder.keys()
            _require_new(taken & {*parts, f"{token}_{len(rows)}"})
            free = getattr(encoder.get_input_embeddings(), "free", [])
            for part, row in zip(parts, rows.split(1), strict=True):
                word = free.pop() if free else f"<{secrets.token_hex(16)}>"
                table = _add(encoder, tokenizer, word, row)
                table.own.setdefault(adapter, {})[part] = word
    except ValueError:
        remove_own_tokens(model, adapter)
        raise


def remove_own_tokens(model: Encoders, adapter: str) -> None:
    """Forget an adapter's own tokens; the next ones take their places."""
    for encoder in model.text_encoders:
        table = encoder.get_input_embeddings()
        if isinstance(table, WordEmbedding):
            table.free += table.own.pop(adapter, {}).values()


def own_words(encoder: Any, adapter: str | None) -> Mapping[str, str]:
    """An adapter's own tokens: what the encoder's tokenizer calls the parts of each."""
    words: Mapping[str, str] = getattr(encoder.get_input_embeddings(), "own", {}).get(adapter, {})
    return words


def have_own_words(model: Encoders, adapters: Collection[str | None]) -> bool:
    """Return whether one of these adapters has tokens of its own."""
    tables = [encoder.get_input_embeddings() for encoder in model.text_encoders]
    return any(not {*adapters}.isdisjoint(getattr(table, "own", ())) for table in tables)


def _by_encoder(
    model: Encoders, tokens: Mapping[str, Vectors]
) -> Iterator[tuple[str, Any, Any, str, Tensor]]:
    """Component, text encoder and tokenizer, and each token that is for them with its rows."""
    names = model.family.text_encoder_names
    for name, encoder, tokenizer in zip(names, model.text_encoders, model.tokenizers, strict=True):
        for token, vectors in tokens.items():
            if name in vectors:
                rows = vectors[name].view(-1, vectors[name].shape[-1])
                yield name, encoder, tokenizer, token, rows


def _require_new(known: Collection[str]) -> None:
    if known:
        raise ValueError(
            f"the model's vocabulary has the token {quoted(min(known))} already; "
            "a trained token needs a name of its own"
        )


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
    _require_new(tokenizer.get_vocab().keys() & {*parts, f"{token}_{len(rows)}"})
    first = len(tokenizer)
    tokenizer.add_tokens([AddedToken(part, single_word=True, normalized=True) for part in parts])
    if isinstance(table, WordEmbedding):
        first, rows = table.first, torch.cat([table.rows, rows.to(table.rows)])
    grown = WordEmbedding(table, first, rows)
    encoder.set_input_embeddings(grown)
    return grown


def token_parts(token: str, count: int) -> list[str]:
    """Return the tokenizer's names of a multi-vector token: ``<x>``, ``<x>_1``, ``<x>_2``."""
    return [token, *(f"{token}_{number}" for number in range(1, count))]


def write_out_words(tokenizer: Any, prompt: str, own: Mapping[str, str] | None = None) -> str:
    """A prompt with all vectors of its trained words: ``A <X> dog`` becomes ``a <x> <x>_1 dog``.

    Words are read as `whole_word` reads them, everywhere: whatever their case, beside any
    punctuation and each other, and not inside other words. A word whose next vector is written
    behind it stays as it is. A prompt without words is returned as it is, any other as the
    tokenizer normalizes it.

    Args:
        tokenizer: A tokenizer.
        prompt: The prompt.
        own: An adapter's own tokens (`own_words`).
    """
    normalize = tokenizer.backend_tokenizer.normalizer.normalize_str
    text, own = normalize(prompt), {normalize(word): name for word, name in (own or {}).items()}
    added = ((normalize(word), word) for word in tokenizer.added_tokens_encoder)
    names = {word: name for word, name in added if word.rpartition("_")[0] not in own} | own
    found = [word for word in names if word in text]
    if not found:
        return prompt

    def write_out(match: re.Match[str]) -> str:
        word, parts = match[0], [names[match[0]]]
        if not re.match(rf" {re.escape(word)}_1(?!\w)", text[match.end() :]):
            while (part := f"{word}_{len(parts)}") in names:
                parts.append(names[part])
        # A tokenizer finds them between other characters than those of words.
        left = " " * bool(re.match(r"\w", text[: match.start()][-1:]))
        after = text[match.end() :]
        right = " " * bool(re.match(r"\w", after) or pattern.match(after))
        return f"{left}{' '.join(parts)}{right}"

    # The longest first, as a tokenizer finds them.
    words = sorted(found, key=len, reverse=True)
    pattern = re.compile("|".join(whole_word(word).pattern for word in words))
    return pattern.sub(write_out, text)


def has_words(model: Encoders, prompt: str) -> bool:
    """Return whether a prompt holds a trained word, as the model's tokenizers read it."""
    for encoder, tokenizer in zip(model.text_encoders, model.tokenizers, strict=True):
        table = encoder.get_input_embeddings()
        if isinstance(table, WordEmbedding):
            text = write_out_words(tokenizer, prompt)
            ids = tokenizer(text, truncation=False, verbose=False).input_ids
            if max(ids) >= table.first:
                return True
    return False
