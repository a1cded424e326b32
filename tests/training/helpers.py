"""Helpers of several tests of training: settings, and readers of what a run leaves."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections import namedtuple
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from PIL import Image

from dora_diffusion.adapters.compiled import compile_blocks
from dora_diffusion.adapters.inject import disabled
from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.config.features.slider import pairs_of
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.models.components import Components
from dora_diffusion.training.batch import Batch
from dora_diffusion.training.conditioner import Conditioner
from dora_diffusion.training.features.prior import Prior, Unmasked
from dora_diffusion.training.features.slider import Slider
from dora_diffusion.training.inputs.plan import plan_run
from dora_diffusion.training.optimizer import _LIBRARIES, optimizer_library
from dora_diffusion.training.prediction import Ask, Drawn, Question, answer
from dora_diffusion.training.processes import make_accelerator
from dora_diffusion.training.recipe import assemble, train
from dora_diffusion.training.run import Run
from dora_diffusion.training.step import Step
from dora_diffusion.training.terms import (
    Denoising,
    RowLoss,
    Term,
    mean_losses,
    squared_error,
)

SAMPLES = Path(__file__).parents[2] / "samples"
T = TypeVar("T")
Usage = namedtuple("Usage", "total used free")


@lru_cache
def _shrunk() -> tempfile.TemporaryDirectory[str]:
    """The samples' photos at 192 pixels, as long as the process lives: large ones take long."""
    home = tempfile.TemporaryDirectory()
    for photo in sorted(SAMPLES.glob("*/*.jpg")):
        small = Path(home.name, photo.parent.name, photo.name)
        small.parent.mkdir(exist_ok=True)
        with Image.open(photo) as image:
            image.resize((image.width // 4, image.height // 4)).save(small, quality=95)
        if (caption := photo.with_suffix(".txt")).is_file():
            shutil.copy(caption, small.parent)
    return home


def small_samples() -> Path:
    """A folder of the samples with small photos and their captions; to be read, or copied."""
    return Path(_shrunk().name)


def make_config(model, photos, output_dir, **kwargs):
    settings = {
        "pretrained_model_name_or_path": str(model),
        "instance_data_dir": str(photos),
        "instance_prompt": "a photo of a sks mug",
        "output_dir": str(output_dir),
        "resolution": 32,
        "rank": 2,
        "conv_rank": 2,
        "max_train_steps": 4,
        "learning_rate": 1e-3,
        "text_encoder_lr": 1e-3,
        "num_validation_images": 0,
        "validation_inference_steps": 2,
        "checkpointing_steps": 0,
        "seed": 3,
    }
    return TrainConfig(**{**settings, **kwargs})


def needs_library(optimizer: str) -> None:
    """Skip a test where an optimizer's library is not installed."""
    try:
        optimizer_library(optimizer)
    except ConfigError:
        pytest.skip(f"{_LIBRARIES[optimizer]} is not installed")


def open_run(model: Path, photos: Path, output: Path, **settings: object) -> Run:
    config = TrainConfig(
        pretrained_model_name_or_path=str(model),
        instance_data_dir=str(photos),
        instance_prompt="a photo of a sks mug",
        output_dir=str(output),
        **{
            "resolution": 64,
            "max_train_steps": 4,
            "seed": 3,
            "rank": 2,
            "conv_rank": 2,
            **settings,
        },
    )
    return moved(assemble(plan_run(config), make_accelerator(config)))


def moved(run: Run) -> Run:
    """A run whose weights are all moved: a fresh adapter is the base."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in run.weights.parameters().values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter * (1 + 0.1 * noise) + 0.05 * noise)
    return run


def terms_of(
    components: Components,
    *,
    snr_gamma: float = 0.0,
    unmasked_prior: float = 0.0,
    huber: str = "",
    slider: TrainConfig | None = None,
) -> list[Term]:
    """Terms of a loss, with the prior of class captions, or those of a slider."""
    process = components.process
    delta = partial(process.huber_delta, schedule=huber, c=0.1) if huber else squared_error
    loss = RowLoss(process, snr_gamma, delta)
    if slider is not None:
        pairs = {t: [e for p, e in pairs_of(slider) if p == t] for t in slider.target}
        return [Slider(loss, pairs, slider.slider_guidance)]
    unmasked = [Unmasked(loss, unmasked_prior)] if unmasked_prior else []
    return [Denoising(loss), Prior(loss), *unmasked]


def losses_by(
    components: Components,
    terms: Sequence[Term],
    batch: Batch,
    *,
    train_text_encoder: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of subject and prior of a batch."""
    encode = Conditioner(components, train_text_encoder)
    drawn = Drawn(batch, [[Question(a, batch, encode) for a in t.asks(batch)] for t in terms])
    base = partial(disabled, *components.adaptable().values())
    answers = answer(components, drawn.distinct(), base)
    parts = [(t, q) for t, q in zip(terms, drawn.questions, strict=True) if q]
    return mean_losses(batch, [t.losses(batch, *map(answers.__getitem__, q)) for t, q in parts])


def predictions_of(step: Step, batch: Batch) -> torch.Tensor:
    """Predictions of a step's model, as it is, for all rows of a batch."""
    question = Question(Ask(batch.captions), batch, step.encode)
    return answer(step.components, [question], nullcontext)[question]


def hook_of(step: Step, kind: type[T]) -> T:
    """The feature of a run of some kind."""
    (hook,) = (hook for hook in step.hooks if isinstance(hook, kind))
    return hook


def accelerator_of_fp16(config: TrainConfig, scale: float = 2.0**10) -> Any:
    """Set up fp16 as Accelerate does on a GPU, on this CPU: autocast and a gradient scaler."""
    accelerator = make_accelerator(replace(config, mixed_precision="no"))
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return accelerator


def warnings_of(config):
    """The warnings of a run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(config)
    return [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


def losses(folder, figure="loss"):
    lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if figure in record]
    return {record["step"]: record[figure] for record in records}


def steps_in(folder: Path) -> list[int]:
    return [
        json.loads(line)["step"]
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def assert_same_adapter(first, second, **tolerance):
    first, second = read_adapter(first).layers, read_adapter(second).layers
    assert set(first) == set(second)
    for name, layer in first.items():
        for part in ("down", "up", "magnitude"):
            torch.testing.assert_close(
                getattr(layer, part),
                getattr(second[name], part),
                **{"rtol": 0, "atol": 0, **tolerance},
            )


def same(first: Path, second: Path) -> bool:
    first, second = read_adapter(first).layers, read_adapter(second).layers
    return set(first) == set(second) and all(
        torch.equal(getattr(layer, part), getattr(second[name], part))
        for name, layer in first.items()
        for part in ("down", "up", "magnitude")
    )


def no_room(monkeypatch, free: int, real=shutil.disk_usage) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12 - free, free))


def find(sheet: Image.Image, image: Image.Image, within: int = 0) -> list[tuple[int, int]]:
    """Places of an image in a sheet, to so many of 255: (left, top) of each."""
    whole, part = (np.asarray(each.convert("RGB"), np.int16) for each in (sheet, image))
    height, width = part.shape[:2]
    return [
        (x, y)
        for y in range(whole.shape[0] - height + 1)
        for x in range(whole.shape[1] - width + 1)
        if np.abs(whole[y, x] - part[0, 0]).max() <= within
        and np.abs(whole[y : y + height, x : x + width] - part).max() <= within
    ]


def noise(size: tuple[int, int], seed: int) -> Image.Image:
    drawn = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(drawn)


def compile_without_compiler(monkeypatch: Any, backend: Any, **options: Any) -> None:
    """Have runs compile their blocks with a backend of torch that needs no C++ compiler."""
    home = "dora_diffusion.training.features.compile"
    compiled = partial(compile_blocks, backend=backend, **options)
    monkeypatch.setattr(f"{home}.compile_blocks", compiled)
    monkeypatch.setattr(f"{home}.require_compiler", lambda device: None)
    monkeypatch.setattr(
        "diffusers.UNet2DConditionModel._no_split_modules", ["BasicTransformerBlock"]
    )
    torch._dynamo.reset()
