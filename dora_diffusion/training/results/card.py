"""Model card of a result (README)."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dora_diffusion import __version__
from dora_diffusion.config import TrainConfig, read_config_file
from dora_diffusion.config.families import FAMILIES, Family
from dora_diffusion.config.fields import shown
from dora_diffusion.config.train import run_values
from dora_diffusion.config.wording import pixels
from dora_diffusion.export.files import model_name
from dora_diffusion.export.metadata import front_matter, word_section
from dora_diffusion.formats.adapter.embeddings import EMBEDDINGS, embedding_files
from dora_diffusion.formats.adapter.metadata import (
    AdapterMetadata,
    reading_in_words,
    split_triggers,
    stated_reading,
    without_path,
)
from dora_diffusion.formats.files.runs import INPUT_AXIS_FILES
from dora_diffusion.training.inputs.subject import Subject, example_prompt, subjects_of, triggers_of
from dora_diffusion.training.results.folders import METRICS_NAME

VALIDATION_LOSS = "validation_loss"
"""Metadata key of the validation loss at the step of the result."""


def model_card(
    config: TrainConfig,
    subjects: Sequence[Subject],
    metadata: AdapterMetadata,
    written: Path,
    report: str,
    samples: Mapping[str, str],
) -> str:
    """Return the model card of a result: trigger words, sample images, usage and training.

    Args:
        config: Settings of the run.
        subjects: Subjects of the run.
        metadata: Metadata of the adapter.
        written: Adapter file or model folder.
        report: Summary of the trained parameters.
        samples: Caption -> path of an image, relative to the card.
    """
    base = without_path(metadata.base_model)
    trigger, first = triggers_of(subjects), subjects[0].settings
    prompt = example_prompt(config)
    images = "".join(
        f"\n**{caption}**\n\n![{caption}]({path})\n" for caption, path in samples.items()
    )
    steps = metadata.extra["training_steps"]
    measured = _validation(config, metadata, written)
    _, method = _method(config)
    family, size = FAMILIES[metadata.family], pixels(metadata.resolutions)
    stated = stated_reading(metadata.extra)
    reading, skip = reading_in_words(stated, family), stated.get("clip_skip", 0)
    call = _literal(prompt)
    call += "".join(f', {name}=load_image("my_{name}.png")' for name in family.image_arguments)
    call += f", clip_skip={skip}" if skip else ""
    read = f"\nPrompts were read {reading}; `generate` does so by itself.\n" if reading else ""
    if other := metadata.extra.get("init_adapter"):
        method += f", started from `{other}` (SHA-256 {metadata.extra['init_adapter_sha256'][:12]})"
    title = trigger or Path(config.output_dir).name
    head = _head(config, first, metadata, written, title, samples)
    return f"""{head}
# {title}

{_trigger_sentence(config, trigger, prompt)}
{read}{images}
## Use it
{_use(config, family, base, written, prompt, call)}{_words(config, written)}
## How it was made

