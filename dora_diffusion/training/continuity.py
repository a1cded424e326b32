"""What a resumed run has in common with its checkpoint, and what changed at which step."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from dora_diffusion.config import ConfigError, TrainConfig, settings
from dora_diffusion.config.resume import differences, listed
from dora_diffusion.wording import counted, quoted

# Image, caption and mask of each file, as `DreamBoothDataset.contents` gives them.
Contents = Mapping[str, Sequence[Mapping[str, str]]]
# Settings from a step on: {"from_step": 301, "settings": {"learning_rate": 4e-5}}.
Segment = dict[str, Any]

_KINDS = {"images": "image", "class_images": "class image"}


def check_same_run(
    name: str, state: Mapping[str, Any], config: TrainConfig, contents: Contents | None
) -> None:
    """Refuse to resume a checkpoint with other settings or other images than it was trained with.

    Args:
        name: The checkpoint's name.
        state: What it holds.
        config: The settings of this run.
        contents: What this run trains on; None compares settings only.

    Raises:
        ConfigError: With everything that differs, in one line.

    Warns:
        UserWarning: If the same images come in another order, since they are drawn by it.
    """
    refused, _ = differences(state["config"], config)
    if refused:
        raise ConfigError(
            f"cannot resume {name}: these settings differ: {listed(refused)}; take them back, or "
            "start over in another --output_dir"
        )
    before = state.get("contents")
    if before is None or contents is None:
        return
    problems = [problem for kind in _KINDS for problem in _content_problems(kind, before, contents)]
    if problems:
        raise ConfigError(
            f"cannot resume {name}: it was trained on other images: {'; '.join(problems)}; put "
            "them back, or start over in another --output_dir"
        )
    for kind, noun in _KINDS.items():
        if [row["image"] for row in before[kind]] != [row["image"] for row in contents[kind]]:
            warnings.warn(
                f"the {noun}s of {name} come in another order (renamed?), so the resumed run is "
                "not the same to the last bit",
                stacklevel=2,
            )


def _content_problems(kind: str, before: Contents, now: Contents) -> list[str]:
    noun = _KINDS[kind]
    old = {row["image"]: row for row in before[kind]}
    new = {row["image"]: row for row in now[kind]}
    problems = [
        f"{counted(len(names), noun)} {what} ({_names(names)})"
        for what, names in (
            ("missing", [row["name"] for digest, row in old.items() if digest not in new]),
            ("new", [row["name"] for digest, row in new.items() if digest not in old]),
        )
        if names
    ]
    if problems and kind == "class_images":
        problems.append("they follow validation_inference_steps and validation_guidance_scale too")
    shared = [(old[digest], row) for digest, row in new.items() if digest in old]
    for a, b in shared:
        if a["caption"] != b["caption"]:
            problems.append(
                f"another caption of {b['name']} ({quoted(a['caption'])} -> {quoted(b['caption'])})"
            )
            break
    masks = [b["name"] for a, b in shared if a["mask"] != b["mask"]]
    return problems + ([f"other masks ({_names(masks)})"] if masks else [])


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def segment(step: int, values: Mapping[str, Any]) -> Segment:
    """What is used from a step on, of the settings that may change when a run is resumed."""
    names = [setting.name for setting in settings() if setting.resume == "free"]
    return {"from_step": step, "settings": {n: values[n] for n in names if n in values}}


def changed_segments(segments: Sequence[Segment]) -> list[Segment]:
    """The segments with only the settings in which they differ; none for a run of one piece."""
    if len(segments) < 2:
        return []
    names = {name for segment in segments for name in segment["settings"]}
    differing = {
        name
        for name in names
        if any(s["settings"].get(name) != segments[0]["settings"].get(name) for s in segments)
    }
    return [
        {
            "from_step": segment["from_step"],
            "settings": {k: v for k, v in segment["settings"].items() if k in differing},
        }
        for segment in segments
    ]


def batches_seen(state: Mapping[str, Any]) -> int:
    """How many batches a checkpoint's run has trained on, by which its draws are numbered.

    Earlier versions kept no count: they numbered a step's batches from its own accumulation.
    """
    if "batches" in state:
        return int(state["batches"])
    segments = state.get("segments") or [segment(1, state["config"])]
    last_steps = [after["from_step"] - 1 for after in segments[1:]] + [state["step"]]
    return max(
        step * int(part["settings"].get("gradient_accumulation_steps", 1))
        for part, step in zip(segments, last_steps, strict=True)
    )
