"""Training, sampling and merging on an emulated Apple GPU, against the same on the CPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dora_diffusion.adapters.inject import inject_adapters
from dora_diffusion.adapters.layers import adapted_layers
from dora_diffusion.adapters.scope import norm_scope
from dora_diffusion.config import AdapterConfig, ConfigError
from dora_diffusion.config.schedulers import SCHEDULERS
from dora_diffusion.evaluation.denoising import HeldOutImages
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.numerics.devices import has_gradient_scaler
from dora_diffusion.sampling.load import load_adapted
from dora_diffusion.sampling.settings import SamplingSettings
from dora_diffusion.training.recipe import train
from tests.apple import AppleGPU, apple_gpu
from tests.integration.emulated import (
    CHECKPOINTED,
    FULL,
    SAMPLES,
    assert_learned,
    figures,
    images_of,
    sample,
)
from tests.refusal import refused

SCALES = pytest.mark.skipif(
    not has_gradient_scaler("mps"), reason="this torch does not scale gradients on Apple's GPU"
)


def was_trained_on(gpu: AppleGPU) -> None:
    assert {"convolution_backward", "native_group_norm_backward", "_fused_adamw_"} <= gpu.operators


@pytest.mark.parametrize(("family", "settings"), [("sd1", FULL), ("sdxl", CHECKPOINTED)])
def test_a_run_learns_what_it_learns_on_the_cpu(family, settings, run, request):
    """Class images, text encoders and samples in one; dropout that is recomputed in the other."""
    folder = request.getfixturevalue(f"{family}_folder")
    on_cpu, on_gpu = (run(folder, output, **settings) for output in ("cpu", "gpu"))
    expected = train(on_cpu).adapter
    with apple_gpu() as gpu:
        adapter = train(on_gpu).adapter
        was_trained_on(gpu)
    for name in ("loss", "grad_norm"):
        assert figures(on_gpu, name) == pytest.approx(figures(on_cpu, name), rel=1e-3)
    assert_learned(adapter, expected)


@pytest.mark.slow
def test_a_run_resumes(run, sd1_folder):
    whole, parts = (run(sd1_folder, name, **FULL) for name in ("whole", "parts"))
    with apple_gpu():
        expected = read_adapter(train(whole).adapter).layers
        shutil.copytree(whole.output_dir, parts.output_dir)
        shutil.rmtree(Path(parts.output_dir) / "checkpoint-2", ignore_errors=True)
        resumed = run(sd1_folder, "parts", **FULL, resume_from_checkpoint="checkpoint-1")
        adapter = read_adapter(train(resumed).adapter).layers
    assert all(torch.equal(layer.up, adapter[name].up) for name, layer in expected.items())


@pytest.mark.parametrize(
    ("has_bf16", "dtype", "tolerance"),
    [(True, torch.bfloat16, 0.03), pytest.param(False, torch.float16, 0.01, marks=SCALES)],
)
def test_auto_is_the_half_precision_that_the_device_has(
    has_bf16, dtype, tolerance, run, sd1_folder
):
    """fp16 with its gradient scaler before macOS 14, and never bfloat16 there."""
    settings = {"targets": ["full"], "conv_rank": 2, "max_train_steps": 1}
    whole = run(sd1_folder, "whole", **settings)
    half = run(sd1_folder, "half", **settings, mixed_precision="auto")
    train(whole)
    with apple_gpu(has_bf16) as gpu:
        train(half)
        was_trained_on(gpu)
        assert gpu.dtypes & {torch.bfloat16, torch.float16} == {dtype}
        assert ("_amp_update_scale_" in gpu.operators) == (dtype == torch.float16)
    assert figures(half, "loss") == pytest.approx(figures(whole, "loss"), rel=tolerance)


def test_precision_that_the_device_lacks_is_refused_in_one_line(run, sd1_folder, monkeypatch):
    with apple_gpu(has_bf16=False):
        with pytest.raises(ConfigError, match="bfloat16 on Apple's GPU needs macOS 14"):
            train(run(sd1_folder, "out", mixed_precision="bf16"))
        with pytest.raises(ConfigError, match="bfloat16 on Apple's GPU needs macOS 14"):
            load_adapted(sd1_folder, dtype=torch.bfloat16)
    monkeypatch.setattr(torch, "__version__", "2.7.1")
    with apple_gpu(), refused("mixed_precision", "torch 2.8"):
        train(run(sd1_folder, "out", mixed_precision="fp16"))


@pytest.mark.parametrize(("family", "count"), [("sd1", 1), ("sdxl", 2)])
def test_images_are_those_of_the_cpu(family, count, request, random_adapter):
    folder = request.getfixturevalue(f"{family}_folder")
    axes = ("output", "input")
    adapters = [random_adapter(folder, axis=axes[i], seed=i, every=3) for i in range(count)]
    expected = images_of(folder, adapters)
    with apple_gpu() as gpu:
        actual = images_of(folder, adapters)
        assert "convolution" in gpu.operators
    assert np.abs(actual - expected).max() <= 2


def test_every_scheduler_samples(sd1_folder):
    """Diffusers computes their steps in float64 on other devices."""

    def images() -> list[np.ndarray]:
        components, _ = load_adapted(sd1_folder)
        return [sample(components, SamplingSettings(2, 1.0, name, 32, 32)) for name in SCHEDULERS]

    expected = images()
    with apple_gpu():
        for name, actual, reference in zip(SCHEDULERS, images(), expected, strict=True):
            assert np.abs(actual - reference).max() <= 2, name


def test_a_model_has_one_identity_and_one_error_everywhere(sdxl_folder):
    """Class images and latents are kept by the identity; the error is what `evaluate` measures."""

    def facts() -> tuple[str, float]:
        components, _ = load_adapted(sdxl_folder)
        image = Image.open(next((SAMPLES / "bolt_mug").glob("*.jpg"))).convert("RGB")
        held_out = HeldOutImages(components, [image], ["a dog"])
        return components.identity(), held_out.losses([[1]])[0][0]

    expected = facts()
    with apple_gpu():
        identity, error = facts()
    assert identity == expected[0]
    assert error == pytest.approx(expected[1], rel=1e-4)


@pytest.mark.parametrize("axis", ["output", "input"])
def test_channels_that_cancel_keep_their_norm(axis):
    """``W + sBA`` is nearly 0 in one channel: the factored norm is lost there."""
    with apple_gpu():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6))
        inject_adapters(model, AdapterConfig(targets=("0",), rank=5, norm_axis=axis))
        ((_, layer),) = adapted_layers(model)
        adapter = layer.adapters["default"]
        with torch.no_grad():
            # The low-rank update of channel 2 is its weight, negative.
            if axis == "output":
                adapter.down.copy_(torch.eye(5))
                adapter.up[2] = -layer.weight[2] / adapter.weights().scale
                channel = layer.weight[2]
            else:
                adapter.down[:, 2] = torch.eye(5)[0]
                adapter.up[:, 0] = -layer.weight[:, 2] / adapter.weights().scale
                channel = layer.weight[:, 2]
            channel += 1e-6 * torch.arange(1, len(channel) + 1)
        weights = adapter.weights()
        delta = weights.scale * weights.up.detach().double() @ weights.down.detach().double()
        expected = (
            (layer.weight.detach().double() + delta).norm(dim=1 if axis == "output" else 0).float()
        )
        assert expected.min() < 1e-4
        model[0].to("mps")
        with norm_scope(model):
            norm = layer.scales("default", adapter).norm
            model[0](torch.randn(4, 5).to("mps")).square().sum().backward()
        torch.testing.assert_close(norm.cpu(), expected, rtol=1e-5, atol=0)
        assert all(p.grad.isfinite().all() for p in adapter.parameters())
