"""Settings that commands share."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dora_diffusion.cli.console.output import say
from dora_diffusion.config.base import (
    BASE_HELP,
    BaseModel,
    OfModel,
    quantize_convolutions_flag,
    quantize_flag,
    require_tile_size,
    vae_tile_size_flag,
)
from dora_diffusion.config.command import CommandSettings
from dora_diffusion.config.families import PREDICTION_TYPES
from dora_diffusion.config.fields import (
    AUTO,
    DTYPES,
    REQUIRED,
    ConfigError,
    flag,
    require_token_length,
)
from dora_diffusion.formats.files.atomic import require_writable
from dora_diffusion.models.schedulers import A1111_NAMES, SCHEDULERS

if TYPE_CHECKING:
    from dora_diffusion.formats.adapter.metadata import AdapterMetadata
    from dora_diffusion.models.components import Components
    from dora_diffusion.numerics.weights import Strengths
    from dora_diffusion.sampling.stack import AdapterUse


def adapter_and_strength(text: str) -> tuple[str, float]:
    """Split ``FILE:0.5`` into the file and its strength; 1 where none is given."""
    match = re.fullmatch(r"(.+):([-+]?\d*\.?\d+(?:[eE][-+]?\d+)?)", text)
    return (match[1], float(match[2])) if match else (text, 1.0)


def adapter_and_strengths(text: str) -> tuple[str, float, float]:
    """Split ``FILE:0.5:0.8`` into the file, and its strengths in text encoders and UNet."""
    path, last = adapter_and_strength(text)
    file, first = adapter_and_strength(path)
    return (file, first, last) if file != path else (path, last, last)


def needs_adapter(config: Any) -> str | None:
    """An adapter must be there; of a list, what merges it says so."""
    return "no adapter is given" if getattr(config, "adapter", "") is None else None


@dataclass(frozen=True, kw_only=True)
class AnyBase(CommandSettings):
    """The base model of what does without one."""

    without_base: ClassVar[str | None] = "no base is given"

    base: str | None = flag(None, BASE_HELP)
    variant: str | None = flag(
        None, "Weight variant of the base, such as fp16.", needs=(OfModel("base", "base"),)
    )
    revision: str | None = flag(
        None,
        "Branch, tag or commit of a base on the hub.",
        needs=(OfModel("base", "base", "hub"),),
    )

    @property
    def base_model(self) -> Any:
        """The base as a `BaseModel`, with all that is asked of it; None where there is none."""
        return None if self.base is None else BaseModel.of_settings(vars(self))


@dataclass(frozen=True, kw_only=True)
class RequiredBase(AnyBase):
    """The base model."""

    base: str = flag(REQUIRED, BASE_HELP)


@dataclass(frozen=True, kw_only=True)
class ScheduleFlags(CommandSettings):
    """Flags of the base's noise schedule."""

    prediction_type: str | None = flag(
        None,
        "What the base predicts: the noise (epsilon) or v. Default: what it says, else what the "
        "adapter says, else epsilon.",
        choices=PREDICTION_TYPES,
    )
    zero_terminal_snr: bool | None = flag(
        None,
        "Zero terminal SNR: the base's noise schedule ends in pure noise (arXiv:2305.08891). "
        "Default: what it says, else what the adapter says, else not.",
    )


@dataclass(frozen=True, kw_only=True)
class Alpha(CommandSettings):
    """Alpha of an adapter whose file may not state it."""

    alpha: float | None = flag(
        None,
        "Alpha that the adapter was trained with, if its file does not say it. Default: its rank, "
        "with a warning.",
        needs=(needs_adapter,),
    )


@dataclass(frozen=True, kw_only=True)
class Overwrite(CommandSettings):
    """Handling of an output that exists."""

    overwrite: bool = flag(False, "Replace an output that exists.")


def check_results(output: str | Path, what: str, files: Iterable[str], *, overwrite: bool) -> None:
    """Refuse a folder of results that cannot be written, or that holds one of the files already.

    Raises:
        ConfigError: With what to do.
    """
    if not overwrite and any((Path(output) / name).exists() for name in files):
        raise ConfigError(
            f"{output} contains {what} already; choose another --output, or --overwrite", "output"
        )
    require_writable(Path(output), is_folder=True)


