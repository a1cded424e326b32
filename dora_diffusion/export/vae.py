"""Another autoencoder for a merged model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from dora_diffusion.export.output import ExportError
from dora_diffusion.formats.checkpoint.folder import find_weights
from dora_diffusion.formats.checkpoint.weights import ModelWeights
from dora_diffusion.formats.files.header import PICKLED, TensorSpec
from dora_diffusion.formats.files.stream import TensorReader
from dora_diffusion.formats.names.checkpoint import VAE_PREFIX
from dora_diffusion.formats.names.vae import count_levels, modern_vae_path, vae_names
from dora_diffusion.wording import listing


class VaeFile:
    """The tensors of an autoencoder by canonical name, whatever layout its file has.

    Attributes:
        specs: Dtype and shape of every tensor, ``vae....``.
        config: Its ``config.json``, if it has one.

    Raises:
        ExportError: If a tensor has no place in an autoencoder.
    """

    def __init__(self, reader: TensorReader, config: Path | None) -> None:
        self.reader, self.config = reader, config
        # A whole checkpoint has the autoencoder's tensors under a prefix.
        prefix = VAE_PREFIX if any(key.startswith(VAE_PREFIX) for key in reader.specs) else ""
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
        self.specs = {name: self._spec(name, key) for name, key in self._key_of.items()}

    def _spec(self, name: str, key: str) -> TensorSpec:
        spec = self.reader.specs[key]
        linear = ".attentions.0.to_" in name and name.endswith(".weight")
        return TensorSpec(spec.dtype, spec.shape[:2]) if linear else spec

    def __getitem__(self, name: str) -> Tensor:
        """Load one tensor by canonical name."""
        return self.reader[self._key_of[name]].view(self.specs[name].shape)


class WithVae:
    """Base weights with another autoencoder in place of their own.

    Raises:
        ExportError: If the autoencoders differ in shape.
    """

    def __init__(self, base: ModelWeights, vae: VaeFile) -> None:
        self.base, self.vae, self.family = base, vae, base.family
        replaced = {name: spec for name, spec in base.specs.items() if name.startswith("vae.")}
        wrong = [
            name
            for name in replaced.keys() | vae.specs.keys()
            if _size(replaced.get(name)) != _size(vae.specs.get(name))
        ]
        if wrong:
            raise ExportError(
                f"the autoencoder is of another kind than the base's: {listing(wrong)}"
            )
        self.specs: Mapping[str, TensorSpec] = {**base.specs, **vae.specs}

    def __getitem__(self, name: str) -> Tensor:
        """Load one tensor."""
        return self.vae[name] if name.startswith("vae.") else self.base[name]


def _size(spec: TensorSpec | None) -> tuple[int, int]:
    """First dimension and number of values: the same for a Linear weight and a 1x1 convolution."""
    return (0, 0) if spec is None else ((*spec.shape, 1)[0], math.prod(spec.shape))


@contextlib.contextmanager
def open_vae(name: str | Path) -> Iterator[VaeFile]:
    """Open an autoencoder and close its file afterwards.

    Args:
        name: A folder of an autoencoder or of a whole model, a hub id of either, or a
            ``.safetensors`` file: an autoencoder alone, or a whole checkpoint.

    Raises:
        ExportError: If it is not an autoencoder.
        ModelNotFoundError: If there is none.
    """
    path = Path(name).expanduser()
    if path.suffix in PICKLED:
        raise ExportError(f"{path.name} is a pickle, which can run code when opened")
    config = None
    if not path.is_file():
        folder = _folder(name)
        path, config = find_weights(folder), folder / "config.json"
    with TensorReader(path) as reader:
        yield VaeFile(reader, config if config and config.is_file() else None)


def _folder(name: str | Path) -> Path:
    from dora_diffusion.models.locate import fetch_snapshot, looks_local, resolve_folder

    path = Path(name).expanduser()
    if not path.is_dir() and not looks_local(str(name)) and ":" not in str(name):
        allow = ["config.json", "*.safetensors", "vae/config.json", "vae/*.safetensors"]
        path = fetch_snapshot(str(name), None, allow, ["*.fp16.*"])
    elif not (path / "config.json").is_file():
        path = resolve_folder(name)
    return path / "vae" if (path / "vae").is_dir() else path
