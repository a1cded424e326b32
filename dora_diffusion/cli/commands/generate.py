"""``dora-diffusion generate``."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dora_diffusion.cli.console.progress import progress
from dora_diffusion.cli.settings import AdaptedModel, Overwrite, Sampling
from dora_diffusion.config import ConfigError
from dora_diffusion.config.fields import REQUIRED, Need, flag, require
from dora_diffusion.config.file import read_yaml
from dora_diffusion.config.run import SampleSettings
from dora_diffusion.config.wording import quoted
from dora_diffusion.formats.files.atomic import require_writable

if TYPE_CHECKING:
    from dora_diffusion.formats.adapter.metadata import AdapterMetadata
    from dora_diffusion.sampling.generate import SamplingSettings


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(Overwrite, Sampling, AdaptedModel):
    """Settings of ``generate``; its defaults are those of a run's samples.

    So a seed gives the sample's image again.
    """

    adapter: str | None = flag(None, "An adapter file, or the output folder of a run.")
    adapters_file: str | None = flag(
        None,
        "Many adapters at once: a YAML list with an entry for each image, a file, or adapter, "
        "prompt, seed and strength. Images of a batch share the product with the base's weights.",
    )
    prompt: str | None = flag(
        None, "Prompt; required, unless each entry of --adapters_file has one."
    )
    wildcards: bool = flag(
        False, "Draw {a|b} and __file__ of the prompt by each image's seed; \\{ is a brace."
    )
    wildcard_dir: str | None = flag(
        None,
        "Folder of wildcard files: __colours__ is a line of its colours.txt.",
        needs=(Need("wildcards"),),
    )
    output: str = flag(REQUIRED, "Image file, X.png.")
    image: str | None = flag(None, "Of an inpainting model: image to paint into, cut to the size.")
    mask_image: str | None = flag(
        None,
        "Image of the same size as --image, white where to paint.",
        flags=("--mask_image", "--mask"),
    )
    negative_prompt: str = flag("", "Negative prompt.")
    seed: int | None = flag(None, "Seed of the first image. Default: random, shown.")
    num_images: int = flag(1, "Number of images, one per seed.", least=1)
    batch_size: int = flag(4, "Batch size.", least=1)
    guidance_scale: float = flag(
        SampleSettings.validation_guidance_scale, "Guidance scale (CFG scale)."
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

    def perform(self) -> int:
        """Generate images, and write them with what made them."""
        rows = _rows(self)
        from dora_diffusion.numerics.weights import Strengths
        from dora_diffusion.sampling.generate import generate_images
        from dora_diffusion.sampling.images import parameters_text, save_png
        from dora_diffusion.sampling.pool import AdapterPool, ImageRow

        settings = _settings(self)
        components, metadata = self.load(self.adapter, offload=self.offload)
        lacking = [
            name for name in components.family.image_arguments if getattr(self, name) is None
        ]
        require(
            not lacking,
            f"{self.base} is an inpainting model: give --image, and --mask_image of the same size, "
            "white where to paint (all white to paint the whole image)",
        )
        pool = AdapterPool(
            components,
            clip_skip=self.clip_skip,
            max_token_length=self.max_token_length,
        )
        readings = {row.adapter: components for row in rows}
        if self.adapters_file:
            readings = {row.adapter: pool.components_for(row.adapter) for row in rows}
            told = {row.adapter: pool.metadata(row.adapter) for row in rows}
        else:
            told = {rows[0].adapter: metadata}
        _warn_of_triggers(rows, told, self)
        shared: dict[str, Any] = {"batch_size": self.batch_size, "require_finite": True}
        with progress("generating images", "step") as show:
            if self.adapters_file:
                of_pool = [
                    ImageRow(row.prompt, row.seed, row.adapter and (row.adapter, row.strength))
                    for row in rows
                ]
                images = pool.generate(of_pool, settings, on_step=show, **shared)
            else:
                images = generate_images(
                    components,
                    [row.prompt for row in rows] if self.wildcards else self.prompt or "",
                    [row.seed for row in rows],
                    settings,
                    on_step=lambda done, steps: show(done * len(rows), steps * len(rows)),
                    **shared,
                )
        for row, image in zip(rows, images, strict=True):
            own = Strengths() if self.adapters_file else self.strengths
            strengths = replace(own, strength=row.strength)
            text = parameters_text(
                row.prompt, row.seed, settings, image.size, self.base, row.adapter, strengths,
                extra=readings[row.adapter].clip_skip_parameter,
            )  # fmt: skip
            save_png(image, row.path, text)
            print(f"{row.path} (seed {row.seed})")
        return 0


class _Row(NamedTuple):
    """One image."""

    prompt: str
    seed: int
    adapter: str | None
    strength: float
    path: Path


def _warn_of_triggers(
    rows: Sequence[_Row], told: Mapping[str | None, AdapterMetadata], args: GenerateSettings
) -> None:
    """Warn, before it takes time, of prompts that lack their adapter's trigger word."""
    from dora_diffusion.sampling.generate import lacks_trigger

    lacking = {
        row.prompt: told[row.adapter].trigger
        for row in rows
        if row.adapter and lacks_trigger(row.prompt, told[row.adapter])
    }
    for prompt, trigger in lacking.items():
        which = f"the prompt {quoted(prompt)}" if args.adapters_file else "the prompt"
        warnings.warn(
            f"{which} lacks the adapter's trigger word; write {trigger!r} to get the subject",
            stacklevel=2,
        )


