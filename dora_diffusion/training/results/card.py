"""The model card of a result: its README."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from dora_diffusion import __version__
from dora_diffusion.config import TrainConfig, read_config_file
from dora_diffusion.config.families import FAMILIES, Family
from dora_diffusion.config.wording import pixels
from dora_diffusion.export.metadata import word_section
from dora_diffusion.formats.adapter.embeddings import EMBEDDINGS, embedding_files
from dora_diffusion.formats.adapter.file import AdapterMetadata
from dora_diffusion.formats.adapter.inspect import report_on
from dora_diffusion.formats.adapter.metadata import (
    reading_in_words,
    split_triggers,
    stated_reading,
    without_path,
)
from dora_diffusion.training.inputs.subject import Subject, example_prompt, subjects_of, triggers_of

KOHYA_FILE = "dora_kohya.safetensors"
VALIDATION_LOSS = "validation_loss"
"""Field of the metadata: the loss on held-out photos at the step that was written."""


def model_card(
    config: TrainConfig,
    subjects: Sequence[Subject],
    metadata: AdapterMetadata,
    written: Path,
    report: str,
    samples: Mapping[str, str],
) -> str:
    """The README of a result, with the trigger word first, its images, and how to use it.

    Args:
        config: The run's settings.
        subjects: What was taught.
        metadata: The adapter's metadata.
        written: The adapter file, or the folder of the model.
        report: What was trained.
        samples: Caption -> path of an image, relative to the card.
    """
    base = without_path(metadata.base_model)
    trigger, first = triggers_of(subjects), subjects[0].settings
    prompt = example_prompt(config)
    images = "".join(
        f"\n**{caption}**\n\n![{caption}]({path})\n" for caption, path in samples.items()
    )
    steps, loss = metadata.extra["training_steps"], _validation(config, metadata, written)
    library = "" if written.name == KOHYA_FILE else "\nlibrary_name: diffusers"
    tag, method = _method(config)
    use = _use_of_model if config.is_full else _use_of_adapter
    names = ("variant", "revision")
    loaded = {name: str(value) for name in names if (value := getattr(config, name))}
    family, size = FAMILIES[metadata.family], pixels(metadata.resolutions)
    stated = stated_reading(metadata.extra)
    reading, skip = reading_in_words(stated, family), stated.get("clip_skip", 0)
    called = _images(family) + (f", clip_skip={skip}" if skip else "")
    read = f"\nPrompts were read {reading}; `generate` does so by itself.\n" if reading else ""
    if other := metadata.extra.get("init_adapter"):
        method += f", started from `{other}` (SHA-256 {metadata.extra['init_adapter_sha256'][:12]})"
    return f"""---
base_model: {base}
instance_prompt: {json.dumps(first.instance_prompt, ensure_ascii=False)}{library}
tags: [text-to-image, {tag}, dreambooth]
---

# {trigger or Path(config.output_dir).name}

{_trigger_sentence(trigger, prompt)}
{read}{images}
## Use it
{use(family, base, written, prompt, loaded, called)}{_words(config, written)}
## How it was made

{method} on `{base}`,
trained with dora_diffusion {__version__} at {size} for {steps} steps: {report}.
All settings are in `config.yaml`; the loss of every step is in `metrics.jsonl`.{loss}
"""


def _validation(config: TrainConfig, metadata: AdapterMetadata, written: Path) -> str:
    """The loss on held-out photos, as a sentence; empty where none was taken at this step."""
    if VALIDATION_LOSS not in metadata.extra:
        return ""
    is_result = written.parent.resolve() == Path(config.output_dir).resolve()
    lowest = ", the lowest of the run" if config.keep_best and is_result else ""
    return (
        f"\nThe validation loss, on held-out photos, is {metadata.extra[VALIDATION_LOSS]} at step "
        f"{metadata.extra['training_steps']}{lowest}."
    )


def _method(config: TrainConfig) -> tuple[str, str]:
    """The method as a tag, and in words."""
    if config.is_full:
        return "full-finetuning", "Full fine-tuning"
    is_dora = config.method_name == "dora"
    name = "DoRA" if is_dora else "LoRA"
    if config.parametrization == "vera":
        name = "DVoRA" if is_dora else "VeRA"
    axis = f", norm on the {config.norm_axis} axis" if is_dora else ""
    start = f", started by {config.init}" if config.init != "random" else ""
    return name.lower(), f"{name} ({_ranks(config)}{axis}{start})"


def _ranks(config: TrainConfig) -> str:
    if config.parametrization == "vera":
        return f"projections of rank {config.vera_rank}"
    if config.parametrization == "adalora":
        return f"ranks allocated to layers, from {config.rank}, convolutions {config.conv_rank}"
    return f"rank {config.rank}, convolutions {config.conv_rank}"


def _use_of_adapter(
    family: Family, base: str, adapter: Path, prompt: str, loaded: Mapping[str, str], called: str
) -> str:
    model, folder = _model(base, loaded), shlex.quote(adapter.parent.name)
    flags = _image_flags(family)
    return f"""
