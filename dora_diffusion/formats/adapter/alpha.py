"""Alpha and initialization of layers, from PEFT's configs and other metadata."""

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

LOKR = "LOKR"
"""``peft_type`` of LoKr."""
# PEFT changes the base's weights when it creates such an adapter, and again when it loads one.
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Time limit for all patterns of a file; an ordinary file needs a small fraction.
_MOST_SECONDS = 5.0
# (canonical name, rank) -> effective alpha
AlphaOf = Callable[[str, int], float]


class AssumedAlpha(Note):
    """Note that an alpha was assumed and may be wrong."""


class AlphaOfTraining(Note):
    """Note that an alpha was taken from the file's record of its training."""


ALPHA_IS_RANK = "alpha = rank is assumed"
NO_ALPHA = AssumedAlpha(f"it does not store its alpha; {ALPHA_IS_RANK}")
AI_TOOLKIT = AssumedAlpha(
    "its magnitudes have ai-toolkit's names, and ai-toolkit's formula is DoRA's only if alpha "
    f"equals the rank; {ALPHA_IS_RANK}"
)


def alpha_rule(
    metadata: Mapping[str, str],
    config: Mapping[str, Any] | None,
    alpha: float | None,
) -> tuple[AlphaOf, Note | None]:
    """Return the rule for the effective alpha of a layer, given its name and rank.

    Args:
        metadata: The file's metadata.
        config: The ``adapter_config.json`` of a PEFT folder; None for other files.
        alpha: Alpha of training, for a file that does not store it.

    Returns:
        The rule, and a note on layers that do not store their alpha.

    Raises:
        AdapterFormatError: Here or from the rule, if the source of alpha is damaged; or if an alpha
            is given, but the file states one.
    """
    is_stated = OWN + "target" in metadata or DIFFUSERS_METADATA in metadata
    is_stated = is_stated or "lora_alpha" in (config or {})
    if is_stated and alpha is not None:
        raise AdapterFormatError("the file determines its alpha; leave out the given one")
    if alpha is not None and not 0 < alpha < math.inf:
        raise AdapterFormatError(
            f"alpha is {alpha:g}; it must be the number above 0 of the training"
        )
    alpha_of, note = _stated_rule(metadata, config)
    return alpha_of, None if is_stated or alpha is not None else note


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
        fields = {k.removeprefix(start): v for k, v in packed.items() if k.startswith(start)}
        if not fields:
            raise AdapterFormatError(f"its {DIFFUSERS_METADATA} has nothing on the {component}")
        return _peft_alpha(fields, path, rank, patterns)

    return alpha_of, NO_ALPHA


def refuse_changed_base(start: object) -> None:
    """Check that an adapter's ``init_lora_weights`` does not change the base weights.

    Raises:
        AdapterFormatError: If it does.
    """
    name = str(start).lower()
    if name.startswith(_CHANGES_THE_BASE):
        raise AdapterFormatError(
            f"it was initialized by {name}, which changes the base's weights, so it fits no "
            "released model; let PEFT convert it (path_initial_model_for_weight_conversion)"
        )


def _alpha_by_training(metadata: Mapping[str, str]) -> tuple[AlphaOf, Note]:
    """Return the rule alpha = rank, or a kohya file's recorded alpha for layers of its rank."""
    try:
        rank_then, alpha_then = (float(metadata[f"ss_network_{f}"]) for f in ("dim", "alpha"))
    except (KeyError, ValueError):
        return (lambda name, rank: float(rank)), NO_ALPHA
    note = AlphaOfTraining(
        f"its layers do not store their alpha; alpha {alpha_then:g} of its training is used"
    )
    return (lambda name, rank: alpha_then if rank == rank_then else float(rank)), note


def _peft_alpha(config: Mapping[str, Any], path: str, rank: int, patterns: NamePatterns) -> float:
    """Return a module's effective alpha from a PEFT config; patterns match the end of its path."""
    try:
        alpha = _by_pattern(config, "alpha_pattern", config.get("lora_alpha", rank), path, patterns)
        if config.get("peft_type") == LOKR:
            # PEFT divides by the configured rank, which layers with whole factors do not have.
            r = _by_pattern(config, "rank_pattern", config.get("r", rank), path, patterns)
            return float(alpha) / float(r) * rank
        return float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise AdapterFormatError(f"its configuration has a broken alpha: {error}") from error


def _by_pattern(
    config: Mapping[str, Any], field: str, default: Any, path: str, patterns: NamePatterns
) -> Any:
    for pattern, value in (config.get(field) or {}).items():
        name = path if "text_model" in pattern else path.removeprefix("text_model.")
        if patterns.matches(pattern, name):
            return value
    return default


def json_object(text: str, what: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        AdapterFormatError: If it is something else; names it by ``what``.
    """
    try:
        loaded = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{what} is not JSON") from error
    if not isinstance(loaded, dict):
        raise AdapterFormatError(f"{what} is not a JSON object")
    return loaded


class NamePatterns:
    """Matcher for the patterns of one untrusted file, with a time limit.

    Attributes:
        seconds: Remaining computing time for all names and patterns.
    """

    def __init__(self, seconds: float = _MOST_SECONDS) -> None:
        self.seconds = seconds

    def matches(self, pattern: str, name: str) -> bool:
        r"""Return whether ``re.match(rf"(.*\.)?({pattern})$", name)`` has a match, as in PEFT.

        Raises:
            AdapterFormatError: If the pattern is broken, or takes too long.
        """
        started = time.thread_time()  # The clock of the library's timeout.
        try:
            match = regex.match(rf"(.*\.)?({pattern})$", name, timeout=max(self.seconds, 1e-9))
        except TimeoutError as error:
            raise AdapterFormatError(
                f"the pattern {quoted(pattern)} takes too long to match; write the modules' names "
                "instead"
            ) from error
        except (regex.error, RecursionError, OverflowError) as error:
            raise AdapterFormatError(f"the pattern {quoted(pattern)} is broken: {error}") from error
        self.seconds -= time.thread_time() - started
        return match is not None
