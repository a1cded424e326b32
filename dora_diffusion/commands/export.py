"""``dora-diffusion export``."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from dora_diffusion.commands.effect import warn_without_effect


def run(args: argparse.Namespace) -> int:
    """Merge adapters into a base, check what was written, and say where it is."""
    from dora_diffusion.export import export_checkpoint
    from dora_diffusion.models.precision import AUTO, dtype_of

    warn_without_effect(args)
    with byte_progress("written") as show:
        path = export_checkpoint(
            args.base,
            [adapter_and_strength(text) for text in args.adapter],
            args.output,
            strength=args.strength,
            unet_strength=args.unet_strength,
            text_encoder_strength=args.text_encoder_strength,
            direction_strength=args.direction_strength,
            magnitude_strength=args.magnitude_strength,
            alpha=args.alpha,
            dtype=None if args.dtype == AUTO else dtype_of(args.dtype),
            vae=args.vae,
            variant=args.variant,
            config=args.config,
            overwrite=args.overwrite,
            on_progress=show,
        )
    print(f"{path} (reopened and checked)")
    return 0


@contextlib.contextmanager
def byte_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar in bytes, with the rate and the time left; gives the function that moves it.

    Args:
        what: What happens to the bytes.
    """
    from tqdm import tqdm

    # What takes less than a second, such as a refusal, shows no bar.
    bar: Any = tqdm(desc=what, unit="B", unit_scale=True, dynamic_ncols=True, leave=False, delay=1)

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    with bar:
        yield show


def adapter_and_strength(text: str) -> tuple[str, float]:
    """Split ``FILE:0.5`` into the file and its strength; 1 where none is given."""
    match = re.fullmatch(r"(.+):([-+]?\d*\.?\d+(?:[eE][-+]?\d+)?)", text)
    return (match[1], float(match[2])) if match else (text, 1.0)
