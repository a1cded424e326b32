"""Start of a run, afresh or at a checkpoint, and what is checked before it resumes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dora_diffusion.config import ConfigError, TrainConfig, differences, settings
from dora_diffusion.config.derived import Changes, as_yaml, listed
from dora_diffusion.config.file import SEGMENTS
from dora_diffusion.config.learning import OptimizerSettings
from dora_diffusion.config.paths import relative_paths
from dora_diffusion.config.run import SampleSettings
from dora_diffusion.config.wording import counted, quoted
from dora_diffusion.formats.adapter.stored import adapter_hash
from dora_diffusion.formats.files.atomic import save_text
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

# Image, caption and mask of each file, as `DreamBoothDataset.contents` gives them.
Contents = Mapping[str, Sequence[Mapping[str, str]]]
# Settings from a step on: {"from_step": 301, "settings": {"learning_rate": 4e-5}}.
Segment = dict[str, Any]

_KINDS = {"images": "image", "class_images": "class image"}


@dataclass(frozen=True)
class RunStart:
    """Start of a run.

    Attributes:
        segments: The settings that are used, by the step from which on they are.
        conditions: What its bits depend on beside them, in the same way (`conditions_of`).
        step: Optimizer steps done.
        checkpoint: What it resumes from; None for a fresh run.
        is_interim: Whether that is one of those between the regular checkpoints.
        changed: Setting -> (before, now).
        unused: The same, of settings without effect since no step is left.
    """

    segments: Sequence[Segment]
    conditions: Sequence[Mapping[str, Any]]
    step: int = 0
    checkpoint: Path | None = None
    is_interim: bool = False
    changed: Changes = field(default_factory=dict)
    unused: Changes = field(default_factory=dict)


def start_run(run: Run, output_dir: Path) -> RunStart:
    """Restore a run from the checkpoint that is resumed, if one is, with its settings.

    Raises:
        ConfigError: If there is no such checkpoint, or it does not belong to this run.
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
        # Samples are generated again; all else is what the steps were trained with.
        used = {source.name for source in fields(SampleSettings)}
        used |= {"max_train_steps", "keep_best"}
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
    """Write the resolved settings, which ``--config`` reads back.

    The settings are those of the last segment. Where a resumed run changed some, ``segments``
    says from which step on each value was used. Resuming and overwriting were asked for once: kept
    in the file, they would act on every run that is made from it. Paths in the run's folder and
    beside it are relative to the file.
    """
    config = replace(config, resume_from_checkpoint=None, overwrite_output_dir=False)
    text, apart = as_yaml(config, path.parent), changed_segments(segments)
    if apart:
        apart = [{**own, "settings": relative_paths(own["settings"], path.parent)} for own in apart]
        record = yaml.safe_dump({SEGMENTS: apart}, sort_keys=False, allow_unicode=True)
        text = f"# Of a resumed run: see segments for what changed.\n{text}{record}"
    return save_text(path, text)


def segment(step: int, values: Mapping[str, Any]) -> Segment:
    """Return the settings from a step on, of those that may change when a run is resumed."""
    names = [setting.name for setting in settings() if setting.resume == "free"]
    return {"from_step": step, "settings": {n: values[n] for n in names if n in values}}


def changed_segments(segments: Sequence[Segment]) -> list[Segment]:
    """The segments with only the settings in which they differ; none for a run of one piece."""
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
    """Warn that an adapter is no longer what the run started from; it is not needed any more."""
    origin, file = state["start"].get("origin", {}), Path(config.init_adapter or "")
    if not origin or not file.expanduser().exists():
        return
    if adapter_hash(file) != origin["init_adapter_sha256"]:
        warnings.warn(
            f"init_adapter {file} has changed since the run started from it; {name} continues from "
            "what it was then",
            stacklevel=3,
        )


def _check_steps(path: Path, step: int, total_steps: int, config: TrainConfig) -> None:
    """Refuse what a checkpoint has passed, and to mix with later ones of the run it leaves."""
    if step > total_steps:
        raise ConfigError(
            f"{path.name} has {step} steps, more than the {total_steps} that are asked for; set "
            f"--max_train_steps to more than {step}, or resume from an earlier checkpoint",
            "max_train_steps",
        )
    later = checkpoints_in(Path(config.output_dir), after=step)
    if later and not config.overwrite_output_dir:
        raise ConfigError(
            f"{config.output_dir} holds checkpoints after step {step} ({later[-1].name}); "
            "resume from there with --resume_from_checkpoint latest, choose another "
            "output_dir, or drop them with --overwrite_output_dir",
            "resume_from_checkpoint",
        )


def _check_result(
    path: Path, before: Mapping[str, Any], config: TrainConfig, has_ended: bool
) -> None:
    """Refuse to write over a finished result with one of other settings, or of another run.

    More steps of the same are what a finished run is resumed for, on any machine.
    """
    folder = Path(config.output_dir)
    if config.overwrite_output_dir or not holds_result(folder):
        return
    instead = "choose another --output_dir, or replace it with --overwrite_output_dir"
    if path.parent.resolve() != folder.resolve():
        raise ConfigError(
            f"output_dir {folder} holds a finished result, and {path} is of another run; {instead}",
            "output_dir",
        )
    learning = {source.name for source in fields(OptimizerSettings)}
    learning |= {"train_batch_size", "gradient_accumulation_steps"}
    _, changed = differences(before, config)
    other = {name: change for name, change in changed.items() if name in learning}
    if other and not has_ended:
        raise ConfigError(
            f"output_dir {folder} holds a finished result, which was trained with other settings: "
            f"{listed(other)}; take them back, {instead} (--resume_from_checkpoint {path} works "
            "from there too)",
            "output_dir",
        )


def check_same_run(
    name: str, state: Mapping[str, Any], config: TrainConfig, contents: Contents
) -> None:
    """Refuse to resume a checkpoint with other settings or other images than it was trained with.

    Args:
        name: The checkpoint's name.
        state: What it holds.
        config: The settings of this run.
        contents: What this run trains on.

    Raises:
        ConfigError: With everything that differs, in one line.

    Warns:
        UserWarning: If the same images come in another order, since they are drawn by it.
    """
    refused, _ = differences(state["config"], config)
    if refused:
        raise ConfigError(
            f"cannot resume {name}: these settings differ: {listed(refused)}; take them back, or "
            "start over in another --output_dir",
            "resume_from_checkpoint",
        )
    before = state["contents"]
    problems = [problem for kind in _KINDS for problem in _content_problems(kind, before, contents)]
    if problems:
        raise ConfigError(
            f"cannot resume {name}: it was trained on other images: {'; '.join(problems)}; put "
            "them back, or start over in another --output_dir",
            "resume_from_checkpoint",
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
    for what in ("mask", "weight"):
        other = [b["name"] for a, b in shared if a.get(what) != b.get(what)]
        problems += [f"other {what}s ({_names(other)})"] if other else []
    return problems


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
