"""Held-out photos: validation loss, and choice of the best checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from dora_diffusion.config.features.feature import Added, Excluded, Feature, Problem
from dora_diffusion.config.fields import Need, TextOrPath, flag, free_flag


def holds_out(subject: Any) -> bool:
    """Return whether photos of a subject are held out."""
    has_some = subject.validation_data_dir or subject.validation_split
    return bool(subject.has_photos and has_some)


def _held_out(config: Any) -> str | None:
    """Held-out photos (`--validation_data_dir` or `--validation_split`)."""
    is_on = any(map(holds_out, config.subjects))
    return None if is_on else "no photos are held out (validation_split is 0)"


class HeldOutFeature(Feature):
    """Photos of some subjects are held out for the validation loss."""

    on, code = Need("validation_split"), "held_out:HeldOutCode"
    adds: ClassVar = {
        "validation_steps": Added(needs=_held_out),
        "validation_epochs": Added(needs=Need("validation_steps", (None,))),
    }
    excludes: ClassVar = (
        Excluded("run", "validation_data_dir and validation_split both select held-out photos; "
                 "leave one of them out", "validation_split",
                 when=lambda config: config.validation_data_dir and config.validation_split),
    )  # fmt: skip

    def is_on(self, config: Any) -> bool:
        return _held_out(config) is None

    def defaults(self, config: Any) -> Mapping[str, Any]:
        is_known = config.validation_steps or not config.validation_epochs
        return {"validation_loss_steps": config.validation_steps or 200} if is_known else {}

    def problems(self, config: Any) -> Iterator[Problem]:
        if config.validation_split > 1 and config.validation_split % 1:
            yield (
                "validation_split",
                f"validation_split is {config.validation_split:g}; give a share below 1, or a "
                "whole number of photos",
            )


_held_out_flag = partial(free_flag, needs=(_held_out,))


@dataclass(frozen=True, kw_only=True)
class HeldOutSettings:
    """Validation on held-out photos, and choice of the best checkpoint."""

    heading: ClassVar = "Validation"
    belongs_to: ClassVar[Feature] = HeldOutFeature()

    validation_data_dir: TextOrPath[str | None] = flag(
        None,
        "Folder of held-out photos of the subject, with optional .txt captions, to compute the "
        "validation loss on.",
        resume="ignored",  # its photos are compared by content
        is_path=True,
        has_photos=True,
        of_photos=True,
        of_subject=True,
    )
    validation_split: float = flag(
        0.0,
        "Photos of instance_data_dir to hold out instead: a fraction below 1, or their number. "
        "They are drawn by seed and content.",
        least=0,
        of_photos=True,
        of_subject=True,
    )
    validation_loss_steps: int | None = _held_out_flag(
        None,
        "Compute the validation loss every N steps, and at step 0 and at the end.",
        derived="validation_steps, or 200 if it is 0",
        above=0,
    )
    keep_best: bool = _held_out_flag(
        False,
        "Keep the checkpoint with the lowest validation loss, regardless of "
        "checkpoints_total_limit, and write it as the result.",
        ends_run=True,
    )
