"""``dora-diffusion evaluate``."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from dora_diffusion.cli.console.output import print_json, progress
from dora_diffusion.cli.settings import AdaptedModel, Sampling, check_results
from dora_diffusion.config import ConfigError
from dora_diffusion.config.fields import REQUIRED, flag
from dora_diffusion.config.file import read_text
from dora_diffusion.config.images import GUIDANCE_SCALE, STEPS
from dora_diffusion.config.wording import counted
from dora_diffusion.formats.adapter.metadata import CAPTIONS, OWN

if TYPE_CHECKING:
    from dora_diffusion.evaluation.photos import PhotoSubject
    from dora_diffusion.evaluation.ranking import EvaluationPrompts
    from dora_diffusion.evaluation.report import Evaluation
    from dora_diffusion.models.components import Components
    from dora_diffusion.sampling.settings import SamplingSettings
    from dora_diffusion.training.inputs.subject import Subject


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
        "efficientnet-lite0. Default: efficientnet-lite0 if it is installed.",
    )
    trigger: str | None = flag(None, "Trigger words. Default: from the adapter's file.")
    class_word: str | None = flag(
        None, "Class of the subject. Default: the trigger words without their token."
    )
    prompts: str | None = flag(
        None,
        "Text file, one prompt per line, with {} where the subject is named. Default: a built-in "
        "list.",
    )
    steps: int | None = flag(
        None,
        f"Denoising steps. Default: {STEPS}; of transformers and distilled models what they are "
        "for, as of guidance.",
    )
    num_seeds: int = flag(4, "Images per prompt, one per seed.", least=1)
    seed: int = flag(0, "Random seed of the first image.")
    guidance_scale: float | None = flag(
        None, "Guidance scale (CFG scale). Default: 3.5 for the toy world, else 7.5."
    )

    def perform(self) -> int:
        """Measure an adapter, print the table or JSON, and write both with a sheet of images."""
        outputs, sources = _outputs(self), [source_of(subject) for subject in self.subject]
        for source, output in zip(sources, outputs, strict=True):
            _check(self, source, output)
            self.sampling(source)
        components, triggers, captions, base_model = _load(self)
        of_subjects = zip(sources, outputs, _one_for_each(triggers, self), strict=True)
        reports = []
        for source, output, trigger in of_subjects:
            measure = source.measure(self, trigger, captions)
            with progress("generating images", "step") as show:
                evaluation = measure(
                    components,
                    seeds=range(self.seed, self.seed + self.num_seeds),
                    settings=self.sampling(source, components),
                    batch_size=self.batch_size,
                    on_step=show,
                    base_model=base_model,
                )
            details = _details(self, trigger, self.sampling(source, components))
            evaluation = dataclasses.replace(evaluation, details=details)
            files = evaluation.write(output)
            reports.append(evaluation.to_dict())
            if not self.json:
                print(f"{trigger}:\n" if len(sources) > 1 else "", end="")
                # The cautions were already printed as warnings.
                print(dataclasses.replace(evaluation, cautions=()).table())
                print("\n" + "\n".join(f"{name}: {path}" for name, path in files.items()))
        if self.json:
            print_json(reports if len(sources) > 1 else reports[0])
        return 0

    def sampling(
        self, source: SubjectSource, components: Components | None = None
    ) -> SamplingSettings:
        """Return the sampling settings of a subject's images.

        Args:
            source: The subject.
            components: The model, whose defaults are used; None: not loaded yet.

        Raises:
            ConfigError: If they are not valid.
        """
        from dora_diffusion.sampling.load import sampling_defaults
        from dora_diffusion.sampling.settings import SamplingSettings

        values: dict[str, Any] = {"guidance_scale": source.guidance_scale}
        values |= sampling_defaults(components) if components else {}
        stated = {name: getattr(self, name) for name in ("steps", "guidance_scale", "scheduler")}
        return SamplingSettings(**values | {n: v for n, v in stated.items() if v is not None})


def _outputs(args: EvaluateSettings) -> list[Path]:
    """Return the output folder of each subject.

    Raises:
        ConfigError: If two subjects have the same name.
    """
    output = Path(args.output)
    if len(args.subject) == 1:
        return [output]
    names = [Path(subject).resolve().name for subject in args.subject]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"two of the subjects {', '.join(args.subject)} have the same name, and so the same "
            "results folder; rename a folder",
            "subject",
        )
    return [output / name for name in names]


def _one_for_each(triggers: str, args: EvaluateSettings) -> list[str]:
    """Return the trigger words of each subject.

    Raises:
        ConfigError: If the numbers of subjects and trigger words differ.
    """
    from dora_diffusion.formats.adapter.metadata import split_triggers

    names, count = split_triggers(triggers) or [""], len(args.subject)
    if len(names) != count:
        raise ConfigError(
            f"the adapter has {counted(len(names), 'subject')}, {triggers or 'without a trigger'}, "
            f"but --subject names {count}; name one for each, in this order, or choose with "
            "--trigger",
            "subject",
        )
    if count > 1 and args.class_word:
        raise ConfigError("--class_word is for one subject; choose it with --trigger", "class_word")
    return names


def _check(args: EvaluateSettings, source: SubjectSource, output: Path) -> None:
    """Check settings and output before a model is loaded."""
    if not 0 <= args.seed < 2**32:
        raise ConfigError(f"seed is {args.seed}; it must be between 0 and 2**32 - 1", "seed")
    from dora_diffusion.evaluation.report import FILES

    check_results(output, "an evaluation", FILES.values(), overwrite=args.overwrite)
    if args.prompts and not Path(args.prompts).is_file():
        raise ConfigError(
            f"prompts {args.prompts} is not a file of prompts, one per line", "prompts"
        )
    source.check(args)


def _load(args: EvaluateSettings) -> tuple[Components, str, str, Components | None]:
    """Load the model to measure. Returns it, its trigger words, its caption rules and its base.

    The base is None for an adapter: it is then the same model without the adapter.
    """
    from dora_diffusion.formats.checkpoint.models import is_model

    if not Path(args.adapter).expanduser().exists() or not is_model(args.adapter):
        components, metadata = args.load(args.adapter)
        captions = metadata.extra.get(CAPTIONS, "")
        return components, args.trigger or metadata.trigger, captions, None
    from dora_diffusion.export.files import open_model
    from dora_diffusion.export.metadata import trained_trigger

    with open_model(args.adapter) as stored:
        trigger = args.trigger or trained_trigger(stored.metadata)
        captions = stored.metadata.get(OWN + CAPTIONS, "")
    # A whole model has no adapter: warn about settings such as strengths.
    without: dict[str, Any] = {"adapter": None}
    dataclasses.replace(args, **without).warn()
    tuned = dataclasses.replace(args, base=args.adapter, variant=None, revision=None)
    components, _ = tuned.load(None)
    base_model, _ = args.load(None)
    return components, trigger, captions, base_model


def _details(args: EvaluateSettings, trigger: str, settings: SamplingSettings) -> dict[str, Any]:
    from dora_diffusion.formats.adapter.metadata import without_path

    return {
        "base": without_path(args.base),
        "adapter": without_path(str(Path(args.adapter).resolve())),
        "strength": args.strength,
        "trigger": trigger,
        "sampling": {
            name: getattr(settings, name) for name in ("steps", "guidance_scale", "scheduler")
        },
    }


class SubjectSource(Protocol):
    """Source of a subject's reference images and of its measurements.

    Attributes:
        guidance_scale: Default guidance scale of the measured images.
    """

    guidance_scale: ClassVar[float]

    def check(self, args: EvaluateSettings) -> None:
        """Check the settings, and raise a `ConfigError` if they do not fit the source."""

    def measure(
        self, args: EvaluateSettings, trigger: str, captions: str
    ) -> Callable[..., Evaluation]:
        """Read the references. Returns a function of a model, seeds and sampling settings.

        Args:
            args: The command's settings.
            trigger: Trigger words, empty if unknown.
            captions: Caption rules of the training, from the metadata.
        """

    def questions(
        self, subjects: Sequence[Subject], settings: SamplingSettings, base: str
    ) -> EvaluationPrompts:
        """Return the prompts for ranking checkpoints of a run with these subjects."""


def source_of(subject: str | None) -> SubjectSource:
    """Return the source of a subject: of the toy world by name, else a folder or a run's photos.

    A folder with the name of a toy subject must be given as a path, such as ``./NAME``.
    """
    known = resolve_name("dora_diffusion.toy.judges:KNOWN")
    source: SubjectSource = known.get(subject) or PhotoFolder(subject, tuple(known))
    return source


@dataclass(frozen=True)
class PhotoFolder:
    """Subject with photos as references.

    Attributes:
        folder: Folder of the photos; None: the run's photos.
        others: Names of the toy subjects, for the error message.
    """

    guidance_scale: ClassVar = GUIDANCE_SCALE
    folder: str | None
    others: Sequence[str] = ()

    def check(self, args: EvaluateSettings) -> None:
        if not Path(self.folder or "").is_dir():
            raise ConfigError(
                f"subject {self.folder} is neither a folder of photos nor one of "
                f"{', '.join(self.others)}",
                "subject",
            )

    def measure(
        self, args: EvaluateSettings, trigger: str, captions: str
    ) -> Callable[..., Evaluation]:
        from dora_diffusion.data.captions import CaptionRules
        from dora_diffusion.data.photos import read_photo_record
        from dora_diffusion.evaluation.photos import PROMPTS, evaluate_photos, read_subject
        from dora_diffusion.models.metric_models import LITE, lite_is_installed, open_metric_model

        if not trigger:
            raise ConfigError(
                "the adapter's file has no trigger; give it with --trigger 'sks dog'", "trigger"
            )
        names = args.metric_model or ([LITE] if lite_is_installed() else [])
        models = [open_metric_model(name) for name in names]
        text = read_text(args.prompts, "prompts", "prompts") if args.prompts else ""
        prompts = [line.strip() for line in text.splitlines() if line.strip()] or PROMPTS
        class_word = args.class_word or trigger.partition(" ")[2]
        trained_on = read_photo_record(args.adapter) or ()
        rules = CaptionRules.from_stated(captions, trigger)
        subject = read_subject(self.folder or "", trigger, class_word, trained_on, rules)
        for caution in subject.cautions:
            warnings.warn(caution, stacklevel=1)
        return partial(evaluate_photos, subject=subject, metric_models=models, prompts=prompts)

    def questions(
        self, subjects: Sequence[Subject], settings: SamplingSettings, base: str
    ) -> EvaluationPrompts:
        from dora_diffusion.evaluation.ranking import ask_photos

        photo_subjects, known = known_photos(subjects, self.folder)
        return ask_photos(photo_subjects, settings, known)


def known_photos(
    subjects: Sequence[Subject], folder: str | None
) -> tuple[list[PhotoSubject], list[str]]:
    """Return each subject's photos for comparison: held-out photos, else the training photos.

    Args:
        subjects: Subjects of the run. Subjects with equal trigger words count as one.
        folder: Folder of photos to use instead.

    Returns:
        The subjects, and the trigger words of subjects compared with training photos.
    """
    from dora_diffusion.data.photos import list_photos
    from dora_diffusion.evaluation.photos import PhotoSubject
    from dora_diffusion.training.features.held_out import divide_all
    from dora_diffusion.training.features.validation import read_held_out

    none: list[list[Path]] = [[] for _ in subjects]
    folders = [Path(one.settings.instance_data_dir or "") for one in subjects]
    if folder and Path(folder).resolve() not in [path.resolve() for path in folders]:
        trained_on, held_out = none, [list_photos(folder), *none[1:]]
    else:
        trained_on, held_out = divide_all(subjects, [list_photos(path) for path in folders])
        held_out = none if folder else held_out
    known, photo_subjects = list[str](), dict[str, PhotoSubject]()
    # A style without trigger words, trained with subjects, is in all of their images.
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
        photo_subjects[trigger] = PhotoSubject(
            name, trigger, subjects[places[0]].class_word, photos
        )
    return list(photo_subjects.values()), known
