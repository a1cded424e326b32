"""Tensors of a model by canonical name, and their conversion to a single file and back.

An `Entry` describes how a tensor of the file is built from component tensors. Entries are planned
from names alone, so a checkpoint can be read and written one tensor at a time. A plan uses each
source tensor exactly once and writes each name once.

model.diffusion_model.      the UNet, in sgm blocks, or the transformer; a file of the latter alone
                            may have another prefix, or none
first_stage_model., vae.    the VAE; `decoder.up` is numbered from the output's side
cond_stage_model.           SD1: CLIP; SD2: open_clip, with q, k, v in one matrix
conditioner.embedders.0/1.  SDXL: CLIP, and open_clip with a transposed projection
text_encoders.              Z-Image: Qwen3
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from dora_diffusion.config.families import (
    COMPONENTS,
    FAMILIES,
    Family,
    UnsupportedModelError,
)
from dora_diffusion.config.wording import listing
from dora_diffusion.formats.files.stream import TensorSpec
from dora_diffusion.formats.names.modules import (
    NAMES,
    ROWS,
    SWAPPED,
    NameTable,
    UNetLayout,
    below,
    encoder_path,
    transformer_names,
    unet_names,
)
from dora_diffusion.numerics.weights import LayerKind, MergeError, swap_halves

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIXES = tuple(dict.fromkeys(family.vae_prefix for family in FAMILIES.values()))
_DENOISER_PREFIXES = (UNET_PREFIX, *{f.denoiser_prefix for f in FAMILIES.values()} - {""})
_CLIP_PREFIXES = [
    encoder.checkpoint_prefix
    for family in FAMILIES.values()
    for encoder in family.text_encoders
    if not encoder.is_open_clip and not encoder.is_in_denoiser
]
# More layers than the largest text encoder of CLIP: SD2's has 23, SDXL's second one 32.
_MOST_LAYERS = 64
# More resnets per level than known autoencoders: released encoders have two, decoders three.
_MOST_RESNETS = 8
_LEVEL = re.compile(r"decoder\.up(?:_blocks)?\.(\d+)\.")
_PROJECTION = re.compile(r".*\.mid\.attn_1\.(q|k|v|proj_out)\.weight")


@lru_cache
def checkpoint_names(
    family: Family, unet: UNetLayout | None, vae_levels: int, prefix: str = UNET_PREFIX
) -> NameTable:
    """Return the names of all tensors that a single file of a family may contain.

    Args:
        family: Family of the model.
        unet: Layout of a UNet; None for transformers.
        vae_levels: Number of the autoencoder's resolution levels.
        prefix: Prefix of the denoiser's tensors.
    """
    denoiser = transformer_names(family.code) if unet is None else unet_names(unet)
    pairs = denoiser.below(f"{family.denoiser}.", prefix)
    pairs += vae_names(vae_levels).below("vae.", family.vae_prefix)
    for encoder in family.text_encoders:
        component, start = encoder.component, encoder.checkpoint_prefix
        start = f"{prefix}{start}" if encoder.is_in_denoiser else start
        if encoder.is_open_clip:
            pairs += NameTable(_open_clip_pairs()).below(f"{component}.", start)
        else:
            pairs.append((component, start.removesuffix(".")))
    return NameTable(pairs)


def _open_clip_pairs() -> Iterator[tuple[str, str]]:
    yield from NAMES["open_clip_top"].items()
    for layer in range(_MOST_LAYERS):
        name, original = f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        yield from below(NAMES["open_clip_layer"], name, original)


def standard_key(key: str) -> str:
    """Return the standard name of a tensor: some programs drop or repeat CLIP's ``text_model.``.

    With another name most programs do not load the text encoder, or refuse the file.
    """
    for prefix in _CLIP_PREFIXES:
        if key.startswith(prefix):
            return prefix + encoder_path(key.removeprefix(prefix))
    return key


@lru_cache
def vae_names(levels: int) -> NameTable:
    """Return the names of the modules of an autoencoder with this number of resolution levels."""
    return NameTable(_vae_pairs(levels))


def _vae_pairs(levels: int) -> Iterator[tuple[str, str]]:
    top, attention, resnet = (NAMES[f"vae_{part}"] for part in ("top", "attention", "resnet"))
    yield from ((name, name) for name in ("quant_conv", "post_quant_conv", "bn"))
    for side, blocks in (("encoder", "down"), ("decoder", "up")):
        yield from below(top, side, side)
        yield from below(attention, f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1")
        for i in range(2):
            yield from below(resnet, f"{side}.mid_block.resnets.{i}", f"{side}.mid.block_{i + 1}")
        for level in range(levels):
            # The original decoder numbers its levels from the output.
            number = level if side == "encoder" else levels - 1 - level
            name, original = f"{side}.{blocks}_blocks.{level}", f"{side}.{blocks}.{number}"
            for i in range(_MOST_RESNETS):
                yield from below(resnet, f"{name}.resnets.{i}", f"{original}.block.{i}")
            yield f"{name}.{blocks}samplers.0.conv", f"{original}.{blocks}sample.conv"


def count_levels(paths: Iterable[str]) -> int:
    """Count the resolution levels from names in either layout, without prefix."""
    return 1 + max((int(m[1]) for path in paths if (m := _LEVEL.match(path))), default=0)


def is_projection_weight(original: str) -> bool:
    """Return whether a weight is a 1x1 convolution in the original layout, Linear in Diffusers."""
    return _PROJECTION.fullmatch(original) is not None


Operation = Literal["copy", "concatenate", "transpose", "as_conv", "as_integer", "swap"]
# Position ids of a text encoder, which some programs store as floating-point numbers.
POSITIONS = ".position_ids"


class CheckpointLayoutError(ValueError):
    """Error of a model without a single-file layout, or with tensors that do not fit it."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a single file.

    Attributes:
        key: Name in the file.
        sources: Canonical names of the source tensors, e.g. ``unet.conv_in.weight``.
        operation: Operation on the sources. ``as_conv`` turns ``(C, C)`` into ``(C, C, 1, 1)``;
            ``concatenate`` joins along dim 0; ``swap`` exchanges the halves of dim 0.
    """

    key: str
    sources: tuple[str, ...]
    operation: Operation = "copy"

    @classmethod
    def of(cls, key: str, sources: Sequence[str]) -> Entry:
        """Return the entry of a key, with the operation from its name and number of sources."""
        operation: Operation = "copy"
        if len(sources) > 1:
            operation = "concatenate"
        elif key.endswith(".text_projection"):
            operation = "transpose"  # open_clip multiplies from the left: x @ P
        elif key.endswith(POSITIONS):
            operation = "as_integer"
        elif is_projection_weight(key):
            operation = "as_conv"
        return cls(key, tuple(sources), operation)

    def spec(self, specs: Mapping[str, TensorSpec]) -> TensorSpec:
        """Return dtype and shape of the tensor, from its sources' dtypes and shapes.

        Raises:
            CheckpointLayoutError: If the sources of a joined matrix do not fit together.
        """
        sources = [specs[name] for name in self.sources]
        if len({(spec.dtype, spec.shape[1:]) for spec in sources}) > 1:
            raise CheckpointLayoutError(f"{listing(self.sources)} cannot be joined")
        return TensorSpec.of(self.build(map(_without_data, sources)))

    def build(self, tensors: Iterable[Tensor]) -> Tensor:
        """Build the tensor from its sources, in order."""
        sources = list(tensors)
        if self.operation == "concatenate":
            return torch.cat(sources)
        if self.operation == "transpose":
            return sources[0].t().contiguous()
        if self.operation == "swap":
            return swap_halves(sources[0])
        if self.operation == "as_conv" and sources[0].ndim == 2:
            return sources[0][:, :, None, None]
        return sources[0].to(torch.int64) if self.operation == "as_integer" else sources[0]

    def source_spec(self, spec: TensorSpec) -> TensorSpec:
        """Return dtype and shape of each source, from the tensor's dtype and shape."""
        return TensorSpec.of(self.source(self.sources[0], _without_data(spec)))

    def source(self, name: str, tensor: Tensor) -> Tensor:
        """Extract a source from the tensor."""
        if self.operation == "concatenate":
            return tensor.chunk(len(self.sources))[self.sources.index(name)]
        if self.operation == "as_conv":
            return tensor.flatten(1)
        if self.operation == "swap":
            return swap_halves(tensor)
        return tensor.t().contiguous() if self.operation == "transpose" else tensor


