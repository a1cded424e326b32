"""Flags that several commands have, and what is said of them before a model is loaded."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_diffusion.cli.commands.parser import SwitchAction
from dora_diffusion.cli.console.progress import say
from dora_diffusion.cli.console.tables import print_json
from dora_diffusion.config import ConfigError
from dora_diffusion.config.adapter import NORM_AXES
from dora_diffusion.config.families import PREDICTION_TYPES
from dora_diffusion.config.fields import AUTO, DTYPES, dtype_name, require, require_token_length
from dora_diffusion.config.run import SampleSettings
from dora_diffusion.config.wording import counted
from dora_diffusion.formats.layouts import CONVERSIONS, PROGRAMS
from dora_diffusion.models.schedulers import SCHEDULERS

if TYPE_CHECKING:
    from dora_diffusion.formats.adapter.metadata import AdapterMetadata
    from dora_diffusion.formats.checkpoint.schedule import AskedSchedule
    from dora_diffusion.models.components import Components

_STRENGTHS = {
    "strength": "Adapter strength: 0 is the base, 1 as trained.",
    "direction_strength": "Scale of the low-rank update inside the norm.",
    "magnitude_strength": "Share of the magnitude's change that is applied.",
}
_COMPONENT_STRENGTHS = {
    "unet_strength": "Multiplies --strength for the UNet.",
    "text_encoder_strength": "Multiplies --strength for the text encoders.",
}


def add_base(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add ``--base``, and which of its weights are taken."""
    parser.add_argument(
        "--base",
        required=required,
        help="Diffusers folder, hub id, single-file .safetensors checkpoint, or embedded:NAME.",
    )
    parser.add_argument("--variant", help="Weight variant of the base, such as fp16.")
    parser.add_argument("--revision", help="Branch, tag or commit of a base on the hub.")


def base_options(args: argparse.Namespace, flag: str = "base") -> dict[str, str | None]:
    """The variant and the revision of ``--base``, or ``--tuned``, as keywords of what opens it.

    Warns:
        UserWarning: Of one without effect.
    """
    from dora_diffusion.models.locate import is_embedded

    start, what = ("", "base") if flag == "base" else (f"{flag}_", f"{flag} model")
    names = [f"{start}variant", f"{start}revision"]
    options, model = {name: getattr(args, name) for name in names}, getattr(args, flag)
    reasons = {}
    if model is None:
        reasons = dict.fromkeys(options, f"no {what} is given")
    elif model.endswith(".safetensors"):
        reasons = dict.fromkeys(options, f"the {what} is a single file")
    elif is_embedded(model) or Path(model).expanduser().exists():
        reasons = {names[1]: f"the {what} is on this machine, not a hub id"}
    warn_of({name: reason for name, reason in reasons.items() if options[name] is not None})
    return options


def add_alpha(parser: argparse.ArgumentParser) -> None:
    """Add ``--alpha``."""
    parser.add_argument(
        "--alpha",
        type=float,
        help="Alpha that the adapter was trained with, if its file does not say it. Default: its "
        "rank, with a warning.",
    )


def add_dtype(parser: argparse.ArgumentParser, text: str, *, default: str | None = AUTO) -> None:
    """Add ``--dtype``, with ``auto`` among its choices where that is the default."""
    parser.add_argument(
        "--dtype",
        type=dtype_name,
        choices=(AUTO, *DTYPES) if default == AUTO else DTYPES,
        default=default,
        help=text,
    )


def add_sampling(parser: argparse.ArgumentParser, *, batch_size: int) -> None:
    """Add how images are sampled; without the guidance, whose default differs."""
    steps = SampleSettings.validation_inference_steps
    parser.add_argument("--steps", type=int, default=steps, help="Denoising steps.")
    parser.add_argument(
        "--scheduler", choices=tuple(SCHEDULERS), help="Scheduler. Default: the model's own."
    )
    parser.add_argument("--batch_size", type=int, default=batch_size, help="Batch size.")


def add_noise_schedule(parser: argparse.ArgumentParser) -> None:
    """Add how the base's noise schedule is meant."""
    parser.add_argument(
        "--prediction_type",
        choices=PREDICTION_TYPES,
        help="What the base predicts: the noise (epsilon) or v. Default: what it says, else what "
        "the adapter says, else epsilon.",
    )
    parser.add_argument(
        "--zero_terminal_snr",
        action=SwitchAction,
        help="Zero terminal SNR: the base's noise schedule ends in pure noise "
        "(arXiv:2305.08891). Default: "
        "what it says, else what the adapter says, else not.",
    )


def asked_schedule(args: argparse.Namespace) -> AskedSchedule:
    """What `add_noise_schedule` added."""
    from dora_diffusion.formats.checkpoint.schedule import AskedSchedule

    return AskedSchedule(args.prediction_type, args.zero_terminal_snr)


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="Replace an output that exists.")


