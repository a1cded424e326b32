"""Does bf16 training follow the float32 loss curve, within what another seed changes?

    python benchmarks/precision.py --steps 100

On the embedded model. The same seed draws the same noise and timesteps, so that losses of the same
step can be compared one by one; another seed's adapter shows how much is chance.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from common import machine, markdown
from train_step import session


def losses(output: Path, steps: int, **settings: object) -> torch.Tensor:
    """Loss of each step."""
    run = session(str(output), learning_rate=1e-3, **settings)
    return torch.stack([run.train_step(step + 1)["loss"].float() for step in range(steps)])


def main() -> None:
    """Train, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        exact = losses(Path(folder), args.steps)
        low = losses(Path(folder), args.steps, mixed_precision="bf16")
        other = losses(Path(folder), args.steps, seed=1)
    print(f"embedded:tiny-sd, {args.steps} steps. {machine()}\n")
    half = args.steps // 2
    rows = []
    for name, curve in (("float32", exact), ("bf16", low), ("float32, another seed", other)):
        first, second = curve[:half].mean().item(), curve[half:].mean().item()
        apart = (curve - exact).abs().mean().item()
        rows.append([name, f"{first:.4f}", f"{second:.4f}", f"{apart:.4f}"])
    header = ["", "mean loss, first half", "second half", "mean distance to float32, per step"]
    print(markdown(header, rows))


if __name__ == "__main__":
    main()
