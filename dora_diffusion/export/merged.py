"""Weights of a base model with adapters merged in or with replaced tensors, for any output."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.families import Family
from dora_diffusion.config.wording import listing
from dora_diffusion.export.files import ExportError, open_model
from dora_diffusion.formats.checkpoint.models import StoredModel, find_weights
from dora_diffusion.formats.checkpoint.weights import (
    VAE_PREFIXES,
    Entry,
    ModelWeights,
    check_dtype,
    count_levels,
    vae_names,
)
from dora_diffusion.formats.files.stream import PICKLED, TensorReader, TensorSpec
from dora_diffusion.formats.names.modules import modern_vae_path
from dora_diffusion.numerics.merging import (
    WeightedAdapter,
    cast_error,
    layers_of,
    merge_error,
    merge_tensor,
)
from dora_diffusion.numerics.weights import MergeError

_CHECKED_TENSORS = 8


class Overlay:
    """Weights of a model with some tensors replaced.

    Args:
        base: The weights.
        tensors: Canonical name -> function that returns the tensor, without rounding.
        specs: Dtypes and shapes that differ from the base's.
    """

    def __init__(
        self,
        base: ModelWeights,
        tensors: Mapping[str, Callable[[], Tensor]],
        specs: Mapping[str, TensorSpec] | None = None,
    ) -> None:
        self.base, self.tensors, self.family = base, tensors, base.family
        self.specs: Mapping[str, TensorSpec] = {**base.specs, **(specs or {})}

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]() if name in self.tensors else self.base[name]


@dataclass(frozen=True)
class MergedModel:
    """Tensors of a base model with adapters merged in, computed on access.

    Attributes:
        base: The base weights.
        adapters: The adapters to merge.
        dtype: Dtype of the UNet and the text encoders; None keeps the base's.

    Raises:
        MergeError: If an adapted weight of the base is quantised.
    """

    base: ModelWeights
    adapters: Sequence[WeightedAdapter]
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        for adapter in self.adapters:
            for name in adapter.layers:
                check_dtype(name, self.base.specs[f"{name}.weight"].dtype)

    @property
    def family(self) -> Family | None:
        return self.base.family

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Dtype and shape of each tensor to write."""
        specs, dtype = self.base.specs, self.dtype
        if dtype is None:
            return specs
        cast = {n: s for n, s in specs.items() if s.dtype.is_floating_point}
        cast = {n: TensorSpec(dtype, s.shape) for n, s in cast.items() if not n.startswith("vae.")}
        return {**specs, **cast}

    def __getitem__(self, name: str) -> Tensor:
        """Return a merged tensor in the dtype to write."""
        return self.tensor(name)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a merged tensor, computed in float32 and cast once (None: to `specs`' dtype)."""
        layers = layers_of(name, self.adapters)
        try:
            return merge_tensor(self.base[name], layers, dtype or self.specs[name].dtype)
        except MergeError as error:
            raise MergeError(f"{name}: {error}") from error

    def build(self, entry: Entry, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor of the single-file layout, built from merged tensors."""
        return entry.build(self.tensor(name, dtype) for name in entry.sources)

    def explains(self, entry: Entry, written: Tensor) -> bool:
        """Return whether a tensor is the merged one, up to rounding.

        The bits are usually equal, but no BLAS guarantees this, and a correct merge must not be
        refused. If they differ, each number is compared with its own bound on the rounding of
        float32 and of one cast. A damaged or different tensor, or another strength, exceeds it.
        """
        if torch.equal(written, self.build(entry)):
            return True
        expected = self.build(entry, torch.float32)
        errors = (
            merge_error(self.base[name], layers_of(name, self.adapters)) for name in entry.sources
        )
        allowed = cast_error(expected, written.dtype) + 2 * entry.build(errors)
        # In this form, a NaN counts as a difference.
        return bool(((written.float() - expected).abs() <= allowed).all())


def check_sample(path: Path, entries: Sequence[Entry], merged: MergedModel) -> None:
    """Recompute some adapted tensors and compare them with the reopened file.

    Raises:
        ExportError: If one differs by more than its rounding.
    """
    adapted = [e for e in entries if any(layers_of(n, merged.adapters) for n in e.sources)]
    step = max(1, len(adapted) // _CHECKED_TENSORS)
    with TensorReader(path) as reader:
        for entry in adapted[::step][:_CHECKED_TENSORS]:
            if not merged.explains(entry, reader[entry.key]):
                raise ExportError(f"{path.name}: {entry.key} did not read back as it was merged")


class VaeFile:
    """Tensors of an autoencoder by canonical name, read from a file of any layout.

    Attributes:
        specs: Dtype and shape of every tensor, ``vae....``.
        config: The ``config.json``, if there is one.

    Raises:
        ExportError: If a tensor does not belong to an autoencoder.
    """

    def __init__(self, reader: TensorReader, config: Path | None) -> None:
        self.reader, self.config = reader, config
        # A whole checkpoint has the autoencoder's tensors under a prefix.
        prefixes = [p for p in VAE_PREFIXES if any(key.startswith(p) for key in reader.specs)]
        prefix = prefixes[0] if prefixes else ""
        keys = [key for key in reader.specs if key.startswith(prefix)]
        names = vae_names(count_levels(key.removeprefix(prefix) for key in keys))
        self._key_of: dict[str, str] = {}
        unknown = []
        for key in keys:
            path = modern_vae_path(key.removeprefix(prefix))
            if name := names.to_canonical(path) or (names.to_original(path) and path):
                self._key_of[f"vae.{name}"] = key
            elif not key.startswith((f"{prefix}loss.", "model_ema.")):
                unknown.append(key)
        if unknown or not self._key_of:
            raise ExportError(f"{reader.path.name} is not an autoencoder: {listing(unknown)}")
        self.specs = {name: reader.specs[key] for name, key in self._key_of.items()}
        for name, spec in self.specs.items():
            if ".attentions.0.to_" in name and name.endswith(".weight"):  # A Linear layer.
                self.specs[name] = TensorSpec(spec.dtype, spec.shape[:2])

    def __getitem__(self, name: str) -> Tensor:
        """Load a tensor by canonical name."""
        return self.reader[self._key_of[name]].view(self.specs[name].shape)


def with_vae(base: ModelWeights, vae: VaeFile) -> Overlay:
    """Return base weights with another autoencoder in place of the base's.

    Raises:
        ExportError: If the autoencoders differ in shape.
    """
    replaced = {name: spec for name, spec in base.specs.items() if name.startswith("vae.")}
    # First dimension and number of values are equal for a Linear weight and a 1x1 convolution.
    old, new = (
        {name: (*spec.shape[:1], math.prod(spec.shape)) for name, spec in specs.items()}
        for specs in (replaced, vae.specs)
    )
    if wrong := [name for name in old.keys() | new.keys() if old.get(name) != new.get(name)]:
        raise ExportError(f"the autoencoder has other shapes than the base's: {listing(wrong)}")
    return Overlay(base, {name: partial(vae.__getitem__, name) for name in vae.specs}, vae.specs)


@contextlib.contextmanager
def open_base(base: BaseModel) -> Iterator[tuple[StoredModel, ModelWeights, VaeFile | None]]:
    """Open a base. Yields the model, its weights with ``base.vae`` in place, and that autoencoder.

    Raises:
        ExportError: If ``base.vae`` is not an autoencoder, or has other shapes than the model's.
    """
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(open_model(base))
        vae = stack.enter_context(_open_vae(base.vae)) if base.vae else None
        yield model, with_vae(model, vae) if vae else model, vae


@contextlib.contextmanager
def _open_vae(name: str | PathLike[str]) -> Iterator[VaeFile]:
    """Open an autoencoder and close its file afterwards.

    Args:
        name: As in `vae_folder`, or a ``.safetensors`` file of an autoencoder or a whole
            checkpoint.

    Raises:
        ExportError: If the file is not an autoencoder.
        ModelNotFoundError: If it does not exist.
    """
    from dora_diffusion.models.locate import vae_folder

    path = Path(name).expanduser()
    if path.suffix in PICKLED:
        raise ExportError(f"{path.name} is a pickle, which can run code when opened")
    config = None
    if not path.is_file():
        folder = vae_folder(name)
        path, config = find_weights(folder), folder / "config.json"
    with TensorReader(path) as reader:
        yield VaeFile(reader, config if config and config.is_file() else None)
