"""The ``dora-diffusion`` command: its list of commands.

Each is a class of what it takes, a `CommandSettings`, in one of the modules of `HOMES`: ``export``
is ``ExportSettings``. None imports anything heavy before it is performed, so that every ``--help``
answers at once.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Container, Sequence
from importlib import import_module
from typing import Any

from dora_diffusion import __version__
from dora_diffusion.cli.commands.parser import Parser
from dora_diffusion.cli.console.errors import reporting_errors
from dora_diffusion.config.command import CommandSettings
from dora_diffusion.system import let_break_interrupt

COMMANDS = {
    "train": "teach a model a subject from photos",
    "generate": "generate images",
    "serve": "generate over HTTP, with many adapters in one batch",
    "evaluate": "measure subject similarity, subject leakage and language drift",
    "analyze": "analyze how training changed the weights: magnitude, direction, rank",
    "fleet": "train an adapter for each of many subjects, on this machine or on a Ray cluster",
    "compare": "train several methods on several subjects and seeds, and report what differs",
    "simulate": "plan a fleet: how long subjects wait for workers, and what it costs",
    "rank-checkpoints": "measure the checkpoints of a run, and suggest one",
    "export": "merge an adapter into a model",
    "verify": "verify a merged model: recompute it and compare",
    "convert": "write an adapter in another tool's format, or with a smaller rank",
    "extract": "make an adapter of the difference between two models",
    "combine": "make one adapter of several",
    "inspect": "show what a file is, and which programs compute it exactly",
    "push": "publish a run on the Hugging Face hub, privately by default",
    "app": "train, compare and export in the browser",
    "demo": "train, evaluate and merge a sample subject",
    "prepare": "check photos, write captions and masks",
    "samples": "copy the sample subjects: photos, captions, settings",
    "doctor": "check the installation and a base model, and describe them for a bug report",
}
HOMES = {
    "cli.commands.train": ("train",),
    "cli.commands.generate": ("generate",),
    "cli.commands.evaluate": ("evaluate",),
    "cli.commands.rank_checkpoints": ("rank-checkpoints",),
    "cli.commands.results": ("export", "verify", "push"),
    "cli.commands.adapters": ("convert", "extract", "combine"),
    "cli.commands.inspect": ("inspect",),
    "cli.commands.prepare": ("prepare",),
    "cli.commands.project": ("samples", "doctor"),
    "cluster.commands": ("fleet", "serve"),
    "lab.commands": ("analyze", "compare", "demo"),
    "lab.simulation.command": ("simulate",),
    "studio.app.command": ("app",),
}
"""Module -> the commands in it; the rooms beside the core are found here, and imported nowhere."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0 done, 1 failed (the last line says why), 2 wrong usage, 3 out of memory,
        128 + N saved and stopped by signal N.
    """
    words = sys.argv[1:] if argv is None else argv
    _complete()
    args = build_parser(COMMANDS.keys() & words).parse_args(words)
    tune_process()
    let_break_interrupt()
    _print_anything()
    with reporting_errors(args.command, debug=args.debug) as outcome:
        outcome.code = read_settings(args).perform()
    return outcome.code


def build_parser(filled: Container[str] = COMMANDS) -> argparse.ArgumentParser:
    """The parser of all commands; only those in ``filled`` have their flags."""
    parser = Parser(
        prog="dora-diffusion",
        description="Teach Stable Diffusion or SDXL your subject with DoRA.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.add_argument("--debug", action="store_true", help="Show tracebacks.")
        if name in filled:
            settings_of(name).add_arguments(command)
    return parser


def read_settings(args: argparse.Namespace) -> Any:
    """Return the settings of the command that was parsed; see `CommandSettings.of_arguments`."""
    return settings_of(args.command).of_arguments(args)


def settings_of(command: str) -> type[CommandSettings]:
    """The class of a command."""
    (home,) = (home for home, commands in HOMES.items() if command in commands)
    name = f"{command.title().replace('-', '')}Settings"
    kind: type[CommandSettings] = getattr(import_module(f"dora_diffusion.{home}"), name)
    return kind


def tune_process() -> None:
    """Set what torch reads once, when it starts; what the user has set stays.

    On Linux: large pages for large tensors, since the kernel takes longer to hand out a buffer in
    small ones than many an operation to fill it; and threads that sleep while they wait, since on
    a machine that does something else too they would keep the others from their cores.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _print_anything() -> None:
    """Replace characters that the console cannot encode."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _complete() -> None:
    """Answer a shell that asks, through argcomplete, how the line could continue; then exit."""
    if "_ARGCOMPLETE" in os.environ:
        try:
            import argcomplete
        except ImportError:
            sys.exit("error: completion needs argcomplete; run 'pip install argcomplete'")
        argcomplete.autocomplete(build_parser())


if __name__ == "__main__":
    sys.exit(main())
