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
from dora_diffusion.config.wording import listing
from dora_diffusion.export.files import model_name
from dora_diffusion.export.merge_spec import MergeSpec, file_hash
from dora_diffusion.formats.adapter.embeddings import EMBEDDINGS, field_of
from dora_diffusion.formats.adapter.file import AdapterFile
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

MERGED, BASE, TRAINED = OWN + "merged", OWN + "base", OWN + "trained"
TRIGGER = OWN + "trigger"
_UNKNOWN_HASH = "0" * 64
# What a base says of its own bytes is not true of a changed file.
_HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
# What of the base's card holds for whoever uses the new model, too.
_LICENSE_FIELDS = ("license", "license_name", "license_link", "extra_gated_prompt")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_MERGED_TEXT = """\
{linked} with adapters merged into its weights by dora_diffusion. What the card of the base says of
its training holds for the base; its figures are not those of this model.
{ask}
| adapter | strength | SHA-256 |
|---|---|---|
{rows}

`dora-diffusion verify FOLDER --base BASE{options} --adapter FILE` recomputes every merged tensor.
"""
_WORDS_TEXT = """
The model's own vocabulary does not have {words}: each is a file in `{folder}`.

- A1111, Forge: copy the files to `embeddings`, and write a file's name ({names}).
- ComfyUI: copy them to `models/embeddings`, and write {comfyui}.
- InvokeAI: import them, and write {invokeai}.
- Diffusers: load them into the pipeline before its first prompt, and write words in lower case:

```python
from safetensors.torch import load_file

def load_word(token, file):
    encoders = {{"clip_l": "", "clip_g": "_2"}}
    for key, vectors in load_file(file).items():
        part = encoders.get(key, "")
        pipeline.load_textual_inversion(
            {{token: vectors}},
            token=token,
            text_encoder=getattr(pipeline, f"text_encoder{{part}}"),
            tokenizer=getattr(pipeline, f"tokenizer{{part}}"),
        )

{loads}
```
"""
_TRAINED_TEXT = """\
{linked}, fine-tuned by dora_diffusion. What the card of the base says of its training holds for the
base; its figures are not those of this model.
{ask}"""


