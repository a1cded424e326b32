"""A request for images, as a command line makes it: one, several or a grid of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_diffusion.cli.settings import (
    AdaptedModel,
    Overwrite,
    Sampling,
    adapter_and_strength,
    adapter_and_strengths,
    needs_adapter,
)
from dora_diffusion.config.fields import REQUIRED, Need, flag, require
from dora_diffusion.config.prompts import (
    DENOISE,
    DETAIL_DENOISE,
    DETAIL_PADDING,
    HIRES_DENOISE,
    LEAST_PADDING,
    Style,
    read_styles,
    with_styles,
)
from dora_diffusion.config.run import SampleSettings
from dora_diffusion.config.wording import did_you_mean, listing

if TYPE_CHECKING:
    from typing_extensions import Self

    from dora_diffusion.models.components import Components
    from dora_diffusion.sampling.settings import SamplingSettings
    from dora_diffusion.sampling.stack import AdapterUse


@dataclass(frozen=True, kw_only=True)
class RequestedImages(Overwrite, Sampling, AdaptedModel):
    """Settings of images; the defaults are those of a run's samples.

    So a seed gives the sample's image again.
    """

    adapter: list[str] | None = flag(
        None,
        "Adapter files, or output folders of runs; FILE:0.5 gives one its own strength, and "
        "FILE:0.5:0.8 one for the text encoders and one for the UNet. May be repeated.",
        repeated=True,
    )
    layer_strength: list[str] = flag(
        [],
        "Factors of the strength on layers by patterns of their names, as inspect shows them, such "
        "as unet.up_blocks.*:0.5 text_encoder.*:0. Several that match are multiplied.",
        needs=(needs_adapter,),
    )
    strength_schedule: list[str] = flag(
        [],
        "Factor of the strength over the denoising steps: '0:0.4, 0.5:1' is 0.4, and from half of "
        "them on 1. Prompts are encoded as at 0. One for all adapters, or one for each.",
        needs=(needs_adapter,),
    )
    adapters_file: str | None = flag(
        None,
        "Many adapters at once: a YAML list with an entry for each image, a file, or adapter, "
        "prompt, seed and strength. Images of a batch share the product with the base's weights.",
    )
    adapter_dir: str | None = flag(
        None,
        "Folder of adapters that the prompt may name as in web UIs: <lora:NAME:0.8> applies "
        "NAME.safetensors of it, or of its folder NAME; --repeat looks there first.",
        needs=(lambda config: None if config.repeat else "the prompt names no adapter",),
    )
    prompt: str | None = flag(
        None, "Prompt; required, unless each entry of --adapters_file has one."
    )
    prompt_weights: bool = flag(
        True,
        "Read (word:1.2), (word), [word] and BREAK in prompts, as A1111 does; \\( is a bracket.",
    )
    styles: str | None = flag(
        None,
        "File of styles as A1111 has them (styles.csv: name, prompt, negative_prompt).",
        needs=(Need("style"),),
    )
    style: list[str] = flag(
        [],
        "Styles of that file, in their order: a style's text takes the prompt at its {prompt}, or "
        "follows it after a comma; the negative prompt alike.",
        repeated=True,
    )
    wildcards: bool = flag(
        False, "Draw {a|b} and __file__ of the prompt by each image's seed; \\{ is a brace."
    )
    wildcard_dir: str | None = flag(
        None,
        "Folder of wildcard files: __colours__ is a line of its colours.txt.",
        needs=(Need("wildcards"),),
    )
    output: str = flag(REQUIRED, "Image file: X.png, X.jpg or X.webp; with --grid, a folder.")
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
    repeat: str | None = flag(
        None,
        "Image to repeat (PNG, JPEG, WebP) with the prompt, seed and settings in it, of this "
        "program, A1111 or a plain workflow of ComfyUI. Base and adapters that are not given are "
        "looked up by hash and name: in --adapter_dir, the runs, the image's folder and the "
        "current one. Flags take precedence.",
    )
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
    hires: float | None = flag(
        None,
        "Second pass at sides that are so many times as long, such as 1.5, over the enlarged image "
        "of the first one (Hires. fix). Default: none.",
    )
    hires_denoise: float = flag(
        HIRES_DENOISE, "Denoising strength of the second pass.", needs=(Need("hires"),)
    )
    hires_steps: int | None = flag(
        None,
        "Denoising steps of the second pass, of which that share is done. Default: --steps.",
        needs=(Need("hires"),),
    )
    detail: str | None = flag(
        None,
        "Model that finds a face or subject in each finished image, which is enlarged to the "
        "model's size, painted over and put back: rembg, rembg:MODEL, or a segmentation model "
        "(folder or hub id).",
    )
    detail_label: str | None = flag(
        None,
        "Which of a segmentation model's labels that is, such as face.",
        needs=(Need("detail"),),
    )
    detail_prompt: str | None = flag(
        None, "Prompt of the detail pass. Default: the image's.", needs=(Need("detail"),)
    )
    detail_denoise: float = flag(
        DETAIL_DENOISE,
        "Denoising strength of the detail pass.",
        needs=(Need("detail"),),
        above=0,
        most=1,
    )
    detail_padding: int = flag(
        DETAIL_PADDING,
        "Pixels around what is found that the detail pass sees too.",
        needs=(Need("detail"),),
        least=LEAST_PADDING,
    )
    negative_prompt: str = flag("", "Negative prompt.")
    seed: int | None = flag(None, "Seed of the first image. Default: random, shown.")
    num_images: int = flag(1, "Number of images, one per seed.", least=1, most=10_000)
    batch_size: int = flag(4, "Batch size.", least=1)
    steps: int | None = flag(
        None,
        f"Denoising steps. Default: {SampleSettings.validation_inference_steps}; of LCM, Turbo and "
        "Lightning models and adapters what they are for, as of guidance and scheduler.",
    )
    guidance_scale: float | None = flag(
        None,
        "Guidance scale (CFG scale); 1 is none. Default: "
        f"{SampleSettings.validation_guidance_scale}.",
    )
    guidance_rescale: float = flag(
        0.0,
        "Guidance rescale, against overexposed images of models with zero terminal SNR: 0.7 in "
        "arXiv:2305.08891. Default: 0, none.",
    )
    width: int | None = flag(None, "Width in pixels. Default: the model's own.")
    height: int | None = flag(None, "Height in pixels. Default: the model's own.")
    offload: str = flag(
        "none",
        "Offloading to the machine's memory. model: each part of the model is on the GPU only "
        "while it computes, which takes less of its memory and more time. Default: none.",
        choices=("none", "model"),
    )

    def named_adapters(self) -> Self:
        """The settings with the adapters that the prompt names in place of their tags.

        Of a grid each cell has its own.

        Raises:
            ConfigError: If a style or an adapter is not there.
        """
        if self.adapter_dir is None or self.prompt is None or self.grid:
            return self
        from dora_diffusion.sampling.images import split_tags, unread_options

        prompt, tags = split_tags(self.styled("prompt"))
        if not tags:
            return self
        for name, shares in tags:
            other = unread_options(shares)
            instead = "use --layer_strength" if "lbw" in other else f"write <lora:{name}:0.8>"
            require(
                not other,
                f"{other} of <lora:{name}{shares}> has no meaning here; {instead}",
                "prompt",
            )
        negative = self.styled("negative_prompt")
        words = [f"{adapter_named(self.adapter_dir, name)}{shares}" for name, shares in tags]
        return replace(
            self, prompt=prompt, negative_prompt=negative, styles=None, style=[], adapter_dir=None,
            adapter=[*(self.adapter or []), *words],
        )  # fmt: skip

    @cached_property
    def chosen_styles(self) -> list[Style]:
        """The styles that are asked for.

        Raises:
            ConfigError: If there is no such file or style.
        """
        require(
            not self.style or self.styles is not None,
            "style is given without a file of styles; give A1111's styles.csv with --styles",
            "styles",
        )
        return read_styles(self.styles, self.style) if self.styles and self.style else []

    def styled(self, name: str) -> str:
        """The prompt, or the negative one, with the styles.

        Raises:
            ConfigError: If a style is not there, or the text is too long.
        """
        texts = [getattr(style, name) for style in self.chosen_styles]
        return with_styles(getattr(self, name) or "", texts)

    def without_effect(self) -> dict[str, str]:
        """Settings that have no effect, and why; of a grid those that have none in any cell.

        Raises:
            ConfigError: If the grid cannot be.
        """
        if not self.grid:
            return super().without_effect()
        from dora_diffusion.cli.axes import plan_grid

        cells, known = plan_grid(self).cells.values(), {s.name: s for s in self.settings()}
        reasons = {n: why for cell in cells for n, why in cell.without_effect().items()}
        is_idle = {n: all(known[n].inactive_reason(cell) for cell in cells) for n in reasons}
        return {name: reason for name, reason in reasons.items() if is_idle[name]}

    @property
    def reading(self) -> dict[str, int | None]:
        """Clip skip and token length by which prompts are read, where they are given."""
        return {"clip_skip": self.clip_skip, "max_token_length": self.max_token_length}

    def distilled(
        self, settings: SamplingSettings, components: Components, uses: Sequence[AdapterUse]
    ) -> tuple[SamplingSettings, str]:
        """The settings, those that are not given as a distilled model or adapter needs them.

        Returns:
            The settings, and a line that says so; empty where nothing was chosen.
        """
        from dora_diffusion.sampling.images import adapter_name
        from dora_diffusion.sampling.load import few_steps

        found = few_steps(components, [adapter_name(use.path) for use in uses])
        if found is None:
            return settings, ""
        name, few = found
        names = ("steps", "guidance_scale", "scheduler")
        chosen = {n: getattr(few, n) for n in names if getattr(self, n) is None and getattr(few, n)}
        if not chosen:
            return settings, ""
        values = ", ".join(f"{setting} {value}" for setting, value in chosen.items())
        flags = ", ".join(f"--{setting}" for setting in chosen)
        line = f"{name} is for few steps ({few.kind}): {values}; {flags} take precedence"
        return replace(settings, **chosen), line

    def uses(self) -> list[AdapterUse]:
        """The adapters that are on for all images, with their strengths.

        Raises:
            ConfigError, ValueError: If a strength or schedule cannot be.
        """
        from dora_diffusion.numerics.weights import MergeStrengths
        from dora_diffusion.sampling.stack import uses_of

        adapters = []
        for word in self.adapter or []:
            path, text_encoder, unet = adapter_and_strengths(word)
            shares = {"text_encoder_strength": text_encoder, "unet_strength": unet}
            adapters.append((path, MergeStrengths(**vars(self.strengths), **shares)))
        layers = dict(adapter_and_strength(word) for word in self.layer_strength)
        return uses_of(adapters, layers, self.strength_schedule)

    @cached_property
    def sampling(self) -> SamplingSettings:
        """The settings of sampling: images and the model of a detail pass are opened.

        Raises:
            ConfigError, ValueError, OSError: If a value cannot work, or a file cannot be read.
        """
        from dora_diffusion.data.images import open_photo
        from dora_diffusion.sampling.detail import Detail
        from dora_diffusion.sampling.settings import SamplingSettings
        from dora_diffusion.sampling.stack import name_of

        names = [field.name for field in fields(SamplingSettings)]
        given: dict[str, Any] = {name: getattr(self, name, None) for name in names}
        given = {name: value for name, value in given.items() if value is not None}
        given |= {n: open_photo(given[n]) for n in ("image", "mask_image") if n in given}
        if self.detail:
            given["detail"] = Detail.open(
                self.detail, self.detail_label or "", denoise=self.detail_denoise,
                padding=self.detail_padding, prompt=self.detail_prompt or "",
            )  # fmt: skip
        given["negative_prompt"] = self.styled("negative_prompt")
        schedules = {name_of(n): use.schedule for n, use in enumerate(self.uses()) if use.schedule}
        return SamplingSettings(**given, strength_schedules=schedules)


def adapter_folder(folder: str) -> Path:
    """The folder of adapters that prompts name.

    Raises:
        ConfigError: If it is none.
    """
    path = Path(folder).expanduser()
    require(
        path.is_dir(), f"adapter_dir {folder} is not a folder; give one of adapters", "adapter_dir"
    )
    return path


def adapter_named(folder: str, name: str) -> str:
    """The file of an adapter of a folder, by its name in texts.

    Raises:
        ConfigError: If there is none.
    """
    from dora_diffusion.formats.files.runs import adapter_files
    from dora_diffusion.sampling.images import adapter_name, tag_name

    # What is directly there comes first, and counts.
    files = reversed(adapter_files(adapter_folder(folder)))
    known = {tag_name(adapter_name(file)): str(file) for file in files}
    require(
        name in known,
        f"adapter_dir {folder} has no adapter {name!r}{did_you_mean(name, known)}; there are "
        f"{listing(known, 8) or 'none'}",
        "adapter_dir",
    )
    return known[name]