```bash
dora-diffusion generate --base {model} --adapter {folder} \\
    --prompt {shlex.quote(prompt)}{flags} --output image.png
dora-diffusion export --base {model} --adapter {folder} --output merged
```
{_diffusers_example(family, base, adapter, prompt, loaded, called)}"""


def _model(base: str, loaded: Mapping[str, str]) -> str:
    """A base model, and which of its weights, for a shell."""
    flags = (f" --{name} {shlex.quote(value)}" for name, value in loaded.items())
    return shlex.quote(base) + "".join(flags)


def _use_of_model(
    family: Family, base: str, model: Path, prompt: str, loaded: Mapping[str, str], called: str
) -> str:
    folder = f"{model.parent.name}/{model.name}"
    quoted, flags = shlex.quote(folder), _image_flags(family)
    return f"""
```bash
dora-diffusion generate --base {quoted} --prompt {shlex.quote(prompt)}{flags} --output image.png
dora-diffusion extract --base {_model(base, loaded)} --tuned {quoted} \\
    --rank 16 --output adapter.safetensors
```

In Diffusers:

```python
from diffusers import {family.auto_pipeline}{_image_import(family)}

pipeline = {family.auto_pipeline}.from_pretrained({_literal(folder)})
image = pipeline({_literal(prompt)}{called}).images[0]
```
"""


def _words(config: TrainConfig, written: Path) -> str:
    """Return the section on loading the new words."""
    folder = written if config.is_full else written.parent
    files = embedding_files(folder, "", config.words)
    section = word_section(list(files.items()), written.parent)
    if section and config.is_full and config.single_file:
        section += (
            f"\n`{written.name}.safetensors` has the same files in `{EMBEDDINGS}` next to it.\n"
        )
    return section


def _image_flags(family: Family) -> str:
    return "".join(f" --{name} my_{name}.png" for name in family.image_arguments)


def _image_import(family: Family) -> str:
    return "\nfrom diffusers.utils import load_image" if family.image_arguments else ""


def _images(family: Family) -> str:
    return "".join(f', {name}=load_image("my_{name}.png")' for name in family.image_arguments)


def _literal(text: str) -> str:
    """A text as a Python string in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _trigger_sentence(trigger: str, prompt: str) -> str:
    if triggers := split_triggers(trigger):
        which = "the subject" if len(triggers) == 1 else "that subject"
        return f"Write {' or '.join(f'**`{t}`**' for t in triggers)} in a prompt to get {which}."
    such_as = f", such as `{prompt}`" if prompt else ""
    return (
        f"It is a style and has no trigger word: write prompts like its captions{such_as}. A lower "
        "`--strength` shows less of it."
    )


def _diffusers_example(
    family: Family, base: str, adapter: Path, prompt: str, loaded: Mapping[str, str], called: str
) -> str:
    if adapter.name == KOHYA_FILE:
        return (
            "\nThe magnitudes are on the input axis, which Diffusers cannot load: "
            f"`{adapter.name}` is in the kohya form, which ComfyUI 0.3.64, Forge and A1111 compute "
            "as it was trained. What they compute from a DoRA may change; the merged model of the "
            "second command is exact in every program, and stays so.\n"
        )
    options = (f"{name}={_literal(value)}" for name, value in loaded.items())
    source, helper = ", ".join([_literal(base), *options]), ""
    if base.startswith("embedded:"):
        source = f'model_folder("{base.removeprefix("embedded:")}")'
        helper = "\nfrom dora_diffusion.models.embedded import model_folder"
    return f"""
In Diffusers, which needs PEFT for an adapter (`pip install peft`):

```python
from diffusers import {family.auto_pipeline}{_image_import(family)}{helper}

pipeline = {family.auto_pipeline}.from_pretrained({source})
pipeline.load_lora_weights({_literal(adapter.parent.name)}, weight_name="{adapter.name}")
image = pipeline({_literal(prompt)}{called}).images[0]
```
"""


def card_of(folder: Path, adapter: Path) -> str:
    """The model card of a run's adapter: the trainer's, or one of another checkpoint.

    Args:
        folder: The run's.
        adapter: An adapter file of it.

    Raises:
        ValueError, OSError: If the run's config.yaml or the adapter cannot be read.
    """
    written = folder / "README.md"
    if adapter.parent == folder and written.is_file():
        return written.read_text(encoding="utf-8")
    config = TrainConfig.from_dict(read_config_file(folder / "config.yaml"))
    report = report_on(adapter)
    steps = int(report.metadata.extra["training_steps"])
    sample = folder / "samples" / f"step-{steps:06d}.png"
    samples = {f"At step {steps}": f"samples/{sample.name}"} if sample.is_file() else {}
    layers = f"{sum(report.layers.values())} layers"
    return model_card(config, subjects_of(config), report.metadata, adapter, layers, samples)
