"""Images as a command line asks for them: one, several or a grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import PurePath
from typing import TYPE_CHECKING

from dora_diffusion.cli.settings import AdaptedModel, adapter_and_strengths
from dora_diffusion.config.command import CommandSettings, group
from dora_diffusion.config.fields import REQUIRED, Need, flag
from dora_diffusion.config.images import ImageRequest
from dora_diffusion.config.wording import listing

if TYPE_CHECKING:
    from dora_diffusion.models.components import Components
    from dora_diffusion.sampling.settings import SamplingSettings
    from dora_diffusion.sampling.stack import AdapterUse


@dataclass(frozen=True, kw_only=True)
class RequestedImages(CommandSettings, ImageRequest):
    """An `ImageRequest` with its model and files, of one image or several."""

    model: AdaptedModel = group(AdaptedModel)
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
    num_images: int = flag(1, "Number of images, one per seed.", least=1, most=10_000)
    batch_size: int = flag(4, "Batch size.", least=1)
    output: str = flag(REQUIRED, "Image file: X.png, X.jpg or X.webp; with --grid, a folder.")
    overwrite: bool = flag(False, "Replace an output that exists.")
    grid: list[str] = flag(
        [],
        "Image for each combination of values, as a web page and a sheet: strength=0.5, 0.75, .., "
        "1.25; 'scheduler=ddim, euler'; 'replace=red, blue' in the prompt. An axis is a setting, "
        "size, replace, unet_strength or text_encoder_strength; values that hold commas have || "
        "between. Cells that are there already are kept.",
        metavar="AXIS=VALUES",
        repeated=True,
    )
    grid_limit: int = flag(100, "Most images of a grid.", least=1, needs=(Need("grid"),))
    repeat: str | None = flag(
        None,
        "Image to repeat (PNG, JPEG, WebP) with the prompt, seed and settings in it, of this "
        "program or A1111. Give its base with --base and its adapters with --adapter, unless its "
        "text names them by a path or hub id. Flags take precedence.",
    )
    offload: str = flag(
        "none",
        "Offloading to the machine's memory. model: each part of the model is on the GPU only "
        "while it computes, which takes less of its memory and more time. Default: none.",
        choices=("none", "model"),
    )

    def without_effect(self) -> dict[str, str]:
        """Settings that have no effect (for a grid: in no cell), and why.

        Raises:
            ConfigError: If the grid cannot be.
        """
        if not self.grid:
            return super().without_effect()
        from dora_diffusion.cli.axes import plan_grid

        cells, known = plan_grid(self).cells.values(), {s.name: s for s in self.settings()}
        reasons = {n: why for cell in cells for n, why in cell.without_effect().items()}
        flat = [cell.flat for cell in cells]
        is_idle = {n: all(map(known[n].inactive_reason, flat)) for n in reasons}
        return {name: reason for name, reason in reasons.items() if is_idle[name]}

    def for_few_steps(
        self, settings: SamplingSettings, components: Components, uses: Sequence[AdapterUse]
    ) -> tuple[SamplingSettings, str]:
        """Replace settings that are not given by the values of a distilled model or adapter.

        Without one, the defaults of the model's family are used.

        Returns:
            The settings, and a line that reports the values of a distilled model or adapter; else
            empty.
        """
        from dora_diffusion.formats.adapter.stored import read_metadata
        from dora_diffusion.sampling.images import adapter_name
        from dora_diffusion.sampling.load import few_steps, sampling_defaults

        distilled = few_steps(components, [adapter_name(use.path) for use in uses])
        stated = {
            "steps": self.steps, "guidance_scale": self.guidance_scale,
            "scheduler": self.scheduler,
        }  # fmt: skip
        if distilled is None:
            defaults = sampling_defaults(components)
            return replace(settings, **{n: v for n, v in defaults.items() if stated[n] is None}), ""
        name, few = distilled
        chosen = {n: getattr(few, n) for n, v in stated.items() if v is None and getattr(few, n)}
        if not chosen:
            return settings, ""
        values = ", ".join(f"{setting} {value}" for setting, value in chosen.items())
        flags = ", ".join(f"--{setting}" for setting in chosen)
        line = f"{name} is for few steps ({few.kind}): {values}; {flags} take precedence"
        model = PurePath(name).name
        trained = {PurePath(read_metadata(use.path).base_model).name for use in uses} - {"", model}
        if name == components.name and trained:
            line += f"; trained on {listing(sorted(trained))}, used on {model}, as people do"
        return replace(settings, **chosen), line

    def uses(self) -> list[AdapterUse]:
        """The adapters that are on for all images, with their strengths.

        Raises:
            ValueError: If a strength is out of range.
        """
        from dora_diffusion.numerics.weights import MergeStrengths
        from dora_diffusion.sampling.stack import AdapterUse

        adapters = []
        for word in self.adapter or []:
            path, text_encoder, unet = adapter_and_strengths(word)
            shares = {"text_encoder_strength": text_encoder, "unet_strength": unet}
            strengths = MergeStrengths(**vars(self.model.strengths), **shares)
            adapters.append(AdapterUse(path, strengths))
        return adapters

    @cached_property
    def sampling(self) -> SamplingSettings:
        """The settings of sampling: its images are opened.

        Raises:
            ConfigError, ValueError, OSError: If a value cannot work, or a file cannot be read.
        """
        from dora_diffusion.models.locate import known_family, model_info
        from dora_diffusion.sampling.settings import SamplingSettings

        settings = SamplingSettings.of(self)
        self.uses()  # Raise errors about strengths too, before a model is loaded.
        if (family := known_family(self.model.base_model)) is not None:
            settings.check_sides(model_info(str(self.model.base)).size_step, family.title)
        return settings
