"""Commands that write an adapter: ``convert``, ``extract``, ``combine``."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_diffusion.cli.console.output import print_json, progress, tell
from dora_diffusion.cli.settings import (
    Alpha,
    AnyBase,
    Overwrite,
    RequiredBase,
    adapter_and_strength,
)
from dora_diffusion.config import ConfigError
from dora_diffusion.config.adapter import NORM_AXES
from dora_diffusion.config.base import BaseModel, OfModel
from dora_diffusion.config.command import CommandSettings
from dora_diffusion.config.families import DEFAULT_FAMILY, FAMILIES
from dora_diffusion.config.fields import DTYPES, REQUIRED, flag
from dora_diffusion.config.wording import counted
from dora_diffusion.formats.files.atomic import atomic_file
from dora_diffusion.formats.layouts import (
    CONVERSIONS,
    FOLDERS,
    KEY_FORMATS,
    LORA_RANK,
    NOT_TARGETS,
    PROGRAMS,
    TARGETS,
)

if TYPE_CHECKING:
    from dora_diffusion.export.convert import ConversionReport
    from dora_diffusion.export.fitting import FitSettings
    from dora_diffusion.formats.adapter.metadata import AdapterMetadata


@dataclass(frozen=True, kw_only=True)
class Written(Overwrite):
    """Settings of a written adapter."""

    json: bool = flag(False, "Print JSON, with the error of every layer.")
    dtype: str | None = flag(
        None, "Precision of the low-rank factors. Default: float32.", choices=DTYPES
    )


@dataclass(frozen=True, kw_only=True)
class Limits(CommandSettings):
    """Limits on the rank of each layer."""

    rank: int | None = flag(None, "Largest rank. Default: the sum of the adapters' in each layer.")
    conv_rank: int | None = flag(None, "Largest rank of convolutions. Default: --rank.")
    energy: float | None = flag(
        None,
        "Use each layer's smallest rank that keeps this share of the squared singular values, "
        "such as 0.95. Default: the largest rank.",
    )


def fit_of(settings: ConvertSettings | Fit) -> FitSettings:
    """Return a command's settings for fitting; ``convert`` keeps the adapter's method and axis."""
    import torch

    from dora_diffusion.export.fitting import FitSettings

    names = {"rank", "conv_rank", "energy", "method", "norm_axis"} & vars(settings).keys()
    values: dict[str, Any] = {name: getattr(settings, name) for name in names}
    dtype = getattr(torch, settings.dtype) if settings.dtype else None
    return FitSettings(**values, dtype=dtype)


@dataclass(frozen=True, kw_only=True)
class ConvertSettings(Written, Alpha, Limits, AnyBase):
    """Settings of ``convert``."""

    input: str = flag(REQUIRED, "An adapter file or folder.", positional=True)
    output: str = flag(
        REQUIRED,
        "The file or folder to write; for peft and comfyui_pair also a .zip.",
        positional=True,
    )
    to: str = flag(
        REQUIRED,
        f"Program that gets the format it needs of this adapter: {', '.join(PROGRAMS)}. Or a "
        "format: diffusers, peft; kohya, for LyCORIS; diffusion_model, for transformers; "
        "comfyui_pair, two files for any base in every version of ComfyUI; for one --base: "
        "comfyui, dense (large), and lora, lora-diffusers, which approximate it without "
        "magnitudes. Or smaller-rank: the same method with --rank, --conv_rank or --energy, "
        "nearest with --base.",
        choices=TARGETS,
        refused=NOT_TARGETS,
    )
    family: str | None = flag(
        None, "Model family, for files that do not store it.", choices=tuple(FAMILIES)
    )
    rank: int | None = flag(
        None, f"Largest rank, for smaller-rank and the lora targets. Default: {LORA_RANK} for lora."
    )
    strength: float = flag(
        1.0,
        "Strength of the written adapter: 0.7 makes a weaker file with the effect of this one at "
        "0.7. A DoRA needs --base. Trained words are unchanged.",
        above=0,
    )
    tags: list[str] = flag([], "Tags that adapter managers show.")
    thumbnail: str | None = flag(None, "An image that adapter managers show.")

    def perform(self) -> int:
        """Write an adapter for another tool, and print its error."""
        from dora_diffusion.export.convert import convert_adapter

        output = Path(self.output)
        is_packed = self.to in FOLDERS and output.suffix == ".zip"
        if is_packed and output.exists() and not self.overwrite:
            raise ConfigError(f"{output} exists; choose another output, or --overwrite", "output")
        names = ("family", "alpha", "strength", "tags", "thumbnail", "overwrite")
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        tell(phase="converting")
        with tempfile.TemporaryDirectory() as scratch:
            report = convert_adapter(
                self.input,
                Path(scratch, output.stem) if is_packed else self.output,
                self.to,
                fit_of(self),
                base=self.base_model,
                **options,
            )
            if is_packed:
                with atomic_file(output) as temporary:
                    packed = shutil.make_archive(f"{scratch}/packed", "zip", report.path)
                    shutil.move(packed, temporary)
            print_written(report, output if is_packed else report.path, as_json=self.json)
        return 0


def magnitudes(config: Any) -> str | None:
    """Condition that the method has magnitudes."""
    return "a LoRA has no magnitudes" if config.method == "lora" else None


@dataclass(frozen=True, kw_only=True)
class Fit(Written, Limits, RequiredBase):
    """Settings for fitting and writing an adapter."""

    output: str = flag(REQUIRED, "The file or folder to write.")
    method: str = flag("dora", "lora: without magnitudes.", choices=("dora", "lora"))
    norm_axis: str | None = flag(
        None,
        "Axis of the magnitudes. Default: that of the adapters, or output if they differ.",
        choices=NORM_AXES,
        needs=(magnitudes,),
    )
    format: str | None = flag(
        None,
        "Key format. Default: diffusers; on the input axis the only one that supports it: kohya, "
        "or for transformers diffusion_model.",
        choices=KEY_FORMATS,
    )


@dataclass(frozen=True, kw_only=True)
class ExtractSettings(Fit):
    """Settings of ``extract``."""

    tuned: str = flag(
        REQUIRED,
        "The fine-tuned model, of the same architecture: a Diffusers folder, hub id or single "
        ".safetensors file.",
    )
    tuned_variant: str | None = flag(
        None, "Weight variant of --tuned, such as fp16.", needs=(OfModel("tuned", "tuned model"),)
    )
    tuned_revision: str | None = flag(
        None,
        "Branch, tag or commit of --tuned on the hub.",
        needs=(OfModel("tuned", "tuned model", "hub"),),
    )
    rank: int = flag(REQUIRED, "Largest rank; small layers get less.")
    norm_axis: str | None = flag(
        None, "Axis of the magnitudes. Default: output.", choices=NORM_AXES, needs=(magnitudes,)
    )

    def perform(self) -> int:
        """Write the adapter nearest to a tuned model, and print its error."""
        from dora_diffusion.export.derive import extract_adapter

        tuned = BaseModel(self.tuned, self.tuned_variant, self.tuned_revision)
        with progress("extracting", "B") as show:
            report = extract_adapter(
                self.base_model, tuned, self.output, fit_of(self),
                key_format=self.format, overwrite=self.overwrite, on_progress=show,
            )  # fmt: skip
        print_written(report, as_json=self.json)
        return 0


@dataclass(frozen=True, kw_only=True)
class CombineSettings(Alpha, Fit):
    """Settings of ``combine``."""

    adapters: list[str] = flag(
        REQUIRED,
        "Adapter files or output folders; FILE:0.5 sets the strength of one.",
        positional=True,
        metavar="ADAPTER",
    )

    def perform(self) -> int:
        """Write one adapter with the effect of several, and print its error."""
        from dora_diffusion.export.derive import combine_adapters

        with progress("combining", "B") as show:
            report = combine_adapters(
                self.base_model,
                [adapter_and_strength(text) for text in self.adapters],
                self.output,
                fit_of(self),
                key_format=self.format,
                alpha=self.alpha,
                overwrite=self.overwrite,
                on_progress=show,
            )
        print_written(report, as_json=self.json)
        return 0


def print_written(
    report: ConversionReport, output: str | Path | None = None, *, as_json: bool
) -> None:
    """Print the file, its error, and the programs that read it exactly.

    For a file that was written for one program, print the verdict there and the file's growth.
    """
    from dora_diffusion.export.files import inspect_adapter

    if as_json:
        print_json(dataclasses.asdict(report))
        return
    layers = counted(report.layers, "layer")
    print(f"{output or report.path}: {layers}, {CONVERSIONS[report.target].written}")
    if report.worst is not None:
        name, error = report.worst
        print(
            f"relative error of the change: median {report.median_error:.2%}, "
            f"largest {error:.2%} in {name}, in total {report.total_error:.2%}"
        )
    for note in report.notes:
        print(f"note: {note}")
    written = inspect_adapter(report.path)
    tools = written.tools
    if report.program:
        if line := clip_skip_line(report.program, written.metadata):
            print(line)
        print(_cost(report, tools))
        return
    exact, wrong = where_it_works(tools)
    for line in exact:
        print(line)
    if wrong:
        print(f"wrong: {wrong}; convert the adapter for these, or export a merged model")


def clip_skip_line(program: str, metadata: AdapterMetadata) -> str:
    """Return a line with the clip skip to set in a program, as it counts; empty without one."""
    from dora_diffusion.formats.adapter.metadata import stated_reading

    name, skip = PROGRAMS[program].clip_skip, stated_reading(metadata.extra).get("clip_skip", 0)
    number = FAMILIES.get(metadata.family, DEFAULT_FAMILY).web_ui_clip_skip(skip)
    return f"trained with clip_skip {skip}: set {name}{number} there" if name and skip else ""


def _cost(report: ConversionReport, tools: Mapping[str, str]) -> str:
    """Return a line with a program's verdict on the file written for it, and the file's growth."""
    program = PROGRAMS[report.program]
    line = f"for {program.title} ({program.place}): {tools.get(program.columns[0], 'not known')}"
    if report.growth >= 2:
        line += f"; {report.growth:.0f} times as large as the adapter"
    if "which is off" in line:
        line += (
            "; a merged model is exact: 'dora-diffusion export --base MODEL --adapter ADAPTER "
            "--output MERGED'"
        )
    return line


def where_it_works(verdicts: Mapping[str, str]) -> tuple[list[str], str]:
    """Group programs by their verdict of `inspect`; a detail is kept if only one program has it.

    Returns:
        A line for each exact verdict, and the programs that read the file wrong.
    """
    programs: dict[str, list[str]] = {}
    for program, verdict in verdicts.items():
        short, _, detail = verdict.partition(": ")
        is_special = sum(other.endswith(detail) for other in verdicts.values()) == 1
        # `inspect` gives the reasons; here it matters only that some layers are affected.
        is_special &= short.startswith("exact") or detail.startswith("it leaves")
        programs.setdefault(short, []).append(f"{program} ({detail})" if is_special else program)
    exact = [
        f"{verdict}: {', '.join(names)}"
        for verdict, names in programs.items()
        if verdict.startswith("exact")
    ]
    return exact, ", ".join(programs.get("wrong", ()))