@dataclass(frozen=True)
class SingleFile:
    """Content of a file in the original layout.

    Attributes:
        entries: Tensors built from component tensors.
        other_specs: Dtype and shape of other tensors, such as the noise schedule.
        load_other: Loads one of the other tensors.
    """

    entries: Sequence[Entry]
    other_specs: Mapping[str, TensorSpec]
    load_other: Callable[[str], Tensor]


def _without_data(spec: TensorSpec) -> Tensor:
    return torch.empty(spec.shape, dtype=spec.dtype, device="meta")


def names_of_configs(
    family: Family, configs: Mapping[str, Mapping[str, Any]], prefix: str = UNET_PREFIX
) -> NameTable:
    """Return the names of all tensors of a pipeline, from its configs by component name.

    Args:
        family: Family of the model.
        configs: The configs.
        prefix: Prefix of the denoiser's tensors.

    Raises:
        CheckpointLayoutError: If a component is missing or the layout cannot number its blocks.
    """
    required = (family.denoiser, "vae", "scheduler")
    if missing := [name for name in required if name not in configs]:
        raise CheckpointLayoutError(f"the pipeline has no {listing(missing)} config")
    try:
        unet = UNetLayout.of(configs[family.denoiser])
    except ValueError as error:
        raise CheckpointLayoutError(str(error)) from error
    levels = len(configs["vae"].get("block_out_channels", ()))
    return checkpoint_names(family, unet, levels, prefix)


