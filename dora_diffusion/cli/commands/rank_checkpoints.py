"""``dora-diffusion rank-checkpoints``: measures fixed-seed images of a run's checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dora_diffusion.cli.commands.evaluate import source_of
from dora_diffusion.cli.console.output import progress, tell
from dora_diffusion.cli.settings import AnyBase, Overwrite, check_results
from dora_diffusion.config import ConfigError, TrainConfig, read_config_file
from dora_diffusion.config.fields import REQUIRED, flag, require
from dora_diffusion.config.images import SAMPLES
from dora_diffusion.config.train import run_values
from dora_diffusion.config.wording import aligned
from dora_diffusion.formats.files.runs import (
    BASE_NAME,
    COMPARISON,
    RESULT_NAME,
    adapter_checkpoints,
    candidates,
    result_adapter,
)

if TYPE_CHECKING:
    from dora_diffusion.evaluation.ranking import EvaluationPrompts, Ranking
    from dora_diffusion.models.components import Components


@dataclass(frozen=True, kw_only=True)
class RankCheckpointsSettings(Overwrite, AnyBase):
    """Settings of ``rank-checkpoints``."""

    without_base = None  # The default is the run's base, which may be on the hub.

    run: Path = flag(REQUIRED, "The output folder of a run.", positional=True)
    checkpoints: list[str] = flag(
        [],
        "Checkpoints to rank, such as checkpoint-100, or result. Default: up to eight, spread over "
        "the run, and its result.",
        metavar="NAME",
    )
    subject: str | None = flag(
        None,
        "Folder of photos to be similar to; or, for an embedded model, a subject of the toy world "
        "such as bolt_mug. Default: the run's held-out photos, else those it trained on.",
    )
    output: Path = flag(Path("ranking"), "Folder of the results.")

    def perform(self) -> int:
        """Sample the same images from base and checkpoints, measure them, and suggest one."""
        check_results(self.output, "a ranking", [COMPARISON], overwrite=self.overwrite)
        config = TrainConfig.from_dict(run_values(read_config_file(self.run / "config.yaml")))
        adapters = _adapters(self.run, self.checkpoints)
        base = config.base_model
        if self.base is not None:
            base = replace(base, path=self.base, variant=None, revision=None)
        elif config.sample_base:
            base = config.sample_base
        base = replace(
            base, variant=self.variant or base.variant, revision=self.revision or base.revision
        )
        questions = _questions(config, self, str(base.path))
        tell(phase="loading the model")
        from dora_diffusion.evaluation.ranking import Ranking, rank, write_ranking
        from dora_diffusion.sampling.load import load_model

        components = load_model(base, None)
        components = components.reading(config.clip_skip, config.max_token_length)
        questions = _on_model(questions, components, config)
        with progress("generating images", "image") as show:
            measured, notes = rank(components, adapters, questions, self.output, show, BASE_NAME)
        steps = {BASE_NAME: 0, **{name: _steps(name, path) for name, path in adapters.items()}}
        rows = [replace(row, step=steps[row.name]) for row in measured]
        ranking = Ranking(tuple(rows), (), tuple(notes), questions.similar_to, questions.triggers)
        write_ranking(self.output, ranking)
        _print(ranking)
        print(self.output)
        return 0


def _on_model(
    questions: EvaluationPrompts, components: Components, config: TrainConfig
) -> EvaluationPrompts:
    """Return the prompts with settings that suit a model.

    Those of the run suit its base, or the model of its samples if it had one. The loss of training
    is not one of a distilled model.
    """
    from dora_diffusion.sampling.load import few_steps, sampling_defaults
    from dora_diffusion.sampling.settings import SamplingSettings

    name = components.name
    is_twin = name == config.sample_model
    is_distilled = name != config.pretrained_model_name_or_path and few_steps(components)
    defaults = sampling_defaults(components)
    if is_twin:
        defaults = {"scheduler": defaults.get("scheduler")}
    elif config.sample_model:
        defaults = {n: getattr(SamplingSettings, n) for n in SAMPLES} | defaults
    elif not is_distilled:
        return questions
    held_out, notes = questions.held_out, questions.notes
    if held_out and (is_twin or is_distilled):
        held_out = ()
        notes += (f"The denoising loss was not measured: images are of {name}, not of the base.",)
    sampling = replace(questions.settings, **defaults)
    return replace(questions, settings=sampling, held_out=held_out, notes=notes)


def _adapters(run: Path, names: Sequence[str]) -> dict[str, Path]:
    """Return adapter files by the names of their checkpoints.

    Raises:
        ConfigError: If the run has no checkpoint of a name, or none at all.
    """
    checkpoints, result = adapter_checkpoints(run), result_adapter(run)
    if not names:
        names = candidates(checkpoints, None if result is None else _steps(RESULT_NAME, result))
    places = {name: result_adapter(run / name) for name in checkpoints} | {RESULT_NAME: result}
    lacking = [name for name in names if places.get(name) is None]
    if lacking or not names:
        what = ", ".join(lacking) or "any adapter"
        raise ConfigError(
            f"{run} does not contain {what}; it has {', '.join(checkpoints) or 'no checkpoint'}",
            "checkpoints",
        )
    return {name: path for name in names if (path := places[name])}


def _steps(name: str, adapter: Path) -> int:
    """Return the training steps of an adapter, from its name or its file."""
    from dora_diffusion.formats.adapter.inspect import report_on

    if name != RESULT_NAME:
        return int(name.removeprefix("checkpoint-"))
    return int(report_on(adapter).metadata.extra.get("training_steps", 1))


def _questions(config: TrainConfig, args: RankCheckpointsSettings, base: str) -> EvaluationPrompts:
    """Return the evaluation prompts of a run's subjects, with the run's sampling settings."""
    from dora_diffusion.sampling.settings import SamplingSettings
    from dora_diffusion.training.inputs.subject import subjects_of, triggers_of

    require(
        config.has_photos,
        "the run taught a slider, which has no photos to compare with; its samples, as "
        "samples/step-000200.png, show each checkpoint at several strengths",
        "run",
    )
    settings = SamplingSettings(
        steps=config.validation_inference_steps,
        guidance_scale=config.validation_guidance_scale,
        width=config.resolution,
        height=config.resolution,
    )
    subjects = subjects_of(config)
    if args.subject and len({one.trigger for one in subjects} - {""}) > 1:
        raise ConfigError(
            f"the run has several subjects, {triggers_of(subjects)}, but --subject names one; "
            "leave it out to rank by the photos of each",
            "subject",
        )
    return source_of(args.subject).questions(subjects, settings, base)


def _print(ranking: Ranking) -> None:
    """Print the table of measurements, the notes and the suggestion."""

    def shown(value: float | None, digits: int = 3) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    subjects = ranking.triggers if len(ranking.triggers) > 1 else ()
    table = [["checkpoint", *subjects, f"similarity to {ranking.similar_to}", "drift",
              "denoising loss"]]  # fmt: skip
    table += [
        [row.name, *(shown(value) for value in row.by_subject(len(subjects))),
         *map(shown, (row.similarity, row.drift)), shown(row.loss, 4)]
        for row in ranking.rows
    ]  # fmt: skip
    if all(row.loss is None for row in ranking.rows):
        table = [row[:-1] for row in table]
    print(aligned(table))
    for line in (*ranking.notes, ranking.verdict):
        print(line, end="\n" if line else "")
    if ranking.suggested:
        print(f"suggested: {ranking.suggested}")
