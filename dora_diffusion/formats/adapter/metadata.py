"""Metadata of an adapter file: this package's fields, and the kohya and modelspec fields.

Metadata values are strings. Keys of this package start with ``dora_diffusion.``; other readers
ignore them. Kohya's scripts write ``ss_*``, which web UIs read (the family from
``ss_base_model_version``, then ``ss_v2``). ``modelspec.*`` is Stability AI's standard of model
metadata. Local paths are never written.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mode
from typing import TYPE_CHECKING, Any

from dora_diffusion.config.families import FAMILIES, Family
from dora_diffusion.config.fields import TOKENS_PER_CHUNK

if TYPE_CHECKING:
    from dora_diffusion.numerics.weights import LayerWeights

FORMAT_VERSION = "1"
OWN = "dora_diffusion."
_FACTS = ("family", "base_model", "trigger", "resolution", "format_version")
# Facts about the layers, recomputed at every write.
_COMPUTED = ("rank", "alpha", "norm_axis", "target", "component", "projections", "shapes")
TRAINED_ALPHA = "trained_alpha"
DIFFUSERS_METADATA = "lora_adapter_metadata"
UNET_LAYERS = "unet_layers_per_block"
ZERO_TERMINAL_SNR = "zero_terminal_snr"
# Target of an approximation ("DoRA", "LoRA", "tuned model", "sum of the adapters"), and its
# relative error.
APPROXIMATES, APPROXIMATION_ERROR = "approximates", "approximation_error"
# Strength with which a conversion was written, if not 1.
STRENGTH = "strength"
# Prompt settings other than the defaults (`Components.reading`).
READING = ("clip_skip", "max_token_length")
# Rules by which captions were made from files next to photos (`stated_rules`).
CAPTIONS = "captions"
TAGS, THUMBNAIL = "modelspec.tags", "modelspec.thumbnail"
TAG_FREQUENCY = "ss_tag_frequency"
# Name of the dataset in tag frequencies; kohya writes names of folders.
_DATASET = "images"

_V_ARCHITECTURES = tuple(filter(None, (family.v_architecture for family in FAMILIES.values())))


@dataclass(frozen=True)
class AdapterMetadata:
    """Metadata of an adapter that is not in its tensors.

    Attributes:
        family: Name of a `Family`, or ``""`` if unknown.
        base_model: Name of the trained model (a hub id, not a path).
        trigger: Trigger words of the subject; for several subjects joined by `join_triggers`.
        resolutions: Training resolutions in pixels, the smallest first.
        format_version: Version of this metadata; ``""`` for a file of another program.
        extra: Further fields, such as ``prediction_type`` or ``base_model_hash``. ``trained_alpha``
            is the alpha of training, for files with the scale multiplied into the factors.
            ``zero_terminal_snr`` is ``"True"`` or ``"False"``. ``unet_layers_per_block`` is
            `UNetLayout.text`, on which kohya's names of an SDXL UNet depend.
        tags: Tags for adapter managers.
        thumbnail: A small image as a data URI (``data:image/jpeg;base64,...``).
        tag_frequency: Number of training captions with each tag.
    """

    family: str = ""
    base_model: str = ""
    trigger: str = ""
    resolutions: tuple[int, ...] = ()
    format_version: str = FORMAT_VERSION
    extra: Mapping[str, str] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    thumbnail: str = ""
    tag_frequency: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.family not in ("", *FAMILIES):
            raise ValueError(f"family is {self.family!r}; it must be one of {list(FAMILIES)}")
        if self.thumbnail and not self.thumbnail.startswith("data:image/"):
            raise ValueError(f"thumbnail is {self.thumbnail[:20]!r}; it must be a data URI")


def without_path(name: str) -> str:
    """Return a model's name without local folders: hub ids unchanged, only the end of a path."""
    looks_local = (
        name.startswith(("/", "~", "."))
        or "\\" in name
        or name.count("/") > 1
        or re.match(r"[A-Za-z]:", name) is not None
    )
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1] if looks_local else name


def stated_reading(fields: Mapping[str, str], prefix: str = "") -> dict[str, int]:
    """Return a file's prompt settings for `Components.reading`; empty if it states none.

    Args:
        fields: `AdapterMetadata.extra`; or, with the prefix `OWN`, the metadata of a model's file.
        prefix: Prefix of the names.
    """
    texts = {name: fields.get(prefix + name, "") for name in READING}
    return {name: int(text) for name, text in texts.items() if text.isdecimal()}


