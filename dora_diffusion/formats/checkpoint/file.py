"""A single-file checkpoint in the original layout, seen through canonical tensor names.

The inverse of ``checkpoint_keys``. What open_clip joins (q, k, v) or transposes is split and turned
back on loading, and the VAE's 1x1 convolutions become Linear weights.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dora_diffusion.families import COMPONENTS, FAMILIES, TITLES, Family, UnsupportedModelError
from dora_diffusion.formats.checkpoint.keys import (
    OPEN_CLIP_LEAVES,
    OPEN_CLIP_TOP,
    QKV,
    UNET_PREFIX,
    VAE_PREFIX,
    Entry,
)
from dora_diffusion.formats.files.stream import TensorReader, TensorSpec
from dora_diffusion.formats.names.modules import with_text_model
from dora_diffusion.formats.names.sgm_blocks import UNetLayout, from_sgm
from dora_diffusion.formats.names.vae import count_levels, is_attention_weight, vae_from_original

# Averaged copies of the unmerged weights; some loaders prefer them to the merged ones.
LEFT_OUT = ("model_ema.",)
# Of a text encoder, told by its shape: some programs store them as floating-point numbers.
POSITIONS = ".position_ids"
# Empty tensors by which a file says how its noise schedule is meant.
MARKERS: Mapping[str, Mapping[str, Any]] = {
    "v_pred": {"prediction_type": "v_prediction"},
    "ztsnr": {"rescale_betas_zero_snr": True},
}
_CLIP_PREFIXES = [
    encoder.checkpoint_prefix
    for family in FAMILIES.values()
    for encoder in family.text_encoders
    if not encoder.is_open_clip
]
# What `modelspec.prediction_type` says, and the ends of Stable Diffusion 2's architectures.
_PREDICTIONS = {"v": "v_prediction", "epsilon": "epsilon"}
_ARCHITECTURES = {"-768-v": "v_prediction", "-512": "epsilon"}
_RESBLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")
_TOP_BACK = {original: name for name, original in OPEN_CLIP_TOP.items()}
_LEAVES_BACK = {original: name for name, original in OPEN_CLIP_LEAVES.items()}


class CheckpointFile:
    """Lazy access to a single-file checkpoint. Use ``CheckpointFile.open``.

    Attributes:
        reader: The file.
        entries: For each tensor of the UNet, the text encoders and the VAE, the canonical tensors
            inside it.
        specs: Dtype and shape of the canonical tensors.
    """

    def __init__(self, reader: TensorReader, family: Family) -> None:
        self.reader = reader
        self.entries = original_entries(family, reader.specs)
        self.specs: dict[str, TensorSpec] = {}
        self._entry_of: dict[str, Entry] = {}
        for entry in self.entries:
            self._entry_of |= dict.fromkeys(entry.sources, entry)
            spec = _source_spec(entry, reader.specs[entry.key])
            self.specs |= dict.fromkeys(entry.sources, spec)

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, family: Family) -> Iterator[CheckpointFile]:
        """Open a checkpoint of a known family and close it afterwards."""
        with TensorReader(path) as reader:
            yield cls(reader, family)

    def __getitem__(self, name: str) -> Tensor:
        """Load one tensor by canonical name."""
        entry = self._entry_of[name]
        tensor = self.reader[entry.key]
        if entry.operation == "concatenate":
            return tensor.chunk(len(entry.sources))[entry.sources.index(name)]
        if entry.operation == "as_conv":
            return tensor.flatten(1)
        return tensor.t().contiguous() if entry.operation == "transpose" else tensor

    def module_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the UNet's and text encoders' 2-D and 4-D weights by canonical module name."""
        return {
            name.removesuffix(".weight"): spec.shape
            for name, spec in self.specs.items()
            if name.endswith(".weight")
            and not name.startswith("vae.")
            and len(spec.shape) in (2, 4)
        }

    def copied_specs(self) -> dict[str, TensorSpec]:
        """The tensors of no component, such as the noise schedule, by their names in the file."""
        planned = {entry.key for entry in self.entries}
        return {
            key: spec
            for key, spec in self.reader.specs.items()
            if key not in planned and not key.startswith(LEFT_OUT)
        }

    def schedule(self) -> dict[str, Any]:
        """See `stated_schedule`."""
        return stated_schedule(self.reader.metadata, self.reader.specs)


def stated_schedule(metadata: Mapping[str, str], names: Iterable[str]) -> dict[str, Any]:
    """The settings of a scheduler that a file states: by marker tensors, or metadata."""
    architecture = metadata.get("modelspec.architecture", "").partition("/")[0]
    stated = _PREDICTIONS.get(metadata.get("modelspec.prediction_type", ""), "")
    for end, prediction in _ARCHITECTURES.items():
        if not stated and architecture.endswith(end):
            stated = prediction
    settings: dict[str, Any] = {"prediction_type": stated} if stated else {}
    for marker in MARKERS.keys() & set(names):
        settings |= MARKERS[marker]
    return settings


