"""Training, sampling and merging on an emulated NVIDIA GPU, against the same on the CPU."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dora_diffusion.adapters.inject import layer_adapters
from dora_diffusion.config import ConfigError
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.memory import describe_device
from dora_diffusion.training import optimizer as optimizer_module
from dora_diffusion.training.accelerator import make_accelerator
from dora_diffusion.training.loop import train
from dora_diffusion.training.session import Session, open_session
from dora_diffusion.training.subject import subject_of
from tests.integration.emulated import (
    CHECKPOINTED,
    FULL,
    PARTS,
    assert_learned,
    figures,
    images_of,
)
from tests.nvidia import NvidiaGPU, nvidia_gpu

SMALL = {"targets": ["attention+conv"], "conv_rank": 2, "train_text_encoder": True}


def was_trained_on(gpu: NvidiaGPU) -> None:
    assert {"convolution_backward", "native_group_norm_backward", "_fused_adamw_"} <= gpu.operators


@pytest.mark.parametrize(("family", "settings"), [("sd1", FULL), ("sdxl", CHECKPOINTED)])
def test_a_run_learns_what_it_learns_on_the_cpu(family, settings, run, request):
    """Class images, text encoders and samples in one; dropout that is recomputed in the other."""
    folder = request.getfixturevalue(f"{family}_folder")
    on_cpu, on_gpu = (run(folder, output, **settings) for output in ("cpu", "gpu"))
    expected = train(on_cpu).adapter
    with nvidia_gpu() as gpu:
        adapter = train(on_gpu).adapter
        was_trained_on(gpu)
    for name in ("loss", "grad_norm"):
        assert figures(on_gpu, name) == pytest.approx(figures(on_cpu, name), rel=1e-3)
    assert_learned(adapter, expected)


@pytest.mark.parametrize(
    ("has_bf16", "dtype", "tolerance"),
    [(True, torch.bfloat16, 0.03), (False, torch.float16, 0.01)],
)
def test_auto_is_the_half_precision_that_the_device_has(
    has_bf16, dtype, tolerance, run, sdxl_folder
):
    """fp16 with its gradient scaler before Ampere."""
    settings = {"targets": ["attention"], "gradient_accumulation_steps": 2}
    whole = run(sdxl_folder, "whole", **settings)
    half = run(sdxl_folder, "half", **settings, mixed_precision="auto")
    train(whole)
    with nvidia_gpu(has_bf16) as gpu:
        train(half)
        assert gpu.dtypes & {torch.bfloat16, torch.float16} == {dtype}
        # Norms of bfloat16 weights are products that widen as they read.
        assert ("mm.dtype_out" in gpu.operators) == (dtype == torch.bfloat16)
        assert ("_amp_update_scale_" in gpu.operators) == (dtype == torch.float16)
    assert figures(half, "loss") == pytest.approx(figures(whole, "loss"), rel=tolerance)


@pytest.mark.parametrize(
    "settings",
    [
        CHECKPOINTED | {"targets": ["cross-attention"]},
        SMALL | {"targets": ["cross-attention"], "mixed_precision": "fp16"},
    ],
    ids=["whole", "fp16"],
)
def test_a_run_resumes(settings, run, sd1_folder):
    settings = settings | {"checkpointing_steps": 1, "max_train_steps": 3}
    whole, parts = (run(sd1_folder, name, **settings) for name in ("whole", "parts"))
    with nvidia_gpu():
        expected = read_adapter(train(whole).adapter).layers
        shutil.copytree(whole.output_dir, parts.output_dir)
        for step in (2, 3):
            shutil.rmtree(Path(parts.output_dir) / f"checkpoint-{step}")
        resumed = run(sd1_folder, "parts", **settings, resume_from_checkpoint="checkpoint-1")
        adapter = read_adapter(train(resumed).adapter).layers
    for name, layer in expected.items():
        assert all(torch.equal(getattr(layer, p), getattr(adapter[name], p)) for p in PARTS)


def open_on(config) -> Session:
    return open_session(config, subject_of(config), make_accelerator(config))


def parameters_of(session: Session) -> dict[str, torch.Tensor]:
    return {
        f"{component}.{number}.{name}": parameter
        for component, model in session.adapters.modules.items()
        for number, adapter in enumerate(layer_adapters(model))
        for name, parameter in adapter.named_parameters()
    }


@pytest.mark.parametrize(("family", "checkpointing"), [("sd1", False), ("sdxl", True)])
def test_a_step_waits_for_nothing(family, checkpointing, run, request):
    """Text encoders, dropped captions and accumulation included, once the photos are encoded."""
    settings = SMALL | {
        "gradient_checkpointing": checkpointing, "mixed_precision": "bf16", "caption_dropout": 0.5,
        "center_crop": True, "gradient_accumulation_steps": 5, "noise_offset": 0.05,
        "targets": ["cross-attention"],
    }  # fmt: skip
    folder = request.getfixturevalue(f"{family}_folder")
    with nvidia_gpu() as gpu:
        session = open_on(run(folder, "out", **settings))
        session.train_step(1)
        gpu.waits.clear()
        session.train_step(2)
        assert not gpu.waits


def test_an_fp16_step_that_overflows_changes_nothing_but_the_scale(run, sd1_folder):
    """The next step is the one that would have come without it."""
    settings = SMALL | {"mixed_precision": "fp16", "max_train_steps": 6, "lr_warmup_steps": 4}
    with nvidia_gpu(has_bf16=False):
        session = open_on(run(sd1_folder, "out", **settings))
        scaler, step = session.accelerator.scaler, session.train_step
        step(1)
        parameters = parameters_of(session)
        before = {name: p.detach().clone() for name, p in parameters.items()}
        moments = {
            id(p): {k: v.clone() for k, v in state.items()}
            for p, state in step.optimizer.optimizer.state.items()
        }
        scale = scaler.get_scale()
        victim = next(p for name, p in parameters.items() if name.endswith("up"))
        handle = victim.register_hook(lambda grad: torch.full_like(grad, float("inf")))
        record = step(2)
        handle.remove()
        assert not torch.isfinite(record["grad_norm"].cpu())
        assert scaler.get_scale() == scale / 2
        assert all(torch.equal(p, before[name]) for name, p in parameters.items())
        for p, state in step.optimizer.optimizer.state.items():
            assert all(torch.equal(value, moments[id(p)][k]) for k, value in state.items())
        assert all(p.grad is None for p in parameters.values())
        # Warm-up is by the number of the step, which metrics and checkpoints tell: 2 of 4.
        assert step.lr_schedule.last_epoch == 2
        record = step(3)
        assert torch.isfinite(record["grad_norm"].cpu())
        assert scaler.get_scale() == scale / 2
        moved = [not torch.equal(p, before[name]) for name, p in parameters.items()]
        assert any(moved)


def test_fp16_says_nothing_about_the_order_of_its_steps(run, sd1_folder, recwarn):
    with nvidia_gpu(has_bf16=False):
        train(run(sd1_folder, "out", targets=["cross-attention"], mixed_precision="fp16"))
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


class AdamW8bit(torch.optim.Optimizer):
    """What bitsandbytes' does where it matters here.

    It takes parameters on CUDA only; moments of large ones are whole numbers with a scale for each
    block, those of others float32.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    assert p.is_cuda
                    self._update(p, group, self.state[p])

    def _update(self, p, group, state):
        if not state:
            for name in ("state1", "state2"):
                state[name] = torch.zeros_like(p, dtype=torch.uint8)
                state[f"absmax{name[-1]}"] = p.new_zeros(())
            state["step"] = 0
        state["step"] += 1
        moments = []
        for name, beta, new in zip(
            ("1", "2"), group["betas"], (p.grad, p.grad.square()), strict=True
        ):
            codes, absmax = state[f"state{name}"], state[f"absmax{name}"]
            moment = (codes.float() / 127 - 1) * absmax if state["step"] > 1 else 0 * new
            moment = beta * moment + (1 - beta) * new
            state[f"absmax{name}"] = moment.abs().max()
            scaled = (moment / state[f"absmax{name}"].clamp_min(1e-30) + 1) * 127
            codes.copy_(scaled.round())
            moments.append(moment / (1 - beta ** state["step"]))
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(group["lr"] * moments[0] / (moments[1].clamp_min(0).sqrt() + group["eps"]))


