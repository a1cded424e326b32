"""``dora-diffusion convert``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping


def run(args: argparse.Namespace) -> int:
    """Write an adapter for another tool, and say how exact it is."""
    import torch

    from dora_diffusion.export import CONVERSIONS, convert_adapter, inspect_adapter

    options = {} if args.rank is None else {"rank": args.rank}
    report = convert_adapter(
        args.input,
        args.output,
        args.to,
        base=args.base,
        family=args.family,
        alpha=args.alpha,
        tags=args.tags,
        thumbnail=args.thumbnail,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        overwrite=args.overwrite,
        **options,
    )
    if args.json:
        print(json.dumps(dataclasses.asdict(report), indent=2, default=str))
        return 0
    print(f"{report.path}: {report.layers} layers, {CONVERSIONS[report.target]}")
    if report.worst is not None:
        name, error = report.worst
        print(
            f"relative error of the change: median {report.median_error:.2%}, "
            f"largest {error:.2%} in {name}, in total {report.total_error:.2%}"
        )
    for note in report.notes:
        print(f"note: {note}")
    exact, wrong = where_it_works(inspect_adapter(report.path).tools)
    for line in exact:
        print(line)
    if wrong:
        print(f"wrong: {wrong}; choose another --to for these, or export a merged model")
    return 0


def where_it_works(verdicts: Mapping[str, str]) -> tuple[list[str], str]:
    """The programs, by what `inspect` says of each, with what is special to one of them.

    Returns:
        A line for each way of being exact, and the programs that read it wrong.
    """
    programs: dict[str, list[str]] = {}
    for program, verdict in verdicts.items():
        short, _, detail = verdict.partition(": ")
        is_own = sum(one.endswith(detail) for one in verdicts.values()) == 1
        # Why a program is wrong, `inspect` says; that it is so for some layers only, matters here.
        is_own &= short.startswith("exact") or detail.startswith("it leaves")
        programs.setdefault(short, []).append(f"{program} ({detail})" if is_own else program)
    exact = [
        f"{verdict}: {', '.join(names)}"
        for verdict, names in programs.items()
        if verdict.startswith("exact")
    ]
    return exact, ", ".join(programs.get("wrong", ()))
