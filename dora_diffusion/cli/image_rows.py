"""Requested images one by one: prompt, seed and adapter of each, by its file."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dora_diffusion.cli.repeat import loaded_text
from dora_diffusion.config import ConfigError
from dora_diffusion.config.fields import REQUIRED, Setting, require
from dora_diffusion.config.file import read_yaml
from dora_diffusion.config.flag_map import find_setting
from dora_diffusion.config.images import MOST_CHARACTERS, SETTINGS, ImageRequest
from dora_diffusion.config.problems import Problems, read_values
from dora_diffusion.config.wording import quoted
from dora_diffusion.formats.files.atomic import require_writable
from dora_diffusion.formats.parameters import NEGATIVE, network_tags, settings_line

if TYPE_CHECKING:
    from PIL.Image import Image

    from dora_diffusion.cli.requested_images import RequestedImages
    from dora_diffusion.formats.adapter.metadata import AdapterMetadata
    from dora_diffusion.models.components import Components
    from dora_diffusion.sampling.settings import SamplingSettings

_ENTRY = {
    setting.name: setting
    for setting in (
        Setting("adapter", str), Setting("prompt", str, default=REQUIRED),
        replace(SETTINGS["seed"], default=REQUIRED), Setting("strength", float, default=1.0),
    )
}  # fmt: skip
"""Settings of an entry of the adapters file."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class LoadedRequest(NamedTuple):
    """A request with its model.

    Attributes:
        request: The settings.
        components: The model, which reads prompts as its adapters need.
        sampling: Settings of sampling, adjusted to a distilled model or adapter.
        batch: For an image that is repeated: images of its batch, which round its products, and its
            position there.
    """

    request: RequestedImages
    components: Components
    sampling: SamplingSettings
    batch: tuple[int, int] = (1, 0)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of an image, in pixels."""
        return self.sampling.size(self.components.default_resolution)

    def sample(
        self, rows: Sequence[ImageRequest], on_step: Callable[[int, int], None]
    ) -> list[Image]:
        """Sample the rows with the adapters that are on; a repeated image in its batch."""
        from dora_diffusion.sampling.generate import generate_images

        size, position = self.batch
        seeds = [row.known_seed for row in rows]
        if size > 1:
            # The other images change only how products are rounded.
            seeds = [seeds[0] - position + number for number in range(size)]
        images = generate_images(
            self.components,
            rows[0].prompt,
            seeds,
            self.sampling,
            batch_size=size if size > 1 else self.request.batch_size,
            on_step=on_step,
            require_finite=True,
        )
        return images[position:][: len(rows)]

    def write(
        self, image: Image, path: Path, row: ImageRequest, index: int = 0, count: int = 1
    ) -> str:
        """Write an image with its generation parameters, which are returned.

        Args:
            image: The image.
            path: Its file.
            row: Its prompt and seed, and an adapter of its own.
            index: Position of the image among all images of the request.
            count: Number of all images.
        """
        from dora_diffusion.sampling import images
        from dora_diffusion.sampling.stack import AdapterUse

        request, batch = self.request, self.batch
        if request.adapters_file:
            batch = (1, 0)  # Its rows depend on their adapters, not on the batch.
        elif batch[0] == 1:
            start = index - index % request.batch_size
            batch = min(request.batch_size, count - start), index - start
        uses = [row.adapter] if isinstance(row.adapter, AdapterUse) else request.uses()
        extra = images.model_fields(self.components, *batch)
        loaded = loaded_text(request.model)
        extra |= {images.LOADED: loaded} if loaded else {}
        text = images.parameters_text(
            row, self.sampling.for_model(self.components), self.size, request.model.base,
            images.recorded(uses), extra=extra,
        )  # fmt: skip
        images.save_image(image, path, text)
        return text


def warn_of_triggers(prompts: Iterable[tuple[str, AdapterMetadata]]) -> None:
    """Warn, before it takes time, of prompts that lack their adapter's trigger word."""
    for message in trigger_messages(prompts):
        warnings.warn(message, stacklevel=2)


def trigger_messages(prompts: Iterable[tuple[str, AdapterMetadata]]) -> list[str]:
    """Return a message on each prompt that lacks its adapter's trigger word."""
    from dora_diffusion.sampling.conditioning import lacks_trigger

    pairs = list(prompts)
    are_several = len({prompt for prompt, _ in pairs}) > 1
    lacking = {prompt: m.trigger for prompt, m in pairs if lacks_trigger(prompt, m)}
    return [
        f"{f'the prompt {quoted(prompt)}' if are_several else 'the prompt'} lacks the adapter's "
        f"trigger word; write {trigger!r} to get the subject"
        for prompt, trigger in lacking.items()
    ]


