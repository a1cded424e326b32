"""Files of the first LoRA trainer (cloneofsimo/lora): numbered layers, and trained tokens.

``unet:N:down`` and ``unet:N:up`` are the factors of the N-th layer, with alpha = rank; the metadata
name the classes that layers were counted in, and mark tokens: ``{"<s1>": "<embed>"}``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from dora_diffusion.formats.adapter.keys import AdapterFormatError, Part
from dora_diffusion.formats.names.positional import positional_names
from dora_diffusion.wording import listing

_KEY = re.compile(r"(unet|text_encoder):(0|[1-9][0-9]{0,5}):(up|down)")
_TOKEN_MARK = "<embed>"
_FACTORS: tuple[Part, Part] = ("down", "up")


def is_positional(keys: Iterable[str]) -> bool:
    """Whether a file's layers have numbers for names."""
    return any(map(_KEY.fullmatch, keys))


def take_tokens(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Take the trained tokens out of a file's tensors, so that layers remain."""
    if not is_positional(tensors):
        return {}
    marked = sorted(name for name, mark in metadata.items() if mark == _TOKEN_MARK)
    return {name: tensors.pop(name) for name in marked if name in tensors}


def group_numbered(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]] | None,
) -> dict[str, dict[Part, str]]:
    """Sort a file's keys into layers: canonical module name -> part -> key.

    Args:
        tensors: The file's tensors without its tokens.
        metadata: The file's metadata.
        shapes: Of the model's modules, None takes those of the released models.

    Raises:
        AdapterFormatError: If a key or a number is left over, or the numbers fit no model.
    """
    matches = {key: _KEY.fullmatch(key) for key in tensors}
    if left_over := [key for key, match in matches.items() if match is None]:
        raise AdapterFormatError(f"{len(left_over)} keys belong to no known module: "
                                 f"{listing(left_over)}")  # fmt: skip
    components = dict.fromkeys(match[1] for match in matches.values() if match)
    groups: dict[str, dict[Part, str]] = {}
    for component in components:
        count = 1 + max(int(m[2]) for m in matches.values() if m and m[1] == component)
        weights = [_weight_shape(tensors, f"{component}:{number}") for number in range(count)]
        classes = _classes(metadata.get(component, "[]"), component)
        try:
            names = positional_names(component, weights, classes, shapes)
        except ValueError as error:
            raise AdapterFormatError(str(error)) from error
        for number, name in enumerate(names):
            groups[name] = {part: f"{component}:{number}:{part}" for part in _FACTORS}
    return groups


def _weight_shape(tensors: Mapping[str, Tensor], layer: str) -> tuple[int, ...]:
    if missing := [part for part in _FACTORS if f"{layer}:{part}" not in tensors]:
        raise AdapterFormatError(f"{layer} lacks its {' and '.join(missing)} factor")
    down, up = (tensors[f"{layer}:{part}"] for part in _FACTORS)
    if min(down.ndim, up.ndim) < 2:
        raise AdapterFormatError(
            f"{layer}: low-rank factors of shapes {tuple(down.shape)} and {tuple(up.shape)}"
        )
    return (up.shape[0], *down.shape[1:])


def _classes(text: str, component: str) -> list[str]:
    """What the metadata say of a component: a JSON list of class names."""
    try:
        classes = json.loads(text)
    except (ValueError, RecursionError):
        classes = None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise AdapterFormatError(
            f"its metadata should list the classes of the {component} whose layers it counts"
        )
    return classes
