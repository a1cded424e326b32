"""Choice and abilities of the device."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from dora_diffusion.models.memory import describe_device
from dora_diffusion.numerics import devices
from tests.apple import apple_gpu


@pytest.fixture
def has(monkeypatch: pytest.MonkeyPatch):
    """Have torch find an accelerator of a kind; without one, torch 2.6 raises an error."""
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)

    def find(kind: str | None) -> None:
        def current() -> torch.device:
            if kind is None:
                raise RuntimeError("Cannot access accelerator device when none is available.")
            return torch.device(kind)

        monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: kind is not None)

    return find


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps", None])
def test_the_default_is_the_accelerator_unless_accelerate_is_told_otherwise(kind, has, monkeypatch):
    has(kind)
    assert devices.default_device() == (kind or "cpu")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "yes")
    assert devices.default_device() == describe_device().kind == "cpu"


@pytest.mark.parametrize(
    ("version", "is_new", "has_bf16", "has_scaler"),
    [("2.5.1", True, False, False), ("2.6.0", True, True, False), ("2.6.0", False, False, False),
     ("2.8.0+cpu", True, True, True), ("2.13.0", False, False, True)],
)  # fmt: skip
def test_what_apples_gpu_can_follows_from_macos_and_torch(
    version, is_new, has_bf16, has_scaler, monkeypatch
):
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(
        torch.backends.mps, "is_macos_or_newer", lambda major, minor: is_new or major < 14
    )
    assert devices.has_bf16("mps") == has_bf16
    assert devices.has_gradient_scaler("mps") == has_scaler


def test_float64_is_asked_of_intels_gpus(monkeypatch):
    assert devices.has_float64("cpu")
    assert devices.has_float64("cuda")
    assert not devices.has_float64("mps")
    for has_fp64 in (True, False):
        devices._intel_has_float64.cache_clear()
        properties = SimpleNamespace(has_fp64=has_fp64)
        monkeypatch.setattr(torch.xpu, "get_device_properties", lambda index, p=properties: p)
        assert devices.has_float64("xpu") == has_fp64
    devices._intel_has_float64.cache_clear()


def test_fused_optimizers_are_where_torch_says(monkeypatch):
    from torch.utils import _foreach_utils

    monkeypatch.setattr(_foreach_utils, "_get_fused_kernels_supported_devices", lambda: ["cuda"])
    assert devices.has_fused_optimizers("cuda")
    assert not devices.has_fused_optimizers("mps")


def test_memory_of_a_gpu_is_its_own_or_a_share_of_the_machines(has, monkeypatch):
    has("xpu")
    monkeypatch.setattr(torch.xpu, "mem_get_info", lambda: (5 * 2**30, 8 * 2**30), raising=False)
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda index: "Arc B580", raising=False)
    monkeypatch.setattr(torch.xpu, "max_memory_allocated", lambda: 3 * 2**30, raising=False)
    monkeypatch.setattr(torch.xpu, "is_bf16_supported", lambda **_: True, raising=False)
    device = describe_device()
    assert (device.kind, device.name, device.free_gib) == ("xpu", "Arc B580", 5.0)
    assert devices.peak_memory() == 3 * 2**30
    assert devices.free_device_memory("cpu") is devices.memory_limit("cpu") is None


def test_memory_of_apples_gpu_is_asked_and_released():
    with apple_gpu() as gpu:
        assert devices.peak_memory() == 3 * 2**30
        devices.release_memory()
        assert gpu.releases == 1
        assert describe_device().free_gib <= 12


def test_nothing_is_loaded_to_report_nothing():
    code = (
        "import sys; from dora_diffusion.numerics import devices; "
        "print(devices.peak_memory(), devices.release_memory(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert done.stdout == "None None False\n", done.stderr
