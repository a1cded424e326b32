"""Meaning of `auto` on each device."""

from __future__ import annotations

import pytest
import torch

from dora_diffusion.models import precision
from tests.refusal import refused


@pytest.mark.parametrize(
    ("device", "has_bf16", "dtype", "name"),
    [
        ("cuda", True, torch.bfloat16, "bf16"),
        ("cuda:1", False, torch.float16, "fp16"),
        ("cpu", True, torch.float32, "no"),
        ("xpu", True, torch.bfloat16, "bf16"),
        ("mps", True, torch.bfloat16, "bf16"),
        ("mps", False, torch.float16, "fp16"),
    ],
)
def test_auto_is_what_the_device_computes(device, has_bf16, dtype, name, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    for home in (torch.cuda, torch.xpu):
        monkeypatch.setattr(
            home, "is_bf16_supported", lambda including_emulation: has_bf16, raising=False
        )
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version: has_bf16)
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    assert precision.auto_dtype(device) == dtype
    assert precision.dtype_of("auto", device) == dtype
    assert precision.precision_of("auto", device) == name


def test_memory_and_models_state_one_rule(monkeypatch):
    """The meaning of `auto` on a device is decided in one place."""
    monkeypatch.setattr(precision, "auto_precision", lambda device: "fp16")
    assert precision.auto_dtype("cpu") == torch.float16


def test_what_is_named_is_taken():
    assert precision.dtype_of("float16", "cpu") == torch.float16
    assert precision.precision_of("bf16", "cpu") == "bf16"
    with refused("dtype", "'fp8'"):
        precision.dtype_of("fp8")


@pytest.mark.parametrize(("launched", "name"), [("bf16", "bf16"), ("fp16", "fp16"), ("no", "no")])
def test_accelerate_launch_settles_auto(launched, name, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert precision.precision_of("auto", "cpu") == name
    assert precision.precision_of("no", "cpu") == "no"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    on_gpu = "bf16" if launched == "no" else launched  # it says no where nothing was asked
    assert precision.precision_of("auto", "cuda") == on_gpu