def add_adapted_model(parser: argparse.ArgumentParser) -> None:
    """Add what `load_adapted_model` takes besides ``--base`` and the adapter."""
    add_model(parser)
    add_alpha(parser)
    _add_strengths(parser, _STRENGTHS)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add what `model_options` reads besides ``--base``."""
    add_dtype(
        parser,
        "Precision. auto: bfloat16 on a GPU that computes it, else float16; float32 on a CPU.",
    )
    parser.add_argument(
        "--config",
        help="Diffusers folder with the configuration of a single-file base. Default: the "
        "released model's.",
    )
    add_noise_schedule(parser)
    stated = "Default: what the adapter's file says, else that of the base."
    parser.add_argument(
        "--clip_skip",
        type=int,
        help="Last layers of the text encoders to leave out, as Diffusers counts: 1 is Clip skip 2 "
        f"of web UIs; of SDXL their Clip skip 2 is 0 here. {stated}",
    )
    parser.add_argument(
        "--max_token_length",
        type=int,
        help=f"Tokens of a prompt that are read, in chunks of 75; 0 reads all. {stated}",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="Compile the UNet's repeated blocks with torch.compile: a longer start, then faster "
        "steps on a GPU. Pays from some hundred steps on.",
    )


def add_merge(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add what `export` merges and `verify` compares with; adapters are ``required`` or not."""
    add_base(parser)
    without = "" if required else " Default: none, the base as it is."
    parser.add_argument(
        "--adapter",
        required=required,
        nargs="+",
        action="extend",
        default=[],
        help="Adapter files or output folders; FILE:0.5 gives one its own strength. May be "
        f"repeated.{without}",
    )
    add_alpha(parser)
    parser.add_argument("--vae", help="Another VAE: folder, hub id or .safetensors file.")
    add_noise_schedule(parser)
    _add_strengths(parser, _STRENGTHS | _COMPONENT_STRENGTHS)


def merge_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_merge` added, as keywords of `export_checkpoint` and `verify_checkpoint`."""
    names = (*_STRENGTHS, *_COMPONENT_STRENGTHS, "alpha", "vae")
    options = {name: getattr(args, name) for name in names} | base_options(args)
    return options | {"schedule": asked_schedule(args)}


def adapter_and_strength(text: str) -> tuple[str, float]:
    """Split ``FILE:0.5`` into the file and its strength; 1 where none is given."""
    match = re.fullmatch(r"(.+):([-+]?\d*\.?\d+(?:[eE][-+]?\d+)?)", text)
    return (match[1], float(match[2])) if match else (text, 1.0)


def load_adapted_model(args: argparse.Namespace) -> tuple[Components, AdapterMetadata]:
    """The base model with the adapter on it, ready to sample from.

    Raises:
        ValueError: If a strength is out of its limits, before anything is loaded.

    Warns:
        UserWarning: Of flags without effect.
    """
    from dora_diffusion.numerics.weights import Strengths

    Strengths(*(getattr(args, name) for name in _STRENGTHS))
    options = model_options(args)
    warn_without_effect(args)
    from dora_diffusion.sampling.generate import load_adapted

    components, metadata = load_adapted(
        args.base,
        args.adapter,
        strength=args.strength,
        direction=args.direction_strength,
        magnitude=args.magnitude_strength,
        alpha=args.alpha,
        offload=getattr(args, "offload", "none"),
        **options,
    )
    if components.schedule is not None and not components.schedule.is_configured:
        say(f"noise schedule of {args.base}: {components.schedule}", sys.stderr)
    return components, metadata


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_base` and `add_model` added, as keywords of `load_adapted`.

    Raises:
        ConfigError: If prompts cannot be read so.

    Warns:
        UserWarning: Of flags without effect.
    """
    require(
        args.clip_skip is None or args.clip_skip >= 0,
        f"clip_skip is {args.clip_skip}; it must not be negative",
        "clip_skip",
    )
    if args.max_token_length is not None:
        require_token_length(args.max_token_length)
    from dora_diffusion.models.precision import dtype_of

    names = ("config", "compile", "clip_skip", "max_token_length")
    options = {name: getattr(args, name) for name in names} | base_options(args)
    return options | {"dtype": dtype_of(args.dtype), "schedule": asked_schedule(args)}


def require_at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Refuse counts below 1.

    Raises:
        ConfigError: Of the first that is.
    """
    for name in names:
        value = getattr(args, name)
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1", name)


