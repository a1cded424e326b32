"""``dora-diffusion inspect``."""

from __future__ import annotations

import argparse
import dataclasses
import json

_WIDEST = 160


def run(args: argparse.Namespace) -> int:
    """Say what an adapter file is."""
    from dora_diffusion.export import inspect_adapter

    report = dataclasses.asdict(inspect_adapter(args.file, args.base))
    if args.json:
        print(json.dumps(report, indent=2, default=str))
        return 0
    width = max(len(name) for name in report)
    for name, value in report.items():
        for line in _lines(value):
            print(f"{name.replace('_', ' '):<{width}}  {line}")
            name = ""
    return 0


def _lines(value: object) -> list[str]:
    if isinstance(value, dict):
        return [f"{key}: {_short(item)}" for key, item in value.items()] or ["-"]
    if isinstance(value, (list, tuple)):
        return [str(item) for item in value] or ["-"]
    return [_short(value) if value not in (None, "") else "-"]


def _short(value: object) -> str:
    """A value on one line; a thumbnail is thousands of letters, and so may be ranks per layer."""
    text = str(value)
    return text if len(text) <= _WIDEST else f"{text[:_WIDEST]}... ({len(text)} characters)"
