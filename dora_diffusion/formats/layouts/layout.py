"""Base class of the layouts of adapter files.

A layout detects, reads, checks, writes and judges files. Reading and reports use the same objects.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dora_diffusion.config.families import DENOISERS, FAMILIES, denoiser_family
from dora_diffusion.config.wording import counted, listing
from dora_diffusion.formats.adapter.metadata import (
    DIFFUSERS_METADATA,
    OWN,
    UNET_LAYERS,
    AdapterMetadata,
    parse_metadata,
)
from dora_diffusion.formats.checkpoint.weights import ModelWeights
from dora_diffusion.formats.files.stream import TensorSpec
from dora_diffusion.formats.layouts import (
    COLUMNS,
    FACTS,
    LAYOUTS,
    VERDICTS,
    unknown_keys_message,
)
from dora_diffusion.formats.names.kohya import Resolve, name_resolver
from dora_diffusion.formats.names.modules import UNetLayout, comfyui_reads, split_component
from dora_diffusion.numerics.weights import LayerWeights, NormAxis

# down and up are A and B; mid is the core of a Tucker-decomposed convolution. `magnitude` is PEFT's
# (always on the output axis); the shape of `dora_scale` determines its axis. The others are LoKr's.
Part = Literal[
    "down", "up", "mid", "alpha", "magnitude", "dora_scale",
    "w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2",
]  # fmt: skip
Layers = Mapping[str, LayerWeights]
Shapes = Mapping[str, tuple[int, ...]]
Specs = Mapping[str, TensorSpec]
Tensors = Mapping[str, Tensor]
Fields = Mapping[str, str]
BUNDLED_TOKEN = re.compile(r"bundle_emb\.(?P<token>.+)\.(?P<key>clip_[lhg])")
"""Key of a trained token's vectors in a file of layers."""
EXACT = "exact"
# Modules of layouts that are not named after them. Each layout is a constant, such as `KOHYA`.
_MODULES = {
    "diffusers": "dotted", "peft": "dotted", "attn_procs": "dotted", "onetrainer": "dotted",
    "comfyui": "one_base", "dense": "one_base",
}  # fmt: skip
# Joined attention projections, which only some programs split.
_JOINED = ("to_qkv.", "to_kv.", "in_proj.", "qkv_proj.")


class AdapterFormatError(ValueError):
    """Error for a file that cannot be read, or an adapter that a format cannot represent."""


class Note(str):
    """Note on a file and how it was read. Subclasses identify the kind of note."""

    __slots__ = ()


class Key(NamedTuple):
    """Parsed name of a tensor in an adapter file.

    Attributes:
        text: The whole name.
        path: Path of the module as in the file, with its prefix.
        form: Suffix after the path, such as ``".lora_A.weight"``.
        part: Role of the tensor in its layer.
    """

    text: str
    path: str
    form: str
    part: Part

    @property
    def is_embedding(self) -> bool:
        """True if the key is a factor of an Embedding with PEFT's name."""
        return self.form.startswith(".lora_embedding_")

    @property
    def is_ai_toolkit(self) -> bool:
        """True if the key is a magnitude of a DoRA from ai-toolkit."""
        return self.form == ".magnitude"


# Canonical module name -> part -> key.
Groups = dict[str, dict[Part, Key]]


