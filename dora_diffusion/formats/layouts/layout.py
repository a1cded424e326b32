"""Layout of adapter files: how it is told, read, checked, written, and judged.

A layout is one object in the list of `dora_diffusion.formats.layouts`. Reading a file and
reporting on it ask the same objects.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dora_diffusion.config.wording import counted, listing
from dora_diffusion.formats.adapter.metadata import (
    APPROXIMATES,
    APPROXIMATION_ERROR,
    DIFFUSERS_METADATA,
    AdapterMetadata,
)
from dora_diffusion.formats.checkpoint.weights import ModelWeights
from dora_diffusion.formats.files.stream import TensorSpec
from dora_diffusion.formats.layouts import COLUMNS, VERDICTS
from dora_diffusion.formats.names.kohya import Resolve
from dora_diffusion.formats.names.modules import UNetLayout
from dora_diffusion.numerics.weights import LayerWeights

# down and up are A and B; mid is the core of a Tucker-decomposed convolution. A `magnitude` is
# PEFT's (always the output axis), a `dora_scale` tells its axis by its shape.
Part = Literal["down", "up", "mid", "alpha", "magnitude", "dora_scale"]
Layers = Mapping[str, LayerWeights]
Shapes = Mapping[str, tuple[int, ...]]
Specs = Mapping[str, TensorSpec]
Tensors = Mapping[str, Tensor]
Fields = Mapping[str, str]
BUNDLED_TOKEN = re.compile(r"bundle_emb\.(?P<token>.+)\.(?P<key>clip_[lhg])")
"""Key of a trained token's vectors in a file of layers."""
EXACT = "exact"
# The error of an approximation that is none, but for the rounding of its numbers.
_ROUNDING = 1e-5
# Attention projections trained as one matrix, which only some programs split.
_JOINED = ("to_qkv.", "to_kv.", "in_proj.", "qkv_proj.")


class AdapterFormatError(ValueError):
    """An adapter file that cannot be read, or an adapter that a format cannot hold."""


class Note(str):
    """Note on a file and how it was read; its class tells which finding it is."""

    __slots__ = ()


class Key(NamedTuple):
    """A tensor's name in an adapter file, taken apart.

    Attributes:
        text: All of it.
        path: The module's path as the file writes it, with all that stands before it.
        form: What stands behind it, such as ``".lora_A.weight"``.
        part: What the tensor is.
    """

    text: str
    path: str
    form: str
    part: Part

    @property
    def is_embedding(self) -> bool:
        """True if the key is a factor of an Embedding, as PEFT names it."""
        return self.form.startswith(".lora_embedding_")

    @property
    def is_ai_toolkit(self) -> bool:
        """True if the key is a magnitude of ai-toolkit's DoRA."""
        return self.form == ".magnitude"


# Canonical module name -> part -> key.
Groups = dict[str, dict[Part, Key]]


@dataclass(frozen=True)
class WriteOptions:
    """Options for writing an adapter.

    Attributes:
        metadata: What is known of it.
        dtype: Of the low-rank factors; None keeps theirs. Magnitudes stay float32: rounding one
            moves every weight of its row, and they are small.
        title: Name shown by user interfaces, the file's name without suffix.
        unet_layout: For kohya names of an SDXL UNet that is not shaped like the released one.
        base: The base model, for the layouts that need it.
        beside: Plain LoRA layers whose change is added, for ``dense``.
        bundled: Trained tokens' tensors by key, for files that hold them.
    """

    metadata: AdapterMetadata
    dtype: torch.dtype | None = None
    title: str = ""
    unet_layout: UNetLayout | None = None
    base: ModelWeights | None = None
    beside: Layers = field(default_factory=dict)
    bundled: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class EncodedFile:
    """One file to write: tensors with metadata, or text.

    Attributes:
        tensors: How to make each tensor when it is written, by name: large files are never whole
            in memory.
        metadata: The file's metadata.
        text: Content of a text file.
    """

    tensors: Mapping[str, tuple[TensorSpec, Callable[[], Tensor]]] = field(default_factory=dict)
    metadata: Fields = field(default_factory=dict)
    text: str | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], metadata: Fields) -> EncodedFile:
        lazy = {key: (TensorSpec.of(t), lambda t=t: t) for key, t in tensors.items()}
        return cls(lazy, metadata)


