"""``dora-diffusion simulate``."""

from __future__ import annotations

import argparse
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dora_diffusion.cli.commands.options import add_overwrite, warn_of
from dora_diffusion.cli.console.tables import print_json
from dora_diffusion.config import ConfigError
from dora_diffusion.config.fields import require, require_positive
from dora_diffusion.formats.files.atomic import require_writable, save_text

if TYPE_CHECKING:
    from dora_diffusion.lab.simulation.plan import QueuePlan
    from dora_diffusion.lab.simulation.report import Demand

RESULTS = "simulation.json"
SUBJECTS, SUBJECTS_AT_A_RATE = 1000, 10_000
_FILE = "that of --records, else 0"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    _add_demand(parser)
    _add_workers(parser)
    parser.add_argument("--price", type=float, help="Price of a GPU-hour, in any currency.")
    parser.add_argument(
        "--gpus_per_worker", type=float, default=1.0, help="GPUs of a worker, such as 0.25."
    )
    parser.add_argument("--seed", type=int, default=0, help="Random seed of all draws.")
    parser.add_argument("--output", type=Path, default="simulation", help="Folder of the results.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    add_overwrite(parser)


def _add_demand(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Subjects")
    group.add_argument(
        "--rate",
        type=float,
        help="Arrivals per hour, at random (a Poisson process). Default: all subjects at once.",
    )
    group.add_argument(
        "--arrivals",
        type=Path,
        metavar="FILE",
        help="Arrivals instead: one time a line, in seconds or as an ISO 8601 date.",
    )
    group.add_argument(
        "--subjects",
        type=int,
        help=f"Number of arrivals. Default: {SUBJECTS:,}; with --rate {SUBJECTS_AT_A_RATE:,}.",
    )
    group.add_argument(
        "--records",
        type=Path,
        metavar="FILE",
        help="Costs that a fleet has measured: its file fleet.jsonl. Training times are drawn from "
        "it; starts and failures are its own, unless given.",
    )
    group.add_argument(
        "--seconds", type=float, help="Mean training time of a subject alone, without its start."
    )
    group.add_argument(
        "--variation",
        type=float,
        default=0.0,
        help="Standard deviation of training times, in means: 0 all the same, 1 exponential.",
    )


def _add_workers(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Workers")
    group.add_argument(
        "--workers",
        type=int,
        nargs="+",
        default=[1],
        help="Number of workers; several are compared.",
    )
    seconds = {
        "cold_start": f"Seconds to the first step in a new process. Default: {_FILE}.",
        "warm_start": f"Seconds to the first step where the base is in memory. Default: {_FILE}.",
        "keep_warm": "Idle time after which a worker is given back. Default: never.",
    }
    for name, text in seconds.items():
        group.add_argument(f"--{name}", type=float, metavar="SECONDS", help=text)
    group.add_argument("--pack", type=int, default=1, help="Most subjects trained at once.")
    group.add_argument(
        "--pack_throughput",
        type=_size_and_factor,
        nargs="+",
        default=[],
        metavar="SIZE:FACTOR",
        help="Subject-steps per second of packs, relative to one subject, such as 4:2.2 8:3.2.",
    )
    group.add_argument(
        "--failures",
        type=float,
        help="Failures of a worker per hour, without notice; training resumes from the last "
        "checkpoint. "
        f"Default: {_FILE}.",
    )
    group.add_argument(
        "--preemptions",
        type=float,
        default=0.0,
        help="Preemptions of a worker per hour, with notice: a checkpoint is saved.",
    )
    waits = {
        "window": "How long a subject waits for its pack to fill.",
        "checkpoint_seconds": "Training time between checkpoints; 0: a failure loses all.",
        "recovery": "Seconds from a failure to the new process.",
        "preempted_for": "Seconds from a preemption to the next worker.",
    }
    for name, text in waits.items():
        group.add_argument(f"--{name}", type=float, default=0.0, metavar="SECONDS", help=text)


def _size_and_factor(text: str) -> tuple[int, float]:
    size, _, factor = text.partition(":")
    try:
        return int(size), float(factor)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not SIZE:FACTOR, such as 4:2.2") from None


def run(args: argparse.Namespace) -> int:
    """Simulate the queue for each number of workers; print a table, write JSON and a plot."""
    if (args.output / RESULTS).exists() and not args.overwrite:
        raise ConfigError(
            f"{args.output} holds a simulation already; choose another --output, or --overwrite"
        )
    require_positive("price", args.price)
    require_positive("gpus_per_worker", args.gpus_per_worker)
    plan, demand = _read(args)
    require_writable(args.output, is_folder=True)
    from dora_diffusion.lab.simulation import report

    plans = [replace(plan, workers=count) for count in args.workers]
    forecasts = [report.forecast(each, demand) for each in plans]
    results = [report.to_dict(f, demand, args.gpus_per_worker, args.price) for f in forecasts]
    plot = report.write(args.output, report.plot(plans, demand))
    from json import dumps

    given = {"plan": asdict(plan), "demand": asdict(demand)}
    document = {**given, "results": results}
    path = save_text(args.output / RESULTS, dumps(document, indent=1, default=str) + "\n")
    if args.json:
        print_json(results)
        return 0
    print(report.table(results, has_price=args.price is not None))
    for line in report.remarks(forecasts, results, demand):
        print(line)
    print(f"\nresults: {path}\nplot: {plot}")
    return 0


def _read(args: argparse.Namespace) -> tuple[QueuePlan, Demand]:
    """The plan, whose workers vary, and what arrives.

    Raises:
        ConfigError: If something is missing, or cannot be.

    Warns:
        UserWarning: Of flags without effect.
    """
    from dora_diffusion.lab.simulation.costs import TrainingTimes, read_arrivals, read_costs
    from dora_diffusion.lab.simulation.plan import QueuePlan, check_failures
    from dora_diffusion.lab.simulation.report import Demand

    _warn(args)
    require(args.rate is None or args.arrivals is None, "give --rate or --arrivals, not both")
    require_positive("rate", args.rate)
    require_positive("subjects", args.subjects)
    require(
        (args.records is None) != (args.seconds is None),
        "say what a subject costs: --records FILE of a fleet, or --seconds of its training",
    )
    names = {field.name for field in fields(QueuePlan)} & vars(args).keys()
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    given |= {"workers": min(args.workers), "pack_throughput": dict(args.pack_throughput)}
    if args.records is None:
        times = TrainingTimes(args.seconds, args.variation)
    else:
        costs = read_costs(args.records)
        times = costs.times
        given = {name: getattr(costs, name) for name in _MEASURED} | given
    plan = QueuePlan(**given)
    check_failures(plan, times.mean)
    arrivals = () if args.arrivals is None else tuple(read_arrivals(args.arrivals))
    usual = SUBJECTS if args.rate is None else SUBJECTS_AT_A_RATE
    subjects = len(arrivals) or args.subjects or usual
    return plan, Demand(times, subjects, args.rate, arrivals, args.seed)


_MEASURED = ("cold_start", "warm_start", "failures")


def _warn(args: argparse.Namespace) -> None:
    """Say which flags do nothing."""
    reasons = {}
    if args.arrivals is not None and args.subjects is not None:
        reasons["subjects"] = "all arrivals of the file are simulated"
    if args.records is not None and args.variation:
        reasons["variation"] = "training times are those of --records"
    if args.pack == 1:
        reasons |= {
            name: "no --pack is given" for name in ("window", "pack_throughput")
            if getattr(args, name)
        }  # fmt: skip
    if not args.failures and (args.records is None or args.failures is not None):
        reasons |= {
            name: "no --failures are given" for name in ("checkpoint_seconds", "recovery")
            if getattr(args, name)
        }  # fmt: skip
    if not args.preemptions and args.preempted_for:
        reasons["preempted_for"] = "no --preemptions are given"
    warn_of(reasons)
