"""Display of a training run on a terminal."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_diffusion.cli.console.output import ProgressBar, say, shown_command, tell
from dora_diffusion.config import TrainConfig
from dora_diffusion.config.derived import listed
from dora_diffusion.config.features.prior import has_class_images, prior_mode
from dora_diffusion.config.wording import counted, duration, listing, pixels, quoted
from dora_diffusion.formats.adapter.metadata import split_triggers
from dora_diffusion.numerics.devices import default_device, device_name
from dora_diffusion.training.events import (
    CachingProgress,
    CheckpointSaved,
    ClassImagesAnnounced,
    ClassImagesProgress,
    Event,
    ModelLoading,
    SampleSaved,
    SamplingProgress,
    StepDone,
    SubjectLeft,
    TrainingEnded,
    TrainingStarted,
    Validated,
)

if TYPE_CHECKING:
    from dora_diffusion.data.photos import Photo

# Maximum number of images per subject in a dry run, and of captions after the first of each.
_LISTED, _DRAWN = 20, 4


class TrainProgress:
    """Display of a run, or of all subjects of a pack: lines, one bar of steps, phases for `tell`.

    The lines of a pack have the subject's name.

    Attributes:
        triggers: Trigger words of each started subject, by name; "" in a run of its own.
    """

    def __init__(self) -> None:
        self.bar: Any = None
        self.images: ProgressBar | None = None
        self.triggers: dict[str, str] = {}
        self.losses = {"loss": "?"}
        self._steps: dict[str, tuple[int, int]] = {}

    @property
    def started(self) -> bool:
        """True if training has started in this process."""
        return bool(self.triggers)

    def __call__(self, event: Event, name: str = "") -> None:
        """Show one event of a run, or of the named subject of a pack."""
        match event:
            case ModelLoading():
                precision = {"no": "float32"}.get(event.precision, event.precision)
                print(f"training {event.model} on {event.device} in {precision}", flush=True)
                tell(phase="loading the model", device_name=device_name(default_device()))
            case TrainingStarted():
                self._start(event, name)
            case ClassImagesAnnounced():
                say((f"{name}: " if name else "") + _class_images_text(event))
            case ClassImagesProgress(done, total) if not name:
                self._count_images("class images", done, total)
            case CachingProgress(done, total) if not name:
                self._count_images("caching latents", done, total)
            case SamplingProgress(done, total) if not name:
                share = "" if done == total else f"sampling {100 * done // total}%"
                # In a log file, every refresh would be a line.
                self.bar.set_description_str(share, refresh=sys.stderr.isatty())
            case StepDone():
                self._count_step(event, name)
            case Validated(step, loss) if loss is not None and name:
                say(f"{name}, step {step}: validation loss {loss:.4f}")
            case Validated(step, loss) if loss is not None:
                self._say_validation(step, loss, event.best_step)
            case Validated() if not name:
                say(
                    f"step {event.step}: similarity of the samples to the held-out photos "
                    f"{event.record['validation_similarity']:.3f}"
                )
            case SampleSaved():
                say(f"{name or 'sample'}: {event.path}")
            case CheckpointSaved():
                removed = f"; removed {', '.join(event.removed)}" if event.removed else ""
                say(f"{name or 'checkpoint'}: {event.path}{removed}")
            case TrainingEnded(step, interrupted) if name:
                say(f"{name}: {'interrupted' if interrupted else 'done'} after step {step}")
            case TrainingEnded():
                self._say_end(event)
            case SubjectLeft(reason):
                say(f"{name} has left the pack: {reason}")

    def close(self) -> None:
        """End the bar's line, so that further output starts on a new line."""
        for bar in (self.images, self.bar):
            if bar is not None:
                bar.close()

    def _count_step(self, event: StepDone, name: str) -> None:
        """Move the bar, which has the steps of all subjects."""
        self._steps[name] = event.step, event.total_steps
        done, total = (sum(counts) for counts in zip(*self._steps.values(), strict=True))
        if self.bar is None:
            self._open_bar(done, total)
        if name:
            tell(phase="training", done=done, total=total)
        else:
            self.losses["loss"] = f"{event.loss:.4f}"
            self.bar.set_postfix(self.losses, refresh=False)
            if done == total:
                tell(phase="saving and sampling")
        self.bar.total = total
        self.bar.update(done - self.bar.n)

    def _open_bar(self, done: int, total: int) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)

    def _say_validation(self, step: int, loss: float, best_step: int | None) -> None:
        self.losses["validation"] = f"{loss:.4f}"
        what = {0: ", of the base model", best_step: ", the lowest so far"}.get(step, "")
        lowest = f" (lowest at step {best_step})" if step and best_step not in (None, step) else ""
        say(f"step {step}: validation loss {loss:.4f}{what}{lowest}")

    def _say_end(self, event: TrainingEnded) -> None:
        tell(result_step=event.result_step or 0)
        if event.result_step not in (None, event.step):
            say(
                f"the result is from step {event.result_step}, which had the lowest validation "
                "loss (keep_best)"
            )

    def _count_images(self, what: str, done: int, total: int) -> None:
        if self.images is None:
            self.images = ProgressBar("image", desc=what)
        self.images(done, total)
        tell(phase=f"{what}: {done} of {total}")
        if done >= total:
            self.images.close()
            self.images = None

    def _start(self, event: TrainingStarted, name: str) -> None:
        self.triggers[name] = event.trigger
        self._steps[name] = event.step, event.total_steps
        if name:
            photos = counted(event.photos, "photo")
            resumed = f"; resumed from {event.resumed_from}" if event.resumed_from else ""
            say(f"{name}: {photos} at {pixels(event.resolutions)}, {event.adapter}{resumed}")
            return
        tell(
            phase="training",
            first_step=event.step,
            total_steps=event.total_steps,
            trigger=event.trigger,
        )
        print(
            f"{event.family} on {event.device}: {counted(event.photos, 'photo')} at "
            f"{pixels(event.resolutions)}, {event.adapter}; {event.schedule}"
            + (f"; started from {event.started_from}" if event.started_from else "")
        )
        if len(split_triggers(event.trigger)) > 1:
            print(f"subjects: {event.trigger}")
        if event.held_out:
            print(f"held out: {counted(len(event.held_out), 'photo')} ({listing(event.held_out)})")
        if event.resumed_from:
            print(_resumed_line(event))
        if event.changed:
            print(f"changed from step {event.step + 1} on: {listed(event.changed)}")
        if event.unused:
            print(f"without effect, since no step is left: {listed(event.unused)}")
        self._open_bar(event.step, event.total_steps)