class AdapterLayout:
    """One way to lay an adapter out in files.

    Attributes:
        name: Its name in the list, and what users call it where it is written.
        key_format: What a report calls its keys; ``"other"`` if no program here writes them.
        file_name: Default name of its file; None for a folder of files.
        says_alpha: Its layers have no other alpha than the one that they are read with.
        is_compact: It holds fewer numbers than the layers that it stands for.
    """

    name = key_format = "other"
    file_name: str | None = ""
    says_alpha = is_compact = False

    def parse(self, key: str) -> Key | None:
        """Parse a key, as its programs or others write it; None if it is none of its."""

    def owns(self, key: Key) -> bool:
        """Return whether the layout's programs read this key, to the last letter."""
        return True

    def matches(self, keys: Collection[str], metadata: Fields) -> bool:
        """Return whether each key of a file is laid out so; no file matches two layouts."""
        parsed = map(self.parse, keys)
        is_own = bool(keys) and all(key is not None and self.owns(key) for key in parsed)
        return is_own and not any(joined in key for key in keys for joined in _JOINED)

    def module(self, key: Key, resolve: Resolve, component: str | None) -> str | None:
        """Canonical name of a key's module, None if it is of none that is known."""
        return key.path

    def tokens(self, keys: Collection[str], metadata: Fields) -> list[str]:
        """The keys of trained tokens among its layers' keys."""
        return []

    def group(self, tensors: Tensors, metadata: Fields, shapes: Shapes | None) -> Groups | None:
        """Sort a file's keys into layers, where no key tells its own; None: `group_keys` does.

        Args:
            tensors: The file's tensors without its tokens.
            metadata: The file's metadata.
            shapes: Of the base model's modules, None if it is not known.

        Raises:
            AdapterFormatError: If the file cannot be read.
        """

    def decode(self, tensors: Tensors, metadata: Fields) -> tuple[Layers, str] | None:
        """Return the layers and a line on what they are, if not made from A, B and m as usual."""

    def check(self, layers: Layers) -> None:
        """Refuse what the layout cannot hold.

        Raises:
            AdapterFormatError: With the reason, and what to write instead.
        """

    def encode(self, layers: Layers, options: WriteOptions) -> dict[str, EncodedFile]:
        """The files that hold layers, by relative name."""
        raise AdapterFormatError(f"the {self.name} layout is read, and not written")

    def is_read_as_meant(self, layers: Layers, specs: Specs, metadata: Fields) -> bool:
        """Return whether programs that know the keys also read the numbers as they are meant.

        None takes alpha from what kohya's scripts note of the training; and PEFT makes all layers
        of a component DoRA, or none.
        """
        kinds = {(n.split(".")[0], layer.magnitude is None) for n, layer in layers.items()}
        is_uniform = len(kinds) == len({component for component, _ in kinds})
        return is_uniform and self.finds_alpha(layers, specs, metadata)

    def finds_alpha(self, layers: Layers, specs: Specs, metadata: Fields) -> bool:
        """Return whether programs find the alpha of each layer, or need none."""
        says_alpha = sum(key.endswith(".alpha") for key in specs) >= len(layers)
        says_alpha |= DIFFUSERS_METADATA in metadata
        return says_alpha or all(layer.scale == 1.0 for layer in layers.values())

    def judge(self, layers: Layers, norm_axis: str, keys: Collection[str]) -> dict[str, str]:
        """Verdict per program for one file; empty if it mixes axes.

        Args:
            layers: Its layers by canonical name.
            norm_axis: ``"output"``, ``"input"``, ``"mixed"``, or ``""`` for a plain LoRA.
            keys: Its keys.
        """
        # PEFT and diffusers know no magnitudes on the input axis.
        kind = f"{self.name} {'DoRA' if norm_axis else 'LoRA'}" if norm_axis != "input" else ""
        unknown = "convert: its key format is not one that we have checked"
        return dict(VERDICTS.get(kind) or dict.fromkeys(COLUMNS, unknown))

    def advice(self, norm_axis: str, keys: Collection[str]) -> list[str]:
        """Return advice on using such a file."""
        return ["programs read few of such files as they are meant: convert it for yours"]


