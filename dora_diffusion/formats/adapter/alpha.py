"""What PEFT's configs and other metadata say of layers: their alpha, and how they were started."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from dora_diffusion.config.wording import quoted
from dora_diffusion.formats.adapter.metadata import DIFFUSERS_METADATA, OWN
from dora_diffusion.formats.layouts.layout import AdapterFormatError, Note
from dora_diffusion.formats.names.modules import split_component

# PEFT changes the base's weights when it starts such an adapter, and again when it loads one.
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# PEFT's patterns of module names, which come with a file: matched as ``re`` does, in bounded time.
# A stranger's regular expression may take ``re`` for ever. Here a pattern becomes an automaton that
# follows all its ways at once (Thompson 1968), so that each character of a name costs at most one
# look at each of its edges.
# A module's path with dots that stand for any character, and with escaped ones: for `re` itself.
_PLAIN = re.compile(r"(?:[\w.-]|\\[.-])*")
# What takes a character, or none: escapes, anchors, sets, and characters that mean themselves.
_ATOM = re.compile(r"\\[dDwWsSbBAZ]|\\\W|\[\^?\]?(?:\\.|[^\]\\])*\]|[^\\()\[\]{}|*+?]")
_REPEATS = re.compile(r"([*+?]|\{(?!\})(\d{1,3})?(,)?(\d{1,3})?\})\??(?![*+?{])")
_MOST_STATES = 5_000
# Of all names and patterns of a file. A pattern with `.*` takes half a million for an SDXL.
_MOST_STEPS = 20_000_000
_STEPS_PER_STATE = 100
# (canonical name, rank) -> effective alpha
AlphaOf = Callable[[str, int], float]


class AssumedAlpha(Note):
    """An alpha was assumed, and may be wrong."""


class AlphaOfTraining(Note):
    """An alpha was taken from the file's record of its training."""


ALPHA_IS_RANK = "alpha = rank is assumed"
NO_ALPHA = AssumedAlpha(f"it does not say its alpha; {ALPHA_IS_RANK}")
AI_TOOLKIT = AssumedAlpha(
    "its magnitudes are named as ai-toolkit names them, whose formula is DoRA's only where alpha "
    f"equals the rank; {ALPHA_IS_RANK}"
)


def alpha_rule(
    metadata: Mapping[str, str], config: Mapping[str, Any] | None
) -> tuple[AlphaOf, Note]:
    """How to tell the effective alpha of a layer, given its name and rank.

    Args:
        metadata: The file's metadata.
        config: The ``adapter_config.json`` of a PEFT folder, None for another file.

    Returns:
        The rule, and what is to be said of layers that do not hold their alpha.

    Raises:
        AdapterFormatError: Here or from the rule, if what should tell it is damaged.
    """
    patterns = NamePatterns()
    if config is not None:

        def of_config(name: str, rank: int) -> float:
            return _peft_alpha(config, split_component(name)[1], rank, patterns)

        return of_config, NO_ALPHA
    if DIFFUSERS_METADATA not in metadata:
        return _alpha_by_training(metadata)
    packed = json_object(metadata[DIFFUSERS_METADATA], f"its {DIFFUSERS_METADATA}")
    for key, value in packed.items():
        if key.endswith(".init_lora_weights"):
            refuse_changed_base(value)

    def alpha_of(name: str, rank: int) -> float:
        component, path = split_component(name)
        start = f"{component}."
        config = {k.removeprefix(start): v for k, v in packed.items() if k.startswith(start)}
        if not config:
            raise AdapterFormatError(f"its {DIFFUSERS_METADATA} says nothing of the {component}")
        return _peft_alpha(config, path, rank, patterns)

    return alpha_of, NO_ALPHA


def says_alpha(metadata: Mapping[str, str], config: Mapping[str, Any] | None) -> bool:
    """Whether a config or metadata tell the alpha for certain, so that it was not lost."""
    ours = OWN + "target" in metadata
    return ours or DIFFUSERS_METADATA in metadata or "lora_alpha" in (config or {})


def refuse_changed_base(start: object) -> None:
    """Refuse an adapter whose ``init_lora_weights`` says that it belongs to other base weights.

    Raises:
        AdapterFormatError: If it does.
    """
    name = str(start).lower()
    if name.startswith(_CHANGES_THE_BASE):
        raise AdapterFormatError(
            f"it was started by {name}, which changes the base's weights, so that it fits no "
            "released model; let PEFT convert it (path_initial_model_for_weight_conversion)"
        )


def _alpha_by_training(metadata: Mapping[str, str]) -> tuple[AlphaOf, Note]:
    """Alpha = rank, or what a kohya file's record of its training says for layers of its rank."""
    try:
        rank_then, alpha_then = (float(metadata[f"ss_network_{f}"]) for f in ("dim", "alpha"))
    except (KeyError, ValueError):
        return (lambda name, rank: float(rank)), NO_ALPHA
    note = AlphaOfTraining(
        f"its layers do not say their alpha; alpha {alpha_then:g} of its training was taken"
    )
    return (lambda name, rank: alpha_then if rank == rank_then else float(rank)), note


