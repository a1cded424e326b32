"""Trials of ``dora-diffusion doctor``, which run in a separate process and need torch."""

from __future__ import annotations

import tempfile
import time
import warnings
from pathlib import Path

from dora_diffusion.config import TrainConfig
from dora_diffusion.models.embedded import samples_folder
from dora_diffusion.models.load import check_components
from dora_diffusion.models.precision import precision_of
from dora_diffusion.numerics import devices

__all__ = ["check_components", "describe_device", "train_and_sample"]


def describe_device() -> str:
    """Describe the default device, its memory, and its half precisions."""
    kind = devices.default_device()
    free = devices.free_device_memory(kind) if devices.has_own_memory(kind) else None
    memory = "" if free is None else f", {free / 2**30:.1f} GiB free"
    able = {
        "bf16": kind == "cpu" or devices.has_bf16(kind),
        "fp16": devices.has_gradient_scaler(kind),
    }
    half = " and ".join(name for name, is_able in able.items() if is_able) or "no half precision"
    precision = precision_of("auto").replace("no", "float32")
    name = devices.device_name(kind)
    return f"{kind} ({name}{memory}), which trains in {precision} by default, and can in {half}"


def train_and_sample() -> str:
    """Train one step of the embedded model, sample one image, and return a line on both.

    Raises:
        Exception: If training or sampling fails.
    """
    from dora_diffusion.training.recipe import train

    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = TrainConfig(
            instance_data_dir=str(samples_folder() / "bolt_mug"),
            instance_prompt="a photo of a sks mug",
            max_train_steps=1,
            checkpointing_steps=1,
            num_validation_images=1,
            validation_inference_steps=1,
            output_dir=str(Path(folder) / "run"),
        )
        result = train(config)
        size = result.samples["adapted"].stat().st_size
    seconds = time.perf_counter() - begun
    return f"one step, and images of {size} bytes, in {seconds:.1f} s"