def factor_pair(name: str, parts: Mapping[Part, Tensor]) -> tuple[Tensor, Tensor]:
    """``A`` and ``B`` of a layer of a file, both of two dimensions or more.

    Raises:
        AdapterFormatError: If there is one of them, or it is of fewer.
    """
    if missing := [part for part in ("down", "up") if part not in parts]:
        raise AdapterFormatError(f"{name} lacks its {' and '.join(missing)} factor")
    down, up = parts["down"], parts["up"]
    if min(down.ndim, up.ndim) < 2:
        raise AdapterFormatError(
            f"{name}: low-rank factors of shapes {tuple(down.shape)} and {tuple(up.shape)}"
        )
    return down, up


def with_alpha(layer: LayerWeights, alpha: float) -> LayerWeights:
    """The layer with another alpha and the same ``s B A``: ``B`` makes up for it."""
    factor = layer.alpha / alpha
    up = layer.up if factor == 1.0 else (layer.up.float() * factor).to(layer.up.dtype)
    return dataclasses.replace(layer, up=up, alpha=alpha)


def unit_scale(layer: LayerWeights) -> LayerWeights:
    """The layer with its scale multiplied into ``up``, so that alpha = rank."""
    return with_alpha(layer, float(layer.rank))


def factors(layer: LayerWeights, options: WriteOptions) -> tuple[Tensor, Tensor]:
    """``A`` and ``B`` as they are written."""
    dtype = options.dtype
    down, up = layer.down.detach().cpu(), layer.up.detach().cpu()
    return (down, up) if dtype is None else (down.to(dtype), up.to(dtype))


@dataclass(frozen=True)
class Approximation:
    """Original that a file approximates.

    Attributes:
        of: ``"DoRA"`` or ``"LoRA"``, ``"tuned model"``, ``"sum of the adapters"``.
        error: Relative error of the change of all layers; None if the file does not say it.
    """

    of: str
    error: float | None

    def __str__(self) -> str:
        if self.error is None:
            return f"which approximates the {self.of}"
        share = f"{self.error:.1%}" if self.error >= 0.001 else "less than 0.1%"
        return f"which is off the {self.of} by {share}"

    def qualify(self, tools: Mapping[str, str], method: str) -> dict[str, str]:
        """The verdicts on a file that is one: exact for what it holds, and how far off that is."""
        exact = f"exact for this {method}, {self}"
        return {
            program: exact + verdict.removeprefix(EXACT)
            if verdict.partition(":")[0] == EXACT
            else verdict
            for program, verdict in tools.items()
        }


def stated_approximation(extra: Mapping[str, str]) -> Approximation | None:
    """Return the approximation that our file's metadata state; None if it is exact."""
    if not (of := extra.get(APPROXIMATES)):
        return None
    try:
        error = float(extra.get(APPROXIMATION_ERROR, ""))
    except ValueError:
        return Approximation(of, None)
    return Approximation(of, error) if error > _ROUNDING else None


def some_layers(names: Collection[str]) -> str:
    """``"5 layers (a, b, c and 2 more)"``."""
    return f"{counted(len(names), 'layer')} ({listing(names, 3)})"
