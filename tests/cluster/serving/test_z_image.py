"""Serving of Z-Image: answers of a batch are the images of Diffusers, with notes."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ZImagePipeline
from PIL import Image

from dora_diffusion.cluster.serving.engine import ApiRequest, BatchItem, Engine, Refusal
from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter
from dora_diffusion.sampling.images import parse_parameters
from tests.z_image import write_z_image

OPTIONS: dict[str, Any] = {"clip_skip": None, "max_token_length": None}


def test_a_batch_of_adapters_is_answered(
    tmp_path: Path, random_adapter: Callable[..., Any]
) -> None:
    folder = write_z_image(tmp_path / "model")
    layers = random_adapter(folder, components=("transformer",), every=3)
    layers = {name: layer for name, layer in layers.items() if ".layers." in name}
    file = write_adapter(
        tmp_path / "first.safetensors", AdapterFile(layers, AdapterMetadata("z-image"))
    )
    shared: dict[str, Any] = {"steps": 3, "guidance_scale": 4.0, "width": 96, "scheduler": "euler"}
    items = [
        BatchItem(ApiRequest(prompt="a dog", adapter="first", **shared), 3, file),
        BatchItem(ApiRequest(prompt="a (dog:1.2) on a long road", **shared), 4, None),
    ]
    engine = Engine.load(str(folder), 2**30, OPTIONS)
    answers = engine.answer(items).answers
    for (request, seed, adapter), answer in zip(items, answers, strict=True):
        pipeline = ZImagePipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        if adapter is not None:
            pipeline.load_lora_weights(adapter)
        (expected,) = pipeline(
            request.prompt, width=96, height=64, num_inference_steps=3, guidance_scale=3.0,
            generator=torch.Generator().manual_seed(seed),
        ).images  # fmt: skip
        assert not isinstance(answer, Exception)
        with Image.open(io.BytesIO(answer.png)) as image:
            difference = np.asarray(image, np.int16) - np.asarray(expected, np.int16)
            fields = parse_parameters(image.info["parameters"])
        assert np.abs(difference).max() <= 1
        assert answer.notes == (
            "scheduler has no effect on Z-Image: it samples with the scheduler of its flow alone",
        )
        assert fields["Size"] == "96x64"
        assert "Sampler" not in fields
    small = ApiRequest(prompt="a dog", width=72, steps=1)
    (refusal,) = engine.answer([BatchItem(small, 1, None)]).answers
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.line) == (
        422, "width is 72; on Z-Image it must be a multiple of 16, such as 64",
    )  # fmt: skip
