"""``python -m lab simulate``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dora_diffusion.cli.console.output import print_json
from dora_diffusion.cli.settings import Overwrite, check_results
from dora_diffusion.config import ConfigError
from dora_diffusion.config.fields import flag, require, when
from dora_diffusion.formats.files.atomic import save_text

if TYPE_CHECKING:
    from lab.simulation.forecasts import Demand
    from lab.simulation.queue import QueuePlan

RESULTS = "simulation.json"
SUBJECTS, SUBJECTS_AT_A_RATE = 1000, 10_000
_FILE = "measured in --records, else 0"
_subjects, _workers = partial(flag, group="Subjects"), partial(flag, group="Workers")
_seconds = partial(_workers, metavar="SECONDS")
_PACK = when(lambda plan: plan.pack != 1, "no --pack is given")
_FAILURES = when(
    lambda plan: plan.failures or (plan.records is not None and plan.failures is None),
    "no --failures are given",
)


@dataclass(frozen=True, kw_only=True)
class SimulateSettings(Overwrite):
    """Settings of ``simulate``."""

    rate: float | None = _subjects(
        None,
        "Arrivals per hour, at random (a Poisson process). Default: all subjects at once.",
        above=0,
    )
    arrivals: Path | None = flag(
        None,
        "File of arrival times instead: one per line, in seconds or as an ISO 8601 date.",
        metavar="FILE",
        group="Subjects",
    )
    subjects: int | None = _subjects(
        None,
        f"Number of arrivals. Default: {SUBJECTS:,}; with --rate {SUBJECTS_AT_A_RATE:,}.",
        above=0,
        needs=(when(lambda plan: plan.arrivals is None, "all arrivals of the file are simulated"),),
    )
    records: Path | None = flag(
        None,
        "Measured costs of a fleet: its file fleet.jsonl. Training times are drawn from it; starts "
        "and failures default to its figures.",
        metavar="FILE",
        group="Subjects",
    )
    seconds: float | None = _subjects(
        None, "Mean training time of a subject alone, without its start."
    )
    variation: float = _subjects(
        0.0,
        "Standard deviation of training times over their mean: 0 constant, 1 exponential.",
        needs=(when(lambda plan: plan.records is None, "training times are drawn from --records"),),
    )
    workers: list[int] = flag(
        [1], "Number of workers; several are compared.", least=1, group="Workers"
    )
    cold_start: float | None = _seconds(
        None, f"Seconds to the first step in a new process. Default: {_FILE}."
    )
    warm_start: float | None = _seconds(
        None, f"Seconds to the first step with the base in memory. Default: {_FILE}."
    )
    keep_warm: float | None = _seconds(
        None, "Idle time after which a worker is released. Default: never."
    )
    pack: int = _workers(1, "Maximum number of subjects trained at once.", least=1)
    pack_throughput: list[str] = flag(
        [],
        "Subject-steps per second of packs, relative to one subject, such as 4:2.2 8:3.2.",
        metavar="SIZE:FACTOR",
        needs=(_PACK,),
        group="Workers",
    )
    failures: float | None = _workers(
        None,
        "Failures of a worker per hour, without notice; training resumes from the last checkpoint. "
        f"Default: {_FILE}.",
    )
    preemptions: float = _workers(
        0.0, "Preemptions of a worker per hour, with notice: a checkpoint is saved."
    )
    window: float = _seconds(
        0.0, "Maximum time that a subject waits for its pack to fill.", needs=(_PACK,)
    )
    checkpoint_seconds: float = _seconds(
        0.0,
        "Training time between checkpoints; 0: a failure loses all progress.",
        needs=(_FAILURES,),
    )
    recovery: float = _seconds(
        0.0, "Seconds from a failure to the new process.", needs=(_FAILURES,)
    )
    preempted_for: float = _seconds(
        0.0,
        "Seconds from a preemption to the next worker.",
        needs=(when(lambda plan: plan.preemptions, "no --preemptions are given"),),
    )
    price: float | None = flag(None, "Price of a GPU-hour, in any currency.", above=0)
    gpus_per_worker: float = flag(1.0, "GPUs of a worker, such as 0.25.", above=0)
    seed: int = flag(0, "Random seed of all draws.")
    output: Path = flag(Path("simulation"), "Folder of the results.")
    json: bool = flag(False, "Print JSON instead of a table.")

    @property
    def throughputs(self) -> dict[int, float]:
        """Throughput factors by pack size.

        Raises:
            ConfigError: If a word is not a size and a factor.
        """
        try:
            pairs = [text.split(":") for text in self.pack_throughput]
            return {int(size): float(factor) for size, factor in pairs}
        except ValueError:
            words = " ".join(self.pack_throughput)
            raise ConfigError(
                f"pack_throughput {words!r} is not SIZE:FACTOR, such as 4:2.2", "pack_throughput"
            ) from None

    def perform(self) -> int:
        """Simulate the queue for each number of workers; print a table, write JSON and a plot."""
        check_results(self.output, "a simulation", [RESULTS], overwrite=self.overwrite)
        plan, demand = _read(self)
        from lab.analysis.plots import save_figure
        from lab.simulation import forecasts

        plans = [replace(plan, workers=count) for count in self.workers]
        results = [forecasts.with_costs(p, demand, self.gpus_per_worker, self.price) for p in plans]
        plot = self.output / "load.png"
        save_figure(forecasts.plot(plans, demand), plot, dpi=140)
        from json import dumps

        inputs = {"plan": asdict(plan), "demand": asdict(demand)}
        document = {**inputs, "results": results}
        path = save_text(self.output / RESULTS, dumps(document, indent=1, default=str) + "\n")
        if self.json:
            print_json(results)
            return 0
        print(forecasts.table(results, has_price=self.price is not None))
        for line in forecasts.remarks(results, demand):
            print(line)
        print(f"\nresults: {path}\nplot: {plot}")
        return 0


def _read(args: SimulateSettings) -> tuple[QueuePlan, Demand]:
    """Read the plan, whose number of workers varies, and the demand.

    Raises:
        ConfigError: If a setting is missing or not valid.
    """
    from lab.simulation.forecasts import (
        Demand,
        TrainingTimes,
        check_failures,
        read_arrivals,
        read_costs,
    )
    from lab.simulation.queue import QueuePlan

    require(
        args.rate is None or args.arrivals is None, "give --rate or --arrivals, not both", "rate"
    )
    require(
        (args.records is None) != (args.seconds is None),
        "the cost of a subject is missing: give --records FILE of a fleet, or --seconds of its "
        "training",
        "seconds",
    )
    names = {field.name for field in fields(QueuePlan)}
    values = {name: value for name in names if (value := getattr(args, name)) is not None}
    values |= {"workers": min(args.workers), "pack_throughput": args.throughputs}
    if args.records is None:
        times = TrainingTimes(args.seconds or 0.0, args.variation)
    else:
        costs = read_costs(args.records)
        times = costs.times
        values = {name: getattr(costs, name) for name in _MEASURED} | values
    plan = QueuePlan(**values)
    check_failures(plan, times.mean)
    arrivals = () if args.arrivals is None else tuple(read_arrivals(args.arrivals))
    default = SUBJECTS if args.rate is None else SUBJECTS_AT_A_RATE
    subjects = len(arrivals) or args.subjects or default
    return plan, Demand(times, subjects, args.rate, arrivals, args.seed)


_MEASURED = ("cold_start", "warm_start", "failures")
