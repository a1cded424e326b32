"""``dora-diffusion train``."""

from __future__ import annotations

import argparse
import warnings
from typing import Any

from dora_diffusion.commands.flags import given_settings, train_config
from dora_diffusion.config import TrainConfig
from dora_diffusion.config.resume import listed
from dora_diffusion.wording import counted


def run(args: argparse.Namespace) -> int:
    """Train, with a progress bar. Returns the exit code."""
    config = train_config(args)
    _say_toy_model(config, given_settings(args))
    if config.push_to_hub:
        from dora_diffusion.hub import check

        check(config.hub_model_id or "")
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
        if config.push_to_hub:
            from dora_diffusion.hub import push

            print(push(result.output_dir, config.hub_model_id or "", private=True))
    return 0


def _say_toy_model(config: TrainConfig, given: set[str]) -> None:
    """Say loudly that no base model was named."""
    if "pretrained_model_name_or_path" not in given:
        warnings.warn(
            f"NO BASE MODEL WAS GIVEN: {config.pretrained_model_name_or_path} is trained, a toy "
            "model of 64 pixels that knows only its own drawn world and cannot learn a real "
            "photo; name yours with --pretrained_model_name_or_path",
            stacklevel=1,
        )


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
        if kind == "load":
            precision = {"no": "float32"}.get(event["precision"], event["precision"])
            print(f"training {event['model']} on {event['device']} in {precision}", flush=True)
        elif kind == "start":
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
            f"{event['family']} on {event['device']}: {counted(event['photos'], 'photo')} at "
            f"{event['resolution']} px, {event['adapter']}"
        )
        if event["changed"]:
            print(f"changed from step {event['step'] + 1} on: {listed(event['changed'])}")
        self.bar = tqdm(
            total=event["total_steps"], initial=event["step"], unit="step", dynamic_ncols=True
        )
