"""Which programs read an adapter exactly, in few lines."""

from __future__ import annotations

from collections.abc import Mapping


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