def agreed_reading(extras: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the prompt settings that several adapters share, from their `AdapterMetadata.extra`.

    Settings in which the adapters differ are omitted.
    """
    texts = {name: {extra.get(name, "") for extra in extras} for name in READING}
    return {n: text for n, agreed in texts.items() if len(agreed) == 1 and (text := agreed.pop())}


def reading_in_words(reading: Mapping[str, int], family: Family) -> str:
    """Describe prompt settings, with clip skip in both countings; empty for the defaults."""
    skip, length = reading.get("clip_skip", 0), reading.get("max_token_length", TOKENS_PER_CHUNK)
    phrases = []
    if skip:
        web = family.web_ui_clip_skip(skip)
        phrases.append(f"with clip_skip {skip} as Diffusers counts (Clip skip {web} in web UIs)")
    if length != TOKENS_PER_CHUNK:
        phrases.append(f"{f'up to {length}' if length else 'all'} tokens in chunks of 75")
    return ", ".join(phrases)


def without_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of training without local folders, including entries of a dataset."""
    from dora_diffusion.config import settings  # A late import, since readers do not need it.

    portable = dict(values)
    for setting in settings():
        value = portable.get(setting.name)
        if setting.kind is dict:
            portable[setting.name] = [without_paths(entry) for entry in value or []]
        elif setting.is_path and isinstance(value, list):
            portable[setting.name] = [without_path(path) for path in value]
        elif setting.is_path and isinstance(value, str):
            portable[setting.name] = without_path(value)
    return {name: value for name, value in portable.items() if name in values}


def own_fields(
    metadata: AdapterMetadata, layers: Mapping[str, LayerWeights], target: str
) -> dict[str, str]:
    """Return this package's metadata fields of a file."""
    values = {name: getattr(metadata, name) for name in ("family", "trigger")}
    values["resolution"] = ", ".join(map(str, metadata.resolutions))
    values["base_model"] = without_path(metadata.base_model)
    values["format_version"] = FORMAT_VERSION
    alpha = describe({name: layer.alpha for name, layer in layers.items()})
    values |= {
        "target": target,
        "rank": describe({name: layer.rank for name, layer in layers.items()}),
        "alpha": metadata.extra.get(TRAINED_ALPHA, alpha),
        "norm_axis": describe(
            {n: "none" if w.magnitude is None else w.norm_axis for n, w in layers.items()}
        ),
    }
    extra = {k: without_path(v) for k, v in metadata.extra.items() if k != TRAINED_ALPHA}
    fields = {OWN + name: value for name, value in (extra | values).items()}
    fields |= {TAGS: ", ".join(metadata.tags), THUMBNAIL: metadata.thumbnail}
    if metadata.tag_frequency:
        fields[TAG_FREQUENCY] = json.dumps({_DATASET: dict(metadata.tag_frequency)})
    return {name: value for name, value in fields.items() if value}


def describe(values: Mapping[str, object]) -> str:
    """Return the value as a text if all layers agree, else JSON of layer -> value."""
    texts = {n: f"{v:g}" if isinstance(v, float) else str(v) for n, v in values.items()}
    distinct = set(texts.values())
    return distinct.pop() if len(distinct) == 1 else json.dumps(dict(sorted(texts.items())))


def described(text: str, name: str) -> str:
    """Return the value of one layer in a ``describe`` text; ``""`` if there is none."""
    if not text.startswith("{"):
        return text
    try:
        return str(json.loads(text).get(name, ""))
    except (ValueError, RecursionError):
        return ""


def join_triggers(triggers: Iterable[str]) -> str:
    """Join the trigger words of several subjects, without duplicates: ``"sks dog, zwx cat"``."""
    return ", ".join(dict.fromkeys(filter(None, triggers)))


def split_triggers(text: str) -> list[str]:
    """Split the result of `join_triggers` into the trigger words of each subject."""
    return [trigger for part in text.split(",") if (trigger := part.strip())]


def modelspec_fields(
    family: Family, title: str, trigger: str, prediction_type: str
) -> dict[str, str]:
    """Return the ``modelspec.*`` fields of a model in the original layout, except empty ones."""
    is_v = prediction_type == "v_prediction"
    fields = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": (is_v and family.v_architecture) or family.architecture,
        "modelspec.implementation": "sgm",
        "modelspec.title": title,
        "modelspec.prediction_type": prediction_type.removesuffix("_prediction"),
        "modelspec.trigger_phrase": trigger,
    }
    return {name: value for name, value in fields.items() if value}


def kohya_fields(
    metadata: AdapterMetadata, layers: Mapping[str, LayerWeights], family: Family, title: str
) -> dict[str, str]:
    """Return the ``ss_*`` and ``modelspec.*`` fields of a kohya-style file."""
    prediction_type = metadata.extra.get("prediction_type", "")
    fields = modelspec_fields(family, title, metadata.trigger, prediction_type)
    # Tags for web UIs; trigger words and tags if there are no captions.
    words = dict(metadata.tag_frequency) or _tags_once(metadata.trigger, metadata.tags)
    fields |= {
        "ss_base_model_version": family.kohya_base_version
        + ("_v" if prediction_type == "v_prediction" else ""),
        "ss_v2": str(family.is_kohya_v2),
        "ss_output_name": title,
        "ss_sd_model_name": without_path(metadata.base_model),
        "ss_sd_model_hash": metadata.extra.get("base_model_hash", ""),
        TAG_FREQUENCY: json.dumps({_DATASET: words}) if words else "",
        "modelspec.implementation": "sgm" if family.kohya_names_original_blocks else "diffusers",
        "modelspec.architecture": fields["modelspec.architecture"] + "/lora",
        "ss_zero_terminal_snr": metadata.extra.get(ZERO_TERMINAL_SNR, ""),
    }
    reading = stated_reading(metadata.extra)
    if "clip_skip" in reading:
        fields["ss_clip_skip"] = str(family.web_ui_clip_skip(reading["clip_skip"]))
    if "max_token_length" in reading:
        fields["ss_max_token_length"] = str(reading["max_token_length"] or None)
    if metadata.resolutions:
        size = metadata.resolutions[-1]
        fields["ss_resolution"] = f"({size}, {size})"
        fields["modelspec.resolution"] = f"{size}x{size}"
    fields |= _network_fields(layers)
    return {name: value for name, value in fields.items() if value}


