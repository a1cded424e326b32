"""Sample images at fixed seeds, saved as labelled sheets: a row per prompt, a column per seed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from PIL import Image

from dora_diffusion.adapters.compiled import uncompiled
from dora_diffusion.config.derived import framed_prompt
from dora_diffusion.generate import SamplingSettings, generate_images, image_grid
from dora_diffusion.images import parameters_text, save_png
from dora_diffusion.training.events import OnEvent, SampleSaved, SamplingProgress
from dora_diffusion.training.session import Session
from dora_diffusion.training.sheets import labelled_sheet, stacked
from dora_diffusion.training.stop import StopRequest
from dora_diffusion.training.subject import caption_rules
from dora_diffusion.training.trackers import Trackers


class _SamplingStopped(Exception):
    """A signal came while sample images were made."""


@contextmanager
def warning_of_full_disk(what: str) -> Iterator[None]:
    """Turn a disk that refuses into a warning: what it refuses is not worth the run."""
    try:
        yield
    except OSError as error:
        warnings.warn(f"{what}: {error.strerror or error}", stacklevel=3)


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
        subject = session.subjects[0].settings
        usual = [framed_prompt(subject)] if subject.instance_prompt else session.dataset.captions
        self._prompts = config.validation_prompt or usual[:1]
        self._rules = caption_rules(subject)
        self._seeds = range(config.seed, config.seed + config.num_validation_images)
        self._settings = SamplingSettings(
            steps=config.validation_inference_steps,
            guidance_scale=config.validation_guidance_scale,
            width=session.resolution,
            height=session.resolution,
        )

    def at_step(self, step: int) -> list[tuple[str, Image.Image]]:
        """Write ``step-STEP.png``; a full disk is a warning. Returns prompts and their images."""
        title, images = f"Step {step} of {self._session.total_steps}, {self._with}", []
        with warning_of_full_disk(f"no samples at step {step}"), suppress(_SamplingStopped):
            images = self._images()
            self._save_sheet(f"step-{step:06d}", images, title, step)
        prompts = [prompt for prompt in self._prompts for _ in self._seeds]
        return list(zip(prompts, images, strict=False))

    def of_result(self, step: int, on_adapted: Callable[[Image.Image], object]) -> None:
        """Write ``adapted.png``, ``base.png`` (without the adapter), and one above the other.

        ``on_adapted`` gets the images of the adapter as a grid without labels, once they are there.
        """
        with suppress(_SamplingStopped):
            images = self._images()
            title = f"After {step} steps, {self._with}"
            adapted = self._save_sheet("adapted", images, title, step)
            on_adapted(image_grid(images, columns=len(self._seeds)))
            with self._session.weights.base_weights():
                images = self._images()
            base = self._save_sheet("base", images, "The base model", step, adapter=False)
            text = self._parameters(images[0].size, step, adapter=True)
            self._save("base_above_adapted", stacked([base, adapted]), text)

    def _images(self) -> list[Image.Image]:
        """Sample all images, prompt by prompt."""
        images: list[Image.Image] = []
        config = self._session.config
        for row, prompt in enumerate(self._prompts):

            def report(done: int, total: int, row: int = row) -> None:
                if self._stop.requested:
                    raise _SamplingStopped
                self._on_event(SamplingProgress(row * total + done, len(self._prompts) * total))

            # Without gradients and at another batch size, each block would be compiled again.
            with uncompiled() if config.compile else nullcontext():
                images += generate_images(
                    self._session.components,
                    [self._rules.draw_prompt(prompt, seed) for seed in self._seeds]
                    if config.wildcards
                    else prompt,
                    self._seeds,
                    self._settings,
                    batch_size=config.sample_batch_size,
                    on_step=report,
                )
        return images

    def _save_sheet(
        self,
        name: str,
        images: Sequence[Image.Image],
        title: str,
        step: int,
        *,
        adapter: bool = True,
    ) -> Image.Image:
        sheet = labelled_sheet(images, title, self._prompts, [f"seed {s}" for s in self._seeds])
        self._save(name, sheet, self._parameters(images[0].size, step, adapter=adapter))
        self._trackers.log_image("samples/adapter" if adapter else "samples/base", sheet, step)
        return sheet

    def _parameters(self, size: tuple[int, int], step: int, *, adapter: bool) -> str:
        """What made a sheet, as `parameters_text` writes it of the first image, and the rest."""
        extra = {
            **self._session.components.clip_skip_parameter,
            "Seeds": ", ".join(str(seed) for seed in self._seeds),
            "Prompts": json.dumps(self._prompts, ensure_ascii=False),
            "Training step": step,
        }
        return parameters_text(
            self._rules.draw_prompt(self._prompts[0], self._seeds[0]),
            self._seeds[0],
            self._settings,
            size,
            self._session.config.pretrained_model_name_or_path,
            str(self._output_dir) if adapter else None,
            extra=extra,
        )

    def _save(self, name: str, image: Image.Image, parameters: str) -> None:
        path = save_png(image, self._output_dir / "samples" / f"{name}.png", parameters)
        if not name.startswith("step-"):
            self.files[name] = path
        self._on_event(SampleSaved(name, path))
