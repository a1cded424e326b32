"""The ``dora-diffusion`` command.

Nothing heavy is imported here: every ``--help`` answers at once. What a command does lives in
`dora_diffusion.commands`, imported when it runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from dora_diffusion import __version__
from dora_diffusion.commands.flags import add_train_flags
from dora_diffusion.commands.parser import Parser
from dora_diffusion.config.flag_map import meant_by, refusal
from dora_diffusion.console.errors import reporting_errors
from dora_diffusion.families import FAMILIES

# Written out, since asking the modules that define them would import torch for every --help.
SAMPLERS = (
    "ddim", "ddpm", "pndm", "heun", "euler", "euler_a", "dpm++", "dpm++_karras", "unipc",
)  # fmt: skip
FORMATS = ("diffusers", "peft", "kohya", "comfyui", "dense", "lora", "lora-diffusers")
# The app and the demo stand above the command line, which knows them by name only.
_HOMES = {"app": "dora_diffusion.app.launch", "demo": "dora_diffusion.demo"}
DTYPES = ("float32", "float16", "bfloat16")
AUTO_DTYPES = ("auto", *DTYPES)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0 done, 1 failed (the last line says why), 2 wrong usage, 3 out of memory,
        128 + N saved and stopped by signal N.
    """
    parser = build_parser()
    _complete(parser)
    args = parser.parse_args(argv)
    tune_process()
    command = import_module(_HOMES.get(args.command, f"dora_diffusion.commands.{args.command}"))
    with reporting_errors(args.command, debug=args.debug) as outcome:
        outcome.code = int(command.run(args) or 0)
    return outcome.code


def _complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks, through argcomplete, how the line could go on; then exit."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)


def tune_process() -> None:
    """Set what torch reads once, when it starts; what the user has set stays.

    On Linux: large pages for large tensors, since the kernel takes longer to hand out a buffer in
    small ones than many an operation to fill it; and threads that sleep while they wait, since on
    a machine that does something else too they would keep the others from their cores.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def train_main(argv: Sequence[str] | None = None) -> int:
    """Run ``dora-diffusion train`` with these flags; what the training script does."""
    return main(["train", *(sys.argv[1:] if argv is None else argv)])


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(
        prog="dora-diffusion",
        description="Teach Stable Diffusion or SDXL your subject with DoRA.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text, add_arguments in (
        ("train", "teach a model a subject from photos", add_train_flags),
        ("generate", "generate images", _generate_arguments),
        ("evaluate", "measure what an adapter has learned, and what it has cost", _evaluate),
        ("export", "merge an adapter into a model", _export_arguments),
        ("verify", "prove a merged model: recompute it and compare", _verify_arguments),
        ("convert", "write an adapter in another tool's format", _convert_arguments),
        ("inspect", "say what an adapter file is, and which tools read it exactly", _inspect),
        ("push", "publish a run on the Hugging Face hub, privately by default", _push_arguments),
        ("app", "train, compare and export in the browser", _arguments_of("app")),
        ("demo", "train, judge and merge a sample subject", _arguments_of("demo")),
        ("samples", "copy the sample subjects: photos, captions, settings", _samples_arguments),
    ):
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            refusals=refusal if name == "train" else None,
            suggest=meant_by if name == "train" else None,
            usage="%(prog)s [--config FILE] [--SETTING VALUE ...]" if name == "train" else None,
        )
        command.add_argument("--debug", action="store_true", help="Show tracebacks.")
        add_arguments(command)
    return parser


def _arguments_of(command: str) -> Callable[[argparse.ArgumentParser], None]:
    """The flags of a command that stands above the command line."""

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        import_module(_HOMES[command]).add_arguments(parser)

    return add_arguments


def _dtype(name: str) -> str:
    """A dtype in torch's name; fp16, bf16 and fp32 are taken too."""
    short = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
    return short.get(name, name)


