"""Report on a written adapter: how near it is, and which programs read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dora_diffusion.cli.console.tables import print_json
from dora_diffusion.config.wording import counted
from dora_diffusion.formats.layouts import CONVERSIONS, PROGRAMS

if TYPE_CHECKING:
    from dora_diffusion.export import ConversionReport


def print_written(
    report: ConversionReport, output: str | Path | None = None, *, as_json: bool
) -> None:
    """Print what was written, how near it is, and which programs read it exactly.

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