def training_summary(config: TrainConfig) -> str:
    """Describe the subjects and images of a run, without loading its model.

    Raises:
        ConfigError, PhotoError: As in the run.

    Warns:
        UserWarning: As in the run.
    """
    from dora_diffusion.data.photos import read_photos
    from dora_diffusion.training.inputs.dataset import check_subject
    from dora_diffusion.training.inputs.plan import plan_run
    from dora_diffusion.training.inputs.subject import caption_rules

    plan, lines, an_epoch = plan_run(config), list[str](), 0
    if not config.has_photos:
        return "\n".join([*config.describe().plan, _made_images(config)])
    groups = zip(plan.subjects, plan.photos, plan.held_out, strict=True)
    for subject, paths, held_out_paths in groups:
        settings = subject.settings
        photos = read_photos(
            paths, settings.instance_prompt or "", skip_unreadable=True, per_line=True
        )
        check_subject(subject, photos)
        an_epoch += len(photos) * settings.repeats
        facts = _facts_of(settings, photos)
        facts += [f"{counted(len(held_out_paths), 'image')} held out"] if held_out_paths else []
        lines.append(
            f"{subject.trigger or 'unchanged captions'}: {', '.join(facts)}, in "
            f"{settings.instance_data_dir}"
        )
        for photo in photos[:_LISTED]:
            first, *drawn = caption_rules(settings).captions(photo.caption)
            lines.append(f"    {photo.path.name}: {first}")
            lines += [f"        or {caption}" for caption in drawn[:_DRAWN]]
            lines += [f"        or {len(drawn) - _DRAWN} more"] if len(drawn) > _DRAWN else []
        lines += [f"    and {len(photos) - _LISTED} more"] if len(photos) > _LISTED else []
    lines.append(f"an epoch: {counted(an_epoch, 'image')}")
    batch = config.train_batch_size * config.gradient_accumulation_steps
    if config.num_train_epochs and not config.max_train_steps:
        epochs, steps = config.num_train_epochs, -(-config.num_train_epochs * an_epoch // batch)
        lines[-1] += f"; {counted(epochs, 'epoch')}: about {counted(steps, 'step')} of {batch}"
    if config.max_train_steps:
        seen = config.max_train_steps * batch / an_epoch
        lines[-1] += f"; {config.max_train_steps} steps of {batch} are {seen:.3g} epochs"
    if config.sample_model:
        steps, guidance = config.validation_inference_steps, config.validation_guidance_scale
        sampling = f"{steps} steps, guidance scale {guidance:g}"
        lines.append(f"samples on {config.sample_model}: {sampling}; trained on the base model")
    return "\n".join(lines)


def _made_images(config: TrainConfig) -> str:
    from dora_diffusion.training.inputs.prior import class_folder

    return (
        f"the base model first generates {config.num_class_images} images of them in "
        f"{class_folder(config)}, unless a run has done so"
    )


def _facts_of(settings: TrainConfig, photos: Sequence[Photo]) -> list[str]:
    """Return the settings of a subject that affect the training on its images, as texts."""
    from dora_diffusion.data.photos import mask_path
    from dora_diffusion.training.inputs.prior import class_folder, missing_class_images

    masks = sum(mask_path(photo.path).is_file() for photo in photos) if settings.masked_loss else 0
    fixed = f" after the first {settings.keep_tags}" if settings.keep_tags else ""
    buckets = _in_buckets(settings, photos) if settings.aspect_ratio_buckets else ""
    applies = {
        counted(len(photos), "image"): True,
        f"at {settings.resolution} px": settings.resolution,
        buckets: buckets,
        "cut at random": not settings.center_crop,
        "mirrored at random": settings.random_flip,
        f"{settings.repeats} times an epoch": settings.repeats > 1,
        counted(masks, "mask file"): masks,
        f"held outside of masks: weight {settings.unmasked_prior:g}": (
            settings.masked_loss and settings.unmasked_prior
        ),
        f"tags shuffled{fixed}": settings.shuffle_tags,
        f"tags left out: {settings.tag_dropout:g}": settings.tag_dropout,
        f"captions dropped: {settings.caption_dropout:g}": settings.caption_dropout,
    }
    facts = [fact for fact in applies if applies[fact]]
    if has_class_images(settings):
        missing, folder = missing_class_images(settings), class_folder(settings)
        images = counted(settings.num_class_images, "class image")
        prompt = f" ({quoted(settings.class_prompt)})" if settings.class_prompt else ""
        facts.append(f"prior: {missing.present} of {images} in {folder}{prompt}")
        if missing.count:
            facts.append(
                f"{missing.count} to generate in {missing.folder} unless a run has done so "
                f"({missing.advice})"
            )
        return facts
    return facts + ([f"prior: {prior_mode(settings)}"] if settings.with_prior_preservation else [])


def _in_buckets(settings: TrainConfig, photos: Sequence[Photo]) -> str:
    """Return the buckets of images; without sizes if these depend on the model."""
    from dora_diffusion.data.crops import Buckets

    if not (settings.resolution and settings.bucket_reso_steps):
        return "in buckets"
    buckets = Buckets(
        settings.resolution,
        settings.bucket_reso_steps,
        settings.min_bucket_reso,
        settings.max_bucket_reso,
    )
    counts = Counter(buckets(photo.size) for photo in photos)
    sizes = [f"{count} of {size[1]} x {size[0]}" for size, count in sorted(counts.items())]
    return f"in buckets ({', '.join(sizes)})"


def next_steps(config: TrainConfig, written: Path) -> list[str]:
    """Return a line each on using a result for images, in ComfyUI and in Diffusers.

    Args:
        config: The run's settings.
        written: The adapter file, or the folder of the model.
    """
    from dora_diffusion.formats.files.runs import INPUT_AXIS_FILES
    from dora_diffusion.models.locate import known_family
    from dora_diffusion.training.inputs.subject import example_prompt

    family = known_family(config.base_model)
    folder = written.parent if written.parent.name else written.parent.resolve()
    pipeline = "ModularPipeline" if family and family.is_modular else "DiffusionPipeline"
    base = ["--base", config.pretrained_model_name_or_path]
    for name in ("variant", "revision"):
        base += [f"--{name}", value] if (value := getattr(config, name)) else []
    single, merged = f"{folder}.safetensors", f"{folder}-merged"
    copy = f"  # then copy {single!r} into ComfyUI/models/"
    of_images = ["--base", config.sample_model] if config.sample_model else base
    adapted = [*of_images, "--adapter", str(folder)]
    comfyui = _command("convert", str(folder), single, "--to", "comfyui", *base) + copy + "loras"
    diffusers = (
        f"pipeline.load_lora_weights({str(folder)!r}, weight_name={written.name!r})"
        "  # after: pip install peft"
    )
    if not config.trains_adapters:
        adapted = ["--base", str(folder)]
        comfyui = _command("export", *adapted, "--output", single) + copy
        comfyui += "diffusion_models" if family and family.has_separate_files else "checkpoints"
        diffusers = f"{pipeline}.from_pretrained({str(written)!r})"
    elif written.name in INPUT_AXIS_FILES.values():
        diffusers = _command("export", *base, "--adapter", str(folder), "--output", merged)
        diffusers += f"  # then {pipeline}.from_pretrained({merged!r})"
    prompt = example_prompt(config)
    strength = config.describe().strength
    adapted += ["--strength", f"{strength:g}"] if strength != 1 else []
    if config.distilled is not None and not config.sample_model:
        adapted.append("--distilled" if config.distilled else "--no-distilled")
    images = _command("generate", *adapted, "--prompt", prompt, "--output", f"{folder}.png")
    lines = [f"images:    {images}", f"ComfyUI:   {comfyui}", f"Diffusers: {diffusers}"]
    is_known = family is None or family.has_unet or family.has_separate_files
    return lines if is_known else [line for line in lines if not line.startswith("ComfyUI")]


def _command(*words: str) -> str:
    return shown_command([["dora-diffusion", *words]])


def _class_images_text(event: ClassImagesAnnounced) -> str:
    images = counted(event.count, "class image")
    if event.seconds is not None:
        return f"{images}: about {duration(event.seconds)}"
    advice = f"; {event.advice}" if event.advice else ""
    return f"{images} to generate before the first step, in {event.folder}{advice}"


def _resumed_line(event: TrainingStarted) -> str:
    step, total, dropped = event.step, event.total_steps, event.steps_dropped
    line = f"resuming from {event.resumed_from}, at step {step} of {total}"
    if dropped:
        line += f"; steps {step + 1} to {step + dropped} are repeated"
    return line + ("; nothing is left to train" if step == total else "")