def _strengths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--strength",
        type=float,
        default=1.0,
        help="0 is the base, 1 the adapter as trained. Default: %(default)s.",
    )
    parser.add_argument(
        "--direction_strength",
        type=float,
        default=1.0,
        help="Scales the low-rank update inside the norm. Default: %(default)s.",
    )
    parser.add_argument(
        "--magnitude_strength",
        type=float,
        default=1.0,
        help="Moves the magnitude by this share of its change. Default: %(default)s.",
    )


def _alpha(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--alpha",
        type=float,
        help="Alpha that an adapter was trained with whose file does not say it. Default: its "
        "rank, with a warning.",
    )


def _base(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument(
        "--base",
        required=required,
        help="Diffusers folder, hub id, single-file .safetensors checkpoint, or embedded:NAME.",
    )


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    _base(parser)
    parser.add_argument("--adapter", help="An adapter file, or the output folder of a run.")
    parser.add_argument("--prompt", required=True, help="Prompt.")
    parser.add_argument("--output", required=True, help="Image file, X.png.")
    parser.add_argument("--negative_prompt", default="", help="Negative prompt.")
    parser.add_argument("--seed", type=int, help="Seed of the first image. Default: random, shown.")
    parser.add_argument(
        "--num_images",
        type=int,
        default=1,
        help="Images, one per seed. Default: %(default)s.",
    )
    parser.add_argument(
        "--batch_size", type=int, default=4, help="Images generated at once. Default: %(default)s."
    )
    parser.add_argument(
        "--steps", type=int, default=30, help="Denoising steps. Default: %(default)s."
    )
    parser.add_argument(
        "--guidance_scale", type=float, default=7.5, help="Guidance scale. Default: %(default)s."
    )
    parser.add_argument("--scheduler", choices=SAMPLERS, help="Default: the model's own.")
    parser.add_argument("--width", type=int, help="Width in pixels. Default: the model's own.")
    parser.add_argument("--height", type=int, help="Height in pixels. Default: the model's own.")
    parser.add_argument("--overwrite", action="store_true", help="Replace an output that exists.")
    _loading(parser)
    _alpha(parser)
    _strengths(parser)


def _evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", help="An adapter file, or the output folder of a run.")
    _base(parser)
    parser.add_argument(
        "--subject",
        required=True,
        help="Folder of photos that training has not seen; or a subject of the toy world, such as "
        "bolt_mug, for an embedded model.",
    )
    parser.add_argument(
        "--output", default="evaluation", help="Folder of the results. Default: %(default)s."
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace results that exist.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    parser.add_argument(
        "--metric_model",
        nargs="+",
        default=[],
        help="What compares photos: folders or hub ids of CLIP, DINO or DINOv2, or "
        "efficientnet-lite0. Default: efficientnet-lite0 where it is installed.",
    )
    parser.add_argument("--trigger", help="Trigger words. Default: what the file says.")
    parser.add_argument(
        "--class_word", help="What it is. Default: the trigger words without their token."
    )
    parser.add_argument(
        "--prompts",
        help="Text file, one prompt per line, with {} where the subject is named. "
        "Default: a list of its own.",
    )
    parser.add_argument(
        "--num_seeds", type=int, default=4, help="Images per prompt. Default: %(default)s."
    )
    parser.add_argument("--seed", type=int, default=0, help="The first seed. Default: %(default)s.")
    parser.add_argument(
        "--steps", type=int, default=25, help="Denoising steps. Default: %(default)s."
    )
    parser.add_argument(
        "--guidance_scale",
        type=float,
        help="Guidance scale. Default: 3.5 for the toy world, else 7.5.",
    )
    parser.add_argument("--scheduler", choices=SAMPLERS, help="Default: the model's own.")
    parser.add_argument(
        "--batch_size", type=int, default=8, help="Images generated at once. Default: %(default)s."
    )
    _loading(parser)
    _alpha(parser)
    _strengths(parser)


def _loading(parser: argparse.ArgumentParser) -> None:
    """How the base of `generate` and `evaluate` is loaded."""
    parser.add_argument(
        "--dtype",
        type=_dtype,
        choices=AUTO_DTYPES,
        default="auto",
        help="Precision. auto: bfloat16 on a GPU that computes it, else float16; float32 on a CPU "
        "and on Apple's GPUs. Default: %(default)s.",
    )
    parser.add_argument("--variant", help="Weight variant of the base, such as fp16.")
    parser.add_argument(
        "--config",
        help="Diffusers folder with the configuration of a single-file base. Default: the "
        "released model's, from the hub.",
    )


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    """What `export` merges and `verify` compares with."""
    _base(parser)
    parser.add_argument(
        "--adapter",
        required=True,
        nargs="+",
        action="extend",
        help="Adapter files or output folders; FILE:0.5 gives one its own strength. May be "
        "repeated.",
    )
    _alpha(parser)
    parser.add_argument("--vae", help="Another VAE: folder, hub id or .safetensors file.")
    parser.add_argument("--variant", help="Weight variant of the base, such as fp16.")
    _strengths(parser)
    for part, text in (("unet", "UNet"), ("text_encoder", "text encoders")):
        parser.add_argument(
            f"--{part}_strength",
            type=float,
            default=1.0,
            help=f"Times --strength, for the {text}. Default: %(default)s.",
        )


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    _merge_arguments(parser)
    parser.add_argument(
        "--output",
        required=True,
        help="X.safetensors for one file that user interfaces read; else a Diffusers folder.",
    )
    parser.add_argument(
        "--dtype",
        type=_dtype,
        choices=AUTO_DTYPES,
        default="auto",
        help="Precision of the result. auto: the base's own, whatever machine merges it. Default: "
        "%(default)s.",
    )
    parser.add_argument(
        "--config",
        help="Diffusers folder with the configuration, for a folder made from a single file. "
        "Default: the released model's, from the hub.",
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace an output that exists.")


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    # Behind --adapter it would be taken for one more adapter: the command tells them apart.
    parser.add_argument(
        "merged", nargs="?", help="The merged model: a folder or a .safetensors file."
    )
    _merge_arguments(parser)


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", help="An adapter file or folder.")
    parser.add_argument("output", help="The file or folder to write.")
    parser.add_argument(
        "--to",
        required=True,
        choices=FORMATS,
        help="What to write. diffusers, peft; kohya: for LyCORIS, and for web UIs where trained on "
        "the input axis; for one --base: comfyui (and Forge), dense (A1111 too; large), and lora, "
        "lora-diffusers, which approximate it without magnitudes.",
    )
    _base(parser, required=False)
    parser.add_argument("--family", choices=tuple(FAMILIES), help="For files that do not say it.")
    parser.add_argument("--rank", type=int, help="Rank of the lora targets. Default: 64.")
    _alpha(parser)
    parser.add_argument("--tags", nargs="*", default=[], help="Words that adapter managers show.")
    parser.add_argument("--thumbnail", help="An image that adapter managers show.")
    parser.add_argument(
        "--json", action="store_true", help="Print JSON, with the error of every layer."
    )
    parser.add_argument(
        "--dtype",
        type=_dtype,
        choices=DTYPES,
        help="Of the low-rank factors. Default: float32.",
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace an output that exists.")


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="An adapter file or folder.")
    _base(parser, required=False)
    parser.add_argument("--json", action="store_true", help="Print JSON.")


def _push_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="The output folder of a run.")
    parser.add_argument("repository", help="NAME/MODEL on the hub; made where there is none.")
    parser.add_argument("--public", action="store_true", help="Let everybody see it.")


def _samples_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", nargs="?", default="samples", help="Where to. Default: %(default)s."
    )


if __name__ == "__main__":
    sys.exit(main())