def standard_key(key: str) -> str:
    """The name that a tensor should have: some programs drop or repeat CLIP's ``text_model.``.

    Without it most programs leave the text encoder as it was, or do not load the file at all.
    """
    for prefix in _CLIP_PREFIXES:
        if key.startswith(prefix):
            return prefix + with_text_model(key.removeprefix(prefix))
    return key


def detect_checkpoint_family(keys: Collection[str], name: str = "the checkpoint") -> Family:
    """Tell the family of a single-file checkpoint from its tensor names.

    Raises:
        UnsupportedModelError: If no family's marker is among them.
    """
    names = {standard_key(key) for key in keys}
    for family in FAMILIES.values():
        if family.checkpoint_key in names:
            return family
    raise UnsupportedModelError(
        f"{name} is not a full checkpoint of {TITLES}: its text encoder was not found among its "
        f"{len(keys)} tensors; an adapter or a bare UNet cannot serve as the base model"
    )


def _source_spec(entry: Entry, spec: TensorSpec) -> TensorSpec:
    if entry.operation == "concatenate":
        return TensorSpec(spec.dtype, (spec.shape[0] // len(entry.sources), *spec.shape[1:]))
    if entry.operation == "transpose":
        return TensorSpec(spec.dtype, spec.shape[::-1])
    return TensorSpec(spec.dtype, spec.shape[:2]) if entry.operation == "as_conv" else spec


def original_entries(family: Family, specs: Mapping[str, TensorSpec]) -> list[Entry]:
    """Entries for the file's UNet, text-encoder and VAE tensors; unknown names have none."""
    layout = layout_of_keys(specs)
    levels = count_levels(key.removeprefix(VAE_PREFIX) for key in specs)
    entries = []
    for key, spec in specs.items():
        if not spec.dtype.is_floating_point or key.endswith(POSITIONS):
            continue
        entry = _unet_entry(key, layout) or vae_entry(key, levels)
        for component in COMPONENTS[1:]:
            entry = entry or _text_entry(family, component, key)
        if entry:
            entries.append(entry)
    return entries


def layout_of_keys(keys: Mapping[str, object]) -> UNetLayout:
    """UNet layout from original names: the first downsampler closes the first level."""
    prefix = re.escape(UNET_PREFIX)
    ops = [m for key in keys if (m := re.match(rf"{prefix}input_blocks\.(\d+)\.0\.op\.", key))]
    step = min((int(match[1]) for match in ops), default=3)
    # Only the way there depends on which up levels have attention, not this way back.
    return UNetLayout(step - 1, ())


def _unet_entry(key: str, layout: UNetLayout) -> Entry | None:
    if not key.startswith(UNET_PREFIX):
        return None
    name = from_sgm(key.removeprefix(UNET_PREFIX), layout)
    return None if name is None else Entry(key, (f"unet.{name}",))


def vae_entry(key: str, levels: int, prefix: str = VAE_PREFIX) -> Entry | None:
    """Entry of a VAE tensor, None for another key.

    Args:
        key: Its name in the file.
        levels: Number of resolution levels.
        prefix: Of the VAE's tensors in the file.
    """
    path = key.removeprefix(prefix)
    name = vae_from_original(path, levels) if key.startswith(prefix) else None
    if name is None:
        return None
    return Entry(key, (f"vae.{name}",), "as_conv" if is_attention_weight(path) else "copy")


def _text_entry(family: Family, component: str, key: str) -> Entry | None:
    encoder = family.text_encoder(component)
    if encoder is None or not key.startswith(encoder.checkpoint_prefix):
        return None
    path = key.removeprefix(encoder.checkpoint_prefix)
    if not encoder.is_open_clip:
        return Entry(key, (f"{component}.{with_text_model(path)}",))
    if path == "text_projection":
        return Entry(key, (f"{component}.text_projection.weight",), "transpose")
    if path in _TOP_BACK:
        return Entry(key, (f"{component}.{_TOP_BACK[path]}",))
    return _resblock_entry(component, key, path)


def _resblock_entry(component: str, key: str, path: str) -> Entry | None:
    match = _RESBLOCK.fullmatch(path)
    if match is None:
        return None
    layer, parameter = f"{component}.text_model.encoder.layers.{match[1]}", match[3]
    if match[2] == "attn.in_proj":
        sources = tuple(f"{layer}.{name}.{parameter}" for name in QKV)
        return Entry(key, sources, "concatenate")
    if match[2] in _LEAVES_BACK:
        return Entry(key, (f"{layer}.{_LEAVES_BACK[match[2]]}.{parameter}",))
    return None
