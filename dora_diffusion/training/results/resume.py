"""Start of a run from the beginning or from a checkpoint, with checks before resuming."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dora_diffusion.config import ConfigError, TrainConfig, differences, settings
from dora_diffusion.config.derived import Changes, as_yaml, listed, relative_paths, removed_settings
from dora_diffusion.config.fields import shown
from dora_diffusion.config.file import SEGMENTS
from dora_diffusion.config.flag_map import REMOVED
from dora_diffusion.config.learning import OptimizerSettings
from dora_diffusion.config.wording import counted, quoted
from dora_diffusion.formats.adapter.stored import adapter_hash
from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.training.features.outside import digests_of
from dora_diffusion.training.results.checkpoint import (
    checkpoints_in,
    find_checkpoint,
    read_state,
    restore,
)
from dora_diffusion.training.results.folders import holds_result
from dora_diffusion.training.results.record import changed_conditions, conditions_of

if TYPE_CHECKING:
    from dora_diffusion.training.run import Run

# Image, caption and mask of each file (`DreamBoothDataset.contents`).
Contents = Mapping[str, Sequence[Mapping[str, str]]]
# Settings from a step on: {"from_step": 301, "settings": {"learning_rate": 4e-5}}.
Segment = dict[str, Any]

_KINDS = {"images": "image", "class_images": "class image"}


@dataclass(frozen=True)
class RunStart:
    """Start of a run.

    Attributes:
        segments: Settings of the run, with the step from which each applies.
        conditions: Versions and hardware (`conditions_of`), in the same form.
        step: Number of completed optimizer steps.
        checkpoint: Checkpoint that is resumed; None for a new run.
        is_interim: Whether the checkpoint is a temporary one.
        changed: Setting -> (value before, value now).
        unused: Changed settings without effect because no step is left, in the same form.
    """

    segments: Sequence[Segment]
    conditions: Sequence[Mapping[str, Any]]
    step: int = 0
    checkpoint: Path | None = None
    is_interim: bool = False
    changed: Changes = field(default_factory=dict)
    unused: Changes = field(default_factory=dict)


def start_run(run: Run, output_dir: Path) -> RunStart:
    """Start a run, restoring the checkpoint that its settings resume, if any.

    Raises:
        ConfigError: If the checkpoint does not exist or does not belong to this run.
    """
    config = run.config
    now = conditions_of(run.components, run.accelerator)
    if not config.resume_from_checkpoint:
        return RunStart([segment(1, config.to_dict())], [{"from_step": 1, **now}])
    path = find_checkpoint(config.resume_from_checkpoint, output_dir)
    state = read_state(path)
    check_same_run(path.name, state, config, run.dataset.contents())
    _warn_of_other_start(path.name, state, config)
    step = int(state["step"])
    _check_steps(path, step, run.total_steps, config)
    _check_result(path, state["config"], config, step == run.total_steps)
    restore(run, state)
    segments = list(state["segments"])
    _, changed = differences(state["config"], config)
    unused: Changes = {}
    if step == run.total_steps:
        # Samples are generated again. Other changed settings would not describe the trained steps.
        used = {setting.name for setting in settings() if setting.ends_run}
        unused = {name: change for name, change in changed.items() if name not in used}
        config = replace(config, **{name: before for name, (before, _) in unused.items()})
        changed = {}
    elif changed:
        segments.append(segment(step + 1, config.to_dict()))
    conditions = list(state.get("conditions") or [{"from_step": 1, **now}])
    if line := changed_conditions(path.name, conditions[-1], now):
        warnings.warn(line, stacklevel=4)
    if step < run.total_steps and conditions[-1] | now != conditions[-1]:
        conditions.append({"from_step": step + 1, **now})
    is_interim = state["interim"]
    run.config = config
    return RunStart(segments, conditions, step, path, is_interim, changed, unused)


def save_config(config: TrainConfig, path: Path, segments: Sequence[Segment]) -> Path:
    """Write the resolved settings to a file that ``--config`` can read.

    The file has the settings of the last segment. If a resumed run changed settings, ``segments``
    lists the values with the step from which each was used. The settings for resuming and
    overwriting are not written, since they would affect every run that uses the file. Paths inside
    the run's folder and its parent are relative to the file.
    """
    config = replace(config, resume_from_checkpoint=None, overwrite_output_dir=False)
    text, apart = as_yaml(config, path.parent), changed_segments(segments)
    if apart:
        apart = [{**s, "settings": relative_paths(s["settings"], path.parent)} for s in apart]
        record = yaml.safe_dump({SEGMENTS: apart}, sort_keys=False, allow_unicode=True)
        text = f"# Resumed run: segments lists the settings that changed.\n{text}{record}"
    return save_text(path, text)


def segment(step: int, values: Mapping[str, Any]) -> Segment:
    """Return a segment with the settings that a resumed run may change."""
    names = [setting.name for setting in settings() if setting.resume == "free"]
    return {"from_step": step, "settings": {n: values[n] for n in names if n in values}}


def changed_segments(segments: Sequence[Segment]) -> list[Segment]:
    """Reduce segments to the settings that differ; empty if there is one segment."""
    if len(segments) < 2:
        return []
    first = segments[0]["settings"]
    differing = {
        name
        for segment in segments
        for name in first | segment["settings"]
        if segment["settings"].get(name) != first.get(name)
    }
    return [
        segment | {"settings": {k: v for k, v in segment["settings"].items() if k in differing}}
        for segment in segments
    ]


def _warn_of_other_start(name: str, state: Mapping[str, Any], config: TrainConfig) -> None:
    """Warn if the file of the starting adapter has changed. The resumed run does not need it."""
    origin, file = state["start"].get("origin", {}), Path(config.init_adapter or "")
    if not origin or not file.expanduser().exists():
        return
    if adapter_hash(file) != origin["init_adapter_sha256"]:
        warnings.warn(
            f"init_adapter {file} has changed since the run started from it; {name} continues with "
            "the original weights",
            stacklevel=3,
        )


def _check_steps(path: Path, step: int, total_steps: int, config: TrainConfig) -> None:
    """Check that a checkpoint is not after the last step, and that no later checkpoint exists."""
    if step > total_steps:
        raise ConfigError(
            f"{path.name} has {step} steps, but max_train_steps is {total_steps}; set "
            f"--max_train_steps to more than {step}, or resume from an earlier checkpoint",
            "max_train_steps",
        )
    later = checkpoints_in(Path(config.output_dir), after=step)
    if later and not config.overwrite_output_dir:
        raise ConfigError(
            f"{config.output_dir} contains checkpoints after step {step} ({later[-1].name}); "
            "resume from there with --resume_from_checkpoint latest, choose another "
            "output_dir, or remove them with --overwrite_output_dir",
            "resume_from_checkpoint",
        )


def _check_result(
    path: Path, before: Mapping[str, Any], config: TrainConfig, has_ended: bool
) -> None:
    """Check that a result of other settings or of another run is not overwritten.

    Resuming a completed run for more steps is allowed, on any machine.
    """
    folder = Path(config.output_dir)
    if config.overwrite_output_dir or not holds_result(folder):
        return
    instead = "choose another --output_dir, or replace it with --overwrite_output_dir"
    if path.parent.resolve() != folder.resolve():
        raise ConfigError(
            f"output_dir {folder} contains a result, but {path} belongs to another run; {instead}",
            "output_dir",
        )
    learning = {source.name for source in fields(OptimizerSettings)}
    learning |= {"train_batch_size", "gradient_accumulation_steps"}
    _, changed = differences(before, config)
    other = {name: change for name, change in changed.items() if name in learning}
    if other and not has_ended:
        raise ConfigError(
            f"output_dir {folder} contains a result that was trained with other settings: "
            f"{listed(other)}; restore them, {instead} (--resume_from_checkpoint {path} works "
            "from there too)",
            "output_dir",
        )


def check_same_run(
    name: str, state: Mapping[str, Any], config: TrainConfig, contents: Contents
) -> None:
    """Check that a checkpoint was trained with the settings and images of this run.

    Args:
        name: Name of the checkpoint.
        state: State of the checkpoint.
        config: Settings of this run.
        contents: Images and captions of this run.

    Raises:
        ConfigError: If they differ. The message lists all differences.

    Warns:
        UserWarning: If the order of the images differs, which changes the order of the batches.
    """
    if removed := removed_settings(state["config"]):
        advice = {setting: f" ({REMOVED[setting]})" for setting in removed if setting in REMOVED}
        values = ", ".join(f"{n} {shown(v)}{advice.get(n, '')}" for n, v in removed.items())
        raise ConfigError(
            f"cannot resume {name}: it was trained with {values}, which this version of "
            "dora-diffusion does not have; start over in another --output_dir, or resume with the "
            "version that wrote it",
            "resume_from_checkpoint",
        )
    refused, _ = differences(state["config"], config)
    if refused:
        raise ConfigError(
            f"cannot resume {name}: these settings differ: {listed(refused)}; restore them, or "
            "start over in another --output_dir",
            "resume_from_checkpoint",
        )
    if (before := state.get("features") or {}) != (now := digests_of(config)):
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        raise ConfigError(
            f"cannot resume {name}: the file of the feature {names[0]} differs; give the copy in "
            "the run's folder, features, with --feature, or start over in another --output_dir",
            "feature",
        )
    before = state["contents"]
    problems = [problem for kind in _KINDS for problem in _content_problems(kind, before, contents)]
    if problems:
        raise ConfigError(
            f"cannot resume {name}: it was trained on other images: {'; '.join(problems)}; restore "
            "them, or start over in another --output_dir",
            "resume_from_checkpoint",
        )
    for kind, noun in _KINDS.items():
        if [row["image"] for row in before[kind]] != [row["image"] for row in contents[kind]]:
            warnings.warn(
                f"the {noun}s of {name} have another order (renamed?): the resumed run will not be "
                "bitwise identical",
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
        problems.append("they depend on validation_inference_steps and validation_guidance_scale")
    shared = [(old[digest], row) for digest, row in new.items() if digest in old]
    for a, b in shared:
        if a["caption"] != b["caption"]:
            problems.append(
                f"new caption of {b['name']} ({quoted(a['caption'])} -> {quoted(b['caption'])})"
            )
            break
    other = [b["name"] for a, b in shared if a["mask"] != b["mask"]]
    return problems + ([f"other masks ({_names(other)})"] if other else [])


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
