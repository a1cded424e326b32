"""Repetition of an image by the generation settings in its text."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_diffusion.cli.settings import AdaptedModel, adapter_and_strengths
from dora_diffusion.config.fields import TOKENS_PER_CHUNK, require
from dora_diffusion.config.wording import number_text
from dora_diffusion.models.locate import is_embedded, looks_local

if TYPE_CHECKING:
    from dora_diffusion.cli.requested_images import RequestedImages
    from dora_diffusion.config.base import BaseModel
    from dora_diffusion.formats.adapter.metadata import AdapterMetadata
    from dora_diffusion.models.components import Components
    from dora_diffusion.sampling.images import RecordedAdapter
    from dora_diffusion.sampling.settings import SamplingSettings
    from dora_diffusion.sampling.stack import AdapterUse

# Settings of a base that change the numbers, besides its name.
_LOADED = (
    "variant", "revision", "dtype", "compile", "quantize", "quantize_convolutions", "vae_tile_size",
    "prediction_type", "zero_terminal_snr", "distilled", "alpha",
)  # fmt: skip
_MOST_REPEATED = 64


def repeated_settings(file: str) -> tuple[dict[str, Any], list[RecordedAdapter]]:
    """Read the settings in an image's text, and its adapters in their order.

    Raises:
        PhotoError: If the file has no generation settings.

    Warns:
        UserWarning: If settings have no meaning here.
    """
    from dora_diffusion.sampling.images import (
        LOADED,
        OWN_VERSION,
        adapters_of,
        read_fields,
        settings_of,
    )

    fields = read_fields(file)
    (values, unread), (adapters, unread_shares) = settings_of(fields), adapters_of(fields)
    unread += unread_shares
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
    return values, adapters


def base_and_adapters(
    image: str, given: Mapping[str, Any], adapters: Sequence[RecordedAdapter]
) -> dict[str, Any]:
    """Return the settings ``base`` and ``adapter`` of an image.

    They are those that are given, else what the image's text names, if that is a hub id, an
    embedded model or a path from the current folder.

    Args:
        image: The image's file.
        given: Settings that take precedence.
        adapters: The image's adapters.

    Raises:
        ConfigError: If something is neither given nor there, all in one message.
    """
    from dora_diffusion.sampling.images import read_fields

    name, model = Path(image).name, read_fields(image).get("Model", "")
    adapters = [] if given.get("adapters_file") else adapters
    words = given.get("adapter") or []
    words = [str(word) for word in ([words] if isinstance(words, str) else words)]
    words = words or [path for adapter in adapters if (path := _path_of(adapter.name))]
    chosen, spare = _in_order(words, adapters)
    is_hub = "/" in model and not looks_local(model)
    base = given.get("base") or (model if is_embedded(model) or is_hub else _path_of(model))
    names = ", ".join(dict.fromkeys(adapter.name for adapter in adapters))
    missing = [
        f"the model {model or '(not stated)'}: give it with --base" * (not base),
        f"the adapters {names}: give the file of each with --adapter, in this order"
        * (not all(chosen)),
    ]
    require(
        not any(missing),
        f"{name} was made with {'; and '.join(filter(None, missing))}",
        "adapter" if base else "base",
    )
    pairs = zip(chosen, adapters, strict=True)
    complete = [*(_with_strengths(word, adapter) for word, adapter in pairs), *spare]
    return {"base": base} | ({"adapter": complete} if adapters else {})


def _path_of(name: str) -> str:
    """Return the path of a file or folder that a text names; empty if there is none."""
    paths = (Path(name), Path(f"{name}.safetensors")) if name else ()
    return next((str(path) for path in paths if path.exists()), "")


def _in_order(
    words: Sequence[str], adapters: Sequence[RecordedAdapter]
) -> tuple[list[str], list[str]]:
    """Sort adapters as an image has them: by their hashes, the others in their order.

    An adapter that an image has twice may be given once.

    Returns:
        A word for each of the image's adapters, empty if there is none; and the other words.
    """
    free, chosen = [*words], list[str]()
    for adapter in adapters:
        same = (w for w in [*free, *words] if adapter.matches(adapter_and_strengths(w)[0]))
        chosen.append(next(same, ""))
        free = [word for word in free if word != chosen[-1]]
    return [word or (free.pop(0) if free else "") for word in chosen], free


def _with_strengths(word: str, adapter: RecordedAdapter) -> str:
    """A given adapter with the strengths of the image's, unless it has its own."""
    from dora_diffusion.numerics.weights import MergeStrengths

    shares = MergeStrengths.of(adapter.strengths)
    numbers = map(number_text, (shares.text_encoder_strength, shares.unet_strength))
    return ":".join([word, *numbers]) if adapter_and_strengths(word)[0] == word else word


