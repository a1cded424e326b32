"""Fixed-seed sample pictures, as grids: one row per prompt, one column per seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from dora_diffusion.config import TrainConfig
from dora_diffusion.generate import SamplingSettings, generate_images, image_grid
from dora_diffusion.models.components import Components


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

    def grid(self, components: Components) -> Image.Image:
        """Sample all pictures with whatever adapters are on."""
        pictures: list[Image.Image] = []
        for prompt in self.prompts:
            pictures += generate_images(components, prompt, self.seeds, self.settings)
        return image_grid(pictures, columns=len(self.seeds))


def side_by_side(rows: Sequence[Image.Image]) -> Image.Image:
    """Grids above each other."""
    return image_grid(list(rows), columns=1)
