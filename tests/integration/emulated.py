"""Parts of runs on emulated GPUs, and what they are compared with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from dora_diffusion.adapters.inject import merge_adapters, unmerge_adapters
from dora_diffusion.adapters.state import load_adapter_state
from dora_diffusion.config import TrainConfig
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.models.components import Components
from dora_diffusion.numerics.weights import LayerWeights
from dora_diffusion.sampling.generate import generate_images
from dora_diffusion.sampling.load import load_adapted
from dora_diffusion.sampling.settings import SamplingSettings

SAMPLES = Path(__file__).parents[2] / "samples"
PARTS = ("down", "up", "magnitude")

FULL = {
    "targets": ["full"], "train_text_encoder": True, "conv_rank": 2, "num_validation_images": 1,
    "with_prior_preservation": True, "prior_preservation_mode": "images", "num_class_images": 2,
    "snr_gamma": 5.0, "noise_offset": 0.05, "gradient_accumulation_steps": 2,
    "checkpointing_steps": 1,
}  # fmt: skip
CHECKPOINTED = {
    "targets": ["attention+conv"], "norm_axis": "input", "gradient_checkpointing": True,
    "lora_dropout": 0.2, "train_text_encoder": True, "conv_rank": 2,
    "with_prior_preservation": True, "prior_preservation_mode": "image-free",
}  # fmt: skip


def figures(config: TrainConfig, name: str) -> list[float]:
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)[name] for line in lines]


def assert_learned(actual: Path, expected: Path) -> None:
    """Two runs' adapters are one, to what rounding makes of it in two steps of AdamW."""
    adapter, wanted = read_adapter(actual).layers, read_adapter(expected).layers
    assert adapter.keys() == wanted.keys()
    for name, layer in wanted.items():
        for part in PARTS:
            found, reference = getattr(adapter[name], part), getattr(layer, part)
            assert (found - reference).norm() <= 0.02 * reference.norm() + 1e-4, (name, part)


def sample(components: Components, settings: SamplingSettings) -> np.ndarray:
    images = generate_images(components, "a photo of a sks dog", [1], settings)
    return np.stack([np.asarray(image, np.int16) for image in images])


def images_of(
    folder: Path, adapters: list[dict[str, LayerWeights]], device: str | None = None
) -> np.ndarray:
    """An image with adapters on a model, merged where there are several."""
    components, _ = load_adapted(folder, device=device)
    models = components.adaptable().values()
    for number, layers in enumerate(adapters):
        load_adapter_state(components.adaptable(), layers, name=str(number))
    if len(adapters) > 1:
        for model in models:
            merge_adapters(model, keep_base=True)
    image = sample(components, SamplingSettings(2, 4.0, "ddim", 32, 32))
    for model in models:
        unmerge_adapters(model)
    return image
