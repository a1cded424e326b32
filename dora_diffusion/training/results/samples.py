"""Sample images at fixed seeds, saved as labelled sheets: a row per prompt, a column per seed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from dora_diffusion.adapters.compiled import uncompiled
from dora_diffusion.config import TrainConfig
from dora_diffusion.config.fields import require_choice
from dora_diffusion.config.prompts import SamplePrompt
from dora_diffusion.data.sheets import image_grid, labelled_sheet, stacked
from dora_diffusion.models.schedulers import SCHEDULERS
from dora_diffusion.sampling.generate import SamplingSettings, generate_images
from dora_diffusion.sampling.images import parameters_text, save_png
from dora_diffusion.training.engine.accelerator import set_by_any, shards_model
from dora_diffusion.training.events import OnEvent, SampleSaved, SamplingProgress
from dora_diffusion.training.inputs.subject import prompt_rules
from dora_diffusion.training.results.metrics import Trackers
from dora_diffusion.training.session import Session
from dora_diffusion.training.signals import StopRequest


class _SamplingStopped(Exception):
    """A signal came while sample images were made."""


@contextmanager
def warning_of_full_disk(what: str) -> Iterator[None]:
    """Convert a disk's refusal to a warning: what it refuses is not worth the run."""
    try:
        yield
    except OSError as error:
        warnings.warn(f"{what}: {error.strerror or error}", stacklevel=3)


class Sampled(NamedTuple):
    """A sample prompt with the settings of its run: its text, seeds, and how it is sampled."""

    text: str
    seeds: range
    settings: SamplingSettings

    @classmethod
    def of(cls, prompt: SamplePrompt, config: TrainConfig) -> Sampled:
        """Return the sampling of a prompt; what it leaves open is as the settings have it.

        Raises:
            ConfigError: If there is no such scheduler.
        """
        if prompt.scheduler:
            require_choice("--ss of a sample prompt", prompt.scheduler, tuple(SCHEDULERS))
        seed = config.seed if prompt.seed is None else prompt.seed
        guidance = prompt.guidance_scale
        settings = SamplingSettings(
            steps=prompt.steps or config.validation_inference_steps,
            guidance_scale=config.validation_guidance_scale if guidance is None else guidance,
            scheduler=prompt.scheduler,
            width=prompt.width or config.resolution,
            height=prompt.height or config.resolution,
            negative_prompt=prompt.negative,
        )
        return cls(prompt.text, range(seed, seed + config.num_validation_images), settings)


def check_prompts(config: TrainConfig) -> None:
    """Refuse sample prompts that could not be sampled, before a model is loaded.

    Raises:
        ConfigError: With what is wrong.
    """
    for prompt in config.prompts:
        Sampled.of(prompt, config)


def _of_one_size(images: Sequence[Image.Image]) -> list[Image.Image]:
    """Return the images of the same size as the first."""
    return [image for image in images if image.size == images[0].size]