def _peft_alpha(config: Mapping[str, Any], path: str, rank: int, patterns: NamePatterns) -> float:
    """Effective alpha of one module from a PEFT config; patterns match the end of its path."""
    try:
        alpha = config.get("lora_alpha", rank)
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            name = path if "text_model" in pattern else path.removeprefix("text_model.")
            if patterns.matches(pattern, name):
                alpha = value
                break
        return float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise AdapterFormatError(f"its configuration has a broken alpha: {error}") from error


def json_object(text: str, what: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        AdapterFormatError: If it is something else; it says ``what`` is.
    """
    try:
        loaded = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{what} is not JSON") from error
    if not isinstance(loaded, dict):
        raise AdapterFormatError(f"{what} is not a JSON object")
    return loaded


class NamePatterns:
    """Matches the patterns of one file.

    Attributes:
        steps: Edges that may still be looked at.
    """

    def __init__(self, steps: int = _MOST_STEPS) -> None:
        self.steps = steps
        self._automata: dict[str, _Automaton] = {}

    def matches(self, pattern: str, name: str) -> bool:
        r"""Whether ``re.match(rf"(.*\.)?({pattern})$", name)`` finds something, as PEFT asks.

        Raises:
            AdapterFormatError: If the pattern is broken, has what no automaton can follow (a look
                around, a reference to a group, flags), or takes too long.
        """
        if _PLAIN.fullmatch(pattern):
            return re.match(rf"(.*\.)?({pattern})$", name) is not None
        if pattern not in self._automata:
            self._automata[pattern] = automaton = _Automaton(pattern)
            self.steps -= _STEPS_PER_STATE * len(automaton.edges)
        found, steps = self._automata[pattern].run(name, self.steps)
        self.steps -= steps
        if self.steps <= 0:
            raise AdapterFormatError(f"the pattern {quoted(pattern)} takes too long to match")
        return found


class _Automaton:
    """States, from each the edges to others: over what an atom takes, or over nothing (None)."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.text, self.at = pattern, rf"(.*\.)?({pattern})$", 0
        self.edges: list[list[tuple[re.Pattern[str] | None, int]]] = [[]]
        try:
            # As `re` sees it, where the pattern's own brackets are not balanced.
            re.compile(self.text)
            self.final = self._ways(0)
        except (re.error, RecursionError, OverflowError) as error:
            raise AdapterFormatError(f"the pattern {quoted(pattern)} is broken: {error}") from error
        if self.at < len(self.text):
            raise self._refused()

    def run(self, name: str, most: int) -> tuple[bool, int]:
        """Whether it takes a start of the name, and the edges looked at; it stops at ``most``."""
        states, steps = {0}, 0
        for place in range(len(name) + 1):
            after: set[int] = set()
            todo = list(states)
            while todo:
                for atom, target in self.edges[todo.pop()]:
                    steps += 1
                    match = None if atom is None else atom.match(name, place)
                    if match and match.end() > place:
                        after.add(target)
                    elif (match or atom is None) and target not in states:
                        states.add(target)
                        todo.append(target)
            if self.final in states or not after or steps > most:
                break
            states = after
        return self.final in states, steps

    def _state(self) -> int:
        if len(self.edges) >= _MOST_STATES:
            raise self._refused()
        self.edges.append([])
        return len(self.edges) - 1

    def _ways(self, start: int) -> int:
        """Alternatives, up to the end or a closing bracket; returns where they end."""
        end = self._state()
        while True:
            state = start
            while self.at < len(self.text) and self.text[self.at] not in "|)":
                state = self._repeated(state)
            self.edges[state].append((None, end))
            if not self.text.startswith("|", self.at):
                return end
            self.at += 1

    def _repeated(self, start: int) -> int:
        """One item with its quantifier."""
        begin = self.at
        state = self._item(start)
        repeats = _REPEATS.match(self.text, self.at)
        if not repeats:
            return state
        least, most = _bounds(repeats)
        end, state = self._state(), start
        for count in range(least if most is None else most):
            if count >= least:
                self.edges[state].append((None, end))
            self.at, before = begin, self._state()
            self.edges[state].append((None, before))
            state = self._item(before)
        if most is None:
            self.at, before = begin, self._state()
            self.edges[state].append((None, before))
            self.edges[self._item(before)].append((None, before))
            state = before
        self.edges[state].append((None, end))
        self.at = repeats.end()
        return end

    def _item(self, start: int) -> int:
        """A group or an atom."""
        if self.text.startswith("(", self.at):
            self.at += 3 if self.text.startswith("(?:", self.at) else 1
            end = self._ways(start)
            if not self.text.startswith(")", self.at):
                raise self._refused()
            self.at += 1
            return end
        atom = _ATOM.match(self.text, self.at)
        if not atom:
            raise self._refused()
        self.at, end = atom.end(), self._state()
        self.edges[start].append((re.compile(atom[0]), end))
        return end

    def _refused(self) -> AdapterFormatError:
        return AdapterFormatError(
            f"the pattern {quoted(self.pattern)} has what is not matched here (look-arounds, "
            "references, flags, or too many repeats); write the modules' names instead"
        )


def _bounds(repeats: re.Match[str]) -> tuple[int, int | None]:
    """Least and most repeats; None is without a limit."""
    kind, least, comma, most = repeats.groups()
    if kind in "*+?":
        return int(kind == "+"), 1 if kind == "?" else None
    lowest = int(least or 0)
    return lowest, int(most) if most else None if comma else lowest
