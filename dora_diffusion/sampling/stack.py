"""Several adapters on one model, each at its own strengths."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from dora_diffusion.adapters.inject import DEFAULT_NAME, layer_adapters
from dora_diffusion.adapters.state import attach_file
from dora_diffusion.config.families import DENOISERS
from dora_diffusion.formats.adapter.embeddings import Vectors, are_equal
from dora_diffusion.formats.adapter.metadata import (
    AdapterMetadata,
    agreed_reading,
    join_triggers,
)
from dora_diffusion.models.components import Components
from dora_diffusion.models.words import add_tokens
from dora_diffusion.numerics.weights import MergeStrengths, Strengths


@dataclass(frozen=True)
class AdapterUse:
    """An adapter of several on one model.

    Attributes:
        path: Its file, or the output folder of a run.
        strengths: How strongly it acts.
    """

    path: str | Path
    strengths: Strengths = field(default_factory=MergeStrengths)


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
        AdapterFormatError, ValueError: If one cannot be read or does not fit.

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
    """
    names = names or [name_of(number) for number in range(len(uses))]
    for component, model in models.items():
        for name, use in zip(names, uses, strict=True):
            own = MergeStrengths.of(use.strengths)
            share = own.unet_strength if component in DENOISERS else own.text_encoder_strength
            for part in layer_adapters(model, name):
                part.strengths = Strengths(
                    own.strength * share, own.direction_strength, own.magnitude_strength
                )