{method} on `{base}`,
trained with dora_diffusion {__version__} at {size} for {steps} steps: {report}.
All settings are in `config.yaml`; the loss of every step is in `metrics.jsonl`, versions and
machine are in `run.json`.{measured}
"""


def _head(
    config: TrainConfig,
    subject: TrainConfig,
    metadata: AdapterMetadata,
    written: Path,
    title: str,
    samples: Mapping[str, str],
) -> str:
    """Return the front matter. The hub's template shows an adapter's sample and prompt."""
    text = example_prompt(config) or title
    tags = ["text-to-image", _method(config)[0], config.describe().tag]
    fields = {
        "library_name": "" if written.name in INPUT_AXIS_FILES.values() else "diffusers",
        "instance_prompt": subject.instance_prompt,
        "tags": [*tags, "template:sd-lora"] if config.trains_adapters else tags,
        # The first image is the result's.
        "widget": [{"text": text, "output": {"url": path}} for path in samples.values()][:1],
        "model-index": _model_index(title, metadata, config),
    }
    source, family = Path(metadata.base_model), FAMILIES[metadata.family]
    name = model_name(source) if source.exists() else metadata.base_model
    return front_matter(name, family, "adapter" if config.trains_adapters else "finetune", fields)


def _model_index(
    title: str, metadata: AdapterMetadata, config: TrainConfig
) -> list[dict[str, Any]]:
    """Return the figures that the run measured, in the hub's form; empty if there are none."""
    figures = {}
    if VALIDATION_LOSS in metadata.extra:
        figures["Validation loss"] = float(metadata.extra[VALIDATION_LOSS])
    steps = int(metadata.extra["training_steps"])
    log = Path(config.output_dir) / METRICS_NAME
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    for row in map(json.loads, filter(None, lines)):
        if row.get("step") == steps and "validation_similarity" in row:
            figures["Similarity to the photos"] = row["validation_similarity"]
    metrics = [
        {"type": name.lower().replace(" ", "_"), "name": name, "value": value}
        for name, value in figures.items()
    ]
    task = {"type": "text-to-image", "name": "Text-to-Image"}
    dataset = {"type": "imagefolder", "name": "Held-out photos"}
    results = [{"task": task, "dataset": dataset, "metrics": metrics}]
    return [{"name": title, "results": results}] if metrics else []


def _validation(config: TrainConfig, metadata: AdapterMetadata, written: Path) -> str:
    """Return a sentence on the validation loss; empty if the step has none."""
    if VALIDATION_LOSS not in metadata.extra:
        return ""
    is_result = written.parent.resolve() == Path(config.output_dir).resolve()
    lowest = ", the lowest of the run" if config.keep_best and is_result else ""
    return (
        f"\nThe validation loss, on held-out photos, is {metadata.extra[VALIDATION_LOSS]} at step "
        f"{metadata.extra['training_steps']}{lowest}."
    )


def _method(config: TrainConfig) -> tuple[str, str]:
    """Return the method as a tag and as text."""
    if method := config.describe().method:
        return method
    adapter = config.adapter("unet")
    name, ranks = adapter.description
    axis = f", norm on the {config.norm_axis} axis" if adapter.use_dora else ""
    start = f", started by {config.init}" if config.init != "random" else ""
    ranks = config.describe().ranks or ranks
    if adapter.rank_pattern:
        ranks += f", of some layers {shown(adapter.rank_pattern)}"
    return name.lower(), f"{name} ({ranks}{axis}{start})"