class ModelMetadata:
    """The metadata of an output, complete once the base's hashes are known, and its card.

    Hashing a model of several gigabytes takes about as long as reading it, so it runs beside the
    merge; the file is written with zeros in the hashes' places, which are filled in the end.

    Args:
        model: The base.
        output: What is written.
        fields: The metadata, but for those of the base.
        triggers: The trigger words.
        text: The card's text.
        record: What was merged, as `MergeSpec.record` gives it.
        hashed: Files of the base, by the name that their hash gets.
        words: Trained words and their files, for the card.
    """

    def __init__(
        self,
        model: StoredModel,
        output: Path,
        fields: Mapping[str, str],
        triggers: Sequence[str],
        text: str,
        *,
        record: Sequence[Mapping[str, Any]] = (),
        hashed: Mapping[str, Sequence[Path]] | None = None,
        words: Sequence[tuple[str, Path]] = (),
    ) -> None:
        self._name, self._title = model_name(model.path), output.resolve().name
        self._family = model.family
        self._fields = {"format": "pt", **fields}
        self._triggers, self._text, self._record = triggers, text, record
        self._words = word_section(words, output)
        self._pool = ThreadPoolExecutor(1)
        self._hashes: dict[str, Future[str]] = {
            name: self._pool.submit(file_hash, files) for name, files in (hashed or {}).items()
        }

    def card(self, old: str) -> str:
        """The model card of a folder; ``old`` is that of the base, which stays if it is all."""
        if not (self._text or self._words) and old:
            return old
        head, linked = _head(self._name, old)
        words = " and ".join(f"**`{trigger}`**" for trigger in self._triggers)
        ask = f"\nWrite {words} in a prompt to get the subject.\n" if words else ""
        if reading := reading_in_words(stated_reading(self._fields, OWN), self._family):
            ask += f"\nIt reads prompts {reading}; `dora-diffusion generate` does so by itself.\n"
        ask += self._words
        rows = "\n".join(
            f"| `{row['adapter']}` | {row['strength']:g} | `{row['sha256'][:16]}` |{_knobs(row)}"
            for row in self._record
        )
        text = self._text or "{linked}, as it is.\n{ask}"
        text = text.format(linked=linked, ask=ask, rows=rows)
        return f"---\n{head}---\n\n# {self._title}\n\n{text}"

    def draft(self) -> dict[str, str]:
        """The metadata with zeros for the base's hashes."""
        return self._with(dict.fromkeys(self._hashes, _UNKNOWN_HASH))

    def final(self) -> dict[str, str]:
        """The metadata; waits for the hashes."""
        return self._with({name: future.result() for name, future in self._hashes.items()})

    def close(self) -> None:
        """Cancel hashes that nobody waits for any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _with(self, hashes: Mapping[str, str]) -> dict[str, str]:
        base = {"name": self._name} | ({"sha256": dict(hashes)} if hashes else {})
        return {**self._fields, BASE: json.dumps(base)}


def word_section(words: Sequence[tuple[str, Path]], folder: Path) -> str:
    """Return the card's section on loading trained words; empty where there are none.

    Args:
        words: The words and their files.
        folder: A folder that the files are in, whose name their paths begin with.
    """
    if not words:
        return ""
    around = folder.resolve().parent
    paths = [(word, file.resolve().relative_to(around).as_posix()) for word, file in words]
    loads = [f"load_word({json.dumps(w, ensure_ascii=False)}, {json.dumps(p)})" for w, p in paths]
    stems = [file.stem for _, file in words]
    return _WORDS_TEXT.format(
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
    adapters: Sequence[AdapterFile],
    output: Path,
    words: Sequence[tuple[str, Path]],
    base: BaseModel,
) -> ModelMetadata:
    """Return the metadata of a model with adapters merged in.

    Args:
        model: The base.
        spec: What is merged.
        adapters: What it has read.
        output: What is written.
        words: The trained words that go with it, and their files.
        base: What the base was opened as.
    """
    fields = {name: text for name, text in model.metadata.items() if name not in _HASHES}
    if not model.is_single_file:
        kept = (TRAINED, TRIGGER, *(OWN + name for name in READING))
        fields = {name: fields[name] for name in kept if name in fields}
    for name in (MERGED, OWN + EMBEDDINGS):
        fields.pop(name, None)
    reading = agreed_reading([adapter.metadata.extra for adapter in adapters])
    fields |= {OWN + name: text for name, text in reading.items()}
    record = spec.record()
    fields |= {MERGED: json.dumps(record)} if record else {}
    trigger = join_triggers(
        [trained_trigger(model.metadata), *(a.metadata.trigger for a in adapters)]
    )
    triggers = list(dict.fromkeys(split_triggers(trigger)))
    fields |= {TRIGGER: join_triggers(triggers)} if triggers else {}
    if output.suffix == ".safetensors":
        fields |= {OWN + name: text for name, text in field_of(file for _, file in words).items()}
        # Where there are releases of both kinds, silence tells nothing.
        usual = "" if model.family.has_two_predictions else "epsilon"
        prediction_type = model.schedule().get("prediction_type", usual)
        spoken = modelspec_fields(model.family, output.stem, ", ".join(triggers), prediction_type)
        if not prediction_type:  # of two architectures; what the base says of itself stays
            del spoken["modelspec.architecture"]
        fields |= spoken
    options = {"variant": base.variant, "revision": base.revision}
    flags = "".join(f" --{name} {value}" for name, value in options.items() if value)
    text = _MERGED_TEXT.replace("{options}", flags) if record else ""
    return ModelMetadata(
        model, output, fields, triggers, text, record=record, hashed=model.files, words=words
    )


def trained_metadata(
    model: StoredModel, metadata: AdapterMetadata, output: Path, words: Mapping[str, Path]
) -> ModelMetadata:
    """Return the metadata of a model that was trained whole, with the files of trained words."""
    steps, trigger = metadata.extra.get("training_steps", ""), metadata.trigger
    fields = {TRAINED: json.dumps({"training_steps": steps})}
    fields |= {TRIGGER: trigger} if trigger else {}
    kept = {name: metadata.extra.get(name, "") for name in (*READING, CAPTIONS)}
    kept |= field_of(words.values()) if output.suffix == ".safetensors" else {}
    fields |= {OWN + name: text for name, text in kept.items() if text}
    if output.suffix == ".safetensors":
        prediction_type = metadata.extra.get("prediction_type", "")
        fields |= modelspec_fields(model.family, output.stem, trigger, prediction_type)
    triggers = split_triggers(trigger)
    return ModelMetadata(model, output, fields, triggers, _TRAINED_TEXT, words=list(words.items()))


def trained_steps(metadata: Mapping[str, str]) -> int | None:
    """The optimizer steps that the metadata of a trained model's file tell of."""
    steps = json.loads(metadata.get(TRAINED, "{}")).get("training_steps", "")
    return int(steps) if steps.isdecimal() else None


def trained_trigger(metadata: Mapping[str, str]) -> str:
    """The trigger words that they tell of; empty where they tell of none."""
    return metadata.get(TRIGGER, "")


def _head(base: str, old: str) -> tuple[str, str]:
    """The front matter of a card, and the base's name as the text has it."""
    fields: dict[str, Any] = {"base_model": base} if _HUB_ID.fullmatch(base) else {}
    fields |= {"library_name": "diffusers", "tags": ["text-to-image"]}
    fields |= {name: value for name, value in _front_matter(old).items() if name in _LICENSE_FIELDS}
    linked = f"[{base}](https://huggingface.co/{base})" if "base_model" in fields else f"`{base}`"
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True), linked


def _knobs(adapter: Mapping[str, Any]) -> str:
    """Strengths of parts that are not 1, behind a row."""
    knobs = {k: v for k, v in adapter.items() if k not in ("adapter", "sha256", "strength")}
    return "".join(f" {name.replace('_', ' ')} {value:g}" for name, value in knobs.items())


def _front_matter(card: str) -> dict[str, Any]:
    """The YAML between the dashes at the top of a card; empty if there is none or it is damaged."""
    match = re.match(r"---\r?\n(.*?)\r?\n---\s", card, re.DOTALL)
    try:
        fields = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return fields if isinstance(fields, dict) else {}
