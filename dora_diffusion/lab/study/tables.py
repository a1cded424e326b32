"""Summary of a study's records: means by row, and paired differences to the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from dora_diffusion.config.wording import counted
from dora_diffusion.evaluation.measures import MEASURES, measure_of, title_of
from dora_diffusion.evaluation.report import Row, shown
from dora_diffusion.evaluation.statistics import Interval, cluster_interval
from dora_diffusion.lab.study.config import BASE
from dora_diffusion.lab.study.trials import Record

METHOD = (
    "Intervals are at 95%, over subjects and seeds (two-level bootstrap); differences are paired "
    "by subject and seed"
)
# From so many on, the ends that a bootstrap can reach, the least and the most value, have a true
# middle between them in 95% of cases: 1 - 2 / 2**n.
_ENOUGH = 6
Value = Callable[[Record], "float | None"]


def figure_of(name: str) -> Value:
    return lambda record: record["measures"].get(name)


def analysis_of(name: str) -> Value:
    """Return a function that reads a figure of the analysis of weights."""
    return lambda record: record.get("analysis", {}).get(name)


def interval(records: Iterable[Record], value: Value) -> Interval | None:
    """Mean over subjects and seeds, with its interval; None where it was never measured."""
    by_subject: dict[str, list[float]] = {}
    for record in records:
        figure = value(record)
        if figure is not None:
            by_subject.setdefault(record["subject"], []).append(figure)
    return cluster_interval(by_subject) if by_subject else None


def paired_difference(
    records: Iterable[Record], row: str, reference: str, value: Value
) -> Interval | None:
    """Mean difference of a row to another on the same subject and seed; None without any pair."""
    figures = {
        (record["row"], record["subject"], record["seed"]): figure
        for record in records
        if (figure := value(record)) is not None
    }
    by_subject: dict[str, list[float]] = {}
    for (name, subject, seed), figure in figures.items():
        other = figures.get((reference, subject, seed))
        if name == row and other is not None:
            by_subject.setdefault(subject, []).append(figure - other)
    return cluster_interval(by_subject) if by_subject else None


def caution(records: Iterable[Record]) -> str:
    """Return why the records' intervals are not to be believed; empty where there are enough."""
    pairs = {(record["subject"], record["seed"]) for record in records}
    subjects = len({subject for subject, _ in pairs})
    if len(pairs) < 2 or subjects >= _ENOUGH:
        return ""
    count, units = (len(pairs), "seed") if subjects == 1 else (subjects, "subject")
    text = f"intervals of {counted(len(pairs), 'run')} on {counted(subjects, 'subject')}"
    if subjects == 1:
        text += " say nothing of other subjects"
    if count < _ENOUGH:
        text += f"{', and' if subjects == 1 else ''} are too narrow: with {count} {units}s, "
        text += f"95% intervals contain the truth at most {1 - 2 / 2**count:.0%} of the time"
    return f"{text}; {_ENOUGH} subjects or more are enough"


def rows_in(records: Sequence[Record]) -> list[str]:
    """Rows in their order, the base first."""
    names = list(dict.fromkeys(record["row"] for record in records))
    return sorted(names, key=lambda name: name != BASE)


def of_row(records: Iterable[Record], row: str) -> list[Record]:
    return [record for record in records if record["row"] == row]


def measures_in(records: Sequence[Record]) -> list[str]:
    """Measures that were taken, in the order in which they are told of."""
    taken = {name for record in records for name in record["measures"]}
    order = list(MEASURES)
    return sorted(taken, key=lambda name: (order.index(name.partition("@")[0]), name))


def figures_table(records: Sequence[Record]) -> list[Row]:
    """A row per figure, a column per row of the study."""
    columns = {name: of_row(records, name) for name in rows_in(records)}
    table: list[Row] = [["", *columns]]
    for name in measures_in(records):
        share = measure_of(name).kind == "share"
        cells = [shown(interval(r, figure_of(name)), share) for r in columns.values()]
        table.append([title_of(name), *cells])
    for title, key in _ANALYSIS.items():
        cells = [shown(interval(r, analysis_of(key)), False) for r in columns.values()]
        table.append([title, *cells])
    for title, read in _COSTS.items():
        table.append([title, *(read(r) for r in columns.values())])
    return table


def differences_table(records: Sequence[Record], reference: str) -> list[Row]:
    """Differences of every row to the reference, figure by figure."""
    others = [name for name in rows_in(records) if name not in (BASE, reference)]
    table: list[Row] = [[f"difference to {reference}", *others]]
    for name in measures_in(records):
        share = measure_of(name).kind == "share"
        found = [paired_difference(records, row, reference, figure_of(name)) for row in others]
        table.append([title_of(name), *(shown(one, share, signed=True) for one in found)])
    for title, key in _ANALYSIS.items():
        found = [paired_difference(records, row, reference, analysis_of(key)) for row in others]
        table.append([title, *(shown(one, False, signed=True) for one in found)])
    return table


def _mean(key: str) -> Callable[[Sequence[Record]], float | None]:
    def read(records: Sequence[Record]) -> float | None:
        values = [record[key] for record in records if record.get(key) is not None]
        return sum(values) / len(values) if values else None

    return read


def _cost(key: str, form: str, scale: float = 1.0) -> Callable[[Sequence[Record]], str]:
    mean = _mean(key)

    def read(records: Sequence[Record]) -> str:
        value = mean(records)
        return "-" if value is None else form.format(value * scale)

    return read


def _rates(records: Sequence[Record]) -> str:
    rates = dict.fromkeys(r["learning_rate"] for r in records if r["learning_rate"] is not None)
    return ", ".join(f"{rate:g}" for rate in rates) or "-"


def _count(records: Sequence[Record]) -> str:
    subjects = {record["subject"] for record in records}
    return f"{len(records)} ({counted(len(subjects), 'subject')})" if records else "-"


_ANALYSIS = {
    "correlation of \N{GREEK CAPITAL LETTER DELTA}M and \N{GREEK CAPITAL LETTER DELTA}D": (
        "correlation"
    ),
    "\N{GREEK CAPITAL LETTER DELTA}M, share of the norm": "delta_m",
    "\N{GREEK CAPITAL LETTER DELTA}D, 1 \N{MINUS SIGN} cosine": "delta_d",
}
_COSTS: dict[str, Callable[[Sequence[Record]], str]] = {
    "learning rate": _rates,
    "trained parameters": _cost("parameters", "{:,.0f}"),
    "live memory while training, MB": _cost("live_bytes", "{:.1f}", 1e-6),
    "processor seconds per step": _cost("processor_seconds_per_step", "{:.3f}"),
    "seconds per step": _cost("seconds_per_step", "{:.3f}"),
    "trials": _count,
}