def scheduler_flag() -> Any:
    """The setting of a scheduler."""
    return flag(
        None,
        "Scheduler, by these names or by A1111's, such as 'DPM++ 2M Karras'. Default: the model's "
        "own.",
        choices=tuple(SCHEDULERS),
        aliases=A1111_NAMES,
    )


@dataclass(frozen=True, kw_only=True)
class Sampling(CommandSettings):
    """Settings of image sampling."""

    scheduler: str | None = scheduler_flag()
    batch_size: int = flag(8, "Batch size.", least=1)


@dataclass(frozen=True, kw_only=True)
class StrengthFlags(CommandSettings):
    """Strengths of an adapter."""

    strength: float = flag(
        1.0, "Adapter strength: 0 is the base, 1 as trained.", needs=(needs_adapter,)
    )
    direction_strength: float = flag(
        1.0, "Scale of the low-rank update inside the norm.", needs=(needs_adapter,)
    )
    magnitude_strength: float = flag(
        1.0, "Share of the magnitude's change that is applied.", needs=(needs_adapter,)
    )

    @property
    def strengths(self) -> Strengths:
        """All of them.

        Raises:
            ValueError: If one is out of its limits.
        """
        from dora_diffusion.numerics.weights import Strengths

        return Strengths(self.strength, self.direction_strength, self.magnitude_strength)


_STATED = "Default: what the adapter's file says, else that of the base."


@dataclass(frozen=True, kw_only=True)
class Model(ScheduleFlags, RequiredBase):
    """A base model that is loaded to sample from."""

    dtype: str = flag(
        AUTO,
        "Precision. auto: bfloat16 on a GPU that computes it, else float16; float32 on a CPU.",
        choices=(AUTO, *DTYPES),
    )
    model_config: str | None = flag(
        None,
        "Diffusers folder with the configuration of a single-file base. Default: the released "
        "model's.",
        needs=(OfModel("base", "base", "file"),),
    )
    clip_skip: int | None = flag(
        None,
        "Last layers of the text encoders to leave out, as Diffusers counts: 1 is Clip skip 2 of "
        f"web UIs; of SDXL their Clip skip 2 is 0 here. {_STATED}",
        least=0,
    )
    max_token_length: int | None = flag(
        None, f"Tokens of a prompt that are read, in chunks of 75; 0 reads all. {_STATED}"
    )
    compile: bool = flag(
        False,
        "Compile the UNet's repeated blocks with torch.compile: a longer start, then faster steps "
        "on a GPU. Pays from some hundred steps on.",
    )
    quantize: str = quantize_flag()
    quantize_convolutions: bool = quantize_convolutions_flag()
    vae_tile_size: int | None = vae_tile_size_flag()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_token_length is not None:
            require_token_length(self.max_token_length)
        require_tile_size(self.vae_tile_size)

    @property
    def reading(self) -> dict[str, int | None]:
        """Clip skip and token length by which prompts are read, where they are given."""
        return {"clip_skip": self.clip_skip, "max_token_length": self.max_token_length}

    @property
    def model_options(self) -> dict[str, Any]:
        """Keyword arguments of `load_adapted` for loading the base."""
        from dora_diffusion.models.precision import dtype_of

        return {"compile": self.compile, "dtype": dtype_of(self.dtype), **self.reading}


@dataclass(frozen=True, kw_only=True)
class AdaptedModel(StrengthFlags, Alpha, Model):
    """A base model with an adapter on it."""

    def load(
        self, adapter: str | Sequence[AdapterUse] | None, *, offload: str = "none"
    ) -> tuple[Components, AdapterMetadata]:
        """The base with an adapter on it, or several, ready to sample from.

        Raises:
            ValueError: If a strength is out of its limits, before anything is loaded.
        """
        strengths, options = self.strengths, self.model_options
        from dora_diffusion.sampling.load import load_adapted

        components, metadata = load_adapted(
            self.base_model,
            adapter,
            strength=strengths,
            alpha=self.alpha,
            offload=offload,
            **options,
        )
        if components.schedule is not None and not components.schedule.is_configured:
            say(f"noise schedule of {self.base}: {components.schedule}", sys.stderr)
        return components, metadata
