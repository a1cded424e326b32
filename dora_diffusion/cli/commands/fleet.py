"""``dora-diffusion fleet``: an adapter for each of many subjects, over the workers of a cluster."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

from dora_diffusion.cli.commands import train
from dora_diffusion.cli.commands.options import require_at_least_one
from dora_diffusion.cli.commands.parser import Parser
from dora_diffusion.cli.console.tables import print_json

if TYPE_CHECKING:
    from dora_diffusion.cluster.fleet.cluster import Share

_OWN = (
    "subjects",
    "address",
    "workers",
    "num_cpus",
    "num_gpus",
    "retries",
    "pack",
    "output",
    "json",
)


def add_workers(parser: argparse.ArgumentParser, what: str) -> None:
    """Add where ``what`` is done, and with which share of a node."""
    parser.add_argument(
        "--address",
        help="Ray cluster: local (workers on this machine), auto (the cluster that runs here), "
        f"HOST:PORT or ray://HOST:PORT. Default: no Ray, {what} one after another in this process.",
    )
    parser.add_argument(
        "--workers", type=int, help="Most workers at once. Default: as many as the nodes have "
        "room for."
    )  # fmt: skip
    parser.add_argument("--num_cpus", type=float, default=1.0, help="Processors of each worker.")
    parser.add_argument(
        "--num_gpus",
        type=float,
        help="GPUs of each worker; 0.5 has two share one. Default: 1 where the cluster has GPUs.",
    )


def workers_share(args: argparse.Namespace) -> Share:
    """What `add_workers` added of each worker's share.

    Raises:
        ConfigError: If it cannot be.

    Warns:
        UserWarning: Of flags without effect.
    """
    import warnings

    from dora_diffusion.cluster.fleet.cluster import Share

    share = Share(args.num_cpus, args.num_gpus, args.workers)
    if args.address is None and share != Share():
        warnings.warn(
            "workers, num_cpus and num_gpus have no effect because no address is given: there is "
            "one worker, this process",
            stacklevel=2,
        )
    return share


def add_arguments(parser: Parser) -> None:
    """Add the command's flags, and those of the training that each subject gets."""
    parser.add_argument(
        "subjects",
        help="Dataset file (YAML list of subjects, each with settings of its own), or "
        "a folder with a folder of photos for each subject.",
    )
    add_workers(parser, "subjects")
    parser.add_argument(
        "--retries",
        type=int,
        default=3,
        help="Further workers for a subject whose worker or node is lost; each resumes from its "
        "last checkpoint.",
    )
    parser.add_argument(
        "--pack",
        type=int,
        default=1,
        metavar="K",
        help="Subjects that each worker trains at once, where their settings allow it, in about "
        "as many operations as one.",
    )
    parser.add_argument(
        "--output",
        dest="output_dir",
        default=argparse.SUPPRESS,
        help="Folder shared by all workers, or fsspec URL such as s3://bucket/shop: results of "
        "each "
        "subject in OUTPUT/NAME. Default: as --output_dir.",
    )
    parser.add_argument("--json", action="store_true", help="Print the records as JSON.")
    parser.usage = "%(prog)s SUBJECTS [--address ADDRESS] [--output OUTPUT] [--SETTING VALUE ...]"
    parser.split_help((*_OWN, "config", "debug", *train.FIRST))
    train.add_settings(parser)


def run(args: argparse.Namespace) -> int:
    """Train all subjects that are not done yet. Returns the exit code: 1 if any failed."""
    require_at_least_one(args, "pack")
    config = train.train_config(args)
    share = workers_share(args)
    from dora_diffusion.config.subject_list import subject_configs

    configs = subject_configs(args.subjects, config)
    if args.dry_run:
        return train.print_what_trains(configs)
    train.warn_of_toy_model(config, args)
    from dora_diffusion.cluster.fleet.console import FleetTable
    from dora_diffusion.cluster.fleet.run import run_fleet
    from dora_diffusion.config.wording import counted

    table = FleetTable()
    try:
        fleet = run_fleet(
            configs, config.output_dir, args.address, share, retries=args.retries, pack=args.pack,
            on_change=table,
        )  # fmt: skip
    except KeyboardInterrupt:
        fleet = None
    finally:
        table.close()
    if fleet is None:
        print("stopped; the same command resumes")
        return 130
    if args.json:
        print_json([dataclasses.asdict(fleet.records[name]) for name in configs])
        return int(bool(fleet.failed))
    before = f", {len(fleet.known)} of them before" if fleet.known else ""
    done = len(fleet.records) - len(fleet.failed)
    print(f"{counted(done, 'subject')} done{before}, {len(fleet.failed)} failed")
    print("\n".join(f"{name}: {place}" for name, place in fleet.files.items()))
    return int(bool(fleet.failed))