def _tags_once(trigger: str, tags: Sequence[str]) -> dict[str, int]:
    return dict.fromkeys(filter(None, (trigger, *tags)), 1)


def _network_fields(layers: Mapping[str, LayerWeights]) -> dict[str, str]:
    rank = mode(layer.rank for layer in layers.values())
    alpha = mode(layer.alpha for layer in layers.values())
    fields = {"ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}"}
    axes = {layer.norm_axis for layer in layers.values() if layer.magnitude is not None}
    if not axes:
        return fields | {"ss_network_module": "networks.lora", "ss_network_args": "{}"}
    arguments = {"algo": "lora", "dora_wd": "True", "wd_on_output": str(axes == {"output"})}
    return fields | {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(arguments)}


def parse_metadata(fields: Mapping[str, str]) -> AdapterMetadata:
    """Parse a file's metadata, of this package or another program."""
    facts = {k.removeprefix(OWN): v for k, v in fields.items() if k.startswith(OWN)}
    facts = facts or _foreign_facts(fields)
    family, thumbnail = facts.get("family", ""), fields.get(THUMBNAIL, "")
    return AdapterMetadata(
        family=family if family in FAMILIES else "",
        base_model=facts.get("base_model", ""),
        trigger=facts.get("trigger", ""),
        resolutions=tuple(
            sorted({int(side) for side in re.findall(r"[0-9]{1,6}", facts.get("resolution", ""))})
        ),
        format_version=facts.get("format_version", ""),
        extra={k: v for k, v in facts.items() if k not in (*_FACTS, *_COMPUTED)},
        tags=_tags(fields),
        thumbnail=thumbnail if thumbnail.startswith("data:image/") else "",
        tag_frequency=_read_tag_frequency(fields),
    )


def _tags(fields: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(filter(None, (tag.strip() for tag in fields.get(TAGS, "").split(","))))


def _read_tag_frequency(fields: Mapping[str, str]) -> dict[str, int]:
    """Return the counts of all datasets, most frequent first; {} if they are not from captions."""
    counts: Counter[str] = Counter()
    with contextlib.suppress(ValueError, AttributeError, TypeError, OverflowError, RecursionError):
        for tags in json.loads(fields.get(TAG_FREQUENCY, "{}")).values():
            counts.update({str(tag).strip(): int(count) for tag, count in tags.items()})
    frequency = dict(counts.most_common())
    written = _tags_once(fields.get("modelspec.trigger_phrase", ""), _tags(fields))
    return {} if frequency == written else frequency


def _foreign_facts(fields: Mapping[str, str]) -> dict[str, str]:
    """Return the facts in another program's metadata, by this package's names."""
    version = fields.get("ss_base_model_version", "").lower()
    architecture = fields.get("modelspec.architecture", "").lower()
    is_v2 = fields.get("ss_v2", "").lower() == "true"
    families = [
        name
        for name, family in FAMILIES.items()
        if family.version_mark in version
        or family.architecture_mark in architecture
        or (is_v2 and family.is_kohya_v2)
    ]
    facts = {
        "family": families[-1] if families else "",
        "base_model": without_path(fields.get("ss_sd_model_name", "")),
        "trigger": fields.get("modelspec.trigger_phrase", ""),
        "resolution": fields.get("modelspec.resolution") or fields.get("ss_resolution", ""),
    }
    predicts_v = fields.get("modelspec.prediction_type") == "v"
    if predicts_v or version.endswith("_v") or architecture.startswith(_V_ARCHITECTURES):
        facts["prediction_type"] = "v_prediction"
        if fields.get("ss_zero_terminal_snr") == "True":
            facts[ZERO_TERMINAL_SNR] = "True"
    return facts | _foreign_reading(fields, facts["family"])


def _foreign_reading(fields: Mapping[str, str], family: str) -> dict[str, str]:
    """Return sd-scripts' prompt settings, without SDXL's clip skip, which it does not use."""
    numbers = {name: fields.get(f"ss_{name}", "") for name in READING}
    skip, length = (
        int(text) if re.fullmatch("[0-9]{1,4}", text) else 0 for text in numbers.values()
    )
    known = FAMILIES.get(family)
    skip = skip - known.web_ui_clip_skip(0) if known and not known.skipped_layers else 0
    is_longer = length > TOKENS_PER_CHUNK and length % TOKENS_PER_CHUNK == 0
    reading = {"clip_skip": skip, "max_token_length": length if is_longer else 0}
    return {name: str(value) for name, value in reading.items() if value > 0}