def warn_without_effect(args: argparse.Namespace) -> None:
    """Say which flags do nothing, and why.

    Args:
        args: With ``base`` and ``config``; ``adapter`` is None where the base alone is used, and
            ``output`` a model's or an image's name where there is one.

    Warns:
        UserWarning: One for each.
    """
    reasons = {}
    if args.adapter is None:
        defaults: dict[str, float | None] = {**dict.fromkeys(_STRENGTHS, 1.0), "alpha": None}
        moved = [name for name, default in defaults.items() if getattr(args, name) != default]
        reasons = dict.fromkeys(moved, "no adapter is given")
    if args.config is not None and not args.base.endswith(".safetensors"):
        reasons["config"] = "the base is not a single .safetensors file"
    elif args.config is not None and Path(getattr(args, "output", "")).suffix == ".safetensors":
        reasons["config"] = "the output is a single file, which holds none"
    warn_of(reasons)


def warn_of(reasons: Mapping[str, str]) -> None:
    for name, reason in reasons.items():
        warnings.warn(f"{name} has no effect because {reason}", stacklevel=3)


def _add_strengths(parser: argparse.ArgumentParser, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        parser.add_argument(f"--{name}", type=float, default=1.0, help=text)


if TYPE_CHECKING:
    from dora_diffusion.export import ConversionReport


def add_limits(parser: argparse.ArgumentParser, text: str, *, required: bool = False) -> None:
    """Add what limits the rank of each layer; ``text`` says what ``--rank`` is."""
    parser.add_argument("--rank", type=int, required=required, help=text)
    parser.add_argument(
        "--conv_rank", type=int, help="Largest rank of convolutions. Default: --rank."
    )
    parser.add_argument(
        "--energy",
        type=float,
        help="Use each layer's smallest rank that keeps this share of the squared singular "
        "values, such as 0.95. Default: the largest rank.",
    )


def add_fit(parser: argparse.ArgumentParser, axis: str) -> None:
    """Add how an adapter is fitted and written; ``axis`` says the default of ``--norm_axis``."""
    parser.add_argument(
        "--method", choices=("dora", "lora"), default="dora", help="lora: without magnitudes."
    )
    parser.add_argument(
        "--norm_axis",
        choices=NORM_AXES,
        help=f"Axis of the magnitudes. Default: {axis}.",
    )
    parser.add_argument(
        "--format",
        choices=("diffusers", "peft", "kohya"),
        help="Key format. Default: diffusers; kohya on the input axis, which it alone can hold.",
    )
    add_json(parser)
    add_dtype(parser, "Precision of the low-rank factors. Default: float32.", default=None)
    add_overwrite(parser)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="Print JSON, with the error of every layer."
    )


def print_written(
    report: ConversionReport, output: str | Path | None = None, *, as_json: bool
) -> None:
    """Say what was written, how near it is, and which programs read it exactly.

    Of a file for one program: what it costs there.
    """
    from dora_diffusion.export import inspect_adapter

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
    tools = inspect_adapter(report.path).tools
    if report.program:
        print(_cost(report, tools))
        return
    exact, wrong = where_it_works(tools)
    for line in exact:
        print(line)
    if wrong:
        print(f"wrong: {wrong}; convert it for these, or export a merged model")


def _cost(report: ConversionReport, tools: Mapping[str, str]) -> str:
    """One line: whether a program computes the file that was made for it exactly, and its size."""
    program = PROGRAMS[report.program]
    line = f"for {program.title} ({program.place}): {tools.get(program.columns[0], 'not known')}"
    if report.growth >= 2:
        line += f"; {report.growth:.0f} times as large as the adapter"
    if "which is off" in line:
        line += "; a merged model is exact (dora-diffusion export)"
    return line


def fit_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_fit` and `add_limits` added, and of the base, as keywords of what writes adapters.

    Warns:
        UserWarning: Of ``--norm_axis`` without effect.
    """
    from dora_diffusion.models.precision import dtype_of

    if args.method == "lora" and args.norm_axis is not None:
        warnings.warn("norm_axis has no effect because a LoRA has no magnitudes", stacklevel=2)
    names = ("rank", "conv_rank", "energy", "method", "norm_axis", "overwrite")
    options = {name: getattr(args, name) for name in names} | base_options(args)
    dtype = dtype_of(args.dtype) if args.dtype else None
    return options | {"key_format": args.format, "dtype": dtype}


def where_it_works(verdicts: Mapping[str, str]) -> tuple[list[str], str]:
    """The programs, by what `inspect` says of each, with what is special to one of them.

    Returns:
        A line for each way of being exact, and the programs that read it wrong.
    """
    programs: dict[str, list[str]] = {}
    for program, verdict in verdicts.items():
        short, _, detail = verdict.partition(": ")
        is_special = sum(other.endswith(detail) for other in verdicts.values()) == 1
        # Why a program is wrong, `inspect` says; that it is so for some layers only, matters here.
        is_special &= short.startswith("exact") or detail.startswith("it leaves")
        programs.setdefault(short, []).append(f"{program} ({detail})" if is_special else program)
    exact = [
        f"{verdict}: {', '.join(names)}"
        for verdict, names in programs.items()
        if verdict.startswith("exact")
    ]
    return exact, ", ".join(programs.get("wrong", ()))
