"""A request for images, as a command line makes it: one, several or a grid of them."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dora_diffusion.cli.settings import (
    AdaptedModel,
    Overwrite,
    Sampling,
    adapter_and_strength,
    adapter_and_strengths,
    needs_adapter,
)
from dora_diffusion.config import ConfigError
from dora_diffusion.config.fields import REQUIRED, TOKENS_PER_CHUNK, Need, flag, require
from dora_diffusion.config.file import read_config_file, read_yaml
from dora_diffusion.config.prompts import DENOISE, Style, read_styles, with_styles
from dora_diffusion.config.run import SampleSettings
from dora_diffusion.config.wording import did_you_mean, listing, quoted
from dora_diffusion.formats.files.atomic import require_writable

if TYPE_CHECKING:
    from PIL.Image import Image
    from typing_extensions import Self

    from dora_diffusion.formats.adapter.metadata import AdapterMetadata
    from dora_diffusion.models.components import Components
    from dora_diffusion.sampling.generate import SamplingSettings
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
        "NAME.safetensors of it, or of its folder NAME; --repeat finds an image's adapters there.",
        needs=(lambda config: "the prompt names no adapter",),
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
        "program, A1111 or a plain workflow of ComfyUI. Flags take precedence.",
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
        0.5, "Denoising strength of the second pass.", needs=(Need("hires"),)
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
        0.4, "Denoising strength of the detail pass.", needs=(Need("detail"),), above=0, most=1
    )
    detail_padding: int = flag(
        32,
        "Pixels around what is found that the detail pass sees too.",
        needs=(Need("detail"),),
        least=16,
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

    @classmethod
    def read(cls, given: Mapping[str, Any], file: str | None = None) -> Self:
        """Make them of what a command line gives, over a YAML file, over an image to repeat.

        Raises:
            ConfigError, PhotoError: If one of these cannot be read, a value is not valid, or the
                image was made with adapters and they are not given.
        """
        values = {**(read_config_file(file) if file else {}), **given}
        image = values.get("repeat")
        if not image:
            return super().read(given, file).named_adapters()
        found, strengths = repeated_settings(str(image))
        found = {name: value for name, value in found.items() if name not in values}
        model = str(found.get("detail", ""))
        require(
            not model or model.startswith("rembg") or "/" in model or Path(model).is_dir(),
            f"{Path(str(image)).name} was made with the detail model {model}; give its folder with "
            "--detail",
        )
        words = values.get("adapter") or []
        words = [words] if isinstance(words, str) else words
        if strengths and not words and values.get("adapter_dir"):
            words = [_named(values["adapter_dir"], name) for name in strengths]
            given = {**given, "adapter_dir": None}
        require(
            len(words) >= len(strengths),
            f"{Path(str(image)).name} was made with the adapter{'s' * (len(strengths) > 1)} "
            f"{', '.join(strengths)}; give each one's file with --adapter",
        )
        if strengths:
            given = {**given, "adapter": _with_strengths(words, strengths)}
        return super().read({**found, **given}, file).named_adapters()

    def named_adapters(self) -> Self:
        """The settings with the adapters that the prompt names in place of their tags.

        Of a grid each cell has its own.

        Raises:
            ConfigError: If a style or an adapter is not there.
        """
        if self.adapter_dir is None or self.prompt is None or self.grid:
            return self
        from dora_diffusion.sampling.images import split_tags

        styles = self.chosen_styles
        prompt, tags = split_tags(with_styles(self.prompt, [style.prompt for style in styles]))
        if not tags:
            return self
        negative = with_styles(self.negative_prompt, [style.negative_prompt for style in styles])
        words = [f"{_named(self.adapter_dir, name)}{shares}" for name, shares in tags]
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
        )
        return read_styles(self.styles, self.style) if self.styles and self.style else []

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

    def load_repeated(
        self, uses: Sequence[AdapterUse], repeated: Repeated
    ) -> tuple[Components, AdapterMetadata]:
        """Load the model, which reads prompts as the image to repeat has it.

        Raises:
            ConfigError: If it is an inpainting model, and there is nothing to paint into.
        """
        components, metadata = self.load(uses, offload=self.offload)
        components = repeated.reading(components, self)
        lacking = [
            name for name in components.family.image_arguments if getattr(self, name) is None
        ]
        require(
            not lacking,
            f"{self.base} is an inpainting model: give --image, and --mask_image of the same size, "
            "white where to paint (all white to paint the whole image)",
        )
        return components, metadata

    def write_image(
        self,
        image: Image,
        row: Row,
        settings: SamplingSettings,
        size: tuple[int, int],
        uses: Sequence[AdapterUse],
        extra: Mapping[str, object],
    ) -> str:
        """Write an image with what made it, which is returned."""
        from dora_diffusion.sampling.images import UsedAdapter, parameters_text, save_image

        used = [UsedAdapter.of(use.path, use.strengths) for use in uses]
        text = parameters_text(row.prompt, row.seed, settings, size, self.base, used, extra=extra)
        save_image(image, row.path, text)
        return text

    def distilled(
        self, settings: SamplingSettings, components: Components, uses: Sequence[AdapterUse]
    ) -> tuple[SamplingSettings, str]:
        """The settings, those that are not given as a distilled model or adapter needs them.

        Returns:
            The settings, and a line that says so; empty where nothing was chosen.
        """
        from dora_diffusion.sampling.generate import few_steps
        from dora_diffusion.sampling.images import adapter_name

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
        from dora_diffusion.sampling.stack import AdapterUse, parse_schedule

        words, factors = self.adapter or [], [adapter_and_strength(w) for w in self.layer_strength]
        schedules = [parse_schedule(text) for text in self.strength_schedule] or [()]
        require(
            len(schedules) in (1, len(words)),
            f"strength_schedule has {len(schedules)} values, for {len(words)} adapters; give one, "
            "or one for each",
        )
        uses = []
        for number, word in enumerate(words):
            path, text_encoder, unet = adapter_and_strengths(word)
            shares = {"text_encoder_strength": text_encoder, "unet_strength": unet}
            strengths = MergeStrengths(**vars(self.strengths), **shares)
            schedule = schedules[min(number, len(schedules) - 1)]
            uses.append(AdapterUse(path, strengths, dict(factors), schedule))
        return uses

    def facts(
        self, number: int, count: int, components: Components, repeated: Repeated
    ) -> dict[str, object]:
        """Return the fields of an image's text besides those of `SamplingSettings`."""
        from dora_diffusion.sampling import images

        start = number - number % self.batch_size
        size, place = min(self.batch_size, count - start), number - start
        if repeated.batch > 1:
            size, place = repeated.batch, repeated.position
        facts = images.model_fields(
            components, self.uses(), 1 if self.adapters_file else size, place
        )
        loaded = {s.name: getattr(self, s.name) for s in self.settings() if s.name in _LOADED}
        usual = {s.name: s.default for s in self.settings()}
        moved = {name: value for name, value in loaded.items() if value != usual[name]}
        return facts | ({images.LOADED: json.dumps(moved)} if moved else {})