@dataclass(frozen=True)
class WriteOptions:
    """Options for writing an adapter.

    Attributes:
        metadata: Metadata of the adapter.
        dtype: Dtype of the low-rank factors; None: unchanged. Magnitudes stay float32, since
            rounding a magnitude changes every weight of its row, and they are small.
        title: Name for user interfaces: of the file without suffix, or of the folder.
        unet_layout: Layout of an SDXL UNet with another shape than the released one, for kohya
            names.
        base: Base model, for layouts that need it.
        beside: Plain LoRA layers whose change is added in ``dense``.
        bundled: Tensors of trained tokens by key, for files that contain them.
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
    """File to write: tensors with metadata, or text.

    Attributes:
        tensors: Functions that return the tensors, by name. They are called when a tensor is
            written, so that large files are never completely in memory.
        metadata: Metadata of the file.
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
    """Layout of an adapter in files.

    Attributes:
        name: Name in the list of layouts, for users too.
        key_format: Name of the key format in reports; ``"other"`` if no known program writes it.
        file_name: Default file name; None for a folder of files.
        is_compact: Whether the file has fewer values than the layers that it represents.
        form: For files that are not read: suffix of the key whose tensor has the layer's shape.
        method: For these files and LoKr: name of the method in reports.
        note: For these files: note for users.
    """

    name = key_format = "other"
    file_name: str | None = ""
    is_compact = False
    form = method = note = ""

    def parse(self, key: str) -> Key | None:
        """Parse a key, also in variants of other programs. None: the key is of another layout."""

    def owns(self, key: Key) -> bool:
        """Return whether the programs of the layout read exactly this key."""
        return True

    def matches(self, keys: Collection[str], metadata: Fields) -> bool:
        """Return whether all keys of a file have this layout. No file matches two layouts."""
        parsed = map(self.parse, keys)
        is_own = bool(keys) and all(key is not None and self.owns(key) for key in parsed)
        return is_own and not any(joined in key for key in keys for joined in _JOINED)

    def module(self, key: Key, resolve: Resolve, component: str | None) -> str | None:
        """Return the canonical name of a key's module, None if it is unknown."""
        return key.path

    def group(
        self, tensors: Tensors, metadata: Fields, shapes: Shapes | None, component: str | None
    ) -> Groups:
        """Group the keys of a file by layer.

        Args:
            tensors: Tensors of the file without trained tokens.
            metadata: Metadata of the file.
            shapes: Weight shapes of the base model's modules, None if it is unknown.
            component: Component of keys without a component, in a PEFT folder.

        Raises:
            AdapterFormatError: If the file cannot be read.
        """
        unet = UNetLayout.from_text(metadata.get(OWN + UNET_LAYERS, ""))
        family = denoiser_family(tensors) or parse_metadata(metadata).family
        return group_keys(tensors, name_resolver(shapes, unet, family), component)

    def decode(self, tensors: Tensors, metadata: Fields) -> tuple[Layers, str] | None:
        """Decode a file without A, B and m. Returns its layers and a note; the default is None."""

    def check(self, layers: Layers) -> None:
        """Check that the layout can represent the layers.

        Raises:
            AdapterFormatError: If it cannot.
        """

    def encode(self, layers: Layers, options: WriteOptions) -> dict[str, EncodedFile]:
        """Encode layers to files, by relative name."""
        raise AdapterFormatError(f"the {self.name} layout is read, and not written")

    def is_read_as_meant(self, layers: Layers, specs: Specs, metadata: Fields) -> bool:
        """Return whether programs that know the keys also interpret the values correctly.

        No program reads alpha from the training metadata of kohya's scripts. PEFT treats either all
        layers of a component as DoRA, or none.
        """
        is_uniform = not any(map(is_mixed, by_component(layers).values()))
        return is_uniform and self.finds_alpha(layers, specs, metadata)

    def finds_alpha(self, layers: Layers, specs: Specs, metadata: Fields) -> bool:
        """Return whether the file has the alpha of each layer, or all scales are 1."""
        says_alpha = sum(key.endswith(".alpha") for key in specs) >= len(layers)
        says_alpha |= DIFFUSERS_METADATA in metadata
        return says_alpha or all(layer.scale == 1.0 for layer in layers.values())

    def judge(self, layers: Layers, norm_axis: str, keys: Collection[str]) -> dict[str, str]:
        """Return the verdict of each program on a file; empty if the norm axes are mixed.

        Args:
            layers: Layers by canonical name.
            norm_axis: ``"output"``, ``"input"``, ``"mixed"``, or ``""`` for a plain LoRA.
            keys: Keys of the file.
        """
        # PEFT and Diffusers do not support magnitudes on the input axis.
        kind = f"{self.name} {'DoRA' if norm_axis else 'LoRA'}" if norm_axis != "input" else ""
        if denoiser_of(layers) == "transformer":
            tools = dict(
                VERDICTS.get(kind + OF_TRANSFORMERS) or VERDICTS[f"other{OF_TRANSFORMERS}"]
            )
            family = denoiser_family(layers)
            if not family:  # Only transformers of known families were checked in ComfyUI.
                return {**tools, "ComfyUI and Forge": "-"}
            code = FAMILIES[family].code
            unread = [name for name in layers if not comfyui_reads(name, code)]
            if unread and tools["ComfyUI and Forge"].startswith(EXACT):
                tools["ComfyUI and Forge"] = f"wrong: it leaves {some_layers(unread)} unchanged"
            return tools
        return dict(VERDICTS.get(kind) or dict.fromkeys(COLUMNS, FACTS["words"]["unchecked"]))

    def advice(self, norm_axis: str, keys: Collection[str]) -> list[str]:
        """Return advice on using a file of this layout."""
        return ["programs read few of such files as they are meant: convert it for yours"]


@cache
def layout_named(name: str) -> AdapterLayout:
    """Return a layout by its name."""
    module = import_module(f"{__package__}.{_MODULES.get(name, name)}")
    layout: AdapterLayout = getattr(module, name.upper())
    return layout


def all_layouts() -> Iterator[AdapterLayout]:
    """Yield the known layouts; the module of each is imported when it is reached."""
    return map(layout_named, LAYOUTS)


def layout_of(keys: Collection[str], metadata: Fields) -> AdapterLayout:
    """Return the layout of a file; `Other` if it has no known layout."""
    matching = (layout for layout in all_layouts() if layout.matches(keys, metadata))
    return next(matching, None) or layout_named("other")


