"""Groups of the settings of requested images, each with its part in sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dora_diffusion.cli.settings import adapter_and_strengths
from dora_diffusion.config.command import CommandSettings
from dora_diffusion.config.fields import Need, flag
from dora_diffusion.config.prompts import DENOISE
from dora_diffusion.config.run import SampleSettings

if TYPE_CHECKING:
    from PIL.Image import Image

    from dora_diffusion.numerics.weights import Strengths
    from dora_diffusion.sampling.stack import AdapterUse


@dataclass(frozen=True, kw_only=True)
class Adapters(CommandSettings):
    """Adapters that act on all images, or on each image its own."""

    adapter: list[str] | None = flag(
        None,
        "Adapter files, or output folders of runs; FILE:0.5 gives one its own strength, and "
        "FILE:0.5:0.8 one for the text encoders and one for the UNet. May be repeated.",
        repeated=True,
    )
    adapters_file: str | None = flag(
        None,
        "Many adapters at once: a YAML list with an entry for each image, a file, or adapter, "
        "prompt, seed and strength. Images of a batch share the product with the base's weights.",
    )

    def uses(self, strengths: Strengths) -> list[AdapterUse]:
        """Return the adapters that are on for all images.

        Args:
            strengths: Strengths that all adapters have, with their own.

        Raises:
            ValueError: If a strength is out of range.
        """
        from dora_diffusion.numerics.weights import MergeStrengths
        from dora_diffusion.sampling.stack import AdapterUse

        adapters = []
        for word in self.adapter or []:
            path, text_encoder, unet = adapter_and_strengths(word)
            shares = {"text_encoder_strength": text_encoder, "unet_strength": unet}
            adapters.append(AdapterUse(path, MergeStrengths(**vars(strengths), **shares)))
        return adapters


@dataclass(frozen=True, kw_only=True)
class Prompts(CommandSettings):
    """The prompt."""

    prompt: str | None = flag(
        None, "Prompt; required, unless each entry of --adapters_file has one."
    )


@dataclass(frozen=True, kw_only=True)
class GridAxes(CommandSettings):
    """Axes of a grid."""

    grid: list[str] = flag(
        [],
        "Image for each combination of values, as a web page and a sheet: strength=0.5, 0.75, .., "
        "1.25; 'scheduler=ddim, euler'; 'replace=red, blue' in the prompt. An axis is a setting, "
        "size, replace, unet_strength or text_encoder_strength; A=1, 2 & B=3, 4 move together; "
        "SKIP: before a value leaves it out; values that hold commas have || between. Cells that "
        "are there already are kept.",
        metavar="AXIS=VALUES",
        repeated=True,
    )
    grid_limit: int = flag(100, "Most images of a grid.", least=1, needs=(Need("grid"),))


@dataclass(frozen=True, kw_only=True)
class ImageInput(CommandSettings):
    """Image to paint over, or into."""

    image: str | None = flag(
        None, "Image to paint over, or into with a mask, cut to the size from the middle."
    )
    mask_image: str | None = flag(
        None,
        "Image of the same size as --image, white where to paint.",
        flags=("--mask_image", "--mask"),
    )
    denoise: float | None = flag(
        None,
        "Denoising strength (strength in Diffusers): how much of --image is painted over, above 0 "
        f"to 1. Default: {DENOISE}; of an inpainting model all.",
        needs=(Need("image"),),
    )

    def opened(self) -> dict[str, Image]:
        """Return the image and its mask, as `SamplingSettings` takes them.

        Raises:
            ConfigError, OSError: If a file cannot be read.
        """
        from dora_diffusion.data.images import open_photo

        files = {"image": self.image, "mask_image": self.mask_image}
        return {name: open_photo(file) for name, file in files.items() if file is not None}


@dataclass(frozen=True, kw_only=True)
class DenoisingSettings(CommandSettings):
    """Denoising of each image, and its size."""

    steps: int | None = flag(
        None,
        f"Denoising steps. Default: {SampleSettings.validation_inference_steps}, of Z-Image and "
        "FLUX.2-klein 50; of LCM, Turbo and Lightning models and adapters what they are for, as of "
        "guidance and scheduler.",
    )
    guidance_scale: float | None = flag(
        None,
        "Guidance scale (CFG scale); 1 is none. Default: "
        f"{SampleSettings.validation_guidance_scale}, of Z-Image 6, of FLUX.2-klein 4.",
    )
    guidance_rescale: float = flag(
        0.0,
        "Guidance rescale, against overexposed images of models with zero terminal SNR: 0.7 in "
        "arXiv:2305.08891. Default: 0, none.",
    )
    width: int | None = flag(None, "Width in pixels. Default: the model's own.")
    height: int | None = flag(None, "Height in pixels. Default: the model's own.")