# Settings of a base that change the numbers, beside its name.
_LOADED = (
    "variant", "revision", "dtype", "compile", "quantize", "quantize_convolutions", "vae_tile_size",
    "prediction_type", "zero_terminal_snr", "alpha",
)  # fmt: skip
_MOST_REPEATED = 64


def repeated_settings(file: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings that an image's text gives, and the strength of each adapter by its name.

    Raises:
        PhotoError: If the file says nothing of how it was made.

    Warns:
        UserWarning: Of what has no meaning here.
    """
    from dora_diffusion.sampling.images import LOADED, OWN_VERSION, read_fields, settings_of

    fields = read_fields(file)
    values, unread = settings_of(fields)
    skip, is_own = values.pop("clip_skip", None), fields.get("Version", "").startswith(OWN_VERSION)
    if skip is None and is_own:
        values["clip_skip"] = 0
    # Web UIs read all of a prompt.
    values.setdefault("max_token_length", TOKENS_PER_CHUNK if is_own else 0)
    with contextlib.suppress(ValueError, AttributeError, RecursionError):
        loaded = json.loads(fields.get(LOADED, "{}"))
        values |= {name: value for name, value in loaded.items() if name in _LOADED}
    if unread:
        warnings.warn(
            f"of {Path(file).name}, this has no meaning here: {'; '.join(unread)}", stacklevel=2
        )
    return values, _strengths_of(fields)


def _named(folder: str, name: str) -> str:
    """The file of an adapter of a folder, by its name in texts.

    Raises:
        ConfigError: If there is none.
    """
    from dora_diffusion.sampling.images import adapter_name, tag_name

    place = Path(folder).expanduser()
    require(place.is_dir(), f"adapter_dir {folder} is not a folder; give one of adapters")
    # What is directly there comes last, and counts.
    files = [*sorted(place.glob("*/*.safetensors")), *sorted(place.glob("*.safetensors"))]
    known = {tag_name(adapter_name(file)): str(file) for file in files}
    require(
        name in known,
        f"adapter_dir {folder} has no adapter {name!r}{did_you_mean(name, known)}; there are "
        f"{listing(known, 8) or 'none'}",
    )
    return known[name]


def _strengths_of(fields: Mapping[str, str]) -> dict[str, str]:
    names, strengths = (fields.get(key, "") for key in ("Adapter", "Adapter strength"))
    return dict(zip(names.split(", "), strengths.split(", "), strict=True)) if names else {}


def _with_strengths(words: Sequence[str], strengths: Mapping[str, str]) -> list[str]:
    """Adapters with the strengths of an image's by their names, where they have none themselves."""
    from dora_diffusion.sampling.images import UsedAdapter

    completed = []
    for word in words:
        path, *_ = adapter_and_strengths(word)
        strength = strengths.get(UsedAdapter.of(path).tag_name)
        if len(words) == len(strengths) == 1:
            (strength,) = strengths.values()
        completed.append(word if strength is None or path != word else f"{word}:{strength}")
    return completed


@dataclass(frozen=True)
class Repeated:
    """Facts of an image to repeat that no setting holds.

    Attributes:
        fields: Its text; empty where none is to be repeated.
        batch: Images of the batch that it is repeated in.
        position: Its place there.
    """

    fields: Mapping[str, str]
    batch: int = 1
    position: int = 0

    @classmethod
    def of(cls, args: RequestedImages, settings: SamplingSettings) -> Repeated:
        """Read the image, and warn of another base or adapter than it was made with.

        Raises:
            ConfigError: If it was made over an image, and none is given.
        """
        if args.repeat is None:
            return cls({})
        from dora_diffusion.sampling.images import (
            BATCH_POSITION,
            BATCH_SIZE,
            model_name,
            read_fields,
        )

        name, fields = Path(args.repeat).name, read_fields(args.repeat)
        model = fields.get("Model", model_name(args.base))
        if model != model_name(args.base):
            warnings.warn(f"{name} was made with the model {model}, not {args.base}", stacklevel=3)
        cls._check_files(name, fields, args, settings)
        place = [fields.get(key, "") for key in (BATCH_SIZE, BATCH_POSITION)]
        size, position = (int(text) if text.isdecimal() else 0 for text in place)
        is_alone = args.num_images == 1 and fields.get("Seed") == str(args.seed)
        if is_alone and position < size <= _MOST_REPEATED and position <= (args.seed or 0):
            return cls(fields, size, position)
        return cls(fields)

    @staticmethod
    def _check_files(
        name: str, fields: Mapping[str, str], args: RequestedImages, settings: SamplingSettings
    ) -> None:
        from dora_diffusion.sampling.images import (
            INIT_IMAGE,
            MASK_IMAGE,
            UsedAdapter,
            painted_fields,
        )

        require(
            INIT_IMAGE not in fields or args.image is not None,
            f"{name} was made over another image; give that with --image, and its mask",
        )
        painted = painted_fields(settings)
        for key, given in ((INIT_IMAGE, args.image), (MASK_IMAGE, f"the mask {args.mask_image}")):
            if key in fields and painted.get(key) != fields[key]:
                warnings.warn(f"{name} was made over another image than {given}", stacklevel=4)
        known = fields.get("Lora hashes", "")
        for use in args.uses() if known else []:
            own = UsedAdapter.of(use.path).hash
            if own and own not in known:
                warnings.warn(
                    f"{name} was made with another adapter file ({known}) than {use.path} ({own})",
                    stacklevel=4,
                )

    def reading(self, components: Components, args: RequestedImages) -> Components:
        """The model, with the image's clip skip, which web UIs count by the model's family."""
        text = self.fields.get("Clip skip", "")
        if args.clip_skip is not None or not text.isdecimal():
            return components
        own = int(text) - components.family.web_ui_clip_skip(0)
        return components.reading(max(0, own), None, is_told=False)


SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Row(NamedTuple):
    """One image."""

    prompt: str
    seed: int
    adapter: str | None
    strength: float
    path: Path


def warn_of_triggers(prompts: Iterable[tuple[str, AdapterMetadata]]) -> None:
    """Warn, before it takes time, of prompts that lack their adapter's trigger word."""
    from dora_diffusion.sampling.generate import lacks_trigger

    pairs = list(prompts)
    are_several = len({prompt for prompt, _ in pairs}) > 1
    lacking = {prompt: m.trigger for prompt, m in pairs if lacks_trigger(prompt, m)}
    for prompt, trigger in lacking.items():
        which = f"the prompt {quoted(prompt)}" if are_several else "the prompt"
        warnings.warn(
            f"{which} lacks the adapter's trigger word; write {trigger!r} to get the subject",
            stacklevel=2,
        )


def sampling_settings(args: RequestedImages) -> SamplingSettings:
    from dora_diffusion.data.images import open_photo
    from dora_diffusion.sampling.detail import Detail
    from dora_diffusion.sampling.generate import SamplingSettings
    from dora_diffusion.sampling.stack import name_of

    names = [field.name for field in fields(SamplingSettings)]
    given: dict[str, Any] = {name: getattr(args, name, None) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    given |= {n: open_photo(given[n]) for n in ("image", "mask_image") if n in given}
    if args.detail:
        given["detail"] = Detail.open(
            args.detail, args.detail_label or "", denoise=args.detail_denoise,
            padding=args.detail_padding, prompt=args.detail_prompt or "",
        )  # fmt: skip
    negatives = [style.negative_prompt for style in args.chosen_styles]
    given["negative_prompt"] = with_styles(args.negative_prompt, negatives)
    schedules = {name_of(n): use.schedule for n, use in enumerate(args.uses()) if use.schedule}
    return SamplingSettings(**given, strength_schedules=schedules)


def _drawn(args: RequestedImages) -> Callable[[str, int], str]:
    """Return a function that draws a prompt's wildcards by an image's seed.

    Raises:
        ConfigError: If they cannot be drawn.
    """
    if not args.wildcards:
        return lambda prompt, seed: prompt
    from dora_diffusion.data.captions import CaptionRules, Wildcards

    return CaptionRules(wildcards=Wildcards(args.wildcard_dir)).draw_prompt


def image_rows(args: RequestedImages) -> list[Row]:
    """The images that are asked for, each with its file.

    One image gets the name that was asked for, several their seed behind it, those of an adapters
    file their number. Seeds are consecutive, from a random one where none is given.

    Raises:
        ConfigError: If torch cannot take one of the seeds, an entry cannot be, or a file cannot be
            written.
        FileNotFoundError: If an entry's adapter is not there.
    """
    output = Path(args.output)
    require(output.suffix.lower() in SUFFIXES, f"output {output} must end in {', '.join(SUFFIXES)}")
    entries = _entries(args) if args.adapters_file else [{}] * args.num_images
    first = secrets.randbelow(2**32) if args.seed is None else args.seed
    if not 0 <= first <= 2**63 - len(entries):
        raise ConfigError(f"seed is {first}; it must be between 0 and 2**63 - num_images")
    from dora_diffusion.formats.adapter.stored import find_adapter
    from dora_diffusion.numerics.weights import require_strength

    rows, drawn = [], _drawn(args)
    for number, entry in enumerate(entries):
        prompt, seed = entry.get("prompt", args.prompt), entry.get("seed", first + number)
        place = f"entry {number + 1} of {args.adapters_file}" if args.adapters_file else "generate"
        require(prompt is not None, f"{place} has no prompt; say with --prompt what to show")
        suffix = f"-{number + 1}" if args.adapters_file else f"-{seed}" if len(entries) > 1 else ""
        adapter = entry.get("adapter")
        text = drawn(with_styles(str(prompt), [style.prompt for style in args.chosen_styles]), seed)
        for words in (text, args.detail_prompt or ""):
            require(
                not re.search("<(lora|lyco|hypernet):", words),
                f"the prompt {quoted(words)} holds <lora:...>, as web UIs load an adapter; give "
                "its file with --adapter, or its folder with --adapter_dir",
            )
        require(
            not text.strip().startswith("Negative prompt:"),
            "the prompt begins with 'Negative prompt:'; give that with --negative_prompt",
        )
        strength = entry.get("strength", 1.0)
        require_strength(f"strength of {place}", strength)
        path = output.with_stem(output.stem + suffix)
        rows.append(Row(text, seed, adapter, strength, path))
    for adapter in {row.adapter for row in rows if row.adapter}:
        find_adapter(adapter)
    existing = next((row.path for row in rows if row.path.exists()), None)
    if existing and not args.overwrite:
        raise ConfigError(
            f"{existing} exists; choose another --output, or replace it with --overwrite"
        )
    for row in rows:
        require_writable(row.path)
    return rows


def _entries(args: RequestedImages) -> list[dict[str, Any]]:
    """The entries of the adapters file.

    Raises:
        ConfigError: If they are not what the flag's help says.
    """
    name = args.adapters_file or ""
    require(args.adapter is None, "adapter and adapters_file are both given; leave out --adapter")
    require(
        args.num_images == 1,
        f"num_images is {args.num_images}, and {name} has an entry for each image; leave it out",
    )
    entries = read_yaml(name)
    require(
        isinstance(entries, list) and bool(entries),
        f"{name} must be a list with an entry for each image, such as '- adapter: runs/dog'",
    )
    known = {"adapter": str | None, "prompt": str, "seed": int, "strength": int | float}
    rows: list[Any] = [{"adapter": e} if isinstance(e, str | None) else e for e in entries]
    for number, entry in enumerate(rows, start=1):
        where = f"entry {number} of {name}"
        require(isinstance(entry, dict), f"{where} must be 'adapter: FILE' and what belongs to it")
        for key, value in entry.items():
            require(key in known, f"{where}: unknown key {key!r}; there are {', '.join(known)}")
            require(
                isinstance(value, known[key]) and not isinstance(value, bool),
                f"{where}: {key} is {value!r}, which is not allowed",
            )
        seed = int(entry.get("seed", 0))
        require(0 <= seed < 2**63, f"{where}: seed is {seed}; it must be between 0 and 2**63 - 1")
    return rows