class SampleWriter:
    """Samples a session's model, with the adapters that are on it, into ``samples/NAME.png``.

    A signal ends sampling; what is left of it is left out.

    Attributes:
        files: Sheets of the result by name, ``base`` for example.
    """

    def __init__(
        self,
        session: Session,
        output_dir: Path,
        trackers: Trackers,
        on_event: OnEvent,
        stop: StopRequest,
    ) -> None:
        self.files: dict[str, Path] = {}
        self._session, self._output_dir = session, output_dir
        self._trackers, self._on_event, self._stop = trackers, on_event, stop
        config = session.config
        self._with = "fine-tuned" if config.is_full else "with the adapter"
        self._prompts = [Sampled.of(prompt, config) for prompt in config.prompts]
        self._lines = config.validation_prompt or [prompt.text for prompt in self._prompts]
        self._rules = prompt_rules(config)

    def at_step(self, step: int) -> list[tuple[str, Image.Image]]:
        """Write ``step-STEP.png``; a full disk is a warning. Returns prompts and their images."""
        title, images = f"Step {step} of {self._session.total_steps}, {self._with}", []
        with warning_of_full_disk(f"no samples at step {step}"), suppress(_SamplingStopped):
            images = self._images()
            self._save_sheet(f"step-{step:06d}", images, title, step)
        prompts = [prompt.text for prompt in self._prompts for _ in prompt.seeds]
        return list(zip(prompts, images, strict=False))

    def of_result(self, step: int, on_adapted: Callable[[Image.Image], object]) -> None:
        """Write ``adapted.png``, ``base.png`` (without the adapter), and one above the other.

        ``on_adapted`` gets the images of the adapter as a grid without labels, once they are there.
        """
        with suppress(_SamplingStopped):
            images = self._images()
            title = f"After {step} steps, {self._with}"
            adapted = self._save_sheet("adapted", images, title, step)
            on_adapted(image_grid(_of_one_size(images), self._session.config.num_validation_images))
            with self._session.weights.base_weights():
                images = self._images()
            base = self._save_sheet("base", images, "The base model", step, adapter=False)
            text = self._parameters(images, step, adapter=True)
            self._save("base_above_adapted", stacked([base, adapted]), text)

    def _images(self) -> list[Image.Image]:
        """Sample all images, prompt by prompt."""
        images: list[Image.Image] = []
        config = self._session.config
        before = last = 0  # denoising steps of the prompts before, and of the last one
        for row, prompt in enumerate(self._prompts):
            before, last = before + last, 0

            def report(done: int, total: int, before: int = before, row: int = row) -> None:
                nonlocal last
                if self._is_stopped():
                    raise _SamplingStopped
                last, left = total, len(self._prompts) - row
                self._on_event(SamplingProgress(before + done, before + left * total))

            # Without gradients and at another batch size, each block would be compiled again.
            with uncompiled() if config.compile else nullcontext():
                images += generate_images(
                    self._session.components,
                    [self._rules.draw_prompt(prompt.text, seed) for seed in prompt.seeds]
                    if self._rules.wildcards
                    else prompt.text,
                    prompt.seeds,
                    prompt.settings,
                    batch_size=config.sample_batch_size,
                    on_step=report,
                )
        return images

    def _is_stopped(self) -> bool:
        """Return whether a signal has come; to any process, where all of them sample one model."""
        accelerator = self._session.accelerator
        asked = self._stop.requested
        return set_by_any(accelerator, asked) if shards_model(accelerator) else asked

    def _save_sheet(
        self,
        name: str,
        images: Sequence[Image.Image],
        title: str,
        step: int,
        *,
        adapter: bool = True,
    ) -> Image.Image:
        columns, lines = [f"seed {seed}" for seed in self._prompts[0].seeds], self._lines
        seeds = [prompt.seeds for prompt in self._prompts]
        if len(set(seeds)) > 1 or len(_of_one_size(images)) < len(images):
            columns = [""] * len(columns)  # None is of one seed, or none is straight.
            rows = zip(lines, seeds, strict=True)
            lines = [f"{line} (from seed {own[0]})" for line, own in rows]
        sheet = labelled_sheet(images, title, lines, columns)
        self._save(name, sheet, self._parameters(images, step, adapter=adapter))
        tag = "samples/adapter" if adapter else "samples/base"
        self._trackers.log_images(tag, [sheet], step)
        for row in range(len(lines) if len(lines) > 1 else 0):
            shown = images[row * len(columns) : (row + 1) * len(columns)]
            self._trackers.log_images(f"{tag}/{row + 1}", shown, step)
        return sheet

    def _parameters(self, images: Sequence[Image.Image], step: int, *, adapter: bool) -> str:
        """Return the parameters of a sheet: `parameters_text` of the first image, and the rest."""
        first, size, last = self._prompts[0], images[0].size, images[-1].size
        extra = {
            **self._session.components.clip_skip_parameter,
            "Seeds": ", ".join(str(seed) for seed in first.seeds),
            "Prompts": json.dumps(self._lines, ensure_ascii=False),
            "Training step": step,
        }
        if last != size:
            extra["Last size"] = f"{last[0]}x{last[1]}"
        return parameters_text(
            self._rules.draw_prompt(first.text, first.seeds[0]),
            first.seeds[0],
            first.settings,
            size,
            self._session.config.pretrained_model_name_or_path,
            str(self._output_dir) if adapter else None,
            extra=extra,
        )

    def _save(self, name: str, image: Image.Image, parameters: str) -> None:
        if not self._session.accelerator.is_main_process:
            return
        path = save_png(image, self._output_dir / "samples" / f"{name}.png", parameters)
        if not name.startswith("step-"):
            self.files[name] = path
        self._on_event(SampleSaved(name, path))
