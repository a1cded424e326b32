"""Results of a run: adapter or model, sample images and model card.

Samples are generated at fixed seeds and saved as labelled sheets with a row per prompt and a column
per seed; at several strengths a row per prompt and seed and a column per strength.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from torch.compiler import set_stance

from dora_diffusion import __version__, system
from dora_diffusion.adapters.inject import set_strength
from dora_diffusion.config import TrainConfig
from dora_diffusion.config.images import ImageRequest, SamplePrompt
from dora_diffusion.data.captions import stated_rules
from dora_diffusion.data.sheets import image_grid, labelled_sheet
from dora_diffusion.formats.adapter.embeddings import EMBEDDINGS
from dora_diffusion.formats.adapter.metadata import (
    CAPTIONS,
    READING,
    UNET_LAYERS,
    AdapterMetadata,
)
from dora_diffusion.formats.checkpoint.schedule import schedule_facts
from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.formats.names.modules import UNetLayout
from dora_diffusion.numerics.weights import MergeStrengths
from dora_diffusion.sampling.conditioning import inactive_messages
from dora_diffusion.sampling.generate import generate_images
from dora_diffusion.sampling.images import RecordedAdapter, parameters_text, save_image, thumbnail
from dora_diffusion.sampling.load import sampling_defaults
from dora_diffusion.sampling.settings import SamplingSettings
from dora_diffusion.training.events import OnEvent, SampleSaved, SamplingProgress
from dora_diffusion.training.inputs.subject import caption_rules
from dora_diffusion.training.metrics import Trackers, naming_step
from dora_diffusion.training.processes import set_by_any, shards_model
from dora_diffusion.training.results.card import VALIDATION_LOSS, model_card
from dora_diffusion.training.results.checkpoint import read_state, restore_weights
from dora_diffusion.training.results.folders import UNFINISHED
from dora_diffusion.training.signals import StopRequest
from dora_diffusion.training.trainable.adapters import Writer

if TYPE_CHECKING:
    from dora_diffusion.models.components import Components
    from dora_diffusion.training.run import Run


def take_best(run: Run, steps: int, checkpoints: Mapping[int, Path]) -> int:
    """Load the weights with the lowest validation loss into the model. Returns their step.

    Args:
        run: Run with validation, after its last step.
        steps: Number of completed optimizer steps, whose weights the model has.
        checkpoints: Available checkpoints, by step.

    Warns:
        UserWarning: If the best step has no checkpoint, or its loss is not below the base model's.
    """
    validation = run.validation
    assert validation is not None
    best, lowest = validation.best({*checkpoints, steps}), validation.best()
    if best is None:
        return steps
    if best != lowest:
        warnings.warn(
            f"the validation loss was lowest at step {lowest}, which has no checkpoint: the result "
            f"has the weights of step {best}",
            stacklevel=4,
        )
    before = validation.losses.get(0, math.inf)
    if validation.losses[best] >= before:
        warnings.warn(
            f"the validation loss was never below the base model's ({before:.4g}): a lower "
            "learning rate or more photos may help",
            stacklevel=4,
        )
    if best != steps:
        restore_weights(run, read_state(checkpoints[best]))
    return best


def write_result(
    run: Run, folder: Path, steps: int, samples: SampleWriter
) -> tuple[Path, float | None]:
    """Write the result of a run, then its samples and model card, made from the written file.

    An earlier result is replaced after the new one has been verified. All processes must call this
    function if the model is sharded; the first one writes.

    Returns:
        The file, and for full fine-tuning the share of the changes that it preserves.

    Raises:
        TrainingError: If the weights are not finite.
        DiskFullError: If the result cannot be written. Samples and card only cause a warning.
    """
    weights, accelerator = run.weights, run.accelerator
    metadata = result_metadata(run, steps)
    write = weights.writer()
    written = weights.result(folder)
    if accelerator.is_main_process:
        written = _write_weights(run, folder, steps, write, metadata)
    if shards_model(accelerator):
        accelerator.wait_for_everyone()
    preserved_share = weights.reload(written)

    def add_thumbnail(grid: Image.Image) -> None:
        """Write the adapter again with a sample as thumbnail for adapter managers."""
        if run.config.trains_adapters and accelerator.is_main_process:
            with tempfile.TemporaryDirectory() as temporary:
                image = thumbnail(save_image(grid, Path(temporary) / "thumbnail.png"))
            write(folder, dataclasses.replace(metadata, thumbnail=image))

    lost = f"the {weights.noun} was written, but not all of its samples and card"
    with warning_of_full_disk(lost):
        if run.config.num_validation_images:
            samples.of_result(steps, add_thumbnail)
        if accelerator.is_main_process:
            _write_card(run, folder, written, steps, samples.files)
    return written, preserved_share


def _write_weights(
    run: Run, folder: Path, steps: int, write: Writer, metadata: AdapterMetadata
) -> Path:
    weights = run.weights
    # On the same disk as the result. `clear_folder` removes leftovers of a crash.
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=folder) as temporary:
        new = write(weights.result(Path(temporary)), metadata)
        with naming_step(weights.noun, steps):
            weights.check(new)
        written = folder / new.relative_to(temporary)
        for file in Path(temporary).glob(f"{EMBEDDINGS}/*"):
            (folder / EMBEDDINGS).mkdir(exist_ok=True)
            system.replace(file, folder / EMBEDDINGS / file.name)
        if written.is_dir():
            shutil.rmtree(written)
        system.replace(new, written)
    weights.write_copies(folder, metadata, write)
    return written


def result_metadata(run: Run, steps: int) -> AdapterMetadata:
    """Return the metadata of a result after a number of optimizer steps."""
    components = run.components
    class_words = dict.fromkeys(subject.class_word for subject in run.subjects)
    losses = run.validation.losses if run.validation else {}
    layout = UNetLayout.of(components.denoiser.config)
    return AdapterMetadata(
        family=components.family.name,
        base_model=run.config.pretrained_model_name_or_path,
        trigger=" ".join(filter(None, (run.trigger, *run.subjects[0].words))),
        resolutions=run.resolutions,
        extra={
            **schedule_facts(components.scheduler.config),
            "training_steps": str(steps),
            "software": f"dora_diffusion {__version__}",
            **_stated_settings(run),
            **run.config.describe().metadata,
            **({VALIDATION_LOSS: f"{losses[steps]:.6g}"} if steps in losses else {}),
            **run.weights.origin,
            **({UNET_LAYERS: layout.text()} if layout else {}),
        },
        tags=tuple(filter(None, class_words)),
        tag_frequency=run.dataset.tag_frequency(),
    )


def _stated_settings(run: Run) -> dict[str, str]:
    """Return non-default settings of initialization, parametrization and prompts, as metadata."""
    config, usual = run.config, TrainConfig()
    names = (*(("init", "parametrization") if config.trains_adapters else ()), *READING)
    stated = {n: str(v) for n in names if (v := getattr(config, n)) != getattr(usual, n)}
    captions = stated_rules({s.trigger: caption_rules(s.settings) for s in run.subjects})
    return stated | ({CAPTIONS: captions} if captions else {})


def _write_card(
    run: Run, folder: Path, written: Path, steps: int, samples: Mapping[str, Path]
) -> None:
    titles = {"adapted": "With the adapter", "base": "Without it, at the same seeds"}
    if not run.config.trains_adapters:
        titles = {"adapted": "Fine-tuned", "base": "The base model, at the same seeds"}
    if run.config.describe().strengths:
        titles = {"adapted": "At several strengths"}
    images = {
        title: samples[name].relative_to(folder).as_posix()
        for name, title in titles.items()
        if name in samples
    }
    metadata, report = result_metadata(run, steps), run.report
    card = model_card(run.config, run.subjects, metadata, written, report, images)
    save_text(folder / "README.md", card)


class _SamplingStopped(Exception):
    """Signal during the generation of sample images."""


@contextmanager
def warning_of_full_disk(what: str) -> Iterator[None]:
    """Convert an `OSError` to a warning, for files that are not worth ending the run."""
    try:
        yield
    except OSError as error:
        warnings.warn(f"{what}: {error.strerror or error}", stacklevel=3)


def sample_settings(
    prompt: SamplePrompt, config: TrainConfig, components: Components
) -> SamplingSettings:
    """Return the sampling settings of a prompt. Options that it lacks come from the run's.

    Raises:
        ConfigError: If the model does not support its size.

    Warns:
        UserWarning: For each setting without effect on the model.
    """
    scheduler = sampling_defaults(components).get("scheduler") if config.sample_model else None
    settings = SamplingSettings.of(
        prompt,
        steps=config.validation_inference_steps,
        guidance_scale=config.validation_guidance_scale,
        scheduler=scheduler,
        width=config.resolution,
        height=config.resolution,
    )
    for line in inactive_messages(components, settings):
        warnings.warn(line, stacklevel=2)
    return settings.for_model(components)


def _of_one_size(images: Sequence[Image.Image]) -> list[Image.Image]:
    """Return the images of the same size as the first."""
    return [image for image in images if image.size == images[0].size]


class SampleWriter:
    """Generates sample images with a run's model and writes them to ``samples/NAME.png``.

    A signal stops sampling. Incomplete sheets are not written.

    Attributes:
        files: Sheets of the result by name, such as ``base``.
    """

    def __init__(
        self,
        run: Run,
        output_dir: Path,
        trackers: Trackers,
        on_event: OnEvent,
        stop: StopRequest,
    ) -> None:
        self.files: dict[str, Path] = {}
        self._run, self._output_dir = run, output_dir
        self._trackers, self._on_event, self._stop = trackers, on_event, stop
        config = run.config
        self._with = "with the adapter" if config.trains_adapters else "fine-tuned"
        prompts = config.prompts
        self._prompts = [prompt.prompt for prompt in prompts]
        model = run.components
        if config.sample_base:
            from dora_diffusion.models.load import load_empty

            model = load_empty(config.sample_base)
        self._settings = [sample_settings(prompt, config, model) for prompt in prompts]
        starts = [config.seed if prompt.seed is None else prompt.seed for prompt in prompts]
        self._seeds = [range(first, first + config.num_validation_images) for first in starts]
        self._lines = config.validation_prompt or self._prompts
        self._strengths = config.describe().strengths

    def at_step(self, step: int) -> list[tuple[str, Image.Image]]:
        """Write ``step-STEP.png``; a full disk is a warning. Returns prompts with their images."""
        title, images = f"Step {step} of {self._run.total_steps}, {self._with}", []
        with warning_of_full_disk(f"no samples at step {step}"), suppress(_SamplingStopped):
            images = self._images(step)
            self._save_sheet(f"step-{step:06d}", images, title, step)
        rows = zip(self._prompts, self._seeds, strict=True)
        prompts = [prompt for prompt, seeds in rows for _ in seeds]
        return list(zip(prompts, images, strict=False))

    def of_result(self, step: int, on_adapted: Callable[[Image.Image], object]) -> None:
        """Write ``adapted.png``, ``base.png`` (without the adapter) and both as one image.

        At several strengths, ``adapted.png`` includes the base model as strength 0 and is the only
        image.

        Args:
            step: Step of the result.
            on_adapted: Called with the images of the adapter as a grid without labels.
        """
        with suppress(_SamplingStopped):
            images = self._images(step)
            title = f"After {step} steps, {self._with}"
            adapted = self._save_sheet("adapted", images, title, step)
            tiles = _of_one_size(images)
            on_adapted(image_grid(tiles, len(self._strengths) or len(self._seeds[0])))
            if self._strengths:
                return
            images = self._images(step, adapter=False)
            base = self._save_sheet("base", images, "The base model", step, adapter=False)
            text = self._parameters(images, step, adapter=True)
            self._save("base_above_adapted", image_grid([base, adapted], 1), text)

    @contextmanager
    def _model(self, step: int, *, adapter: bool) -> Iterator[Components]:
        """Yield the model to sample on, with or without the adapter."""
        run = self._run
        if run.config.sample_model:
            from dora_diffusion.training.features.twin import sampled_on

            with sampled_on(run, result_metadata(run, step) if adapter else None) as components:
                yield components
            return
        with nullcontext() if adapter else run.weights.base_weights():
            yield run.components

    def _images(self, step: int, *, adapter: bool = True) -> list[Image.Image]:
        """Sample all images, prompt by prompt and seed by seed, each at all strengths."""
        with self._model(step, adapter=adapter) as components:
            if not self._strengths:
                return self._images_at_strength(components)
            parts, by_strength = components.adaptable(), []
            models = [parts[name] for name in self._run.weights.modules]
            try:
                for strength in self._strengths:
                    for model in models:
                        set_strength(model, strength)
                    by_strength.append(self._images_at_strength(components))
            finally:
                for model in models:
                    set_strength(model, 1.0)
        return [image for row in zip(*by_strength, strict=True) for image in row]

    def _images_at_strength(self, components: Components) -> list[Image.Image]:
        """Sample all images at the current strength, prompt by prompt."""
        images: list[Image.Image] = []
        config = self._run.config
        before = last = 0  # Denoising steps of all previous prompts and of the last one.
        for row, (prompt, seeds) in enumerate(zip(self._prompts, self._seeds, strict=True)):
            before, last = before + last, 0

            def report(done: int, total: int, before: int = before, row: int = row) -> None:
                nonlocal last
                if self._is_stopped():
                    raise _SamplingStopped
                last, left = total, len(self._prompts) - row
                self._on_event(SamplingProgress(before + done, before + left * total))

            # Another batch size without gradients would recompile each block.
            with set_stance("force_eager"):
                images += generate_images(
                    components,
                    prompt,
                    seeds,
                    self._settings[row],
                    batch_size=config.sample_batch_size,
                    on_step=report,
                )
        return images

    def _is_stopped(self) -> bool:
        """Return whether a signal was received, by any process if the model is sharded."""
        accelerator, requested = self._run.accelerator, self._stop.requested
        return set_by_any(accelerator, requested) if shards_model(accelerator) else requested

    def _save_sheet(
        self,
        name: str,
        images: Sequence[Image.Image],
        title: str,
        step: int,
        *,
        adapter: bool = True,
    ) -> Image.Image:
        columns, lines = [f"seed {seed}" for seed in self._seeds[0]], self._lines
        seeds = self._seeds
        if self._strengths:
            rows = zip(lines, seeds, strict=True)
            lines = [f"{line} (seed {seed})" for line, of_line in rows for seed in of_line]
            columns = [f"strength {strength:g}" for strength in self._strengths]
        elif len(set(seeds)) > 1 or len(_of_one_size(images)) < len(images):
            columns = [""] * len(columns)  # Columns have several seeds, or sizes differ.
            rows = zip(lines, seeds, strict=True)
            lines = [f"{line} (from seed {of_line[0]})" for line, of_line in rows]
        sheet = labelled_sheet(images, title, lines, columns)
        self._save(name, sheet, self._parameters(images, step, adapter=adapter))
        tag = "samples/adapter" if adapter else "samples/base"
        self._trackers.log_images(tag, [sheet], step)
        for row in range(len(lines) if len(lines) > 1 else 0):
            row_images = images[row * len(columns) : (row + 1) * len(columns)]
            self._trackers.log_images(f"{tag}/{row + 1}", row_images, step)
        return sheet

    def _parameters(self, images: Sequence[Image.Image], step: int, *, adapter: bool) -> str:
        """Return the `parameters_text` of a sheet's first image, with entries for the others."""
        size, last, seeds = images[0].size, images[-1].size, self._seeds[0]
        extra = {
            **self._run.components.clip_skip_parameter,
            "Seeds": ", ".join(str(seed) for seed in seeds),
            "Prompts": json.dumps(self._lines, ensure_ascii=False),
            "Training step": step,
        }
        if last != size:
            extra["Last size"] = f"{last[0]}x{last[1]}"
        strengths = MergeStrengths(*self._strengths[:1])
        return parameters_text(
            ImageRequest(self._prompts[0], seeds[0]),
            self._settings[0],
            size,
            self._run.config.sample_model or self._run.config.pretrained_model_name_or_path,
            [RecordedAdapter(self._output_dir.resolve().name, strengths)] if adapter else (),
            extra=extra,
            hash_model=False,
        )

    def _save(self, name: str, image: Image.Image, parameters: str) -> None:
        if not self._run.accelerator.is_main_process:
            return
        path = save_image(image, self._output_dir / "samples" / f"{name}.png", parameters)
        if not name.startswith("step-"):
            self.files[name] = path
        self._on_event(SampleSaved(name, path))