def _settings(args: GenerateSettings) -> SamplingSettings:
    from dora_diffusion.data.images import open_photo
    from dora_diffusion.sampling.generate import SamplingSettings

    given: dict[str, Any] = {f.name: getattr(args, f.name) for f in fields(SamplingSettings)}
    for name in ("image", "mask_image"):
        given[name] = None if given[name] is None else open_photo(given[name])
    return SamplingSettings(**given)


def _drawn(args: GenerateSettings) -> Callable[[str, int], str]:
    """Return a function that draws a prompt's wildcards by an image's seed.

    Raises:
        ConfigError: If they cannot be drawn.
    """
    if not args.wildcards:
        return lambda prompt, seed: prompt
    from dora_diffusion.data.captions import CaptionRules, Wildcards

    return CaptionRules(wildcards=Wildcards(args.wildcard_dir)).draw_prompt


def _rows(args: GenerateSettings) -> list[_Row]:
    """The images that are asked for, each with its file.

    One image gets the name that was asked for, several their seed behind it, those of an adapters
    file their number. Seeds are consecutive, from a random one where none is given.

    Raises:
        ConfigError: If torch cannot take one of the seeds, an entry cannot be, or a file cannot be
            written.
    """
    output = Path(args.output)
    if output.suffix.lower() != ".png":
        raise ConfigError(f"output {output} must end in .png")
    entries = _entries(args) if args.adapters_file else [{}] * args.num_images
    first = secrets.randbelow(2**32) if args.seed is None else args.seed
    if not 0 <= first <= 2**63 - len(entries):
        raise ConfigError(f"seed is {first}; it must be between 0 and 2**63 - num_images")
    from dora_diffusion.numerics.weights import require_strength

    rows, drawn = [], _drawn(args)
    for number, entry in enumerate(entries):
        prompt, seed = entry.get("prompt", args.prompt), entry.get("seed", first + number)
        place = f"entry {number + 1} of {args.adapters_file}" if args.adapters_file else "generate"
        require(prompt is not None, f"{place} has no prompt; say with --prompt what to show")
        suffix = f"-{number + 1}" if args.adapters_file else f"-{seed}" if len(entries) > 1 else ""
        adapter = entry.get("adapter", args.adapter)
        strength = entry.get("strength", 1.0 if args.adapters_file else args.strength)
        require_strength(f"strength of {place}" if args.adapters_file else "strength", strength)
        path = output.with_stem(output.stem + suffix)
        rows.append(_Row(drawn(str(prompt), seed), seed, adapter, strength, path))
    existing = next((row.path for row in rows if row.path.exists()), None)
    if existing and not args.overwrite:
        raise ConfigError(
            f"{existing} exists; choose another --output, or replace it with --overwrite"
        )
    for row in rows:
        require_writable(row.path)
    return rows


def _entries(args: GenerateSettings) -> list[dict[str, Any]]:
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