def image_rows(args: RequestedImages) -> dict[Path, ImageRequest]:
    """Return the requested images by their files.

    One image has the requested name, several have their seed after it, images of an adapters file
    their number. Seeds are consecutive, from a random one where none is given.

    Raises:
        ConfigError: If torch cannot take one of the seeds, an entry cannot be, or a file cannot be
            written.
        FileNotFoundError: If an entry's adapter is not there.
    """
    output = Path(args.output)
    require(
        output.suffix.lower() in SUFFIXES,
        f"output {output} must end in {', '.join(SUFFIXES)}",
        "output",
    )
    file = args.adapters_file
    entries = _entries(args) if file else [{}] * args.num_images
    first = secrets.randbelow(2**32) if args.seed is None else args.seed
    if not 0 <= first <= 2**63 - len(entries):
        raise ConfigError(f"seed is {first}; it must be between 0 and 2**63 - num_images", "seed")
    from dora_diffusion.formats.adapter.stored import find_adapter
    from dora_diffusion.numerics.weights import Strengths, require_strength
    from dora_diffusion.sampling.stack import AdapterUse

    rows = dict[Path, ImageRequest]()
    for number, entry in enumerate(entries):
        prompt, seed = entry.get("prompt", args.prompt), entry.get("seed", first + number)
        place = f"entry {number + 1} of {file}" if file else "generate"
        require(bool(prompt), f"{place} has no prompt; say with --prompt what to show", "prompt")
        suffix = f"-{number + 1}" if file else f"-{seed}" if len(entries) > 1 else ""
        text = str(prompt)
        _require_prompt(text, args)
        adapter, strength = entry.get("adapter"), entry.get("strength", 1.0)
        require_strength(f"strength of {place}", strength)
        use = AdapterUse(adapter, Strengths(strength)) if adapter else None
        rows[output.with_stem(output.stem + suffix)] = ImageRequest(text, seed, use)
    for row in rows.values():
        if isinstance(row.adapter, AdapterUse):
            find_adapter(row.adapter.path)
    _require_free(rows, overwrite=args.overwrite)
    return rows


def _require_free(files: Iterable[Path], *, overwrite: bool) -> None:
    existing = next((path for path in files if path.exists()), None)
    require(
        existing is None or overwrite,
        f"{existing} exists; choose another --output, or replace it with --overwrite",
        "output",
    )
    for path in files:
        require_writable(path)


def _require_prompt(text: str, args: RequestedImages) -> None:
    """Require prompts of one image that are words alone, without tags or settings of web UIs.

    Raises:
        ConfigError: If one names an adapter or holds an image's settings.
    """
    tag = next(iter(network_tags(text)), None)
    require(
        tag is None,
        f"{tag} in the prompt is not read; give the file of an adapter with --adapter",
        "prompt",
    )
    require(
        not text.strip().startswith(NEGATIVE),
        "the prompt begins with 'Negative prompt:'; give that as the negative prompt",
        "prompt",
    )
    for name, words in (("prompt", text), ("negative_prompt", args.negative_prompt)):
        require(
            len(words) <= MOST_CHARACTERS,
            f"a prompt of {len(words)} characters is too long; the most are {MOST_CHARACTERS}",
            name,
        )
        line = settings_line(words)
        require(
            not line,
            f"the {name.replace('_', ' ')} holds the settings of an image ({quoted(line)}); make "
            "it again with --repeat IMAGE, or give its first line alone",
            name,
        )


def _entries(args: RequestedImages) -> list[dict[str, Any]]:
    """The entries of the adapters file.

    Raises:
        ConfigError: If the file is not such a list, or an entry has an unknown key or value.
    """
    name = args.adapters_file or ""
    require(
        args.adapter is None,
        "adapter and adapters_file are both given; leave out --adapter",
        "adapter",
    )
    require(
        args.num_images == 1,
        f"num_images is {args.num_images}, and {name} has an entry for each image; leave it out",
        "num_images",
    )
    entries = read_yaml(name)
    require(
        isinstance(entries, list) and bool(entries),
        f"{name} must be a list with an entry for each image, such as '- adapter: runs/dog'",
        "adapters_file",
    )
    rows, problems = list[dict[str, Any]](), Problems()
    for number, entry in enumerate(entries, start=1):
        values = {"adapter": entry} if isinstance(entry, str | None) else entry
        with problems.collect(f"entry {number} of {name}: "):
            require(isinstance(values, dict), "it must be 'adapter: FILE' and what belongs to it")
            rows.append(read_values(values, partial(find_setting, known=_ENTRY)))
    problems.raise_all("adapters_file")
    return rows