def group_keys(keys: Collection[str], resolve: Resolve, component: str | None = None) -> Groups:
    """Group keys by layer: canonical module name -> part -> key.

    Each key is parsed by the first layout that recognizes it. Unknown keys are an error, since
    skipping them would silently load half an adapter.

    Args:
        keys: Keys of the file, without trained tokens.
        resolve: Function of `name_resolver`.
        component: Component of keys without a component, in a PEFT folder.

    Raises:
        AdapterFormatError: If a key is unknown, or two keys are the same part of a layer.
    """
    if not keys:
        raise AdapterFormatError("the file holds no adapter: it has no tensors")
    layers: Groups = {}
    left_over, twice = [], []
    for text in keys:
        parsed = ((layout, key) for layout in all_layouts() if (key := layout.parse(text)))
        layout, key = next(parsed, (None, None))
        name = layout.module(key, resolve, component) if layout and key else None
        if name is None or key is None:
            left_over.append(text)
            continue
        if key.part in layers.setdefault(name, {}):
            twice.append(f"{layers[name][key.part].text} and {text}")
        layers[name][key.part] = key
    if twice:
        raise AdapterFormatError(f"two keys for one tensor: {listing(twice)}")
    if left_over:
        raise AdapterFormatError(unknown_keys_message(left_over))
    return layers


OF_TRANSFORMERS = " of a transformer"
"""End of the kinds of files in `VERDICTS` that are about transformers."""


def denoiser_of(layers: Iterable[str]) -> str:
    """Return the kind of denoiser that layers belong to; ``"unet"`` if they do not show it."""
    is_transformer = any(name.startswith("transformer.") for name in layers)
    return "transformer" if is_transformer else "unet"


def denoisers_of(layers: Iterable[str]) -> frozenset[str]:
    """Return the kind of denoiser that layers belong to, and a transformer's family."""
    layers = list(layers)
    return frozenset({denoiser_of(layers), denoiser_family(layers)} - {""})


def refuse_denoiser(target: str, able: Collection[str], denoisers: Collection[str]) -> None:
    """Check that a format or program supports adapters of a denoiser.

    Args:
        target: Name of the format or program.
        able: Kinds of denoisers, and families, that it supports.
        denoisers: Kind and family of the adapter's denoiser.

    Raises:
        AdapterFormatError: If it does not; names the formats that do.
    """
    if not {*denoisers} & {*able}:
        kind = next(kind for kind in DENOISERS if kind in denoisers)
        able = [n for n, one in LAYOUTS.items() if one and {*denoisers} & {*one.denoisers}]
        raise AdapterFormatError(
            f"no {target} file of a {DENOISERS[kind]} is known that its programs read; write "
            f"one of {', '.join(able)}, or export a merged checkpoint"
        )


def factor_pair(name: str, tensors: Mapping[Part, Tensor]) -> tuple[Tensor, Tensor]:
    """Return ``A`` and ``B`` of a layer, both with two dimensions or more.

    Raises:
        AdapterFormatError: If one of them is missing or has fewer dimensions.
    """
    if missing := [part for part in ("down", "up") if part not in tensors]:
        raise AdapterFormatError(f"{name} lacks its {' and '.join(missing)} factor")
    down, up = tensors["down"], tensors["up"]
    if min(down.ndim, up.ndim) < 2:
        raise AdapterFormatError(
            f"{name}: low-rank factors of shapes {tuple(down.shape)} and {tuple(up.shape)}"
        )
    return down, up


def by_component(layers: Layers) -> dict[str, dict[str, LayerWeights]]:
    """Group layers by component, each group by canonical name."""
    groups: dict[str, dict[str, LayerWeights]] = {}
    for name, layer in layers.items():
        groups.setdefault(split_component(name)[0], {})[name] = layer
    return groups


def is_mixed(layers: Layers) -> bool:
    """Return whether some layers have a magnitude and others have none."""
    return len({layer.magnitude is None for layer in layers.values()}) > 1


def norm_axes(layers: Iterable[LayerWeights]) -> set[NormAxis]:
    """Return the axes of the layers' magnitudes."""
    return {layer.norm_axis for layer in layers if layer.magnitude is not None}


def with_alpha(layer: LayerWeights, alpha: float) -> LayerWeights:
    """Change the alpha of a layer and rescale ``B``, so that ``s B A`` stays the same."""
    factor = layer.alpha / alpha
    up = layer.up if factor == 1.0 else (layer.up.float() * factor).to(layer.up.dtype)
    return dataclasses.replace(layer, up=up, alpha=alpha)


def unit_scale(layer: LayerWeights) -> LayerWeights:
    """Multiply the scale of a layer into ``up``, so that alpha = rank."""
    return with_alpha(layer, float(layer.rank))


def factors(layer: LayerWeights, options: WriteOptions) -> tuple[Tensor, Tensor]:
    """Return ``A`` and ``B`` for writing, on the CPU and in the configured dtype."""
    dtype = options.dtype
    down, up = layer.down.detach().cpu(), layer.up.detach().cpu()
    return (down, up) if dtype is None else (down.to(dtype), up.to(dtype))


def some_layers(names: Collection[str]) -> str:
    """Return text such as ``"5 layers (a, b, c and 2 more)"``."""
    return f"{counted(len(names), 'layer')} ({listing(names, 3)})"
