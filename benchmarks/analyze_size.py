"""Analyze a pair of models at full size: peak memory, and time.

    python benchmarks/analyze_size.py --family sdxl --work /tmp/analyze

Makes a Diffusers folder of Stable Diffusion 1.5 or SDXL in float16 with random weights, a second
one whose UNet and text encoders were all moved, and a DoRA on the layers that are trained by
default; and takes both apart through the command line, in a process of its own each. The pair takes
14 GB of disk for SDXL, 4 GB for Stable Diffusion 1.5.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from export_speed import default_targets, machine, make_adapter, make_base, warm
from full_size import UNETS, measured

from dora_diffusion.config.families import COMPONENTS
from dora_diffusion.formats.checkpoint.models import find_weights
from dora_diffusion.formats.files.stream import TensorReader, write_tensors


def make_tuned(base: Path, folder: Path) -> None:
    """Write a model of whose components the adaptable ones were moved, a tensor at a time."""
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(2**20, generator=generator) / 1000
    folder.mkdir(exist_ok=True)
    for path in base.iterdir():
        if path.name not in COMPONENTS:
            (folder / path.name).symlink_to(path.resolve())
            continue
        file = find_weights(path)
        (folder / path.name).mkdir()
        (folder / path.name / "config.json").write_bytes((path / "config.json").read_bytes())
        with TensorReader(file) as reader:

            def move(name: str, reader: TensorReader = reader) -> torch.Tensor:
                tensor = reader[name]
                times = -(-tensor.numel() // len(noise))
                moved = tensor.flatten() + noise.repeat(times)[: tensor.numel()].to(tensor.dtype)
                return moved.view(tensor.shape)

            write_tensors(folder / path.name / file.name, reader.specs, move)


def main() -> None:
    """Make what is missing, analyze, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=tuple(UNETS), default="sdxl")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--layers", nargs="+", default=["*"], help="As of analyze.")
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    base, tuned = args.work / args.family, args.work / f"{args.family}-tuned"
    adapter = args.work / f"{args.family}-dora.safetensors"
    if not (base / "model_index.json").is_file():
        make_base(args.family, base)
    if not (tuned / "model_index.json").exists():
        make_tuned(base, tuned)
    if not adapter.is_file():
        make_adapter(args.family, base, adapter, args.rank, only=default_targets(args.family))
    command = [sys.executable, "-m", "dora_diffusion", "analyze", "--base", str(base)]
    command += ["--layers", *args.layers]
    report: dict[str, object] = {**machine(), "family": args.family, "layers": args.layers}
    for name, source in (("DoRA", adapter), ("model", tuned)):
        output = args.work / f"{args.family}-{name}"
        warm(base)
        figures = measured([*command, "--output", str(output), "--overwrite", "--", str(source)])
        analysis = json.loads((output / "analysis.json").read_text(encoding="utf-8"))
        layers = analysis["runs"][0]["checkpoints"][0]["layers"]
        report[name] = {**figures, "layers": layers}
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
