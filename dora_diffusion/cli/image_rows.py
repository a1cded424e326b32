"""The images that are asked for, one by one: prompt, seed and file of each."""

from __future__ import annotations

import re
import secrets
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dora_diffusion.config import ConfigError
from dora_diffusion.config.fields import require
from dora_diffusion.config.file import read_yaml
from dora_diffusion.config.prompts import settings_line, with_styles
from dora_diffusion.config.wording import quoted
from dora_diffusion.formats.files.atomic import require_writable

if TYPE_CHECKING:
    from PIL.Image import Image

    from dora_diffusion.cli.requested_images import RequestedImages
    from dora_diffusion.formats.adapter.metadata import AdapterMetadata
    from dora_diffusion.sampling.settings import SamplingSettings
    from dora_diffusion.sampling.stack import AdapterUse

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Row(NamedTuple):
    """One image."""

    prompt: str
    seed: int
    adapter: str | None
    strength: float
    path: Path

    def write(
        self,
        image: Image,
        settings: SamplingSettings,
        size: tuple[int, int],
        base: str,
        uses: Sequence[AdapterUse],
        extra: Mapping[str, object],
    ) -> str:
        """Write the image with what made it, which is returned."""
        from dora_diffusion.sampling.images import RecordedAdapter, parameters_text, save_image

        used = [RecordedAdapter.of(use.path, use.strengths) for use in uses]
        text = parameters_text(self.prompt, self.seed, settings, size, base, used, extra=extra)
        save_image(image, self.path, text)
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


def _drawn(args: RequestedImages) -> Callable[[str, int], str]:
    """Return a function that draws a prompt's wildcards by an image's seed.

    Raises:
        ConfigError: If they cannot be drawn.

    Warns:
        UserWarning: Of a prompt that has some and is not to be drawn.
    """
    from dora_diffusion.data.captions import WILD, CaptionRules, Wildcards

    known = set[str]()

    def as_text(prompt: str, seed: int) -> str:
        if WILD.search(prompt) and prompt not in known:
            known.add(prompt)
            warnings.warn(
                f"{{a|b}} and __file__ are read as text: {quoted(prompt)}; draw them with "
                "--wildcards",
                stacklevel=3,
            )
        return prompt

    if not args.wildcards:
        return as_text
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
    require(
        output.suffix.lower() in SUFFIXES,
        f"output {output} must end in {', '.join(SUFFIXES)}",
        "output",
    )
    entries = _entries(args) if args.adapters_file else [{}] * args.num_images
    first = secrets.randbelow(2**32) if args.seed is None else args.seed
    if not 0 <= first <= 2**63 - len(entries):
        raise ConfigError(f"seed is {first}; it must be between 0 and 2**63 - num_images", "seed")
    from dora_diffusion.formats.adapter.stored import find_adapter
    from dora_diffusion.numerics.weights import require_strength

    rows, drawn = [], _drawn(args)
    for number, entry in enumerate(entries):
        prompt, seed = entry.get("prompt", args.prompt), entry.get("seed", first + number)
        place = f"entry {number + 1} of {args.adapters_file}" if args.adapters_file else "generate"
        require(
            prompt is not None, f"{place} has no prompt; say with --prompt what to show", "prompt"
        )
        suffix = f"-{number + 1}" if args.adapters_file else f"-{seed}" if len(entries) > 1 else ""
        adapter = entry.get("adapter")
        text = drawn(with_styles(str(prompt), [style.prompt for style in args.chosen_styles]), seed)
        _require_prompt(text, args)
        strength = entry.get("strength", 1.0)
        require_strength(f"strength of {place}", strength)
        path = output.with_stem(output.stem + suffix)
        rows.append(Row(text, seed, adapter, strength, path))
    for adapter in {row.adapter for row in rows if row.adapter}:
        find_adapter(adapter)
    existing = next((row.path for row in rows if row.path.exists()), None)
    if existing and not args.overwrite:
        raise ConfigError(
            f"{existing} exists; choose another --output, or replace it with --overwrite", "output"
        )
    for row in rows:
        require_writable(row.path)
    return rows


def _require_no_tags(words: str) -> None:
    """Refuse tags by which web UIs load networks."""
    if other := re.search(r"<(?:lyco|hypernet):([^:<>]*)[^<>]*>?", words):
        raise ConfigError(
            f"{other[0]} in the prompt is not read; write <lora:{other[1]}:0.8> for an adapter, "
            "with its folder as --adapter_dir",
            "prompt",
        )
    require(
        "<lora:" not in words,
        f"the prompt {quoted(words)} holds <lora:...>, as web UIs load an adapter; give "
        "its file with --adapter, or its folder with --adapter_dir",
        "prompt",
    )


def _require_prompt(text: str, args: RequestedImages) -> None:
    """Require prompts of one image that are words alone, not what web UIs keep beside them.

    Raises:
        ConfigError: If one names an adapter or holds an image's settings.
    """
    detail = args.detail_prompt or ""
    for words in (text, detail):
        _require_no_tags(words)
    require(
        not text.strip().startswith("Negative prompt:"),
        "the prompt begins with 'Negative prompt:'; give that as the negative prompt",
        "prompt",
    )
    for name, words in (
        ("prompt", text), ("detail_prompt", detail), ("negative_prompt", args.negative_prompt or "")
    ):  # fmt: skip
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
        ConfigError: If they are not what the flag's help says.
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
    known = {"adapter": str | None, "prompt": str, "seed": int, "strength": int | float}
    rows: list[Any] = [{"adapter": e} if isinstance(e, str | None) else e for e in entries]
    for number, entry in enumerate(rows, start=1):
        where = f"entry {number} of {name}"
        require(
            isinstance(entry, dict),
            f"{where} must be 'adapter: FILE' and what belongs to it",
            "adapters_file",
        )
        for key, value in entry.items():
            require(
                key in known,
                f"{where}: unknown key {key!r}; there are {', '.join(known)}",
                "adapters_file",
            )
            require(
                isinstance(value, known[key]) and not isinstance(value, bool),
                f"{where}: {key} is {value!r}, which is not allowed",
                "adapters_file",
            )
        seed = int(entry.get("seed", 0))
        require(
            0 <= seed < 2**63,
            f"{where}: seed is {seed}; it must be between 0 and 2**63 - 1",
            "adapters_file",
        )
    return rows
