"""The ``dora-diffusion`` command and the list of its subcommands.

Each subcommand is a class of its settings, a `CommandSettings`, in a module of `HOMES`: ``export``
is ``ExportSettings``. Heavy modules are imported when a command is performed, so that ``--help``
is fast.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from typing import Any

from dora_diffusion import __version__
from dora_diffusion.cli.commands.parser import Parser
from dora_diffusion.cli.console.errors import reporting_errors
from dora_diffusion.config.command import CommandSettings
from dora_diffusion.config.fields import ConfigError
from dora_diffusion.config.flag_map import REMOVED
from dora_diffusion.system import let_break_interrupt

COMMANDS = {
    "train": "teach a model a subject from photos",
    "generate": "generate images",
    "serve": "generate over HTTP, with many adapters in one batch",
    "evaluate": "measure subject similarity, subject leakage and language drift",
    "fleet": "train an adapter for each of many subjects, on this machine or on a Ray cluster",
    "rank-checkpoints": "measure the checkpoints of a run, and suggest one",
    "export": "merge an adapter into a model",
    "verify": "verify a merged model: recompute it and compare",
    "convert": "write an adapter in another tool's format, or with a smaller rank",
    "extract": "make an adapter from the difference between two models",
    "combine": "combine several adapters into one",
    "inspect": "describe a file, and list the programs that compute it exactly",
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
    "studio.app.command": ("app",),
    "toy.command": ("demo",),
}
"""Module -> its commands. Packages outside of the core are named here and not imported."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0 success, 1 failure (the last line gives the reason), 2 wrong usage, 3 out
        of memory, 128 + N saved and stopped by signal N.
    """
    words = sys.argv[1:] if argv is None else argv
    with ExitStack() as stack:
        if words[:1] == ["train"]:
            from dora_diffusion.config.features.outside import features_of_command

            try:
                stack.enter_context(features_of_command(words))
            except ConfigError as error:
                build_parser(()).error(str(error))
        parser = build_parser(COMMANDS.keys() & words)
        return perform(parser.parse_args(words), read_settings)


def perform(args: argparse.Namespace, read: Callable[[argparse.Namespace], Any]) -> int:
    """Perform a parsed command with the settings that ``read`` returns; returns the exit code."""
    tune_process()
    let_break_interrupt()
    _print_anything()
    with reporting_errors(args.command, debug=args.debug) as outcome:
        outcome.code = read(args).perform()
    return outcome.code


def build_parser(filled: Container[str] = COMMANDS) -> argparse.ArgumentParser:
    """Return the parser of all commands, with flags for the commands in ``filled`` only."""
    parser = Parser(
        prog="dora-diffusion",
        description="Teach Stable Diffusion, SDXL or Z-Image your subject with DoRA.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    add_commands(parser, COMMANDS, {name: settings_of(name) for name in COMMANDS if name in filled})
    return parser


def add_commands(
    parser: Parser, texts: Mapping[str, str], kinds: Mapping[str, type[CommandSettings]]
) -> None:
    """Add a subparser for each command, with the flags of its settings if they are in ``kinds``."""
    commands: Any = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.refused = REMOVED
    for name, text in texts.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.add_argument("--debug", action="store_true", help="Show tracebacks. Default: off.")
        if name in kinds:
            kinds[name].add_arguments(command)


def read_settings(args: argparse.Namespace) -> Any:
    """Return the settings of the parsed command; see `CommandSettings.of_arguments`."""
    return settings_of(args.command).of_arguments(args)


def settings_of(command: str) -> type[CommandSettings]:
    """Return the settings class of a command."""
    (home,) = (home for home, commands in HOMES.items() if command in commands)
    name = f"{command.title().replace('-', '')}Settings"
    kind: type[CommandSettings] = getattr(import_module(f"dora_diffusion.{home}"), name)
    return kind


def tune_process() -> None:
    """Set environment variables that torch reads at its start, unless the user has set them.

    Both have an effect on Linux. Large pages are used for large tensors, since allocating a buffer
    in small pages takes longer than many operations on it. Waiting threads sleep, since busy
    waiting would take cores from other processes.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _print_anything() -> None:
    """Make standard output escape characters that the console cannot encode."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())
