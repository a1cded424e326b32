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
    StorageSettings,
    require_tile_size,
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
from dora_diffusion.config.images import scheduler_flag
from dora_diffusion.formats.files.atomic import require_writable

if TYPE_CHECKING:
    from dora_diffusion.formats.adapter.metadata import AdapterMetadata
    from dora_diffusion.models.components import Components
    from dora_diffusion.numerics.weights import Strengths
    from dora_diffusion.sampling.stack import AdapterUse


def adapter_and_strength(text: str) -> tuple[str, float]:
    """Split ``FILE:0.5`` into the file and its strength, by default 1."""
    match = re.fullmatch(r"(.+):([-+]?\d*\.?\d+(?:[eE][-+]?\d+)?)", text)
    return (match[1], float(match[2])) if match else (text, 1.0)


def adapter_and_strengths(text: str) -> tuple[str, float, float]:
    """Split ``FILE:0.5:0.8`` into the file and its strengths in text encoders and UNet."""
    path, last = adapter_and_strength(text)
    file, first = adapter_and_strength(path)
    return (file, first, last) if file != path else (path, last, last)


def needs_adapter(config: Any) -> str | None:
    """Condition that an adapter is given. A command with a list of adapters checks it itself."""
    return "no adapter is given" if getattr(config, "adapter", "") is None else None


@dataclass(frozen=True, kw_only=True)
class AnyBase(CommandSettings):
    """Base model of a command that does not require one."""

    without_base: ClassVar[str | None] = "no base is given"

    base: str | None = flag(None, BASE_HELP)
    variant: str | None = flag(
        None, "Weight variant of the base, such as fp16.", needs=(OfModel("base", "base"),)
    )
    revision: str | None = flag(
        None, "Branch, tag or commit of a base on the hub.", needs=(OfModel("base", "base", "hub"),)
    )

    @property
    def base_model(self) -> Any:
        """The base with its variant and revision, as a `BaseModel`; None if it is not given."""
        return None if self.base is None else BaseModel.of_settings(vars(self))


@dataclass(frozen=True, kw_only=True)
class RequiredBase(AnyBase):
    """Base model of a command that requires one."""

    base: str = flag(REQUIRED, BASE_HELP)


@dataclass(frozen=True, kw_only=True)
class ScheduleFlags(CommandSettings):
    """Flags of the base's noise schedule."""

    prediction_type: str | None = flag(
        None,
        "Prediction type of the base: noise (epsilon) or v. Default: from the base's files, else "
        "from the adapter's, else epsilon.",
        choices=PREDICTION_TYPES,
    )
    zero_terminal_snr: bool | None = flag(
        None,
        "Zero terminal SNR: the base's noise schedule ends in pure noise (arXiv:2305.08891). "
        "Default: from the base's files, else from the adapter's, else off.",
    )


@dataclass(frozen=True, kw_only=True)
class Alpha(CommandSettings):
    """Alpha of an adapter, for files that do not store it."""

    alpha: float | None = flag(
        None,
        "Alpha of the adapter's training, if its file does not store it. Default: its rank, with a "
        "warning.",
        needs=(needs_adapter,),
    )


@dataclass(frozen=True, kw_only=True)
class Overwrite(CommandSettings):
    """Setting for an output that already exists."""

    overwrite: bool = flag(False, "Replace an output that exists.")


def check_results(output: str | Path, what: str, files: Iterable[str], *, overwrite: bool) -> None:
    """Check that a folder of results can be written and contains none of the files.

    Raises:
        ConfigError: If it cannot or does; names the setting to change.
    """
    if not overwrite and any((Path(output) / name).exists() for name in files):
        raise ConfigError(
            f"{output} already contains {what}; choose another --output, or --overwrite", "output"
        )
    require_writable(Path(output), is_folder=True)


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
        """The strengths as `Strengths`.

        Raises:
            ValueError: If one is out of range.
        """
        from dora_diffusion.numerics.weights import Strengths

        return Strengths(self.strength, self.direction_strength, self.magnitude_strength)


_STATED = "Default: from the adapter's file, else the base's."


@dataclass(frozen=True, kw_only=True)
class _ModelFlags(ScheduleFlags, RequiredBase):
    dtype: str = flag(
        AUTO,
        "Precision. auto: bfloat16 on a GPU that computes it, else float16; float32 on a CPU.",
        choices=(AUTO, *DTYPES),
    )
    distilled: bool | None = flag(
        None,
        "The base was distilled to few denoising steps (turbo): images take its steps and "
        "guidance. Default: from the base's files or name.",
    )
    model_config: str | None = flag(
        None,
        "Diffusers folder with the configuration of a single-file base. Default: the released "
        "model's.",
        needs=(OfModel("base", "base", "file"),),
    )
    clip_skip: int | None = flag(
        None,
        "Last layers of the text encoders to skip, as Diffusers counts: 1 is Clip skip 2 of web "
        f"UIs; for SDXL their Clip skip 2 is 0 here. {_STATED}",
        least=0,
    )
    max_token_length: int | None = flag(
        None, f"Maximum tokens of a prompt, in chunks of 75; 0 reads all. {_STATED}"
    )
    compile: bool = flag(
        False,
        "Compile the UNet's repeated blocks with torch.compile: a longer start, then faster steps "
        "on a GPU. Pays from some hundred steps on.",
    )


@dataclass(frozen=True, kw_only=True)
class Model(StorageSettings, _ModelFlags):
    """Base model that is loaded for sampling, stored as requested."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_token_length is not None:
            require_token_length(self.max_token_length)
        require_tile_size(self.vae_tile_size)

    @property
    def reading(self) -> dict[str, int | None]:
        """Clip skip and token length of prompts; None if not given."""
        return {"clip_skip": self.clip_skip, "max_token_length": self.max_token_length}

    @property
    def model_options(self) -> dict[str, Any]:
        """Keyword arguments of `load_adapted` for loading the base."""
        from dora_diffusion.models.precision import dtype_of

        return {"compile": self.compile, "dtype": dtype_of(self.dtype), **self.reading}


@dataclass(frozen=True, kw_only=True)
class AdaptedModel(StrengthFlags, Alpha, Model):
    """Base model with an adapter."""

    def load(
        self, adapter: str | Sequence[AdapterUse] | None, *, offload: str = "none"
    ) -> tuple[Components, AdapterMetadata]:
        """Load the base with one or several adapters, ready for sampling.

        Raises:
            ValueError: If a strength is out of range. Nothing is loaded then.
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