def plan_checkpoint(family: Family, table: NameTable, names: Iterable[str]) -> list[Entry]:
    """Plan the single file of a model.

    Args:
        family: Family of the model.
        table: Layout of the model, from `names_of_configs`.
        names: Canonical names of all tensors.

    Returns:
        Entries sorted by key.

    Raises:
        CheckpointLayoutError: If a tensor has no place in the file.
    """
    open_clip = tuple(f"{e.component}." for e in family.text_encoders if e.is_open_clip)
    # open_clip has no position ids.
    paths = {n for n in names if not (n.startswith(open_clip) and n.endswith(POSITIONS))}
    originals = filter(None, map(table.to_original, paths))
    entries = [entry_of(key, table) for key in sorted({o.partition("#")[0] for o in originals})]
    whole = [entry for entry in entries if entry and paths.issuperset(entry.sources)]
    if lost := paths.difference(*(entry.sources for entry in whole)):
        raise CheckpointLayoutError(
            f"tensors without a place in a {family.name} checkpoint: {listing(lost)}"
        )
    return whole


def entry_of(key: str, names: NameTable) -> Entry | None:
    """Return the entry of a file's tensor; None if it belongs to no component."""
    rows = [names.canonical[key + row] for row in ROWS if key + row in names.canonical]
    if rows:
        return Entry.of(key, rows)
    if name := names.canonical.get(key + SWAPPED):
        return Entry(key, (name,), "swap")
    name = names.to_canonical(standard_key(key))
    return None if name is None else Entry.of(key, [name])


def denoiser_prefix(family: Family, keys: Iterable[str]) -> str:
    """Return the prefix of the denoiser's tensors in a single file."""
    known = (UNET_PREFIX, *filter(None, [family.denoiser_prefix]))
    return next((prefix for key in keys for prefix in known if key.startswith(prefix)), "")


