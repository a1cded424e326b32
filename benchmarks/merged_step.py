"""Cost of a denoising step with an adapter attached, with it merged in, and without one.

    python benchmarks/merged_step.py --work /tmp/step

One evaluation of a Stable Diffusion 1.5 UNet at 512 pixels, two latents (guidance), bfloat16,
random weights, a DoRA on every Linear and Conv2d. The three take turns in one process; times are
medians, and what counts is their ratio to the base model's. `tests/formats/
test_merged_costs_nothing.py` shows that base and merged model run the same operations.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from export_speed import make_adapter, make_base

from dora_diffusion import merge_adapters
from dora_diffusion.adapters.scope import norm_scope
from dora_diffusion.adapters.state import load_adapter


def load(base: Path) -> UNet2DConditionModel:
    """The UNet, as inference uses it."""
    unet = UNet2DConditionModel.from_pretrained(base / "unet", torch_dtype=torch.bfloat16)
    return unet.eval().requires_grad_(False)


def step_seconds(unet: UNet2DConditionModel) -> float:
    """Seconds of one evaluation."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 64, 64, generator=generator).bfloat16()
    prompt = torch.randn(2, 77, 768, generator=generator).bfloat16()
    started = time.perf_counter()
    with torch.inference_mode():
        unet(latents, 500, prompt)
    return time.perf_counter() - started


def main() -> None:
    """Make, load, take turns, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    base, path = args.work / "sd1", args.work / "unet.safetensors"
    if not (base / "model_index.json").is_file():
        make_base("sd1", base)
    make_adapter("sd1", base, path, rank=8, components=("unet",))
    models = {name: load(base) for name in ("base", "merged", "attached")}
    for name in ("merged", "attached"):
        load_adapter(models[name], path, family="sd1")
    merge_adapters(models["merged"])
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with norm_scope(models["attached"]):
        for turn in range(args.repeats + 1):
            for name, unet in models.items():
                took = step_seconds(unet)
                if turn:  # the first is to warm up
                    seconds[name].append(took)
    medians = {name: statistics.median(took) for name, took in seconds.items()}
    report = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}",
        "torch": torch.__version__,
        "median_seconds": {name: round(took, 2) for name, took in medians.items()},
        "times_the_base": {
            name: round(took / medians["base"], 3) for name, took in medians.items()
        },
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
