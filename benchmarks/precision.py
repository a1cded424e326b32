"""Comparison of bf16 and fp16 loss curves with float32's, and with another seed's.

    python benchmarks/precision.py --steps 100

On the embedded model. The same seed draws the same noise and timesteps, so that losses of the same
step can be compared one by one; another seed's adapter shows how much is chance. The commands
refuse fp16 on a CPU, where it is slow; here it runs on one, with the same gradient scaler.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import machine, markdown
from train_step import settings

from dora_diffusion.config import TrainConfig
from dora_diffusion.training.inputs.plan import plan_run
from dora_diffusion.training.processes import make_accelerator
from dora_diffusion.training.recipe import assemble


def fp16_accelerator(config: TrainConfig) -> Any:
    """Return Accelerate's accelerator for fp16 on a GPU, on this CPU."""
    accelerator = make_accelerator(replace(config, mixed_precision="no"))
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler(accelerator.device.type)
    return accelerator


def losses(output: Path, steps: int, **chosen: object) -> torch.Tensor:
    """Loss of each step."""
    config = settings(str(output), learning_rate=1e-3, **chosen)
    make = fp16_accelerator if config.mixed_precision == "fp16" else make_accelerator
    run = assemble(plan_run(config), make(config))
    return torch.stack([run.step(step + 1)["loss"].float() for step in range(steps)])


def main() -> None:
    """Train, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        curves = {
            "float32": losses(Path(folder), args.steps),
            "bf16": losses(Path(folder), args.steps, mixed_precision="bf16"),
            "fp16": losses(Path(folder), args.steps, mixed_precision="fp16"),
            "float32, another seed": losses(Path(folder), args.steps, seed=1),
        }
    print(f"embedded:tiny-sd, {args.steps} steps. {machine()}\n")
    half = args.steps // 2
    rows = []
    for name, curve in curves.items():
        first, second = curve[:half].mean().item(), curve[half:].mean().item()
        apart = (curve - curves["float32"]).abs().mean().item()
        rows.append([name, f"{first:.4f}", f"{second:.4f}", f"{apart:.4f}"])
    header = ["", "mean loss, first half", "second half", "mean distance to float32, per step"]
    print(markdown(header, rows))


if __name__ == "__main__":
    main()