def test_eight_bit_adam_trains_and_resumes(run, sd1_folder, monkeypatch):
    """Each parameter its own, as it quantises by size; moments are saved as they are."""
    library = SimpleNamespace(optim=SimpleNamespace(AdamW8bit=AdamW8bit))
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)
    settings = {
        "targets": ["attention+conv"], "conv_rank": 2, "optimizer": "adamw8bit",
        "checkpointing_steps": 1, "mixed_precision": "fp16", "learning_rate": 1e-4,
    }  # fmt: skip
    whole, parts = (run(sd1_folder, name, **settings) for name in ("whole", "parts"))
    with nvidia_gpu(has_bf16=False) as gpu:
        expected = read_adapter(train(whole).adapter).layers
        shutil.copytree(whole.output_dir, parts.output_dir)
        shutil.rmtree(Path(parts.output_dir) / "checkpoint-2")
        resumed = run(sd1_folder, "parts", **settings, resume_from_checkpoint="checkpoint-1")
        adapter = read_adapter(train(resumed).adapter).layers
        assert torch.uint8 in gpu.dtypes
    for name, layer in expected.items():
        assert all(torch.equal(getattr(layer, p), getattr(adapter[name], p)) for p in PARTS)
    assert any(layer.up.abs().max() > 0 for layer in expected.values())


def test_eight_bit_adam_that_is_not_installed_is_said_before_the_model_is_loaded(
    run, sd1_folder, monkeypatch
):
    monkeypatch.setattr(optimizer_module, "_LIBRARIES", {"adamw8bit": "no_such_library"})
    with nvidia_gpu(), pytest.raises(ConfigError, match="no_such_library, which is not installed"):
        train(run(sd1_folder, "out", optimizer="adamw8bit"))


def test_the_device_is_described():
    with nvidia_gpu():
        device = describe_device()
        assert (device.kind, device.name) == ("cuda", "NVIDIA GeForce RTX 3090")
        assert device.has_bf16
        assert device.has_gradient_scaler
        assert device.free_gib == pytest.approx(20)


@pytest.mark.parametrize(("family", "count"), [("sd1", 1), ("sdxl", 2)])
def test_images_are_those_of_the_cpu(family, count, request, random_adapter):
    folder = request.getfixturevalue(f"{family}_folder")
    axes = ("output", "input")
    adapters = [random_adapter(folder, axis=axes[i], seed=i, every=3) for i in range(count)]
    expected = images_of(folder, adapters)
    with nvidia_gpu() as gpu:
        actual = images_of(folder, adapters)
        assert "convolution" in gpu.operators
    assert np.abs(actual - expected).max() <= 2
