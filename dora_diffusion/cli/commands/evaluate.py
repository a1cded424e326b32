"""``dora-diffusion evaluate``."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_diffusion.cli.console.progress import progress
from dora_diffusion.cli.console.tables import print_json
from dora_diffusion.cli.settings import AdaptedModel, Sampling
from dora_diffusion.config import ConfigError
from dora_diffusion.config.fields import REQUIRED, flag
from dora_diffusion.config.wording import counted
from dora_diffusion.formats.adapter.metadata import CAPTIONS, OWN
from dora_diffusion.formats.files.atomic import require_writable

if TYPE_CHECKING:
    from dora_diffusion.evaluation.report import Evaluation
    from dora_diffusion.models.components import Components
    from dora_diffusion.sampling.generate import SamplingSettings


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(Sampling, AdaptedModel):
    """Settings of ``evaluate``."""

    adapter: str = flag(
        REQUIRED,
        "An adapter file, the output folder of a run, or a model that was trained whole.",
        positional=True,
    )
    subject: list[str] = flag(
        REQUIRED,
        "Folder of held-out photos; or, for an embedded model, a subject of the toy world such as "
        "bolt_mug. If the adapter has several subjects: one for each, in the order of its trigger "
        "words; the results of each get a folder in the output.",
    )
    output: str = flag("evaluation", "Folder of the results.")
    overwrite: bool = flag(False, "Replace results that exist.")
    json: bool = flag(False, "Print JSON instead of a table.")
    metric_model: list[str] = flag(
        [],
        "Image-similarity models: folders or hub ids of CLIP, DINO or DINOv2, or "
        "efficientnet-lite0. Default: efficientnet-lite0 where it is installed.",
    )
    trigger: str | None = flag(None, "Trigger words. Default: what the file says.")
    class_word: str | None = flag(
        None, "Class of the subject. Default: the trigger words without their token."
    )
    prompts: str | None = flag(
        None,
        "Text file, one prompt per line, with {} where the subject is named. Default: a list of "
        "its own.",
    )
    wildcard_dir: str | None = flag(
        None, "Folder of the wildcard files that captions name, as in training."
    )
    num_seeds: int = flag(4, "Images per prompt, one per seed.", least=1)
    seed: int = flag(0, "Random seed of the first image.")
    guidance_scale: float | None = flag(
        None, "Guidance scale (CFG scale). Default: 3.5 for the toy world, else 7.5."
    )


SETTINGS = EvaluateSettings


def run(args: EvaluateSettings) -> int:
    """Measure an adapter; print the table or JSON, and write both with a sheet of images."""
    each = [
        dataclasses.replace(args, subject=[subject], output=str(output))
        for subject, output in zip(args.subject, _outputs(args), strict=True)
    ]
    for one in each:
        _check(one)
        _sampling(one)
    components, triggers, captions, base_model = _load(args)
    reports = []
    for one, trigger in zip(each, _one_for_each(triggers, args), strict=True):
        evaluation = _evaluate(one, components, trigger, captions, base_model)
        files = evaluation.write(Path(one.output))
        reports.append(evaluation.to_dict())
        if not args.json:
            print(f"{trigger}:\n" if len(each) > 1 else "", end="")
            # Its cautions were warned of before it began.
            print(dataclasses.replace(evaluation, cautions=()).table())
            print("\n" + "\n".join(f"{name}: {path}" for name, path in files.items()))
    if args.json:
        print_json(reports if len(each) > 1 else reports[0])
    return 0


def _outputs(args: EvaluateSettings) -> list[Path]:
    """Return the output folder of each subject.

    Raises:
        ConfigError: If two subjects have one name.
    """
    output = Path(args.output)
    if len(args.subject) == 1:
        return [output]
    names = [Path(subject).resolve().name for subject in args.subject]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"two of the subjects {', '.join(args.subject)} have one name, which is that of their "
            "results; rename a folder"
        )
    return [output / name for name in names]


def _one_for_each(triggers: str, args: EvaluateSettings) -> list[str]:
    """The trigger words of each subject.

    Raises:
        ConfigError: If there are as many subjects of neither kind.
    """
    from dora_diffusion.formats.adapter.metadata import split_triggers

    found, count = split_triggers(triggers) or [""], len(args.subject)
    if len(found) != count:
        raise ConfigError(
            f"the adapter has {counted(len(found), 'subject')}, {triggers or 'without a trigger'}, "
            f"and --subject names {count}; name one for each, in this order, or choose with "
            "--trigger"
        )
    if count > 1 and args.class_word:
        raise ConfigError("--class_word is for one subject; choose it with --trigger")
    return found


def _evaluate(
    args: EvaluateSettings,
    components: Components,
    trigger: str,
    captions: str,
    base_model: Components | None,
) -> Evaluation:
    """Measure one subject."""
    settings = _sampling(args)
    evaluate = _evaluate_toy if _is_toy(args) else partial(_evaluate_photos, captions=captions)
    evaluation = evaluate(args, components, trigger, settings, base_model)
    return dataclasses.replace(evaluation, details=_details(args, trigger, settings))


def _sampling(args: EvaluateSettings) -> SamplingSettings:
    """Return the sampling settings of a subject's images.

    Raises:
        ConfigError: If they cannot be.
    """
    from dora_diffusion.lab.judges import SAMPLING
    from dora_diffusion.sampling.generate import SamplingSettings

    default = SAMPLING if _is_toy(args) else SamplingSettings()
    guidance = default.guidance_scale if args.guidance_scale is None else args.guidance_scale
    return SamplingSettings(args.steps, guidance, args.scheduler)


def _load(args: EvaluateSettings) -> tuple[Components, str, str, Components | None]:
    """The model that is measured, its trigger words, how its captions were read, and its base.

    The base is None where it is the same model without the adapter.
    """
    from dora_diffusion.lab.analysis.analyze import is_model

    if not Path(args.adapter).expanduser().exists() or not is_model(args.adapter):
        components, metadata = args.load(args.adapter)
        captions = metadata.extra.get(CAPTIONS, "")
        return components, args.trigger or metadata.trigger, captions, None
    from dora_diffusion.export.files import open_model
    from dora_diffusion.export.metadata import trained_trigger

    with open_model(args.adapter) as stored:
        trigger = args.trigger or trained_trigger(stored.metadata)
        captions = stored.metadata.get(OWN + CAPTIONS, "")
    # Strengths are of an adapter.
    without: dict[str, Any] = {"adapter": None}
    dataclasses.replace(args, **without).warn()
    tuned = dataclasses.replace(args, base=args.adapter, variant=None, revision=None)
    components, _ = tuned.load(None)
    base_model, _ = args.load(None)
    return components, trigger, captions, base_model


def _is_toy(args: EvaluateSettings) -> bool:
    """Return whether the subject is of the toy world; a folder named so is written as a path."""
    from dora_diffusion.lab.toy.benchmark_subjects import SUBJECTS

    return args.subject[0] in SUBJECTS


def _check(args: EvaluateSettings) -> None:
    """Refuse what could not be evaluated or written before a model is loaded."""
    (subject,) = args.subject
    if not 0 <= args.seed < 2**32:
        raise ConfigError(f"seed is {args.seed}; it must be between 0 and 2**32 - 1")
    from dora_diffusion.evaluation.report import Evaluation
    from dora_diffusion.lab.toy.benchmark_subjects import SUBJECTS

    if Evaluation.exists(Path(args.output)) and not args.overwrite:
        raise ConfigError(
            f"{args.output} contains an evaluation already; choose another --output, or --overwrite"
        )
    require_writable(Path(args.output), is_folder=True)
    if args.prompts and not Path(args.prompts).is_file():
        raise ConfigError(f"prompts {args.prompts} is not a file of prompts, one per line")
    if _is_toy(args):
        for name in ("metric_model", "prompts"):
            if getattr(args, name):
                raise ConfigError(
                    f"--{name} is for photos; {subject} is a subject of the toy world"
                )
    elif not Path(subject).is_dir():
        raise ConfigError(
            f"subject {subject} is neither a folder of photos nor one of {', '.join(SUBJECTS)}"
        )


def _evaluate_toy(
    args: EvaluateSettings,
    components: Components,
    trigger: str,
    settings: SamplingSettings,
    base_model: Components | None,
) -> Evaluation:
    from dora_diffusion.lab.judges import evaluate_toy
    from dora_diffusion.lab.toy.benchmark_subjects import find_subject

    if not args.base.startswith("embedded:"):
        warnings.warn(
            f"{args.subject[0]} is a subject of the toy world; its judges know no other images "
            "than those of the embedded models",
            stacklevel=1,
        )
    subject = find_subject(args.subject[0])
    with progress("generating images", "step") as show:
        return evaluate_toy(
            components,
            subject,
            trigger or f"sks {subject.word}",
            _seeds(args),
            settings,
            batch_size=args.batch_size,
            on_step=show,
            base_model=base_model,
        )


def _evaluate_photos(
    args: EvaluateSettings,
    components: Components,
    trigger: str,
    settings: SamplingSettings,
    base_model: Components | None,
    *,
    captions: str,
) -> Evaluation:
    from dora_diffusion.data.captions import CaptionRules
    from dora_diffusion.data.photos import read_photo_record
    from dora_diffusion.evaluation.photos import PROMPTS, evaluate_photos, read_subject
    from dora_diffusion.models.metric_models import LITE, lite_is_installed, open_metric_model

    if not trigger:
        raise ConfigError("the adapter does not say its trigger; give it with --trigger 'sks dog'")
    names = args.metric_model or ([LITE] if lite_is_installed() else [])
    models = [open_metric_model(name) for name in names]
    lines = Path(args.prompts).read_text(encoding="utf-8").splitlines() if args.prompts else []
    class_word = args.class_word or trigger.partition(" ")[2]
    trained_on = read_photo_record(args.adapter) or ()
    rules = CaptionRules.from_stated(captions, args.wildcard_dir, trigger)
    subject = read_subject(args.subject[0], trigger, class_word, trained_on, rules)
    for caution in subject.cautions:
        warnings.warn(caution, stacklevel=1)
    with progress("generating images", "step") as show:
        return evaluate_photos(
            components,
            subject,
            _seeds(args),
            settings,
            metric_models=models,
            prompts=[line.strip() for line in lines if line.strip()] or PROMPTS,
            batch_size=args.batch_size,
            on_step=show,
            base_model=base_model,
        )


def _seeds(args: EvaluateSettings) -> list[int]:
    return list(range(args.seed, args.seed + args.num_seeds))


def _details(args: EvaluateSettings, trigger: str, settings: SamplingSettings) -> dict[str, Any]:
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
