"""Settings of a fit: rank, method, norm axis, and the key format that can store the result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from dora_diffusion.config.adapter import NORM_AXES
from dora_diffusion.config.fields import require, require_choice
from dora_diffusion.export.files import ExportError
from dora_diffusion.formats.layouts import CONVERSIONS, KEY_FORMATS, input_format
from dora_diffusion.formats.layouts.layout import denoiser_of, is_mixed, norm_axes, refuse_denoiser
from dora_diffusion.numerics.weights import (
    LayerWeights,
    NormAxis,
)

METHODS = {"dora": "DoRA", "lora": "LoRA"}


@dataclass(frozen=True)
class FitSettings:
    """Settings for fitting layers.

    Attributes:
        rank: Largest rank; None: the rank of the fitted layers.
        conv_rank: Largest rank of Conv2d layers; None: ``rank``.
        energy: Use each layer's smallest rank that keeps this share of the squared singular values,
            up to the largest rank.
        method: A key of ``METHODS``.
        norm_axis: Axis of the magnitudes; None: the adapters' axis, or output.
        dtype: Dtype of the low-rank factors; None: float32.

    Raises:
        ConfigError: If a value is not valid.
    """

    rank: int | None = None
    conv_rank: int | None = None
    energy: float | None = None
    method: Literal["dora", "lora"] = "dora"
    norm_axis: NormAxis | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name, rank in (("rank", self.rank), ("conv_rank", self.conv_rank)):
            require(rank is None or rank > 0, f"{name} is {rank}; it must be at least 1", name)
        require_choice("method", self.method, tuple(METHODS))
        if self.norm_axis is not None:
            require_choice("norm_axis", self.norm_axis, NORM_AXES)
        energy = 1.0 if self.energy is None else self.energy
        problem = f"energy is {energy:g}; it must be above 0 and at most 1"
        require(0 < energy <= 1, problem, "energy")

    @property
    def axis(self) -> NormAxis:
        """Axis of the magnitudes."""
        return self.norm_axis or "output"

    @property
    def use_dora(self) -> bool:
        """True if layers get a magnitude."""
        return self.method == "dora"

    def rank_of(self, shape: tuple[int, ...], default: int) -> int:
        """Return the largest rank for a weight ``(out, in, *k)``; ``default`` if none is set."""
        rank = self.conv_rank if len(shape) > 2 and self.conv_rank is not None else self.rank
        return default if rank is None else rank

    def key_format(self, requested: str | None, denoiser: str = "unet") -> str:
        """Return the key format to write: the requested one, else one that can store the layers.

        Args:
            requested: The requested key format.
            denoiser: Kind of the model's denoiser.

        Raises:
            ExportError: If the requested one is unknown or cannot store them.
        """
        on_input = self.use_dora and self.axis == "input"
        default = input_format(denoiser) if on_input else "diffusers"
        if requested is None:
            return default
        if requested not in KEY_FORMATS:
            there_is = f"there is {', '.join(KEY_FORMATS)}"
            raise ExportError(f"unknown key format {requested!r}; {there_is}")
        if on_input and requested != default:
            raise ExportError(
                f"the {requested} format cannot store magnitudes on the input axis; choose "
                f"{default}, or the output axis"
            )
        refuse_denoiser(requested, CONVERSIONS[requested].denoisers, denoiser)
        return requested

    @property
    def limits(self) -> dict[str, float]:
        names = ("rank", "conv_rank", "energy")
        return {n: value for n in names if (value := getattr(self, n)) is not None}

    @property
    def ranks(self) -> str:
        """The limits as a text, such as ``"rank 8, energy 0.95"``."""
        limits = [f"{name} {value:g}" for name, value in self.limits.items()]
        return ", ".join(limits) or "sum of the ranks"

    def __str__(self) -> str:
        """Describe the fit: ``"nearest DoRA, output axis, rank 8"``."""
        axis = f"{self.axis} axis, " if self.use_dora else ""
        return f"nearest {METHODS[self.method]}, {axis}{self.ranks}"


def axis_of(layers: Iterable[LayerWeights]) -> NormAxis:
    """Return the axis of all magnitudes; the output axis if they differ, or there are none."""
    return "input" if norm_axes(layers) == {"input"} else "output"


def key_format_for(layers: Mapping[str, LayerWeights]) -> str:
    """Return the key format that can store these layers: Diffusers', if possible."""
    is_uniform = not is_mixed(layers) and "input" not in norm_axes(layers.values())
    return "diffusers" if is_uniform else input_format(denoiser_of(layers))
