"""Alpha and initialization of layers, as PEFT's configs and other metadata state them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import regex

from dora_diffusion.config.wording import quoted
from dora_diffusion.formats.adapter.metadata import DIFFUSERS_METADATA, OWN
from dora_diffusion.formats.layouts.layout import AdapterFormatError, Note
from dora_diffusion.formats.names.modules import split_component

# PEFT changes the base's weights when it starts such an adapter, and again when it loads one.
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# For the patterns of a file, whose names are matched in a small part of one.
_MOST_SECONDS = 5.0
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
    metadata: Mapping[str, str], config: Mapping[str, Any] | None, given: float | None, says: bool
) -> tuple[AlphaOf, Note | None]:
    """Return the rule for the effective alpha of a layer, given its name and rank.

    Args:
        metadata: The file's metadata.
        config: The ``adapter_config.json`` of a PEFT folder, None for another file.
        given: What it was trained with, for a file that lost it.
        says: Whether its layout is such that it was not lost.

    Returns:
        The rule, and what is to be said of layers that do not hold their alpha.

    Raises:
        AdapterFormatError: Here or from the rule, if what should tell it is damaged; or if alpha
            is given and was not lost.
    """
    says = says or OWN + "target" in metadata or DIFFUSERS_METADATA in metadata
    says = says or "lora_alpha" in (config or {})
    if says and given is not None:
        raise AdapterFormatError("its alpha was not lost: the file says it; give none")
    if given is not None and not 0 < given < math.inf:
        raise AdapterFormatError(
            f"alpha {given:g} was given; give the number above 0 that it was trained with"
        )
    alpha_of, note = _stated_rule(metadata, config)
    return alpha_of, None if says or given is not None else note


def _stated_rule(
    metadata: Mapping[str, str], config: Mapping[str, Any] | None
) -> tuple[AlphaOf, Note]:
    patterns = NamePatterns()
    if config is not None:
        return (
            lambda name, rank: _peft_alpha(config, split_component(name)[1], rank, patterns)
        ), NO_ALPHA
    if DIFFUSERS_METADATA not in metadata:
        return _alpha_by_training(metadata)
    packed = json_object(metadata[DIFFUSERS_METADATA], f"its {DIFFUSERS_METADATA}")
    for key, value in packed.items():
        if key.endswith(".init_lora_weights"):
            refuse_changed_base(value)

    def alpha_of(name: str, rank: int) -> float:
        component, path = split_component(name)
        start = f"{component}."
        own = {k.removeprefix(start): v for k, v in packed.items() if k.startswith(start)}
        if not own:
            raise AdapterFormatError(f"its {DIFFUSERS_METADATA} says nothing of the {component}")
        return _peft_alpha(own, path, rank, patterns)

    return alpha_of, NO_ALPHA


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
    """Matches the patterns of one file, which is not trusted: they may take ``re`` for ever.

    Attributes:
        seconds: Of computing that all names and patterns may still take.
    """

    def __init__(self, seconds: float = _MOST_SECONDS) -> None:
        self.seconds = seconds

    def matches(self, pattern: str, name: str) -> bool:
        r"""Return whether ``re.match(rf"(.*\.)?({pattern})$", name)`` has a match, as PEFT asks.

        Raises:
            AdapterFormatError: If the pattern is broken, or takes too long.
        """
        started = time.thread_time()  # As the library measures its own limit.
        try:
            found = regex.match(rf"(.*\.)?({pattern})$", name, timeout=max(self.seconds, 1e-9))
        except TimeoutError as error:
            raise AdapterFormatError(
                f"the pattern {quoted(pattern)} takes too long to match; write the modules' names "
                "instead"
            ) from error
        except (regex.error, RecursionError, OverflowError) as error:
            raise AdapterFormatError(f"the pattern {quoted(pattern)} is broken: {error}") from error
        self.seconds -= time.thread_time() - started
        return found is not None