def _use(
    config: TrainConfig, family: Family, base: str, written: Path, prompt: str, call: str
) -> str:
    """Return the section on usage, on the command line and in Diffusers."""
    loaded = {name: str(v) for name in ("variant", "revision") if (v := getattr(config, name))}
    model = shlex.quote(base) + "".join(f" --{n} {shlex.quote(v)}" for n, v in loaded.items())
    options = [_literal(base), *(f"{name}={_literal(value)}" for name, value in loaded.items())]
    image = "".join(f" --{name} my_{name}.png" for name in family.image_arguments)
    given = config.describe().strength
    strength = f" --strength {given:g}" if given != 1 else ""
    flags = f"--prompt {shlex.quote(prompt)}{image}{strength} --output image.png"
    imports = "\nfrom diffusers.utils import load_image" if family.image_arguments else ""
    folder = written.parent.name
    folder = folder if config.trains_adapters else f"{folder}/{written.name}"
    quoted, source, load, needs = shlex.quote(folder), ", ".join(options), "", ""
    parts, made = "", f"pipeline({call}).images[0]"
    if family.is_modular:
        variant = [option for option in options if option.startswith("variant=")]
        source = ", ".join(option for option in options if option not in variant)
        parts = f"pipeline.load_components({''.join(variant * config.trains_adapters)})\n"
        made = f'pipeline(prompt={call}, output="images")[0]'
    if not config.trains_adapters:
        commands = f"""dora-diffusion generate --base {quoted} {flags}
dora-diffusion extract --base {model} --tuned {quoted} \\
    --rank 16 --output adapter.safetensors"""
        source = _literal(folder)
    else:
        commands = f"""dora-diffusion generate --base {model} --adapter {quoted} \\
    {flags}
dora-diffusion export --base {model} --adapter {quoted}{strength} --output merged"""
        load = f'pipeline.load_lora_weights({_literal(folder)}, weight_name="{written.name}")\n'
        if strength and config.method_name == "lora":
            # For DoRA, the scale of Diffusers differs from the strength.
            name = _literal(config.describe().tag)
            load = load.replace(")\n", f", adapter_name={name})\n")
            load += f"pipeline.set_adapters({name}, {given:.1f})\n"
        needs = ", which needs PEFT for an adapter (`pip install peft`)"
        if base.startswith("embedded:"):
            source = f'model_folder("{base.removeprefix("embedded:")}")'
            imports += "\nfrom dora_diffusion.models.embedded import model_folder"
    example = f"""In Diffusers{needs}:

```python
from diffusers import {family.auto_pipeline}{imports}

pipeline = {family.auto_pipeline}.from_pretrained({source})
{parts}{load}image = {made}
```"""
    if written.name in INPUT_AXIS_FILES.values():
        programs = "kohya's key format, which ComfyUI 0.3.64, Forge and A1111 compute"
        if not family.has_unet:
            programs = "ComfyUI's names, which ComfyUI computes"
        example = (
            "The magnitudes are on the input axis, which Diffusers cannot load. "
            f"`{written.name}` has {programs} as it was trained. Their handling of DoRA may "
            "change; the merged model of the second command is exact in every program."
        )
    return f"\n```bash\n{commands}\n```\n\n{example}\n"


def _words(config: TrainConfig, written: Path) -> str:
    """Return the section on loading new words; empty if there are none."""
    words = config.describe().words
    if not words:
        return ""
    folder = written.parent if config.trains_adapters else written
    files = embedding_files(folder, "", words)
    section = word_section(list(files.items()), written.parent)
    if config.uses("single_file") and config.single_file:
        section += (
            f"\n`{written.name}.safetensors` has the same files in `{EMBEDDINGS}` next to it.\n"
        )
    return section


def _literal(text: str) -> str:
    """Return a text as a Python string literal in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _trigger_sentence(config: TrainConfig, trigger: str, prompt: str) -> str:
    if usage := config.describe().usage:
        return usage
    if triggers := split_triggers(trigger):
        which = "the subject" if len(triggers) == 1 else "that subject"
        return f"Write {' or '.join(f'**`{t}`**' for t in triggers)} in a prompt to get {which}."
    such_as = f", such as `{prompt}`" if prompt else ""
    return (
        f"It is a style and has no trigger word: write prompts like its captions{such_as}. A lower "
        "`--strength` shows less of it."
    )


def card_of(folder: Path, adapter: Path) -> str:
    """Return the model card of an adapter of a run: the existing one, or one for a checkpoint.

    Args:
        folder: Output folder of the run.
        adapter: Adapter file of the run.

    Raises:
        ValueError, OSError: If the config.yaml of the run or the adapter cannot be read.
    """
    written = folder / "README.md"
    if adapter.parent == folder and written.is_file():
        return written.read_text(encoding="utf-8")
    config = TrainConfig.from_dict(run_values(read_config_file(folder / "config.yaml")))
    from dora_diffusion.formats.adapter.inspect import report_on

    report = report_on(adapter)
    steps = int(report.metadata.extra["training_steps"])
    sample = folder / "samples" / f"step-{steps:06d}.png"
    samples = {f"At step {steps}": f"samples/{sample.name}"} if sample.is_file() else {}
    layers = f"{sum(report.layers.values())} layers"
    return model_card(config, subjects_of(config), report.metadata, adapter, layers, samples)
