"""Trained words: tokens added to a tokenizer, with vectors in the text encoder."""

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
    """Embedding table of a text encoder, extended by rows for added tokens.

    The original table is shared and neither copied nor masked, so that it gets no gradients, weight
    decay or moments.

    Args:
        table: Original embedding table.
        first: Id of the first added token.
        rows: Vectors of the added tokens ``(n, C)``.

    Attributes:
        rows: Vectors of the added tokens, a float32 parameter.
        own: For each adapter with own tokens (`add_own_tokens`), the names of its tokens in the
            tokenizer.
        free: Unused tokens of the tokenizer that adapters had before.
    """

    own: dict[str, dict[str, str]]
    free: list[str]

    def __init__(self, table: nn.Embedding, first: int, rows: Tensor) -> None:
        super().__init__(table.num_embeddings, table.embedding_dim, _weight=table.weight)
        self.weight = table.weight
        self.first, self.own, self.free = first, {}, []
        if isinstance(table, WordEmbedding):
            self.own, self.free = table.own, table.free
        rows = rows.detach().to(table.weight.device, torch.float32, copy=True)
        self.rows = nn.Parameter(rows, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """Look up ids ``(B, tokens)``. Returns ``(B, tokens, C)`` in the dtype of the table."""
        is_word = input >= self.first
        known = F.embedding(input.masked_fill(is_word, 0), self.weight)
        words = F.embedding((input - self.first).clamp(min=0), self.rows)
        return torch.where(is_word.unsqueeze(-1), words.to(known.dtype), known)


def add_tokens(model: Encoders, tokens: Mapping[str, Vectors]) -> dict[str, WordEmbedding]:
    """Add tokens to tokenizers and text encoders. Prompts without them are encoded as before.

    A token with n vectors becomes n tokens of the tokenizer, ``<x> <x>_1 <x>_2``, as in Diffusers'
    ``load_textual_inversion``. The vectors of an existing added token are replaced.

    Args:
        model: The loaded model.
        tokens: Token -> vectors ``(C,)`` or ``(n, C)`` for each text encoder.

    Returns:
        The embedding table of each text encoder with added tokens, by component.

    Raises:
        ValueError: If the vocabulary of the model has the token, or an adapter is on an embedding
            table.
    """
    return {
        name: _add(encoder, tokenizer, token, rows)
        for name, encoder, tokenizer, token, rows in _by_encoder(model, tokens)
    }


def add_own_tokens(model: Encoders, adapter: str, tokens: Mapping[str, Vectors]) -> None:
    """Add tokens that only prompts of one adapter can use (`own_words`).

    Several adapters on one model can thereby have different vectors for the same token. Prompts of
    other adapters encode the token as ordinary text. In the tokenizer, the tokens have random
    names.

    Args:
        model: The loaded model.
        adapter: Name of the adapter.
        tokens: As in `add_tokens`.

    Raises:
        ValueError: As in `add_tokens`. No token is added then.
    """
    try:
        for _, encoder, tokenizer, token, rows in _by_encoder(model, tokens):
            names = token_parts(token, len(rows))
            # Added words of the base model may be trained again.
            vocabulary = tokenizer.get_vocab().keys() - tokenizer.added_tokens_encoder.keys()
            _refuse_known(vocabulary & {*names, f"{token}_{len(rows)}"})
            free = getattr(encoder.get_input_embeddings(), "free", [])
            for name, row in zip(names, rows.split(1), strict=True):
                word = free.pop() if free else f"<{secrets.token_hex(16)}>"
                table = _add(encoder, tokenizer, word, row)
                table.own.setdefault(adapter, {})[name] = word
    except ValueError:
        remove_own_tokens(model, adapter)
        raise


def remove_own_tokens(model: Encoders, adapter: str) -> None:
    """Remove the tokens of one adapter. Their rows are reused by later ones."""
    for encoder in model.text_encoders:
        table = encoder.get_input_embeddings()
        if isinstance(table, WordEmbedding):
            table.free += table.own.pop(adapter, {}).values()


def own_words(encoder: Any, adapter: str | None) -> Mapping[str, str]:
    """Return the tokens of one adapter, with their names in the tokenizer."""
    words: Mapping[str, str] = getattr(encoder.get_input_embeddings(), "own", {}).get(adapter, {})
    return words


def have_own_words(model: Encoders, adapters: Collection[str | None]) -> bool:
    """Return whether any of the adapters has its own tokens."""
    tables = [encoder.get_input_embeddings() for encoder in model.text_encoders]
    return any(not {*adapters}.isdisjoint(getattr(table, "own", ())) for table in tables)


def _by_encoder(
    model: Encoders, tokens: Mapping[str, Vectors]
) -> Iterator[tuple[str, Any, Any, str, Tensor]]:
    """Yield component, text encoder, tokenizer, token and rows for each token of each encoder."""
    names = model.family.text_encoder_names
    for name, encoder, tokenizer in zip(names, model.text_encoders, model.tokenizers, strict=True):
        for token, vectors in tokens.items():
            if name in vectors:
                rows = vectors[name].view(-1, vectors[name].shape[-1])
                yield name, encoder, tokenizer, token, rows


def _refuse_known(known: Collection[str]) -> None:
    if known:
        raise ValueError(
            f"the model's vocabulary already has the token {quoted(min(known))}; give the trained "
            "token another name"
        )


def _add(encoder: Any, tokenizer: Any, token: str, rows: Tensor) -> WordEmbedding:
    table, names = encoder.get_input_embeddings(), token_parts(token, len(rows))
    if isinstance(table, AdaptedLayer):
        raise ValueError(
            f"the trained token {token} cannot be added to a token embedding with an adapter; "
            "export the adapter, which writes the token next to the merged model, or train it "
            "without the target token-embedding"
        )
    added = tokenizer.added_tokens_encoder
    if isinstance(table, WordEmbedding) and all(name in added for name in names):
        with torch.no_grad():
            table.rows[added[token] - table.first :][: len(rows)] = rows.to(table.rows)
        return table
    _refuse_known(tokenizer.get_vocab().keys() & {*names, f"{token}_{len(rows)}"})
    first = len(tokenizer)
    tokenizer.add_tokens([AddedToken(name, single_word=True, normalized=True) for name in names])
    if isinstance(table, WordEmbedding):
        first, rows = table.first, torch.cat([table.rows, rows.to(table.rows)])
    extended = WordEmbedding(table, first, rows)
    encoder.set_input_embeddings(extended)
    return extended


def token_parts(token: str, count: int) -> list[str]:
    """Return the names of a multi-vector token in the tokenizer: ``<x>``, ``<x>_1``, ``<x>_2``."""
    return [token, *(f"{token}_{number}" for number in range(1, count))]


def write_out_words(
    tokenizer: Any, prompt: str, own_tokens: Mapping[str, str] | None = None
) -> str:
    """Replace trained words in a prompt by all their tokens: ``A <X> dog`` -> ``a <x> <x>_1 dog``.

    Words are matched by `whole_word`: regardless of case, next to punctuation or each other, and
    not inside other words. A word that is followed by its second token is not replaced. A prompt
    without trained words is returned unchanged; other prompts are normalized by the tokenizer.

    Args:
        tokenizer: The tokenizer.
        prompt: The prompt.
        own_tokens: Tokens of one adapter (`own_words`).
    """
    normalize = tokenizer.backend_tokenizer.normalizer.normalize_str
    text = normalize(prompt)
    own_tokens = {normalize(word): name for word, name in (own_tokens or {}).items()}
    added = ((normalize(word), word) for word in tokenizer.added_tokens_encoder)
    names = {
        word: name for word, name in added if word.rpartition("_")[0] not in own_tokens
    } | own_tokens
    known = [word for word in names if word in text]
    if not known:
        return prompt

    def write_out(match: re.Match[str]) -> str:
        word, tokens = match[0], [names[match[0]]]
        if not re.match(rf" {re.escape(word)}_1(?!\w)", text[match.end() :]):
            while (name := f"{word}_{len(tokens)}") in names:
                tokens.append(names[name])
        # The tokenizer finds added tokens only between characters that are not word characters.
        left = " " * bool(re.match(r"\w", text[: match.start()][-1:]))
        after = text[match.end() :]
        right = " " * bool(re.match(r"\w", after) or pattern.match(after))
        return f"{left}{' '.join(tokens)}{right}"

    # The longest match has precedence, as in the tokenizer.
    words = sorted(known, key=len, reverse=True)
    pattern = re.compile("|".join(whole_word(word).pattern for word in words))
    return pattern.sub(write_out, text)


def has_words(model: Encoders, prompt: str) -> bool:
    """Return whether a prompt contains a trained word for any of the tokenizers."""
    for encoder, tokenizer in zip(model.text_encoders, model.tokenizers, strict=True):
        table = encoder.get_input_embeddings()
        if isinstance(table, WordEmbedding):
            text = write_out_words(tokenizer, prompt)
            ids = tokenizer(text, truncation=False, verbose=False).input_ids
            if max(ids) >= table.first:
                return True
    return False
