"""Several adapters on one model: strengths by component and layer, and over the denoising steps."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import cast

from torch import nn

from dora_diffusion.adapters.inject import DEFAULT_NAME, layer_adapters
from dora_diffusion.adapters.layers import LayerAdapter, adapted_layers
from dora_diffusion.adapters.state import attach_file
from dora_diffusion.config.families import DENOISERS
from dora_diffusion.config.fields import require
from dora_diffusion.config.wording import listing, number_text
from dora_diffusion.formats.adapter.embeddings import Vectors, are_equal
from dora_diffusion.formats.adapter.metadata import (
    AdapterMetadata,
    agreed_reading,
    join_triggers,
)
from dora_diffusion.formats.names.modules import canonical
from dora_diffusion.models.components import Components
from dora_diffusion.models.words import add_tokens
from dora_diffusion.numerics.weights import MergeStrengths, Strengths, require_strength

Schedule = Sequence[tuple[float, float]]
"""(Share of the denoising steps that are done, factor of the strength from there on), from 0 on."""


@dataclass(frozen=True)
class AdapterUse:
    """An adapter of several on one model.

    Attributes:
        path: Its file, or the output folder of a run.
        strengths: How strongly it acts.
        layers: Glob patterns of layers' canonical names, such as ``"unet.up_blocks.*"``, and the
            factor of the strength there. Factors of all patterns that match a layer are multiplied.
        schedule: Factors of the strength over the denoising steps; empty: 1.

    Raises:
        ValueError: If the schedule does not begin at 0, or is not in order below 1.
    """

    path: str | Path
    strengths: Strengths = field(default_factory=MergeStrengths)
    layers: Mapping[str, float] = field(default_factory=dict)
    schedule: Schedule = ()

    def __post_init__(self) -> None:
        starts = [start for start, _ in self.schedule]
        is_ordered = starts == sorted({*starts}) and all(0 <= start < 1 for start in starts)
        if starts and not (is_ordered and starts[0] == 0):
            raise ValueError(
                f"the strength schedule has its changes at {listing(map(str, starts))}; they must "
                "be in order, from 0 to below 1"
            )
        for name, factor in [*self.layers.items(), *self.schedule]:
            require_strength(f"the strength at {name}", factor)


def parse_schedule(text: str) -> Schedule:
    """Read a schedule such as ``0:0.4, 0.5:1``.

    Raises:
        ValueError: If it is none.

    Example:
        >>> parse_schedule("0:0.4, 0.5:1")
        [(0.0, 0.4), (0.5, 1.0)]
    """
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return [(float(start), float(factor)) for start, factor in pairs]
    except ValueError:
        raise ValueError(
            f"the strength schedule is {text!r}; write a share of the steps and a factor of the "
            "strength for each change, such as '0:0.4, 0.5:1'"
        ) from None


def uses_of(
    adapters: Sequence[tuple[str | Path, Strengths]],
    layers: Mapping[str, float],
    schedules: Sequence[str],
) -> list[AdapterUse]:
    """Adapters as settings of ``generate`` have them; `strength_texts` is the way back.

    Args:
        adapters: Files, and how strongly each acts.
        layers: Factors of the strength by patterns of layers, which all have.
        schedules: As `parse_schedule` reads them; one for all, or one for each.

    Raises:
        ConfigError, ValueError: If there is another number of schedules, or one cannot be.
    """
    parsed = [parse_schedule(text) for text in schedules] or [()]
    require(
        len(parsed) in (1, len(adapters)),
        f"strength_schedule has {len(parsed)} values, for {len(adapters)} adapters; give one, or "
        "one for each",
        "strength_schedule",
    )
    if len(parsed) == 1:
        parsed *= len(adapters)
    return [
        AdapterUse(path, strengths, layers, schedule)
        for (path, strengths), schedule in zip(adapters, parsed, strict=True)
    ]


def strength_texts(uses: Sequence[AdapterUse]) -> dict[str, list[str]]:
    """The strengths on layers and over the steps as settings of ``generate``, by their names.

    Both are empty where there are none; a schedule that all share is there once.

    Example:
        >>> strength_texts([AdapterUse("dog", layers={"unet.*": 0.5}, schedule=[(0, 0.4)])])
        {'layer_strength': ['unet.*:0.5'], 'strength_schedule': ['0:0.4']}
    """
    layers = dict.fromkeys(pair for use in uses for pair in use.layers.items())
    has_schedule = any(use.schedule for use in uses)
    schedules = [
        ", ".join(f"{number_text(start)}:{number_text(factor)}" for start, factor in changes)
        for changes in (use.schedule or [(0, 1)] for use in uses if has_schedule)
    ]
    return {
        "layer_strength": [f"{name}:{number_text(factor)}" for name, factor in layers],
        "strength_schedule": schedules[:1] if len({*schedules}) == 1 else schedules,
    }


def name_of(number: int) -> str:
    """The name on the model of the adapter at a place of the stack."""
    return f"{DEFAULT_NAME}_{number}" if number else DEFAULT_NAME


def attach_stack(
    components: Components, uses: Sequence[AdapterUse], alpha: float | None = None
) -> AdapterMetadata:
    """Put adapters and their trained tokens on a model: ``W + sum_i strength_i * (W'_i - W)``.

    So does a merge (`numerics.merging`), and no weight is written: the base may be quantised.

    Args:
        components: The model.
        uses: The adapters, which are named by `name_of`.
        alpha: What the only one was trained with, for a file that does not say it.

    Returns:
        The metadata of the only one; of several what they agree in, and all trigger words.

    Raises:
        AdapterFormatError, ValueError: If one cannot be read or does not fit, or a pattern matches
            no layer of any.

    Warns:
        UserWarning: Of a token that several have with vectors of their own.
    """
    if alpha is not None and len(uses) > 1:
        raise ValueError("alpha is given for several adapters; give each file its own (convert)")
    models, read = components.adaptable(), list[AdapterMetadata]()
    tokens: dict[str, Vectors] = {}
    for number, use in enumerate(uses):
        adapter = attach_file(
            models, use.path, name=name_of(number), family=components.family.name, alpha=alpha
        )
        for token, vectors in adapter.tokens.items():
            if token in tokens and not are_equal(tokens[token], vectors):
                warnings.warn(
                    f"several adapters were trained with the token {token}; here it means that of "
                    f"{use.path}",
                    stacklevel=3,
                )
        tokens |= adapter.tokens
        read.append(adapter.metadata)
    set_strengths(models, uses)
    add_tokens(components, tokens)
    if len(read) == 1:
        return read[0]
    trigger = join_triggers(each.trigger for each in read)
    extra = agreed_reading([each.extra for each in read])
    return AdapterMetadata(read[0].family, trigger=trigger, extra=extra)


def set_strengths(
    models: Mapping[str, nn.Module], uses: Sequence[AdapterUse], names: Sequence[str] = ()
) -> None:
    """Set the strengths of adapters on each layer.

    Args:
        models: The models by component.
        uses: The adapters, in the order in which `attach_stack` has put them on a model.
        names: Their names there, where those are others.

    Raises:
        ValueError: If a pattern matches no layer of any.
    """
    names = names or [name_of(number) for number in range(len(uses))]
    unmatched = dict.fromkeys(pattern for use in uses for pattern in use.layers)
    key = "none"
    for component, model in models.items():
        for path, layer in adapted_layers(model):
            key = canonical(component, path)
            for name, use in zip(names, uses, strict=True):
                if name not in layer.adapters:
                    continue
                matching = [pattern for pattern in use.layers if fnmatchcase(key, pattern)]
                for pattern in matching:
                    unmatched.pop(pattern, None)
                own = MergeStrengths.of(use.strengths)
                share = own.unet_strength if component in DENOISERS else own.text_encoder_strength
                factor = math.prod(use.layers[pattern] for pattern in matching)
                part = cast("LayerAdapter", layer.adapters[name])
                part.strengths = Strengths(
                    own.strength * share * factor, own.direction_strength, own.magnitude_strength
                )
    if unmatched:
        raise ValueError(
            f"the pattern {next(iter(unmatched))!r} matches no layer with an adapter; there is "
            f"{key}, and patterns such as 'unet.up_blocks.*'"
        )


@contextmanager
def scheduled(
    models: Mapping[str, nn.Module], schedules: Mapping[str, Schedule]
) -> Iterator[Callable[[float], None]]:
    """Strengths that change over the denoising steps; those that were set are back after it.

    Yields a function that sets them for what follows, by the share of the steps that are done.
    Prompts are encoded at share 0. Norms that a scope keeps stay right: they depend on the scales
    inside of the norm, not on the strength outside.

    Args:
        models: The models by component.
        schedules: By the adapters' names.

    Raises:
        ValueError: If there is no such adapter.
    """
    parts: dict[str, list[tuple[LayerAdapter, Strengths]]] = {}
    for name in schedules:
        adapters = [part for model in models.values() for part in layer_adapters(model, name)]
        parts[name] = [(part, part.strengths) for part in adapters]
        if not adapters:
            raise ValueError(f"the model has no adapter named {name!r}")
    factors: dict[str, float] = {}

    def set_share(share: float) -> None:
        for name, schedule in schedules.items():
            factor = next((f for start, f in reversed(schedule) if start <= share), 1.0)
            if factors.get(name) != factor:
                factors[name] = factor
                for part, own in parts[name]:
                    part.strengths = dataclasses.replace(own, strength=own.strength * factor)

    set_share(0.0)
    try:
        yield set_share
    finally:
        for own_parts in parts.values():
            for part, own in own_parts:
                part.strengths = own