def loaded_text(model: AdaptedModel | BaseModel) -> str:
    """Loading options of a base for an image's text; empty if all have their default."""
    known = [setting for setting in AdaptedModel.settings() if setting.name in _LOADED]
    values = {s.name: getattr(model, s.name, s.default) for s in known}
    moved = {s.name: values[s.name] for s in known if values[s.name] != s.default}
    return json.dumps(moved) if moved else ""


@dataclass(frozen=True)
class Repeated:
    """Properties of an image to repeat that are not settings.

    Attributes:
        fields: Fields of its text; empty if no image is repeated.
        batch: Number of images in its batch, and its position there.
    """

    fields: Mapping[str, str]
    batch: tuple[int, int] = (1, 0)

    @classmethod
    def of(cls, args: RequestedImages, settings: SamplingSettings) -> Repeated:
        """Read the image, and warn if base or adapters differ from the image's.

        Raises:
            ConfigError: If the image needs an input image, and none is given.
        """
        if args.repeat is None:
            return cls({})
        from dora_diffusion.sampling.images import BATCH_POSITION, BATCH_SIZE, is_model, read_fields

        name, fields = Path(args.repeat).name, read_fields(args.repeat)
        if not is_model(args.model.base, fields):
            model = fields.get("Model") or fields.get("Model hash")
            line = f"{name} was made with the model {model}, not {args.model.base}"
            warnings.warn(line, stacklevel=3)
        cls._check_files(name, fields, args, settings)
        place = [fields.get(key, "") for key in (BATCH_SIZE, BATCH_POSITION)]
        size, position = (int(text) if text.isdecimal() else 0 for text in place)
        is_alone = args.num_images == 1 and fields.get("Seed") == str(args.seed)
        if is_alone and position < size <= _MOST_REPEATED and position <= (args.seed or 0):
            return cls(fields, (size, position))
        return cls(fields)

    @staticmethod
    def _check_files(
        name: str, fields: Mapping[str, str], args: RequestedImages, settings: SamplingSettings
    ) -> None:
        from dora_diffusion.sampling.images import (
            HASHES,
            INIT_IMAGE,
            MASK_IMAGE,
            RecordedAdapter,
            adapters_of,
            painted_fields,
        )

        require(
            INIT_IMAGE not in fields or args.image is not None,
            f"{name} was made over another image; give that with --image, and its mask",
            "image",
        )
        painted = painted_fields(settings)
        files = {INIT_IMAGE: args.image, MASK_IMAGE: f"the mask {args.mask_image}"}
        for key, given in files.items():
            if key in fields and painted.get(key) != fields[key]:
                warnings.warn(f"{name} was made over another image than {given}", stacklevel=4)
        recorded = [adapter for adapter in adapters_of(fields)[0] if adapter.hash]
        for use in args.uses() if recorded else []:
            if {adapter.matches(use.path) for adapter in recorded} == {False}:
                warnings.warn(
                    f"{name} was made with another adapter file ({fields[HASHES]}) than {use.path} "
                    f"({RecordedAdapter.of(use.path).hash})",
                    stacklevel=4,
                )

    def load(
        self, args: RequestedImages, uses: Sequence[AdapterUse]
    ) -> tuple[Components, AdapterMetadata]:
        """Load the model, with the clip skip of the image.

        Raises:
            ConfigError: If it is an inpainting model without an input image or mask.
        """
        components, metadata = args.model.load(uses, offload=args.offload)
        skip = self.fields.get("Clip skip", "")
        if args.model.clip_skip is None and skip.isdecimal():
            # Web UIs count it by the model's family.
            own = int(skip) - components.family.web_ui_clip_skip(0)
            components = components.reading(max(0, own), None, is_told=False)
        needed = components.family.image_arguments
        lacking = [name for name in needed if getattr(args, name) is None]
        require(
            not lacking,
            f"{args.model.base} is an inpainting model: give --image, and --mask_image of the same "
            "size, white where to paint (all white to paint the whole image)",
            "image",
        )
        return components, metadata
