"""``dora-diffusion train``."""

from __future__ import annotations

import argparse
from typing import Any

from dora_diffusion.commands.flags import train_config


def run(args: argparse.Namespace) -> int:
    """Train, with a progress bar. Returns the exit code."""
    config = train_config(args)
    from dora_diffusion.training.loop import train

    progress = TrainProgress()
    try:
        result = train(config, progress)
    finally:
        progress.close()
    if result.signal_number is not None:
        if progress.started:
            print(
                f"stopped at step {result.steps} of {result.total_steps}, checkpoint saved; go on "
                "with --resume_from_checkpoint latest"
            )
        return 128 + result.signal_number
    if result.adapter is not None:
        print(f"done: {result.adapter}")
        print(f"write {progress.trigger!r} in a prompt to get the subject")
    return 0


class TrainProgress:
    """A progress bar with loss and time left, from the trainer's events."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.trigger = ""

    @property
    def started(self) -> bool:
        """Whether this process reports."""
        return self.bar is not None

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event."""
        kind = event["event"]
        if kind == "start":
            self._start(event)
        elif kind == "step":
            self.bar.set_postfix(loss=f"{event['loss']:.4f}", refresh=False)
            self.bar.update()
        elif kind in ("sample", "checkpoint"):
            self.bar.write(f"{kind}: {event['path']}")

    def close(self) -> None:
        """End the bar's line, so that what is said next has one of its own."""
        if self.bar is not None:
            self.bar.close()

    def _start(self, event: dict[str, Any]) -> None:
        from tqdm import tqdm

        self.trigger = event["trigger"]
        print(
            f"{event['family']} on {event['device']}: {event['photos']} photos at "
            f"{event['resolution']} px, {event['adapter']}"
        )
        self.bar = tqdm(
            total=event["total_steps"], initial=event["step"], unit="step", dynamic_ncols=True
        )
