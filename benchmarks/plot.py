"""Draw what `unet_step.py --json` wrote: time and kept activations beside the peers'.

python benchmarks/plot.py 64.json 32.json --output docs/images/cost.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from common import FROZEN, LORA, OURS, ratio

COLORS = {FROZEN: "#b8b8b8", LORA: "#7a9cc6", OURS: "#d1495b"}
OTHER = "#d9c58b"


def bars(axes: Any, relative: dict[str, float], title: str) -> None:
    """One bar per peer, relative to LoRA's."""
    colors = [COLORS.get(name, OTHER) for name in relative]
    drawn = axes.barh(list(relative), list(relative.values()), color=colors)
    axes.bar_label(drawn, fmt="%.2f", label_type="center", color="white", weight="bold")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlim(0, 1.15 * max(relative.values()))
    axes.invert_yaxis()
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Read, draw, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    runs = [json.loads(path.read_text(encoding="utf-8"))["figures"] for path in args.runs]
    figure, grid = plt.subplots(len(runs), 2, figsize=(9, 2 * len(runs) + 0.4), squeeze=False)
    for run, (left, right) in zip(runs, grid, strict=True):
        what = f"{run['targets']}, {run['latent']}x{run['latent']} latents"
        times = {name: ratio(run["seconds"], name).median for name in run["seconds"]}
        kept = {name: size / run["kept"][LORA] for name, size in run["kept"].items()}
        bars(left, times, f"time of a step: {what}")
        bars(right, kept, f"kept activations: {what}")
    figure.suptitle(f"SD1.5's UNet, rank 8, relative to {LORA}", fontsize=11)
    figure.tight_layout()
    figure.savefig(args.output, dpi=110)


if __name__ == "__main__":
    main()
