"""Extraction: how near it comes against the truncated SVD, and at full size how long it takes.

    python benchmarks/extract.py --toy --work /tmp/extract
    python benchmarks/extract.py --family sdxl --rank 16 --work /tmp/extract

With ``--toy``, fine-tunes every weight of the embedded model's UNet and text encoder on a sample
subject, in a plain loop, and extracts a DoRA of each rank. Its peer is what most tools do: the
truncated singular value decomposition (SVD) of ``T - W``, by NumPy in float64. At equal file size:
at the same rank, the largest whole one that takes no more bytes than factors and magnitude do; and
at a part of a rank more, as many bytes as the magnitude takes, of which no file exists: its squared
error is taken between those of both ranks, in proportion.

Without it, writes a model with random weights and a tuned one, whose changes have singular values
that fall like 1 / i, and extracts through the command line in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from export_speed import machine, make_base
from full_size import measured
from torch import Tensor

from dora_diffusion import extract_adapter, load_components
from dora_diffusion.data.images import open_photo
from dora_diffusion.export.fitting import FitSettings
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.formats.checkpoint.models import PipelineFolder
from dora_diffusion.formats.files.stream import TensorReader, write_tensors
from dora_diffusion.models.embedded import model_folder
from dora_diffusion.models.latents import encode_moments, latents_from_moments
from dora_diffusion.models.text import encode_prompts
from dora_diffusion.numerics.loss import add_noise, training_target

STEPS, RATE, BATCH, SIZE = 60, 1e-4, 4, 64
RANKS = (1, 2, 4, 8, 16)
ROUNDING = 1e-6  # of a weight


def fine_tune(folder: Path, steps: int) -> None:
    """Train all weights of the embedded model on a sample subject, and save it as a folder."""
    torch.manual_seed(0)
    model = load_components("embedded:tiny-sd")
    photos = sorted(Path("samples/bolt_mug").glob("*.jpg"))
    pixels = torch.stack([as_pixels(path) for path in photos])
    with torch.no_grad():
        clean = latents_from_moments(model.vae, encode_moments(model.vae, pixels))
    trained = [p for part in model.adaptable().values() for p in part.requires_grad_().parameters()]
    optimizer = torch.optim.AdamW(trained, RATE)
    alphas = model.scheduler.alphas_cumprod
    for step in range(steps):
        latents = clean[torch.randint(len(clean), (BATCH,))]
        noise, timesteps = torch.randn_like(latents), torch.randint(len(alphas), (BATCH,))
        captions = encode_prompts(model, ["a photo of a sks mug"] * BATCH)
        target = training_target(model.prediction_type, latents, noise, alphas[timesteps])
        noisy = add_noise(latents, noise, alphas[timesteps])
        loss = (model.predict(noisy, timesteps, captions) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.4f}", file=sys.stderr)
    model.pipeline().save_pretrained(folder)


def as_pixels(path: Path) -> Tensor:
    """A photo, ``(3, SIZE, SIZE)`` in [-1, 1]."""
    image = open_photo(path).resize((SIZE, SIZE))
    return torch.from_numpy(np.asarray(image, np.float32) / 127.5 - 1).permute(2, 0, 1)


def compare_with_svd(base: Path, tuned: Path, work: Path, rank: int) -> dict[str, object]:
    """Share of layers where a DoRA of a rank is nearer than the SVD at equal file size."""
    started = time.perf_counter()
    report = extract_adapter(
        base, tuned, work / "dora.safetensors", FitSettings(rank=rank), overwrite=True
    )
    seconds = time.perf_counter() - started
    layers = read_adapter(report.path).layers
    lower: dict[str, list[float]] = {"whole rank": [], "part of a rank more": []}
    with PipelineFolder.open(base) as before, PipelineFolder.open(tuned) as after:
        for name, layer in layers.items():
            weights = (model[f"{name}.weight"].double().flatten(1) for model in (before, after))
            old, new = (weight.numpy() for weight in weights)
            squares = np.linalg.svd(new - old, compute_uv=False) ** 2
            magnitude, factors = layer.magnitude_size, layer.down.numel() + layer.up.numel()
            part = magnitude / (factors / layer.rank)
            left = squares[layer.rank :].sum()
            more = left - part * (squares[layer.rank] if layer.rank < len(squares) else 0.0)
            for kind, squared in (("whole rank", left), ("part of a rank more", more)):
                peer = float(np.sqrt(max(squared, 0.0) / squares.sum()))
                # Where both are exact but for rounding, neither is nearer.
                rounding = ROUNDING * np.linalg.norm(old) / np.sqrt(squares.sum())
                if max(peer, report.errors[name]) > rounding:
                    lower[kind].append(report.errors[name] / max(peer, rounding))
    return {
        "rank": rank,
        "layers": len(layers),
        "of them exact both ways": len(layers) - len(lower["whole rank"]),
        "seconds": round(seconds, 1),
        "total error": round(report.total_error, 4),
        **{
            f"nearer, {kind}": round(float(np.mean(np.array(ratios) < 1)), 3)
            for kind, ratios in lower.items()
        },
        **{f"median ratio, {kind}": round(float(np.median(r)), 4) for kind, r in lower.items()},
    }


def make_tuned(base: Path, folder: Path) -> None:
    """Write a tuned copy of a folder, one tensor at a time."""
    for path in base.rglob("*"):
        target = folder / path.relative_to(base)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        elif path.suffix != ".safetensors":
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    for path in base.rglob("*.safetensors"):
        with TensorReader(path) as reader:
            write_tensors(
                folder / path.relative_to(base), reader.specs, lambda n, r=reader: changed(r[n])
            )


def changed(weight: Tensor) -> Tensor:
    """A matrix plus 2% of its norm, in singular values that fall like 1 / i; others as they are."""
    if weight.ndim not in (2, 4):
        return weight
    matrix = weight.float().flatten(1)
    values = 1 / torch.arange(1, 65)
    left, right = torch.randn(len(matrix), 64), torch.randn(64, matrix.shape[1])
    change = (left * values) @ right
    change = change * (0.02 * matrix.norm() / change.norm())
    return (matrix + change).view_as(weight).to(weight.dtype)


def full_size(family: str, work: Path, options: Sequence[str]) -> dict[str, object]:
    """Seconds and peak memory of one extraction."""
    base, tuned = work / family, work / f"{family}-tuned"
    if not (base / "model_index.json").is_file():
        make_base(family, base)
    if not (tuned / "model_index.json").is_file():
        make_tuned(base, tuned)
    command = [
        *(sys.executable, "-m", "dora_diffusion", "extract", "--overwrite"),
        *("--base", str(base), "--tuned", str(tuned), "--output", str(work / "adapter"), *options),
    ]
    return measured(command)


def main() -> None:
    """Measure, and print a report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--family", choices=("sd1", "sdxl"), default="sdxl")
    parser.add_argument("--rank", default="16")
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.toy:
        base, tuned = Path(model_folder("tiny-sd")), args.work / "tuned"
        fine_tune(tuned, args.steps)
        rows = [compare_with_svd(base, tuned, args.work, rank) for rank in RANKS]
        print(json.dumps({**machine(), "steps": args.steps, "ranks": rows}, indent=2))
        return
    report = full_size(args.family, args.work, ["--rank", args.rank])
    print(json.dumps({**machine(), "family": args.family, "rank": args.rank, **report}, indent=2))


if __name__ == "__main__":
    main()
