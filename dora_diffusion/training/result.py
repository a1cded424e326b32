"""What a run leaves behind: the adapter file, its facts, and the model card."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from dora_diffusion import __version__
from dora_diffusion.config import TrainConfig
from dora_diffusion.config.derived import as_yaml
from dora_diffusion.config.file import SEGMENTS
from dora_diffusion.data.captions import tag_frequency
from dora_diffusion.formats.adapter.base_targets import TARGETS
from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter
from dora_diffusion.formats.adapter.metadata import UNET_LAYERS, without_path
from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.formats.names.sgm_blocks import UNetLayout
from dora_diffusion.images import thumbnail
from dora_diffusion.models.components import Components
from dora_diffusion.numerics.weights import LayerWeights
from dora_diffusion.training.continuity import Segment, told_apart
from dora_diffusion.training.subject import Subject

KOHYA_FILE = "dora_kohya.safetensors"
_SAMPLE = re.compile(r"(base|adapted|base_above_adapted|step-\d+)\.png")


def save_config(config: TrainConfig, path: Path, segments: Sequence[Segment] = ()) -> Path:
    """Write the resolved settings, which ``--config`` reads back.

    The settings are those of the last segment. Where a resumed run changed some, ``segments``
    says from which step on each value was used. Resuming and overwriting were asked for once: kept
    in the file, they would act on every run that is made from it.
    """
    config = dataclasses.replace(config, resume_from_checkpoint=None, overwrite_output_dir=False)
    text, apart = as_yaml(config), told_apart(segments)
    if apart:
        record = yaml.safe_dump({SEGMENTS: apart}, sort_keys=False, allow_unicode=True)
        text = f"# Of a resumed run: see segments for what changed.\n{text}{record}"
    return save_text(path, text)


def drop_result(folder: Path) -> None:
    """Remove what an earlier run left in a folder, so that nothing takes it for the next one's."""
    adapters = [folder / name for name in (TARGETS["diffusers"].file_name, KOHYA_FILE) if name]
    if not any(adapter.is_file() for adapter in adapters):
        return
    samples = [p for p in folder.glob("samples/*.png") if _SAMPLE.fullmatch(p.name)]
    for path in (*adapters, folder / "README.md", *samples):
        path.unlink(missing_ok=True)


def adapter_metadata(
    components: Components,
    config: TrainConfig,
    subject: Subject,
    resolution: int,
    steps: int,
    captions: Sequence[str],
) -> AdapterMetadata:
    """The facts that go into the adapter file."""
    return AdapterMetadata(
        family=components.family.name,
        base_model=config.pretrained_model_name_or_path,
        trigger=subject.trigger,
        resolution=resolution,
        extra={
            "prediction_type": components.prediction_type,
            "training_steps": str(steps),
            "software": f"dora_diffusion {__version__}",
            UNET_LAYERS: UNetLayout.from_config(components.unet.config).text(),
        },
        tags=(subject.class_word,) if subject.class_word else (),
        tag_frequency=tag_frequency(captions),
    )


def write_result_adapter(
    folder: Path,
    layers: Mapping[str, LayerWeights],
    metadata: AdapterMetadata,
    layout: UNetLayout | None,
    picture: Path | None = None,
) -> Path:
    """Write the adapter where every tool reads it exactly.

    An output-axis adapter is written in the Diffusers spelling. That spelling cannot hold a
    magnitude on the input axis, which therefore is written in the kohya form. ``picture`` is shown
    small by adapter managers: a sample, never a photo of somebody's.
    """
    if picture is not None:
        metadata = dataclasses.replace(metadata, thumbnail=thumbnail(picture))
    adapter = AdapterFile(dict(layers), metadata)
    on_input = any(
        layer.magnitude is not None and layer.norm_axis == "input" for layer in layers.values()
    )
    if on_input:
        return write_adapter(folder / KOHYA_FILE, adapter, "kohya", unet_layout=layout)
    return write_adapter(folder, adapter, "diffusers")


def model_card(
    config: TrainConfig,
    subject: Subject,
    metadata: AdapterMetadata,
    adapter: Path,
    report: str,
    samples: Mapping[str, str],
) -> str:
    """The README of a result, with the trigger word first, its images, and how to use it.

    Args:
        config: The run's settings.
        subject: Token and class word.
        metadata: The adapter's facts.
        adapter: The adapter file.
        report: What was adapted.
        samples: Caption -> path of an image, relative to the card.
    """
    base = without_path(metadata.base_model)
    prompt = config.validation_prompt[0] if config.validation_prompt else config.instance_prompt
    method = "DoRA" if config.use_dora else "LoRA"
    axis = f", norm on the {config.norm_axis} axis" if config.use_dora else ""
    images = "".join(
        f"\n**{caption}**\n\n![{caption}]({path})\n" for caption, path in samples.items()
    )
    steps = metadata.extra["training_steps"]
    library = "" if adapter.name == KOHYA_FILE else "\nlibrary_name: diffusers"
    return f"""---
base_model: {base}
instance_prompt: {json.dumps(config.instance_prompt, ensure_ascii=False)}{library}
tags: [text-to-image, {method.lower()}, dreambooth]
---

# {subject.trigger or Path(config.output_dir).name}

{_trigger_sentence(subject, prompt or "")}
{images}
## Use it

```bash
dora-diffusion generate --base {base} --adapter {adapter.parent.name} \\
    --prompt "{prompt}" --output image.png
dora-diffusion export --base {base} --adapter {adapter.parent.name} --output merged
```
{_diffusers_example(base, adapter, prompt or "")}
## How it was made

{method} (rank {config.rank}, convolutions {config.conv_rank}{axis}) on `{base}`, trained with
dora_diffusion {__version__} at {metadata.resolution} px for {steps} steps: {report}.
All settings are in `config.yaml`; the loss of every step is in `metrics.jsonl`.
"""


def _trigger_sentence(subject: Subject, prompt: str) -> str:
    if subject.trigger:
        return f"Write **`{subject.trigger}`** in a prompt to get the subject."
    return f"It has no trigger word: write prompts like its captions, such as `{prompt}`."


def _diffusers_example(base: str, adapter: Path, prompt: str) -> str:
    if adapter.name == KOHYA_FILE:
        return (
            "\nThe magnitudes are on the input axis, which Diffusers cannot load: "
            f"`{adapter.name}` is in the kohya form, which ComfyUI 0.3.64, Forge and A1111 compute "
            "as it was trained. What they compute from a DoRA may change; the merged model of the "
            "second command is exact in every program, and stays so.\n"
        )
    source, helper = f'"{base}"', ""
    if base.startswith("embedded:"):
        source = f'model_folder("{base.removeprefix("embedded:")}")'
        helper = "\nfrom dora_diffusion.toy import model_folder"
    return f"""
In Diffusers:

```python
from diffusers import AutoPipelineForText2Image{helper}

pipeline = AutoPipelineForText2Image.from_pretrained({source})
pipeline.load_lora_weights("{adapter.parent.name}", weight_name="{adapter.name}")
image = pipeline("{prompt}").images[0]
```
"""
