"""``dora-diffusion rank-checkpoints``: fixed-seed images, judged as ``evaluate`` judges them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dora_diffusion.cli.console.progress import progress, tell
from dora_diffusion.cli.settings import RankSettings
from dora_diffusion.config import ConfigError, TrainConfig, read_config_file
from dora_diffusion.formats.files.atomic import require_writable
from dora_diffusion.formats.files.runs import (
    BASE_NAME,
    COMPARISON,
    RESULT_NAME,
    adapter_checkpoints,
    candidates,
    result_adapter,
)

if TYPE_CHECKING:
    from dora_diffusion.evaluation.photos import PhotoSubject
    from dora_diffusion.evaluation.ranking import EvaluationPrompts, Ranking
    from dora_diffusion.training.inputs.subject import Subject


SETTINGS = RankSettings


def run(args: RankSettings) -> int:
    """Sample the same images from the base and every checkpoint, measure them, and suggest one."""
    if (args.output / COMPARISON).exists() and not args.overwrite:
        raise ConfigError(
            f"{args.output} contains a ranking already; choose another --output, or --overwrite"
        )
    require_writable(args.output, is_folder=True)
    config = TrainConfig.from_dict(read_config_file(args.run / "config.yaml"))
    adapters = _adapters(args.run, args.checkpoints)
    if args.base is None:
        variant, revision = args.variant or config.variant, args.revision or config.revision
        base = replace(config.base_model, variant=variant, revision=revision)
    else:
        own, variant, revision = args.base, args.variant, args.revision
        base = replace(config.base_model, path=own, variant=variant, revision=revision)
    questions = _questions(config, args, str(base.path))
    tell(phase="loading the model")
    from dora_diffusion.evaluation.ranking import Ranking, rank, write_ranking
    from dora_diffusion.sampling.generate import load_model

    components = load_model(base, None)
    components = components.reading(config.clip_skip, config.max_token_length)
    with progress("generating images", "image") as show:
        measured, notes = rank(components, adapters, questions, args.output, show, BASE_NAME)
    steps = {BASE_NAME: 0, **{name: _steps(name, path) for name, path in adapters.items()}}
    rows = [replace(row, step=steps[row.name]) for row in measured]
    ranking = Ranking(tuple(rows), (), tuple(notes), questions.similar_to, questions.triggers)
    write_ranking(args.output, ranking)
    _print(ranking)
    print(args.output)
    return 0


def _adapters(run: Path, names: Sequence[str]) -> dict[str, Path]:
    """Adapter files by the names of their checkpoints.

    Raises:
        ConfigError: If one of the names is none, or there are none.
    """
    kept, result = adapter_checkpoints(run), result_adapter(run)
    if not names:
        names = candidates(kept, None if result is None else _steps(RESULT_NAME, result))
    places = {name: result_adapter(run / name) for name in kept} | {RESULT_NAME: result}
    lacking = [name for name in names if places.get(name) is None]
    if lacking or not names:
        what = ", ".join(lacking) or "any adapter"
        raise ConfigError(f"{run} has not {what}; it has {', '.join(kept) or 'no checkpoint'}")
    return {name: path for name in names if (path := places[name])}


def _steps(name: str, adapter: Path) -> int:
    """Steps that an adapter was trained for, as its name or its file says."""
    from dora_diffusion.formats.adapter.inspect import report_on

    if name != RESULT_NAME:
        return int(name.removeprefix("checkpoint-"))
    return int(report_on(adapter).metadata.extra.get("training_steps", 1))


def _questions(config: TrainConfig, args: RankSettings, base: str) -> EvaluationPrompts:
    """Return the evaluation prompts of a run's subjects, sampled as the run's own samples are.

    The truth of a subject of the toy world is known; others have photos.
    """
    from dora_diffusion.evaluation.ranking import ask_photos
    from dora_diffusion.lab.judges import ask_toy
    from dora_diffusion.lab.toy.benchmark_subjects import SUBJECTS as TOY
    from dora_diffusion.models.locate import is_embedded
    from dora_diffusion.sampling.generate import SamplingSettings
    from dora_diffusion.training.inputs.subject import subjects_of, triggers_of

    settings = SamplingSettings(
        steps=config.validation_inference_steps,
        guidance_scale=config.validation_guidance_scale,
        width=config.resolution,
        height=config.resolution,
    )
    subjects = subjects_of(config)
    if args.subject and len({one.trigger for one in subjects} - {""}) > 1:
        raise ConfigError(
            f"the run has several subjects, {triggers_of(subjects)}, and --subject is of one; "
            "leave it out to rank by the photos of each"
        )
    if args.subject in TOY:
        if not is_embedded(base):
            raise ConfigError(f"{args.subject} is of the toy world, which {base} does not know")
        return ask_toy(args.subject, subjects[0].trigger, settings)
    asked, known = _known_photos(subjects, args.subject)
    return ask_photos(asked, settings, known)


def _known_photos(
    subjects: Sequence[Subject], folder: str | None
) -> tuple[list[PhotoSubject], list[str]]:
    """Return each subject's photos for comparison: held-out ones, else those it was trained on.

    Args:
        subjects: Of the run. Those with the same trigger words are one.
        folder: Photos to take instead.

    Returns:
        The subjects, and trigger words of those whose photos were trained on.
    """
    from dora_diffusion.data.photos import list_photos
    from dora_diffusion.evaluation.photos import PhotoSubject
    from dora_diffusion.training.results.validation import divide_all, read_held_out

    none: list[list[Path]] = [[] for _ in subjects]
    own = [Path(one.settings.instance_data_dir or "") for one in subjects]
    if folder and Path(folder).resolve() not in [path.resolve() for path in own]:
        trained_on, held_out = none, [list_photos(folder), *none[1:]]
    else:
        trained_on, held_out = divide_all(subjects, [list_photos(path) for path in own])
        held_out = none if folder else held_out
    known, found = list[str](), dict[str, PhotoSubject]()
    # A style beside subjects has none, and is in all of their images.
    triggers = dict.fromkeys(subject.trigger for subject in subjects)
    for trigger in [trigger for trigger in triggers if trigger] or triggers:
        places = [at for at, subject in enumerate(subjects) if subject.trigger == trigger]
        is_new = any(held_out[at] for at in places)
        known += [] if is_new else [trigger]
        paths = held_out if is_new else trained_on
        photos = [
            one for at in places if paths[at] for one in read_held_out(subjects[at], paths[at])
        ]
        name = photos[0].path.parent.name
        found[trigger] = PhotoSubject(name, trigger, subjects[places[0]].class_word, photos)
    return list(found.values()), known


def _print(ranking: Ranking) -> None:
    """The figures as a table, what they are, and what is suggested."""
    from dora_diffusion.config.wording import aligned

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
