"""Base model: its location and loading options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal

from dora_diffusion.config.families import PREDICTION_TYPES
from dora_diffusion.config.fields import Need, flag, require, require_choice

EMBEDDED_PREFIX = "embedded:"
BASE_HELP = "Diffusers folder, hub id, single-file .safetensors checkpoint, or embedded:NAME."
QUANTISATIONS = ("int8", "nf4")
TILE = 512
"""Default side in pixels of the autoencoder's tiles for a quantised model."""
# Tiles overlap by a quarter, which must be whole latents of 8 pixels.
TILE_STEP = 32
_QUANTIZED = Need("quantize", QUANTISATIONS)
_NAMES = {
    "base": "path",
    "pretrained_model_name_or_path": "path",
    "pretrained_vae_model_name_or_path": "vae",
}


@dataclass(frozen=True)
class BaseModel:
    """A base model by name; functions that take it also take the name alone.

    Attributes:
        path: A Diffusers folder, a hub id, ``embedded:NAME``, or a single ``.safetensors`` file.
        variant: Weight variant of a folder or hub id, such as ``"fp16"``.
        revision: Branch, tag or commit of a hub id.
        model_config: For a single file: a Diffusers folder of the same architecture, whose
            configuration and tokenizers are used. None: the released model's configuration, which
            is part of this package.
        vae: Another autoencoder: a folder, a hub id, or a ``.safetensors`` file.
        prediction_type: Prediction of the UNet, ``"epsilon"`` or ``"v_prediction"``. None: read
            from the model, else from its adapters, else the default of its family.
        zero_terminal_snr: Whether the noise schedule ends in pure noise (arXiv:2305.08891). None:
            as for ``prediction_type``.
        distilled: Whether it was distilled to few denoising steps. None: read from the model, as
            far as its files or its name show it.
        quantize: ``"int8"`` or ``"nf4"`` stores the weights of Linear layers of UNet and text
            encoders in 8 or 4 bits (`numerics.quantised`).
        quantize_convolutions: Quantise the weights of convolutions too.
        vae_tile_size: Side in pixels of the tiles in which the autoencoder encodes and decodes
            larger images; 0: no tiling. None: `TILE` if weights are quantised, else 0.

    Raises:
        ConfigError: If a value cannot work.
    """

    path: str | PathLike[str]
    variant: str | None = None
    revision: str | None = None
    model_config: str | PathLike[str] | None = None
    vae: str | PathLike[str] | None = None
    prediction_type: str | None = None
    zero_terminal_snr: bool | None = None
    distilled: bool | None = None
    quantize: str = "none"
    quantize_convolutions: bool = False
    vae_tile_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("path", "model_config", "vae"):
            if isinstance(value := getattr(self, name), PathLike):
                object.__setattr__(self, name, Path(value))
        require_choice("quantize", self.quantize, ("none", *QUANTISATIONS))
        require_tile_size(self.vae_tile_size)
        if self.prediction_type is not None:
            require_choice("prediction_type", self.prediction_type, PREDICTION_TYPES)

    @property
    def tile_size(self) -> int:
        """The autoencoder's tiles in pixels, 0 for none."""
        usual = 0 if self.quantize == "none" else TILE
        return usual if self.vae_tile_size is None else self.vae_tile_size

    def twin(self, path: str) -> BaseModel:
        """Return another model that is stored as this one."""
        names = ("quantize", "quantize_convolutions", "vae_tile_size")
        return BaseModel(path, **{name: getattr(self, name) for name in names})

    @classmethod
    def of(cls, model: AnyModel) -> BaseModel:
        """A model that may be given by its name alone."""
        return model if isinstance(model, BaseModel) else cls(model)

    @classmethod
    def of_settings(cls, settings: Mapping[str, Any]) -> BaseModel:
        """The base model of a command's or a run's settings."""
        values = {_NAMES.get(name, name): value for name, value in settings.items() if value != ""}
        return cls(**{f.name: values.get(f.name, f.default) for f in fields(cls)})


AnyModel = str | PathLike[str] | BaseModel


@dataclass(frozen=True, kw_only=True)
class StorageSettings:
    """Storage of a base model in less memory, as in `BaseModel`."""

    heading: ClassVar = "Model"

    quantize: str = flag(
        "none",
        "Quantise the base model's weights to save GPU memory: int8, or nf4 (4 bits, QLoRA). The "
        "trained adapter works with the unquantised model.",
        choices=("none", *QUANTISATIONS),
    )
    quantize_convolutions: bool = flag(False, "Quantise convolutions too.", needs=(_QUANTIZED,))
    vae_tile_size: int | None = flag(
        None,
        "VAE tiling: encode and decode larger images in tiles of this side in pixels (a multiple "
        "of 32), which overlap by a quarter. Takes less memory and changes images slightly; 0 "
        "turns it off.",
        derived=f"{TILE} with quantize, else 0",
        least=0,
    )


def require_tile_size(value: int | None) -> None:
    """Check that tiles and their overlap are whole latents; None passes."""
    require(
        (value or 0) >= 0 and not (value or 0) % TILE_STEP,
        f"vae_tile_size is {value}; it must be a multiple of {TILE_STEP}, such as {TILE}, or 0",
        "vae_tile_size",
    )


@dataclass(frozen=True)
class OfModel:
    """Condition of settings that describe a model: it is given, in the form that they apply to.

    Attributes:
        setting: Setting that names the model.
        what: Name of the model in messages.
        kind: Required form: a model of several files, one on the hub, or a single file.
    """

    setting: str
    what: str
    kind: Literal["files", "hub", "file"] = "files"

    def __call__(self, config: Any) -> str | None:
        """Return why the condition does not hold; None if it holds."""
        model: str | None = getattr(config, self.setting)
        if model is None:
            without_base: str | None = config.without_base
            return without_base
        is_file = model.endswith(".safetensors")
        if is_file != (self.kind == "file"):
            what = "a single file" if is_file else "not a single .safetensors file"
            return f"the {self.what} is {what}"
        is_here = model.startswith(EMBEDDED_PREFIX) or Path(model).expanduser().exists()
        if self.kind == "hub" and is_here:
            return f"the {self.what} is on this machine, not a hub id"
        return None