def without_prefix(key: str) -> str:
    """Return the name of a denoiser's tensor without the prefix that single files have."""
    return next((key.removeprefix(p) for p in _DENOISER_PREFIXES if key.startswith(p)), key)


def entries_of_file(family: Family, specs: Mapping[str, TensorSpec]) -> list[Entry]:
    """Return entries for the file's denoiser, text-encoder and VAE tensors.

    Unknown names have none.
    """
    prefix = denoiser_prefix(family, specs)
    denoiser = [key.removeprefix(prefix) for key in specs if key.startswith(prefix)]
    levels = count_levels(key.removeprefix(family.vae_prefix) for key in specs)
    unet = UNetLayout.from_original_names(denoiser) if family.has_unet else None
    names = checkpoint_names(family, unet, levels, prefix)
    entries = (
        entry_of(key, names)
        for key, spec in specs.items()
        if spec.dtype.is_floating_point and not key.endswith(POSITIONS)
    )
    return [entry for entry in entries if entry]


class ModelWeights(Protocol):
    """Protocol of a model's weights by canonical name: a folder, a file, live modules or a merge.

    Names of text encoders have ``text_model.``, even if the source's names have not.
    """

    @property
    def family(self) -> Family | None:
        """Family of the model; None if unknown."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Dtype and shape of every tensor."""

    def __getitem__(self, name: str) -> Tensor:
        """Load a tensor."""


def module_shapes(weights: ModelWeights) -> dict[str, tuple[int, ...]]:
    """Return the shapes of UNet and text-encoder weights, except vectors, by canonical module name.

    Raises:
        MergeError: If the model is quantised: the shapes of codes differ from those of weights.
    """
    # In a single file, codes are among the tensors without a component.
    for name, spec in [*weights.specs.items(), *getattr(weights, "other_specs", {}).items()]:
        if ".weight" in name and not spec.dtype.is_floating_point:
            check_dtype(name.removesuffix(".weight"), spec.dtype)
    return {
        name.removesuffix(".weight"): spec.shape
        for name, spec in weights.specs.items()
        if name.endswith(".weight")
        and name.partition(".")[0] in COMPONENTS
        and len(spec.shape) in (2, 3, 4)
    }


def kinds_of(weights: ModelWeights) -> Mapping[str, LayerKind]:
    """Return how live modules store their weight, by canonical name; {} for models on disk.

    On disk only Embeddings are not plain, and adapter files mark these by their keys.
    """
    kinds: Mapping[str, LayerKind] = getattr(weights, "kinds", {})
    return kinds


def module_weight(weights: ModelWeights, name: str) -> Tensor:
    """Load the weight of a module, by its canonical name.

    Raises:
        MergeError: If it is quantised.
    """
    check_dtype(name, weights.specs[f"{name}.weight"].dtype)
    return weights[f"{name}.weight"]


# Suffixes of scales that bitsandbytes, Quanto and scaled float8 files store with codes.
_SCALES = (".absmax", ".SCB", "._scale", ".scale_weight", ".weight_scale")


def require_unquantised(path: Path, specs: Mapping[str, TensorSpec]) -> None:
    """Check that a model's file is not quantised.

    Raises:
        UnsupportedModelError: If it is; names an alternative.
    """
    for key, spec in specs.items():
        is_codes = key.endswith(".weight") and not spec.dtype.is_floating_point
        if is_codes or key.endswith(_SCALES):
            raise UnsupportedModelError(
                f"{path} is quantised ({key}); take the model in half precision or float32, which "
                "--quantize reads in 8 or 4 bits"
            )


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Check that a base weight has a floating-point dtype of 16 bits or more.

    Quantised weights cannot be merged: every program stores their scales differently, and rounding
    to 8 bits loses most of an adapter's change.

    Raises:
        MergeError: If it has another dtype.
    """
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        kind = str(dtype).removeprefix("torch.")
        raise MergeError(
            f"the base stores {name} as {kind}: adapters are merged into weights of 16 bits or "
            "more; take this model in half precision"
        )
