"""Fixed-seed sample images, as labelled sheets: one row per prompt, one column per seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from dora_diffusion.config import TrainConfig
from dora_diffusion.generate import SamplingSettings, generate_images
from dora_diffusion.images import parameters_text
from dora_diffusion.models.components import Components
from dora_diffusion.training.sheets import labelled_sheet

OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Validation:
    """What is sampled.

    Attributes:
        prompts: One row each.
        seeds: One column each.
        settings: Steps, guidance and size.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: SamplingSettings

    @classmethod
    def from_config(cls, config: TrainConfig, resolution: int) -> Validation:
        """The configured prompts; the instance prompt where there are none."""
        prompts = config.validation_prompt or [config.instance_prompt or ""]
        seeds = range(config.seed, config.seed + config.num_validation_images)
        settings = SamplingSettings(
            steps=config.validation_inference_steps,
            guidance_scale=config.validation_guidance_scale,
            width=resolution,
            height=resolution,
        )
        return cls(tuple(prompts), tuple(seeds), settings)

    def images(self, components: Components, on_step: OnStep | None = None) -> list[Image.Image]:
        """Sample all images, prompt by prompt, with whatever adapters are on.

        Args:
            components: The model.
            on_step: Called with (denoising steps done, denoising steps in all).
        """
        images: list[Image.Image] = []
        for row, prompt in enumerate(self.prompts):
            report = None if on_step is None else self._in_row(row, on_step)
            images += generate_images(components, prompt, self.seeds, self.settings, on_step=report)
        return images

    def _in_row(self, row: int, on_step: OnStep) -> OnStep:
        return lambda done, total: on_step(row * total + done, len(self.prompts) * total)

    def sheet(self, images: Sequence[Image.Image], title: str) -> Image.Image:
        """The images under their prompts and seeds."""
        return labelled_sheet(images, title, self.prompts, [f"seed {seed}" for seed in self.seeds])

    def parameters(self, size: tuple[int, int], model: str, adapter: str | None, step: int) -> str:
        """What made a sheet, as `parameters_text` writes it of the first image, and the rest.

        Args:
            size: Width and height of one image.
            model: Name of the base model.
            adapter: The run's folder; None where the adapter is off.
            step: Optimizer steps done.
        """
        extra = {
            "Seeds": ", ".join(str(seed) for seed in self.seeds),
            "Prompts": json.dumps(self.prompts, ensure_ascii=False),
            "Training step": step,
        }
        return parameters_text(
            self.prompts[0], self.seeds[0], self.settings, size, model, adapter, extra=extra
        )
