"""Where a run starts: afresh, or at a checkpoint of an earlier process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.config.derived import as_yaml
from dora_diffusion.config.file import SEGMENTS
from dora_diffusion.config.learning import OptimizerSettings
from dora_diffusion.config.resume import Changes, differences, listed
from dora_diffusion.config.run import SampleSettings
from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.training.checkpoint import checkpoints_after, find_checkpoint, load_state
from dora_diffusion.training.continuity import Segment, changed_segments, segment
from dora_diffusion.training.folders import holds_result
from dora_diffusion.training.session import Session


@dataclass(frozen=True)
class RunStart:
    """Where a run starts.

    Attributes:
        segments: The settings that are used, by the step from which on they are.
        step: Optimizer steps done.
        checkpoint: What it resumes from; None for a fresh run.
        is_interim: Whether that is one of those between the regular checkpoints.
        changed: Setting -> (before, now).
        unused: The same, of settings without effect since no step is left.
    """

    segments: Sequence[Segment]
    step: int = 0
    checkpoint: Path | None = None
    is_interim: bool = False
    changed: Changes = field(default_factory=dict)
    unused: Changes = field(default_factory=dict)


def start_run(session: Session, output_dir: Path) -> tuple[Session, RunStart]:
    """Put the state of the checkpoint that is resumed, if one is, into a session.

    Returns:
        The session, with the settings that it is trained with, and where it starts.

    Raises:
        ConfigError: If there is no such checkpoint, or it does not belong to this run.
    """
    config = session.config
    if not config.resume_from_checkpoint:
        return session, RunStart([segment(1, config.to_dict())])
    path = find_checkpoint(config.resume_from_checkpoint, output_dir)
    state = load_state(path, config, session.dataset.contents())
    step = int(state["step"])
    _check_steps(path, step, session.total_steps, config)
    _check_result(path, state["config"], config, step == session.total_steps)
    session.load_state_dict(state)
    segments = list(state.get("segments") or [segment(1, state["config"])])
    _, changed = differences(state["config"], config)
    unused: Changes = {}
    if step == session.total_steps:
        # Samples are generated again; all else is what the steps were trained with.
        used = {source.name for source in fields(SampleSettings)} | {"max_train_steps"}
        unused = {name: change for name, change in changed.items() if name not in used}
        config = replace(config, **{name: before for name, (before, _) in unused.items()})
        changed = {}
    elif changed:
        segments.append(segment(step + 1, config.to_dict()))
    is_interim = bool(state.get("interim"))
    start = RunStart(segments, step, path, is_interim, changed, unused)
    return replace(session, config=config), start


def save_config(config: TrainConfig, path: Path, segments: Sequence[Segment]) -> Path:
    """Write the resolved settings, which ``--config`` reads back.

    The settings are those of the last segment. Where a resumed run changed some, ``segments``
    says from which step on each value was used. Resuming and overwriting were asked for once: kept
    in the file, they would act on every run that is made from it.
    """
    config = replace(config, resume_from_checkpoint=None, overwrite_output_dir=False)
    text, apart = as_yaml(config), changed_segments(segments)
    if apart:
        record = yaml.safe_dump({SEGMENTS: apart}, sort_keys=False, allow_unicode=True)
        text = f"# Of a resumed run: see segments for what changed.\n{text}{record}"
    return save_text(path, text)


def state_of(session: Session, segments: Sequence[Segment], step: int) -> Mapping[str, Any]:
    """What a checkpoint holds, for `start_run` to resume from."""
    return {
        "step": step,
        "config": session.config.to_dict(),
        "contents": session.dataset.contents(),
        "segments": segments,
        **session.state_dict(),
    }


def _check_steps(path: Path, step: int, total_steps: int, config: TrainConfig) -> None:
    """Refuse what a checkpoint has passed, and to mix with later ones of the run it leaves."""
    if step > total_steps:
        raise ConfigError(
            f"{path.name} has {step} steps, more than the {total_steps} that are asked for; set "
            f"--max_train_steps to more than {step}, or resume from an earlier checkpoint"
        )
    later = checkpoints_after(Path(config.output_dir), step)
    if later and not config.overwrite_output_dir:
        raise ConfigError(
            f"{config.output_dir} holds checkpoints after step {step} ({later[-1].name}); "
            "resume from there with --resume_from_checkpoint latest, choose another "
            "output_dir, or drop them with --overwrite_output_dir"
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
            f"output_dir {folder} holds a finished result, and {path} is of another run; {instead}"
        )
    learning = {source.name for source in fields(OptimizerSettings)}
    learning |= {"train_batch_size", "gradient_accumulation_steps"}
    _, changed = differences(before, config)
    other = {name: change for name, change in changed.items() if name in learning}
    if other and not has_ended:
        raise ConfigError(
            f"output_dir {folder} holds a finished result, which was trained with other settings: "
            f"{listed(other)}; take them back, {instead} (--resume_from_checkpoint {path} works "
            "from there too)"
        )
