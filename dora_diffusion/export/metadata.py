"""Metadata of written models, and the card of a folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.families import Family
from dora_diffusion.config.wording import listing
from dora_diffusion.export.files import model_name
from dora_diffusion.export.merge_spec import MergeSpec
from dora_diffusion.formats.adapter.embeddings import EMBEDDINGS, field_of
from dora_diffusion.formats.adapter.metadata import (
    CAPTIONS,
    OWN,
    READING,
    AdapterMetadata,
    agreed_reading,
    join_triggers,
    modelspec_fields,
    reading_in_words,
    split_triggers,
    stated_reading,
)
from dora_diffusion.formats.checkpoint.models import StoredModel
from dora_diffusion.formats.files.stream import file_hash

MERGED, BASE, TRAINED = OWN + "merged", OWN + "base", OWN + "trained"
TRIGGER = OWN + "trigger"
_UNKNOWN_HASH = "0" * 64
# Fields about the base's own bytes and parts, which are wrong for a changed file.
_HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
_NOT_OF_THE_OUTPUT = {*_HASHES, MERGED, OWN + EMBEDDINGS}
# Fields of the base's card that also apply to the new model.
_LICENSE_FIELDS = ("license", "license_name", "license_link", "extra_gated_prompt")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Texts by topic.
_TEXTS = yaml.safe_load(Path(__file__).with_name("cards.yaml").read_text(encoding="utf-8"))


class ModelMetadata:
    """Metadata and card of an output. The metadata is complete once the base is hashed.

    Hashing a model of several gigabytes takes about as long as reading it, so it runs in parallel
    with the merge. The file is first written with zeros for the hashes.

    Args:
        model: The base.
        output: The file or folder to write.
        fields: The metadata, without fields on the base or for a single file.
        prediction_type: Prediction type of the model; empty if unknown.
        text: Text of the card.
        record: The merged adapters, from `MergeSpec.record`.
        hashed: Files of the base, by the name of their hash.
        words: Trained words and their files.
    """

    def __init__(
        self,
        model: StoredModel,
        output: Path,
        fields: Mapping[str, str],
        prediction_type: str,
        text: str,
        *,
        record: Sequence[Mapping[str, Any]] = (),
        hashed: Mapping[str, Sequence[Path]] | None = None,
        words: Sequence[tuple[str, Path]] = (),
    ) -> None:
        self._name, self._title = model_name(model.path), output.resolve().name
        self._family, self._text, self._record = model.family, text, record
        self._fields, trigger = {"format": "pt", **fields}, fields.get(TRIGGER, "")
        self._triggers, self._words = split_triggers(trigger), word_section(words, output)
        if output.suffix == ".safetensors":
            named = field_of(file for _, file in words)
            self._fields |= {OWN + name: text for name, text in named.items()}
            spoken = modelspec_fields(model.family, output.stem, trigger, prediction_type)
            if not prediction_type and model.family.has_two_predictions:
                del spoken["modelspec.architecture"]  # Keep the base's field.
            self._fields |= spoken
        self._pool = ThreadPoolExecutor(1)
        self._hashes: dict[str, Future[str]] = {
            name: self._pool.submit(file_hash, files) for name, files in (hashed or {}).items()
        }

    def card(self, old: str) -> str:
        """Return the card of a folder; ``old``, the base's card, if there is nothing to add."""
        if not (self._text or self._words) and old:
            return old
        name, base_fields = self._name, _front_matter(old)
        is_on_hub = _HUB_ID.fullmatch(name)
        linked = f"[{name}](https://huggingface.co/{name})" if is_on_hub else f"`{name}`"
        fields = {name: value for name, value in base_fields.items() if name in _LICENSE_FIELDS}
        relation = "finetune" if self._text else ""
        head = front_matter(name, self._family, relation, {**fields, "tags": ["text-to-image"]})
        words = " and ".join(f"**`{trigger}`**" for trigger in self._triggers)
        ask = f"\nWrite {words} in a prompt to get the subject.\n" if words else ""
        if reading := reading_in_words(stated_reading(self._fields, OWN), self._family):
            ask += f"\nIt reads prompts {reading}; `generate` does so by itself.\n"
        rows = "\n".join(map(_row, self._record))
        text = self._text or _TEXTS["unchanged"]
        text = text.format(linked=linked, ask=ask + self._words, rows=rows)
        return f"{head}\n# {self._title}\n\n{text}"

    def draft(self) -> dict[str, str]:
        """Return the metadata with zeros for the base's hashes."""
        return self._with(dict.fromkeys(self._hashes, _UNKNOWN_HASH))

    def final(self) -> dict[str, str]:
        """Wait for the hashes and return the metadata."""
        return self._with({name: future.result() for name, future in self._hashes.items()})

    def close(self) -> None:
        """Cancel hashes that are no longer needed."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _with(self, hashes: Mapping[str, str]) -> dict[str, str]:
        base = {"name": self._name} | ({"sha256": dict(hashes)} if hashes else {})
        return {**self._fields, BASE: json.dumps(base)}


def front_matter(name: str, family: Family, relation: str, fields: Mapping[str, Any]) -> str:
    """Return the YAML header of a card as the hub reads it, without what is unknown.

    Args:
        name: Base model. Only a hub id is written.
        family: Its family.
        relation: The hub's word for the relation to the base: ``adapter`` or ``finetune``.
        fields: Further fields, and others in place of the usual ones. Empty ones are left out.
    """
    head: dict[str, Any] = {}
    if _HUB_ID.fullmatch(name):
        head = {"base_model": name, "base_model_relation": relation}
        head["license"] = family.released_license if name == family.released_id else ""
    head |= {"library_name": "diffusers", "pipeline_tag": "text-to-image", **fields}
    known = {key: value for key, value in head.items() if value}
    return f"---\n{yaml.safe_dump(known, sort_keys=False, allow_unicode=True)}---\n"


def word_section(words: Sequence[tuple[str, Path]], folder: Path) -> str:
    """Return the card's section on loading trained words; empty if there are none.

    Args:
        words: The words and their files.
        folder: A folder that contains the files. Their paths begin with its name.
    """
    if not words:
        return ""
    around = folder.resolve().parent
    paths = [(word, file.resolve().relative_to(around).as_posix()) for word, file in words]
    loads = [f"load_word({json.dumps(w, ensure_ascii=False)}, {json.dumps(p)})" for w, p in paths]
    stems = [file.stem for _, file in words]
    text: str = _TEXTS["words"]
    return text.format(
        words=listing(dict.fromkeys(f"`{word}`" for word, _ in words)),
        folder=EMBEDDINGS,
        names=", ".join(f"`{file.stem}` for `{word}`" for word, file in words),
        comfyui=listing(f"`embedding:{stem}`" for stem in stems),
        invokeai=listing(f"`<{stem}>`" for stem in stems),
        loads="\n".join(loads),
    )


def merged_metadata(
    model: StoredModel,
    spec: MergeSpec,
    output: Path,
    words: Sequence[tuple[str, Path]],
    base: BaseModel,
) -> ModelMetadata:
    """Return the metadata of a model with adapters merged in.

    Args:
        model: The base.
        spec: The adapters and strengths of the merge.
        output: The file or folder to write.
        words: Trained words and their files.
        base: The base as the user named it.
    """
    inherited = model.metadata.keys() - _NOT_OF_THE_OUTPUT
    if not model.is_single_file:
        inherited &= {TRAINED, TRIGGER, *(OWN + name for name in READING)}
    fields = {name: model.metadata[name] for name in inherited}
    facts = [adapter.metadata for *_, adapter in spec.parts]
    reading = agreed_reading([fact.extra for fact in facts])
    fields |= {OWN + name: text for name, text in reading.items()}
    record = spec.record()
    fields |= {MERGED: json.dumps(record)} if record else {}
    triggers = (trained_trigger(model.metadata), *(fact.trigger for fact in facts))
    if trigger := join_triggers(split_triggers(join_triggers(triggers))):
        fields[TRIGGER] = trigger
    # A family with releases of both prediction types has no default.
    usual = "" if model.family.has_two_predictions else "epsilon"
    prediction_type = model.schedule().get("prediction_type", usual)
    options = {"variant": base.variant, "revision": base.revision}
    flags = "".join(f" --{name} {value}" for name, value in options.items() if value)
    text = _TEXTS["merged"].replace("{options}", flags) if record else ""
    rest: dict[str, Any] = {"record": record, "hashed": model.files, "words": words}
    return ModelMetadata(model, output, fields, prediction_type, text, **rest)


def trained_metadata(
    model: StoredModel, metadata: AdapterMetadata, output: Path, words: Mapping[str, Path]
) -> ModelMetadata:
    """Return the metadata of a model whose weights were trained, with files of trained words."""
    facts = metadata.extra
    fields = {TRAINED: json.dumps({"training_steps": facts.get("training_steps", "")})}
    fields |= {TRIGGER: metadata.trigger} if metadata.trigger else {}
    fields |= {OWN + name: text for name in (*READING, CAPTIONS) if (text := facts.get(name))}
    predicted, named = facts.get("prediction_type", ""), list(words.items())
    return ModelMetadata(model, output, fields, predicted, _TEXTS["trained"], words=named)


def trained_steps(metadata: Mapping[str, str]) -> int | None:
    """Return the optimizer steps in a trained model's metadata; None if there are none."""
    steps = json.loads(metadata.get(TRAINED, "{}")).get("training_steps", "")
    return int(steps) if steps.isdecimal() else None


def trained_trigger(metadata: Mapping[str, str]) -> str:
    """Return the trigger words in a trained model's metadata; empty if there are none."""
    return metadata.get(TRIGGER, "")


def _row(adapter: Mapping[str, Any]) -> str:
    """Return an adapter's row in a card's table, followed by strengths that are not 1."""
    factors = {k: v for k, v in adapter.items() if k not in ("adapter", "sha256", "strength")}
    knobs = "".join(f" {name.replace('_', ' ')} {value:g}" for name, value in factors.items())
    name, strength, sha256 = adapter["adapter"], adapter["strength"], adapter["sha256"]
    return f"| `{name}` | {strength:g} | `{sha256[:16]}` |{knobs}"


def _front_matter(card: str) -> dict[str, Any]:
    """Return the YAML header of a card; empty if it is missing or damaged."""
    match = re.match(r"---\r?\n(.*?)\r?\n---\s", card, re.DOTALL)
    try:
        fields = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return fields if isinstance(fields, dict) else {}
