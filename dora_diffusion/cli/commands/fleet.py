"""``dora-diffusion fleet``: an adapter for each of many subjects, over the workers of a cluster."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass

from dora_diffusion.cli.commands import train
from dora_diffusion.cli.commands.parser import Parser, add_flags
from dora_diffusion.cli.console.tables import print_json
from dora_diffusion.cli.settings import WorkerFlags
from dora_diffusion.config.fields import REQUIRED, flag


@dataclass(frozen=True, kw_only=True)
class FleetSettings(WorkerFlags):
    """Settings of ``fleet`` besides those of training."""

    subjects: str = flag(
        REQUIRED,
        "Dataset file (YAML list of subjects, each with settings of its own), or a folder with a "
        "folder of photos for each subject.",
        positional=True,
    )
    retries: int = flag(
        3,
        "Further workers for a subject whose worker or node is lost; each resumes from its last "
        "checkpoint.",
    )
    pack: int = flag(
        1,
        "Subjects that each worker trains at once, where their settings allow it, in about as many "
        "operations as one.",
        least=1,
        metavar="K",
    )
    json: bool = flag(False, "Print the records as JSON.")


def add_arguments(parser: Parser) -> None:
    """Add the command's flags, and those of the training that each subject gets."""
    add_flags(parser, FleetSettings.settings())
    parser.add_argument(
        "--output",
        dest="output_dir",
        default=argparse.SUPPRESS,
        help="Folder shared by all workers, or fsspec URL such as s3://bucket/shop: results of "
        "each subject in OUTPUT/NAME. Default: as --output_dir.",
    )
    parser.usage = "%(prog)s SUBJECTS [--address ADDRESS] [--output OUTPUT] [--SETTING VALUE ...]"
    own = [setting.name for setting in FleetSettings.settings()]
    parser.split_help((*own, "config", "debug", *train.FIRST))
    train.add_settings(parser)


def run(args: argparse.Namespace) -> int:
    """Train all subjects that are not done yet. Returns the exit code: 1 if any failed."""
    own = FleetSettings.read(vars(args))
    own.warn()
    config = train.train_config(args)
    from dora_diffusion.config.subject_list import subject_configs

    configs = subject_configs(own.subjects, config)
    if args.dry_run:
        return train.print_what_trains(configs)
    train.warn_of_toy_model(config, args)
    from dora_diffusion.cluster.fleet.console import FleetTable
    from dora_diffusion.cluster.fleet.run import run_fleet
    from dora_diffusion.config.wording import counted

    table = FleetTable()
    try:
        fleet = run_fleet(
            configs, config.output_dir, own.address, own.share, retries=own.retries, pack=own.pack,
            on_change=table,
        )  # fmt: skip
    except KeyboardInterrupt:
        fleet = None
    finally:
        table.close()
    if fleet is None:
        print("stopped; the same command resumes")
        return 130
    if own.json:
        print_json([dataclasses.asdict(fleet.records[name]) for name in configs])
        return int(bool(fleet.failed))
    before = f", {len(fleet.known)} of them before" if fleet.known else ""
    done = len(fleet.records) - len(fleet.failed)
    print(f"{counted(done, 'subject')} done{before}, {len(fleet.failed)} failed")
    print("\n".join(f"{name}: {place}" for name, place in fleet.files.items()))
    return int(bool(fleet.failed))
