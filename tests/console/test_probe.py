"""What the process answers that is asked for devices."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dora_diffusion.console import probe


def test_what_torch_is_for_and_uses() -> None:
    assert probe._build() in ("the CPU", "Apple's GPUs") or torch.version.cuda or torch.version.hip
    threads = torch.get_num_threads()
    assert probe._cpu() == (
        f"{torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' if threads > 1 else ''}"
    )
    assert len(probe._devices()) == torch.cuda.device_count() + torch.backends.mps.is_available()


@pytest.mark.parametrize(
    ("versions", "built"),
    [
        ({"cuda": "12.8", "hip": None}, "CUDA 12.8"),
        ({"cuda": None, "hip": "6.3"}, "ROCm 6.3"),
        ({"xpu": "2025.1"}, "XPU 2025.1"),
    ],
)
def test_the_kind_of_gpu_that_torch_was_built_for(
    versions: dict[str, str | None], built: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "version", SimpleNamespace(**versions))
    assert probe._build() == built


def test_a_device_says_what_its_driver_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def gpu(**more: object) -> SimpleNamespace:
        properties = SimpleNamespace(name="GPU X", total_memory=8 * 2**30)
        return SimpleNamespace(
            is_available=lambda: True,
            device_count=lambda: 1,
            get_device_properties=lambda index: properties,
            **more,
        )

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    known = {
        "mem_get_info": lambda index: (3 * 2**30, 8 * 2**30),
        "get_device_capability": lambda index: (8, 6),
    }
    monkeypatch.setattr(torch, "cuda", gpu(**known))
    monkeypatch.setattr(torch, "xpu", gpu(), raising=False)
    assert probe._devices() == [
        "cuda:0 GPU X, 8.0 GiB, 3.0 GiB free, compute capability 8.6",
        "xpu:0 GPU X, 8.0 GiB",
    ]


def test_the_hub_s_cache_is_where_the_hub_library_has_it() -> None:
    from huggingface_hub import constants

    assert probe._hub_cache() == constants.HF_HUB_CACHE
