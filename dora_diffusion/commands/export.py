"""``dora-diffusion export``."""

from __future__ import annotations

import argparse
import re
from typing import Any


def run(args: argparse.Namespace) -> int:
    """Merge adapters into a base, check what was written, and say where it is."""
    import torch
    from tqdm import tqdm

    from dora_diffusion.export import export_checkpoint

    bar: Any = tqdm(unit="tensor", dynamic_ncols=True, leave=False)

    def show(written: int, total: int) -> None:
        bar.total = total
        bar.update(written - bar.n)

    with bar:
        path = export_checkpoint(
            args.base,
            [adapter_and_strength(text) for text in args.adapter],
            args.output,
            strength=args.strength,
            direction_strength=args.direction_strength,
            magnitude_strength=args.magnitude_strength,
            dtype=getattr(torch, args.dtype) if args.dtype else None,
            variant=args.variant,
            overwrite=args.overwrite,
            on_progress=show,
        )
    print(f"{path} (reopened and checked)")
    return 0


def adapter_and_strength(text: str) -> tuple[str, float]:
    """Split ``FILE:0.5`` into the file and its strength; 1 where none is given."""
    match = re.fullmatch(r"(.+):([-+]?\d*\.?\d+)", text)
    return (match[1], float(match[2])) if match else (text, 1.0)
