"""Conversion of an image's generation parameters to values of the Generate tab's fields."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_diffusion.cli.repeat import loaded_text
from dora_diffusion.config.families import FAMILIES
from dora_diffusion.config.fields import TOKENS_PER_CHUNK
from dora_diffusion.formats.adapter.metadata import agreed_reading, stated_reading
from dora_diffusion.formats.adapter.stored import read_metadata
from dora_diffusion.models.locate import model_info
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.views.request import (
    BASE,
    FORM,
    MERGED,
    MORE,
    UNSET,
    Chosen,
    adapter_names,
    choices,
)
from dora_diffusion.studio.jobs.image_generator import MAX_IMAGES
from dora_diffusion.studio.jobs.image_store import input_path
from dora_diffusion.studio.jobs.snapshot import adapter_of
from dora_diffusion.studio.jobs.store import GONE


@dataclass(frozen=True)
class Restored:
    """Values of the fields, restored from an image's parameters.

    Attributes:
        choice: The run, checkpoint or model; None if the image's model is missing, `GONE` if its
            first adapter is missing.
        form: Values of all fields by name; fields that the image does not state are unset.
        batch_position: Size of the image's batch, and its index in the batch.
        unread: A line for each parameter that could not be restored.
    """

    choice: str | None
    form: Mapping[str, Any]
    batch_position: tuple[int, int]
    unread: tuple[str, ...]


def restore(context: Context, text: str) -> Restored:
    """Restore the values of the fields from an image's generation parameters."""
    from dora_diffusion.sampling import images

    fields = images.parse_parameters(text)
    values, unknown = images.settings_of(fields)
    unknown += [f"{name} {value}" for name, value in values.items() if name not in UNSET]
    unread = [f"no field here: {setting}" for setting in unknown]
    form = {**UNSET, **{n: shown_value(n, values[n]) for n in values if n in UNSET}}
    adapters = _adapters_of(context, fields, unread)
    form["strength"] = adapters[0][1] if adapters else 1
    further = zip(MORE.items(), adapters[1:], strict=False)
    for (name, strength_name), (adapter, strength) in further:
        form |= {name: adapter, strength_name: strength}
    first = adapters[0][0] if adapters else ""
    choice = first if first not in ("", GONE) else _base_of(context, fields, unread)
    if choice == first and "Model" in fields:
        base = str(Chosen.of(context, first).base.path)
        if images.model_name(base) != fields["Model"]:
            unread.append(f"the model {fields['Model']}: the adapter's is {base}")
    loaded = loaded_text(Chosen.of(context, choice).base) if choice else ""
    if images.LOADED in fields and fields[images.LOADED] != loaded:
        unread.append(f"loaded with {fields[images.LOADED]}")
    here = [name for name, _ in adapters if name != GONE]
    form |= _reading_of(context, here, choice, fields, unread)
    for name, key in (("image", images.INIT_IMAGE), ("mask_image", images.MASK_IMAGE)):
        form[name] = fields.get(key, "")
        if form[name] and input_path(context.workspace, form[name]) is None:
            unread.append(f"{FORM[name].label}: it is not here, choose or paint it")
            form[name] = ""
    numbers = [fields.get(key, "") for key in (images.BATCH_SIZE, images.BATCH_POSITION)]
    size, position = (int(text) if text.isdecimal() else 0 for text in numbers)
    is_batch = position < size <= MAX_IMAGES and position <= form["seed"]
    batch_position = (size, position) if is_batch else (1, 0)
    return Restored(first if first == GONE else choice, form, batch_position, tuple(unread))


def shown_value(name: str, value: Any) -> Any:
    """Convert a setting's value to the value of its field."""
    if isinstance(value, float):
        value = (
            UNSET[name] if not math.isfinite(value) else int(value) if value.is_integer() else value
        )
    return value if isinstance(UNSET[name], (bool, int, float)) else str(value)


def _adapters_of(
    context: Context, fields: Mapping[str, str], unread: list[str]
) -> list[tuple[str, float]]:
    """Return the adapters of an image, as (choice or `GONE`, strength of the UNet)."""
    from dora_diffusion.numerics.weights import MergeStrengths
    from dora_diffusion.sampling import images

    known: dict[str, list[tuple[str, Path]]] = {}
    for job in context.jobs() if "Adapter" in fields else ():
        for checkpoint in adapter_names(job):
            if path := adapter_of(job, checkpoint):
                choice = job.id if checkpoint == job.stands else f"{job.id}/{checkpoint}"
                known.setdefault(images.adapter_name(path), []).append((choice, path))
    try:
        used, meaningless = images.adapters_of(fields)
    except ValueError as error:
        used, meaningless = [], [str(error)]
    unread += meaningless
    adapters, differs = list[tuple[str, float]](), False
    for adapter in used:
        files = known.get(adapter.name, [])
        if len(adapters) > len(MORE):
            unread.append(f"the adapter {adapter.name}: at most {len(adapters)} have a field here")
            continue
        same = [file for file in files if adapter.matches(file[1]) is not False]
        if not files:
            unread.append(f"the adapter {adapter.name} is not here any more; choose another")
        elif not same:
            unread.append(f"the adapter {adapter.name} as it was then: it was trained further")
        strengths = MergeStrengths.of(adapter.strengths)
        encoders, unet = strengths.text_encoder_strength, strengths.unet_strength
        choice = next((choice for choice, _ in same or files), GONE)
        adapters.append((choice, unet))
        differs |= encoders != unet
    if differs:
        unread.append(
            f"strengths {fields['Adapter strength']} of text encoders and UNet: the UNet's are of "
            "both"
        )
    return adapters


def _base_of(context: Context, fields: Mapping[str, str], unread: list[str]) -> str | None:
    """Return the choice of the model of an image without adapters; None if it is missing."""
    from dora_diffusion.sampling.images import model_name

    model = fields.get("Model", "")
    for choice in (choice for _, choice in choices(context, context.jobs())):
        kind, _, name = choice.partition("/")
        path = context.job(name).record.output if kind == MERGED else name
        if kind in (BASE, MERGED) and model_name(path) == model:
            return choice
    unread.append(f"the model {model or 'is not stated'}: choose it")
    return None


def _reading_of(
    context: Context, adapters: Iterable[str], choice: str | None, fields: Mapping[str, str],
    unread: list[str],
) -> dict[str, str]:  # fmt: skip
    """Return settings of an image's text encoding that differ from its adapters' defaults."""
    from dora_diffusion.sampling.images import OWN_VERSION, TOKEN_LENGTH

    is_own = fields.get("Version", "").startswith(OWN_VERSION)
    text = fields.get("Clip skip", "")
    read = {"max_token_length": TOKENS_PER_CHUNK if is_own else 0}
    with contextlib.suppress(KeyError, ValueError):
        read["max_token_length"] = int(fields.get(TOKEN_LENGTH, read["max_token_length"]))
        if choice and (is_own or text):
            family = FAMILIES[model_info(str(Chosen.of(context, choice).base.path)).family]
            first = family.web_ui_clip_skip(0)
            read["clip_skip"] = max(0, int(text or first) - first)
    if text and "clip_skip" not in read:
        unread.append(f"Clip skip {text}: choose a model first, then load the settings again")
    files = [Chosen.of(context, name).adapter for name in adapters]
    agreed = agreed_reading([read_metadata(file).extra for file in files if file])
    stated = {"clip_skip": 0, "max_token_length": TOKENS_PER_CHUNK, **stated_reading(agreed)}
    return {
        name: "" if read.get(name, stated[name]) == stated[name] else str(read[name])
        for name in stated
    }
