"""Prompt weights as in A1111: ``(word:1.2)``, ``(word)``, ``[word]`` and ``BREAK``.

The hidden states of each token are multiplied by its weight, then all states of the chunk are
rescaled to their original mean. Chunks have the 75 tokens of CLIP (30 for the embedded models). A
full chunk ends after its last comma if that is among its last 20 tokens.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dora_diffusion.config.fields import ConfigError
from dora_diffusion.config.wording import quoted
from dora_diffusion.formats.parameters import network_tags
from dora_diffusion.models.words import write_out_words

BREAK = "BREAK"
_FACTOR = 1.1
_BACKTRACK = 20
_SYNTAX = re.compile(rf"[()\[\]\\]|\b{BREAK}\b")
# Escaped character; weight before a closing bracket; bracket; break; other text.
_PIECE = re.compile(
    rf"\\([()\[\]\\]?)|:\s*([+-]?[.\d]+)\s*\)|([()\[\]])|\s*\b({BREAK})\b\s*"
    rf"|((?:(?!\s*\b{BREAK}\b)[^\\()\[\]:])+|:)"
)
_EDITING = re.compile(r"(?<!\\)\[[^\[\]()]*(?:\|[^\[\]]*|:\s*[.\d]+\s*)(?<!\\)\]")
_BRACKETS = re.compile(r"(?<!\\)\([^()\[\]]*(?<!\\)\)")


class Chunk(NamedTuple):
    """Tokens of a prompt that are encoded together, without start and end, and their weights."""

    ids: list[int]
    weights: list[float]


def has_weights(prompt: str) -> bool:
    """Return whether a prompt has brackets, a backslash or a ``BREAK``."""
    return _SYNTAX.search(prompt) is not None


def has_editing(prompt: str) -> bool:
    """Return whether a prompt changes over the steps in A1111: ``[a:b:0.5]``, ``[a|b]``."""
    # Text in round brackets counts as one piece inside square brackets.
    while prompt != (prompt := _BRACKETS.sub("x", prompt)):
        pass
    return _EDITING.search(prompt) is not None


def unread_syntax(prompt: str) -> list[str]:
    """Return the syntax of A1111 and ComfyUI in a prompt that is not supported, by description."""
    kinds = {
        "[a:b:0.5] and [a|b], which change a prompt over the steps": has_editing(prompt),
        "AND, which combines prompts": re.search(r"\bAND\b", prompt),
        "embedding:NAME, a trained word of ComfyUI": re.search(r"\bembedding:\S", prompt),
        "{a|b} and __file__, which draw words": re.search(r"{[^{}]*\|[^{}]*}|__\w+__", prompt),
        "<lora:NAME>, which loads an adapter": network_tags(prompt),
    }
    return [kind for kind, is_in in kinds.items() if is_in]


def parse_weights(prompt: str) -> list[list[tuple[str, float]]]:
    r"""Parse a prompt into segments between breaks, each a list of texts with weights.

    An unclosed bracket extends to the end. An unmatched closing bracket and an escaped bracket
    (``\(``) are text.

    Raises:
        ConfigError: If a weight is not a number.

    Example:
        >>> parse_weights("a (red:1.5) dog")
        [[('a ', 1.0), ('red', 1.5), (' dog', 1.0)]]
    """
    pieces: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def weigh(start: int, factor: float) -> None:
        pieces[start:] = [(text, weight * factor) for text, weight in pieces[start:]]

    for match in _PIECE.finditer(prompt):
        escaped, number, bracket, breaks, text = match.groups()
        if bracket in ("(", "["):
            opened[bracket].append(len(pieces))
        elif number is not None and opened["("]:
            weigh(opened["("].pop(), _number(number, prompt))
        elif bracket == ")" and opened["("]:
            weigh(opened["("].pop(), _FACTOR)
        elif bracket == "]" and opened["["]:
            weigh(opened["["].pop(), 1 / _FACTOR)
        elif breaks:
            pieces.append(("", 1.0))
        elif literal := escaped or text or match[0].lstrip("\\"):
            pieces.append((literal, 1.0))
    for start in opened["("]:
        weigh(start, _FACTOR)
    for start in opened["["]:
        weigh(start, 1 / _FACTOR)
    segments: list[list[tuple[str, float]]] = [[]]
    for is_break, run in itertools.groupby(pieces, lambda piece: not piece[0]):
        if is_break:
            segments += [[] for _ in run]
            continue
        for weight, same in itertools.groupby(run, lambda piece: piece[1]):
            segments[-1].append(("".join(text for text, _ in same), weight))
    return segments


def _number(text: str, prompt: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(
            f"the weight {text} in the prompt {quoted(prompt)} is not a number; write (word:1.2)",
            "prompt_weights",
        ) from None


def plain_parts(prompt: str) -> list[str]:
    """Return the segments of a prompt between breaks as text without weights."""
    return ["".join(text for text, _ in segment) for segment in parse_weights(prompt)]


def weighted_chunks(
    tokenizer: Any, prompt: str, own_tokens: Mapping[str, str], most: int | None
) -> list[Chunk]:
    """Tokenize a weighted prompt into chunks.

    Args:
        tokenizer: The tokenizer.
        prompt: The prompt.
        own_tokens: Tokens of one adapter (`own_words`).
        most: Largest number of chunks of a segment; None: no limit.
    """
    (comma,) = tokenizer(",", add_special_tokens=False).input_ids
    chunks: list[Chunk] = []
    for segment in parse_weights(prompt):
        tokens: list[tuple[int, float]] = []
        for text, weight in segment:
            written = write_out_words(tokenizer, text, own_tokens)
            ids = tokenizer(written, add_special_tokens=False, verbose=False).input_ids
            tokens += [(token, weight) for token in ids]
        ends = _ends([token == comma for token, _ in tokens], tokenizer.model_max_length - 2)
        token_chunks = [tokens[start:end] for start, end in itertools.pairwise([0, *ends])]
        chunks += [
            Chunk([t for t, _ in pairs], [w for _, w in pairs]) for pairs in token_chunks[:most]
        ]
    if len(chunks) > 1 and not chunks[-1].ids:
        chunks.pop()  # The prompt ends with a break.
    return chunks


def _ends(commas: Sequence[bool], size: int) -> list[int]:
    """Return the end index of each chunk of at most ``size`` tokens; at least one.

    Args:
        commas: Whether each token is a comma.
        size: Largest number of tokens in a chunk.
    """
    ends: list[int] = []
    while len(commas) - (start := ends[-1] if ends else 0) > size:
        end = start + size
        # If the next token is a comma, the next chunk begins with it.
        near = () if commas[end] else range(end - 1, end - _BACKTRACK - 1, -1)
        ends.append(next((index + 1 for index in near if commas[index]), end))
    return [*ends, len(commas)]


def weigh_states(states: Tensor, weights: Sequence[Sequence[float]]) -> Tensor:
    """Multiply hidden states ``(B, tokens, C)`` by token weights, keeping the mean of each row.

    A row whose mean is 0 within rounding, as after a LayerNorm without a bias, is not rescaled.

    Args:
        states: Hidden states of a text encoder, beginning with the start token.
        weights: Weights of the tokens after the start token; 1 for further tokens.
    """
    factors = torch.ones(states.shape[:2], dtype=torch.float32)
    for row, row_weights in zip(factors, weights, strict=True):
        row[1 : 1 + len(row_weights)] = torch.tensor(row_weights)
    full = states.float()
    weighted = full * factors.to(full.device).unsqueeze(-1)
    means = [tensor.mean(dim=(1, 2), keepdim=True) for tensor in (full, weighted)]
    least = 1e-6 * full.abs().mean(dim=(1, 2), keepdim=True)
    has_mean = (means[0].abs() > least) & (means[1].abs() > least)
    scales = torch.where(has_mean, means[0] / means[1], 1.0)
    is_weighted = (factors != 1).any(dim=1).to(full.device).view(-1, 1, 1)
    return torch.where(is_weighted, weighted * scales, full).to(states.dtype)
