"""Weights in prompts as A1111 reads them: ``(word:1.2)``, ``(word)``, ``[word]`` and ``BREAK``.

Each token's states are multiplied by its weight, and those of its chunk scaled so that their mean
stays. Chunks are of the 75 tokens that CLIP reads (30 with the embedded models); where one is full,
it ends behind its last comma, if that is among its last 20 tokens.
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
from dora_diffusion.models.words import write_out_words

BREAK = "BREAK"
_FACTOR = 1.1
_BACKTRACK = 20
_SYNTAX = re.compile(rf"[()\[\]\\]|\b{BREAK}\b")
# A backslash with what it escapes; the weight that ends a bracket; a bracket; a break; other text.
_PIECE = re.compile(
    rf"\\([()\[\]\\]?)|:\s*([+-]?[.\d]+)\s*\)|([()\[\]])|\s*\b({BREAK})\b\s*"
    rf"|((?:(?!\s*\b{BREAK}\b)[^\\()\[\]:])+|:)"
)
_EDITING = re.compile(r"(?<!\\)\[[^\[\]()]*(?:\|[^\[\]]*|:\s*[.\d]+\s*)(?<!\\)\]")
_BRACKETS = re.compile(r"(?<!\\)\([^()\[\]]*(?<!\\)\)")


class Chunk(NamedTuple):
    """Tokens of a prompt that are encoded at once, without start and end, and their weights."""

    ids: list[int]
    weights: list[float]


def has_weights(prompt: str) -> bool:
    """Return whether a prompt has brackets, a backslash or a ``BREAK``."""
    return _SYNTAX.search(prompt) is not None


def has_editing(prompt: str) -> bool:
    """Return whether a prompt changes over the steps in A1111: ``[a:b:0.5]``, ``[a|b]``."""
    # What is in round brackets is one piece of what is in square ones.
    while prompt != (prompt := _BRACKETS.sub("x", prompt)):
        pass
    return _EDITING.search(prompt) is not None


def unread_syntax(prompt: str) -> list[str]:
    """Name what of a prompt has a meaning in A1111 or ComfyUI and is read as text here."""
    kinds = {
        "[a:b:0.5] and [a|b], which change a prompt over the steps": has_editing(prompt),
        "AND, which combines prompts": re.search(r"\bAND\b", prompt),
        "embedding:NAME, a trained word of ComfyUI": re.search(r"\bembedding:\S", prompt),
        "<lora:NAME>, which loads an adapter": re.search("<(lora|lyco|hypernet):", prompt),
    }
    return [kind for kind, is_in in kinds.items() if is_in]


def parse_weights(prompt: str) -> list[list[tuple[str, float]]]:
    r"""The parts of a prompt between its breaks: texts, each with its weight.

    A bracket that is not closed reaches to the end, and one that closes nothing is text, as are
    escaped ones (``\(``).

    Raises:
        ConfigError: If a weight is no number.

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
    parts: list[list[tuple[str, float]]] = [[]]
    for is_break, run in itertools.groupby(pieces, lambda piece: not piece[0]):
        if is_break:
            parts += [[] for _ in run]
            continue
        for weight, same in itertools.groupby(run, lambda piece: piece[1]):
            parts[-1].append(("".join(text for text, _ in same), weight))
    return parts


def _number(text: str, prompt: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(
            f"the weight {text} in the prompt {quoted(prompt)} is no number; write (word:1.2)",
            "prompt_weights",
        ) from None


def plain_parts(prompt: str) -> list[str]:
    """The texts of a prompt between its breaks, without weights."""
    return ["".join(text for text, _ in part) for part in parse_weights(prompt)]


def weighted_chunks(
    tokenizer: Any, prompt: str, own: Mapping[str, str], most: int | None
) -> list[Chunk]:
    """A prompt's tokens in chunks.

    Args:
        tokenizer: A tokenizer.
        prompt: The prompt.
        own: An adapter's own tokens (`own_words`).
        most: The chunks of a part that are read; None: all.
    """
    (comma,) = tokenizer(",", add_special_tokens=False).input_ids
    chunks: list[Chunk] = []
    for part in parse_weights(prompt):
        tokens: list[tuple[int, float]] = []
        for text, weight in part:
            written = write_out_words(tokenizer, text, own)
            ids = tokenizer(written, add_special_tokens=False, verbose=False).input_ids
            tokens += [(token, weight) for token in ids]
        ends = _ends([token == comma for token, _ in tokens], tokenizer.model_max_length - 2)
        made = [tokens[start:end] for start, end in itertools.pairwise([0, *ends])]
        chunks += [Chunk([t for t, _ in each], [w for _, w in each]) for each in made[:most]]
    if len(chunks) > 1 and not chunks[-1].ids:
        chunks.pop()  # Nothing is behind the last break.
    return chunks


def _ends(commas: Sequence[bool], size: int) -> list[int]:
    """The end of each chunk of at most so many tokens, of which these are commas; one at least."""
    ends: list[int] = []
    while len(commas) - (start := ends[-1] if ends else 0) > size:
        end = start + size
        # A comma that comes next begins the next chunk.
        near = () if commas[end] else range(end - 1, end - _BACKTRACK - 1, -1)
        ends.append(next((place + 1 for place in near if commas[place]), end))
    return [*ends, len(commas)]


def weigh_states(states: Tensor, weights: Sequence[Sequence[float]]) -> Tensor:
    """States ``(B, tokens, C)`` times the weight of each token, each row with the mean it had.

    A row whose mean is 0 within rounding, as after a LayerNorm without a bias, is not scaled.

    Args:
        states: A text encoder's, from the start token on.
        weights: Of the tokens behind it; those of others are 1.
    """
    factors = torch.ones(states.shape[:2], dtype=torch.float32)
    for row, own in zip(factors, weights, strict=True):
        row[1 : 1 + len(own)] = torch.tensor(own)
    full = states.float()
    weighted = full * factors.to(full.device).unsqueeze(-1)
    means = [each.mean(dim=(1, 2), keepdim=True) for each in (full, weighted)]
    least = 1e-6 * full.abs().mean(dim=(1, 2), keepdim=True)
    has_mean = (means[0].abs() > least) & (means[1].abs() > least)
    scales = torch.where(has_mean, means[0] / means[1], 1.0)
    is_weighted = (factors != 1).any(dim=1).to(full.device).view(-1, 1, 1)
    return torch.where(is_weighted, weighted * scales, full).to(states.dtype)
