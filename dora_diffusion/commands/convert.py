"""``dora-diffusion convert``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import warnings
from collections.abc import Mapping

from dora_diffusion.wording import counted

# What a file of each format is; how exact it is, the lines after it say.
_WRITTEN = {
    "diffusers": "in the key format of Diffusers",
    "peft": "in the key format of PEFT, a folder per component",
    "kohya": "in the key format of kohya's sd-scripts and LyCORIS",
    "comfyui": "with magnitudes changed for ComfyUI and Forge on one base model",
    "dense": "as full differences for one base model",
    "lora": "approximated by a plain LoRA in the key format of kohya's sd-scripts",
    "lora-diffusers": "approximated by a plain LoRA in the key format of Diffusers",
}
# Those whose layers are computed anew.
_WITH_RANK = ("lora", "lora-diffusers")


def run(args: argparse.Namespace) -> int:
    """Write an adapter for another tool, and say how exact it is."""
    import torch

    from dora_diffusion.export import convert_adapter, inspect_adapter

    options = {} if args.rank is None else {"rank": args.rank}
    if options and args.to not in _WITH_RANK:
        warnings.warn(
            f"rank has no effect because {args.to} files keep the adapter's; --to lora takes one",
            stacklevel=1,
        )
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
    print(f"{report.path}: {counted(report.layers, 'layer')}, {_WRITTEN[report.target]}")
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
