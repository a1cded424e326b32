"""A base model: where it is, and what is asked of how it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from dora_diffusion.config.arguments import check_arguments
from dora_diffusion.config.families import PREDICTION_TYPES
from dora_diffusion.config.fields import Need, flag, require, require_choice

EMBEDDED_PREFIX = "embedded:"
BASE_HELP = "Diffusers folder, hub id, single-file .safetensors checkpoint, or embedded:NAME."
QUANTISATIONS = ("int8", "nf4")
TILE = 512
"""Side in pixels of the autoencoder's tiles, where a quantised model has no other."""
# They overlap by a quarter, of whole latents, which are 8 pixels wide.
TILE_STEP = 32
_QUANTIZED = Need("quantize", QUANTISATIONS)
_NAMES = {
    "base": "path",
    "pretrained_model_name_or_path": "path",
    "pretrained_vae_model_name_or_path": "vae",
}


@check_arguments()
@dataclass(frozen=True)
class BaseModel:
    """A base model by name, as functions take it that also take the name alone.

    Attributes:
        path: A Diffusers folder, a hub id, ``embedded:NAME``, or a single ``.safetensors`` file.
        variant: Weight variant of a folder or hub id, such as ``"fp16"``.
        revision: Branch, tag or commit of a hub id.
        model_config: For a single file: a Diffusers folder of the same architecture that gives the
            configuration and the tokenizers. None takes the released model's, which this package
            holds.
        vae: Another autoencoder: a folder, a hub id, or a ``.safetensors`` file.
        prediction_type: What the UNet predicts, ``"epsilon"`` or ``"v_prediction"``. None: what
            the model says; else its adapters; else what is usual of its kind.
        zero_terminal_snr: Whether the noise schedule ends in pure noise (arXiv:2305.08891); None:
            the same.
        quantize: ``"int8"`` or ``"nf4"`` keeps the weights of Linear layers, of UNet and text
            encoders, in 8 or 4 bits (`numerics.quantised`).
        quantize_convolutions: Those of convolutions too.
        vae_tile_size: Side in pixels of the tiles in which the autoencoder encodes and decodes
            larger images; 0: it takes them whole. None: `TILE` where weights are quantised, else 0.

    Raises:
        ConfigError: If a value cannot work.
    """

    path: str | Path
    variant: str | None = None
    revision: str | None = None
    model_config: str | Path | None = None
    vae: str | Path | None = None
    prediction_type: str | None = None
    zero_terminal_snr: bool | None = None
    quantize: str = "none"
    quantize_convolutions: bool = False
    vae_tile_size: int | None = None

    def __post_init__(self) -> None:
        require_choice("quantize", self.quantize, ("none", *QUANTISATIONS))
        require_tile_size(self.vae_tile_size)
        if self.prediction_type is not None:
            require_choice("prediction_type", self.prediction_type, PREDICTION_TYPES)

    @property
    def tile_size(self) -> int:
        """The autoencoder's tiles in pixels, 0 for none."""
        usual = 0 if self.quantize == "none" else TILE
        return usual if self.vae_tile_size is None else self.vae_tile_size

    @classmethod
    def of(cls, model: AnyModel) -> BaseModel:
        """A model that may be given by its name alone."""
        return model if isinstance(model, BaseModel) else cls(model)

    @classmethod
    def of_settings(cls, settings: Mapping[str, Any]) -> BaseModel:
        """The base model of a command's or a run's settings."""
        given = {_NAMES.get(name, name): value for name, value in settings.items() if value != ""}
        return cls(**{f.name: given.get(f.name, f.default) for f in fields(cls)})


AnyModel = str | Path | BaseModel


def quantize_flag() -> Any:
    """The setting `BaseModel.quantize`."""
    return flag(
        "none",
        "Keep the base model's weights in fewer bits, for a GPU of little memory: int8, or nf4 "
        "(4 bits, QLoRA). An adapter that is trained so is one of the unquantised model.",
        choices=("none", *QUANTISATIONS),
    )


def quantize_convolutions_flag() -> Any:
    """The setting `BaseModel.quantize_convolutions`."""
    return flag(False, "Quantise convolutions too.", needs=(_QUANTIZED,))


def vae_tile_size_flag() -> Any:
    """The setting `BaseModel.vae_tile_size`."""
    return flag(
        None,
        "VAE tiling: encode and decode images that are larger in tiles of so many pixels a side, a "
        "multiple of 32, which overlap by a quarter. It takes less memory and changes images "
        "slightly; 0 takes images whole.",
        derived=f"{TILE} with quantize, else 0",
        least=0,
    )


def require_tile_size(value: int | None) -> None:
    """Tiles must divide into latents, and their overlap too; None passes."""
    require(
        (value or 0) >= 0 and not (value or 0) % TILE_STEP,
        f"vae_tile_size is {value}; it must be a multiple of {TILE_STEP}, such as {TILE}, or 0",
        "vae_tile_size",
    )


@dataclass(frozen=True)
class OfModel:
    """Condition of settings that describe a model: one is given, and is loaded as they need.

    Attributes:
        setting: Which model.
        what: How it is called.
        kind: What it must be: one of several files, one of the hub, or a single file.
    """

    setting: str
    what: str
    kind: Literal["files", "hub", "file"] = "files"

    def __call__(self, config: Any) -> str | None:
        """Return why the condition does not hold; None where it does."""
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
