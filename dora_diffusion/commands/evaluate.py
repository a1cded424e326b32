"""``dora-diffusion evaluate``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_diffusion.commands.effect import check_sampling, warn_without_effect
from dora_diffusion.config import ConfigError
from dora_diffusion.console.progress import step_progress

if TYPE_CHECKING:
    from dora_diffusion.evaluation.report import Evaluation
    from dora_diffusion.generate import SamplingSettings
    from dora_diffusion.models.components import Components


def run(args: argparse.Namespace) -> int:
    """Measure an adapter; print the table or JSON, and write both with a sheet of images."""
    _check(args)
    warn_without_effect(args)
    from dora_diffusion.generate import load_adapted
    from dora_diffusion.models.precision import dtype_of

    components, metadata = load_adapted(
        args.base,
        args.adapter,
        strength=args.strength,
        direction=args.direction_strength,
        magnitude=args.magnitude_strength,
        alpha=args.alpha,
        dtype=dtype_of(args.dtype),
        variant=args.variant,
        config=args.config,
    )
    trigger = args.trigger or metadata.trigger
    evaluation, settings = _evaluate(args, components, trigger)
    evaluation = dataclasses.replace(evaluation, facts=_facts(args, trigger, settings))
    files = evaluation.write(Path(args.output))
    if args.json:
        print(json.dumps(evaluation.to_dict(), indent=2))
    else:
        print(evaluation.table())
        print("\n" + "\n".join(f"{name}: {path}" for name, path in files.items()))
    return 0


def _check(args: argparse.Namespace) -> None:
    check_sampling(args)
    for name in ("num_seeds", "batch_size", "steps"):
        if getattr(args, name) < 1:
            raise ConfigError(f"{name} is {getattr(args, name)}; it must be at least 1")
    if not 0 <= args.seed < 2**32:
        raise ConfigError(f"seed is {args.seed}; it must be between 0 and 2**32 - 1")
    from dora_diffusion.evaluation.report import Evaluation

    if Evaluation.exists(Path(args.output)) and not args.overwrite:
        raise ConfigError(
            f"{args.output} holds an evaluation already; choose another --output, or --overwrite"
        )
    if args.prompts and not Path(args.prompts).is_file():
        raise ConfigError(f"prompts {args.prompts} is not a file of prompts, one per line")


def _evaluate(
    args: argparse.Namespace, components: Components, trigger: str
) -> tuple[Evaluation, SamplingSettings]:
    """A subject of the toy world by its name, or real photos in a folder."""
    from dora_diffusion.toy.benchmark_subjects import SUBJECTS

    # A folder, even where it has the name of a subject, has to be written as a path.
    if args.subject in SUBJECTS:
        return _evaluate_toy(args, components, trigger or f"sks {SUBJECTS[args.subject].word}")
    if not Path(args.subject).is_dir():
        raise ConfigError(
            f"subject {args.subject} is neither a folder of photos nor one of {', '.join(SUBJECTS)}"
        )
    return _evaluate_photos(args, components, trigger)


def _evaluate_toy(
    args: argparse.Namespace, components: Components, trigger: str
) -> tuple[Evaluation, SamplingSettings]:
    from dora_diffusion.evaluation.toy.evaluate import SAMPLING, evaluate_toy
    from dora_diffusion.toy.benchmark_subjects import find_subject

    if not args.base.startswith("embedded:"):
        warnings.warn(
            f"{args.subject} is a subject of the toy world; its judges know no other images than "
            "those of the embedded models",
            stacklevel=1,
        )
    for name in ("metric_model", "prompts"):
        if getattr(args, name):
            raise ConfigError(
                f"--{name} is for photos; {args.subject} is a subject of the toy world"
            )
    settings = _settings(args, SAMPLING.guidance_scale)
    with step_progress() as show:
        evaluation = evaluate_toy(
            components,
            find_subject(args.subject),
            trigger,
            _seeds(args),
            settings,
            batch_size=args.batch_size,
            on_step=show,
        )
    return evaluation, settings


def _evaluate_photos(
    args: argparse.Namespace, components: Components, trigger: str
) -> tuple[Evaluation, SamplingSettings]:
    from dora_diffusion.data.photo_record import read_photo_record
    from dora_diffusion.evaluation.metric_models import LITE, lite_is_installed, open_metric_model
    from dora_diffusion.evaluation.photos import PROMPTS, evaluate_photos, read_subject

    if not trigger:
        raise ConfigError("the adapter does not say its trigger; give it with --trigger 'sks dog'")
    names = args.metric_model or ([LITE] if lite_is_installed() else [])
    models = [open_metric_model(name) for name in names]
    lines = Path(args.prompts).read_text(encoding="utf-8").splitlines() if args.prompts else []
    settings = _settings(args, 7.5)
    class_word = args.class_word or trigger.partition(" ")[2]
    trained_on = read_photo_record(args.adapter) or ()
    subject = read_subject(args.subject, trigger, class_word, trained_on)
    for caution in subject.cautions:
        warnings.warn(caution, stacklevel=1)
    with step_progress() as show:
        evaluation = evaluate_photos(
            components,
            subject,
            _seeds(args),
            settings,
            metric_models=models,
            prompts=[line.strip() for line in lines if line.strip()] or PROMPTS,
            batch_size=args.batch_size,
            on_step=show,
        )
    return evaluation, settings


def _settings(args: argparse.Namespace, guidance_scale: float) -> SamplingSettings:
    from dora_diffusion.generate import SamplingSettings

    return SamplingSettings(
        steps=args.steps,
        guidance_scale=guidance_scale if args.guidance_scale is None else args.guidance_scale,
        scheduler=args.scheduler,
    )


def _seeds(args: argparse.Namespace) -> list[int]:
    return list(range(args.seed, args.seed + args.num_seeds))


def _facts(args: argparse.Namespace, trigger: str, settings: SamplingSettings) -> dict[str, Any]:
    from dora_diffusion.formats.adapter.metadata import without_path

    return {
        "base": without_path(args.base),
        "adapter": without_path(str(Path(args.adapter).resolve())),
        "strength": args.strength,
        "trigger": trigger,
        "sampling": {
            "steps": settings.steps,
            "guidance_scale": settings.guidance_scale,
            "scheduler": settings.scheduler,
        },
    }
