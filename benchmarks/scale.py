"""Cost of many subjects, in arithmetic: the tables of lab/measurements/scale.md.

    python benchmarks/scale.py
    python benchmarks/scale.py --records lab/measurements/scale-records.jsonl   # measured costs
    python benchmarks/scale.py --count                # the counted constants anew; half a minute

Costs at full size are counted, not measured: parameters and products by torch on its meta device
(``--count``), operations and operands by `launches.py`, memory by `memory.py`. What no device has
told is an assumption with a flag of its own: all times of a GPU follow from these and the counts.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean, median
from typing import Any

from lab.simulation.forecasts import expected_completion

DAY, HOUR = 86_400, 3_600


@dataclass(frozen=True)
class Counted:
    """A model at its own size, in bf16, batch 1, DoRA on attention and convolutions (rank 8, 4).

    Attributes:
        title: Its name and resolution.
        unet: Parameters of the UNet.
        others: Of text encoders and VAE.
        trained: Of the adapter.
        forward: Products of a forward pass of the UNet, in 10^12 floating-point operations.
        backward: Of the gradients of its activations.
        decode: Of decoding an image.
        operations: What a training step dispatches (`launches.py`).
        operands: Bytes that these read and write, in 10^9.
        peak: GiB of live bytes while training (`memory.py`, ``--offload model``).
        steps: Default number of steps.
    """

    title: str
    unet: int
    others: int
    trained: int
    forward: float
    backward: float
    decode: float
    operations: int
    operands: float
    peak: float
    steps: int

    @property
    def base_bytes(self) -> int:
        """Size of the base in bf16, as it is read."""
        return 2 * (self.unet + self.others)

    @property
    def adapter_bytes(self) -> int:
        """Size of the adapter in float32."""
        return 4 * self.trained

    @property
    def checkpoint_bytes(self) -> int:
        """The adapter and AdamW's two moments."""
        return 3 * self.adapter_bytes

    @property
    def step(self) -> float:
        """10^12 floating-point operations."""
        return self.forward + self.backward


CLIP_L, CLIP_BIG_G, VAE = 123_060_480, 694_659_840, 83_653_863
MODELS = {
    "sd1": Counted(
        "SD1.5, 512 px", 859_520_964, CLIP_L + VAE, 4_291_328,
        0.803, 0.923, 2.51, 3_602, 15.7, 2.61, 800,
    ),
    "sdxl": Counted(
        "SDXL, 1024 px", 2_567_463_684, CLIP_L + CLIP_BIG_G + VAE, 13_832_320,
        6.761, 7.460, 10.47, 9_325, 82.5, 11.11, 1000,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Device:
    """Assumptions about a GPU.

    Attributes:
        tflops: Peak of dense bf16 products, in 10^12 per second (an H100 SXM's data sheet).
        bandwidth: Of its memory, in 10^12 bytes per second (the same).
        utilisation: Share of the peak that products reach.
        streaming: Share of the bandwidth that operands reach.
        dispatch: Seconds to issue an operation.
    """

    tflops: float = 989
    bandwidth: float = 3.35
    utilisation: float = 0.4
    streaming: float = 0.8
    dispatch: float = 10e-6

    def step_seconds(self, model: Counted, pack: int = 1) -> tuple[float, float, float]:
        """Return the seconds of a pack's step: its products, its operands, and its dispatch."""
        return (
            pack * model.step / (self.utilisation * self.tflops),
            pack * model.operands / 1e3 / (self.streaming * self.bandwidth),
            model.operations * pack_operations(pack) * self.dispatch,
        )

    def subject_seconds(self, model: Counted, pack: int = 1) -> float:
        """Return the seconds to train a subject in a pack: the GPU works during dispatch."""
        products, memory, dispatch = self.step_seconds(model, pack)
        return model.steps * max(products + memory, dispatch) / pack

    def image_seconds(self, model: Counted) -> float:
        """Return the seconds to sample an image by products alone, as a full batch does."""
        products = 2 * SAMPLING_STEPS * model.forward + model.decode
        return products / (self.utilisation * self.tflops)


SAMPLING_STEPS = 25
# Operations of a step of four subjects over those of one: more than the 1.20 counted for SD1.5.
PACK_OF_FOUR = 1.25
# A customer's photos, checkpoints of a run, and what a fleet writes of a subject.
PHOTOS, PHOTO_BYTES, CHECKPOINTS, FILES, RECORD_BYTES = 5, 3_000_000, 4, 20, 600
WORKER_FAILURES, WORKER_START = 0.01, 30.0  # per hour; seconds of a cold start
SUBJECTS = (10**2, 10**4, 10**6)
ADAPTERS, IMAGES_PER_SECOND, SERVED_LOAD = 10**3, 10**2, 0.7


def pack_operations(pack: int) -> float:
    """Operations of a pack's step, of those of one subject: linear from those of four."""
    return 1 + (PACK_OF_FOUR - 1) * (pack - 1) / 3


def markdown(rows: Iterable[Sequence[object]]) -> str:
    """A table as the documents print it."""
    first, *rest = [" | ".join(map(str, row)) for row in rows]
    rule = " | ".join(["---"] * (first.count(" | ") + 1))
    return "\n".join(f"| {line} |" for line in (first, rule, *rest))


def size(count: float) -> str:
    """Bytes with three digits."""
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if count < 999.5 or unit == "PB":
            return f"{digits(count)} {unit}"
        count /= 1000
    raise AssertionError


def digits(value: float) -> str:
    """Three of them, or all before the point."""
    if value == 0 or value >= 999.5:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def counted_table() -> str:
    """A subject at full size."""
    models = list(MODELS.values())
    rows: list[list[object]] = [["counted, a subject", *(model.title for model in models)]]
    figures = {
        "base in bf16": [size(m.base_bytes) for m in models],
        "adapter in float32": [size(m.adapter_bytes) for m in models],
        "a checkpoint: adapter and two moments": [size(m.checkpoint_bytes) for m in models],
        "live bytes while training, GiB": [m.peak for m in models],
        "operations that a step dispatches": [f"{m.operations:,}" for m in models],
        "operands that they read and write": [size(m.operands * 1e9) for m in models],
        "products of a step, 10^12 operations": [digits(m.step) for m in models],
        "products of a training, 10^15": [digits(m.steps * m.step / 1e3) for m in models],
        "products of an image, 10^12": [
            digits(2 * SAMPLING_STEPS * m.forward + m.decode) for m in models
        ],
    }
    return markdown(rows + [[name, *values] for name, values in figures.items()])


def gpu_table(device: Device) -> str:
    """Times of a GPU as they would follow."""
    rows: list[list[object]] = [
        ["derived, no GPU has run it", "pack", "products, ms a step", "memory, ms", "dispatch, ms",
         "a subject, s", "adapters per GPU-hour"]
    ]  # fmt: skip
    for model in MODELS.values():
        for pack in (1, 4, 8):
            bounds = [1e3 * value for value in device.step_seconds(model, pack)]
            seconds = device.subject_seconds(model, pack)
            figures = [*map(digits, bounds), digits(seconds), digits(HOUR / seconds)]
            rows.append([model.title, pack, *figures])
    return markdown(rows)


def fleet_table(device: Device) -> str:
    """Return the table of a fleet of so many SDXL subjects."""
    model = MODELS["sdxl"]
    rows: list[list[object]] = [["SDXL, derived", *(f"{n:,} subjects" for n in SUBJECTS)]]
    alone, packed = (device.subject_seconds(model, pack) for pack in (1, 4))
    fails = WORKER_FAILURES / HOUR
    with_failures = expected_completion(
        alone, fails, restart=WORKER_START, interval=alone / CHECKPOINTS
    )
    each = {
        "GPU-hours, one by one": lambda n: digits(n * alone / HOUR),
        "GPU-hours, in packs of 4": lambda n: digits(n * packed / HOUR),
        "GPUs that are done in a day, one by one": lambda n: f"{math.ceil(n * alone / DAY):,}",
        "base, read by each subject": lambda n: size(n * model.base_bytes),
        "base, read once by each of these GPUs": lambda n: size(
            math.ceil(n * alone / DAY) * model.base_bytes
        ),
        "photos": lambda n: size(n * PHOTOS * PHOTO_BYTES),
        "checkpoints written": lambda n: size(n * CHECKPOINTS * model.checkpoint_bytes),
        "adapters kept": lambda n: size(n * model.adapter_bytes),
        "files kept": lambda n: f"{n * FILES:,}",
        "records": lambda n: size(n * RECORD_BYTES),
        "failures of workers": lambda n: digits(n * fails * alone),
        "GPU-hours that they cost": lambda n: digits(n * (with_failures - alone) / HOUR),
    }
    for name, figure in each.items():
        rows.append([name, *(figure(n) for n in SUBJECTS)])
    return markdown(rows)


def serving_table(device: Device) -> str:
    """Return the table of many adapters in one stream of images."""
    models = list(MODELS.values())
    gpus = [math.ceil(IMAGES_PER_SECOND * device.image_seconds(m) / SERVED_LOAD) for m in models]
    rows: list[list[object]] = [
        [f"{ADAPTERS:,} adapters, {IMAGES_PER_SECOND} images a second, derived",
         *(m.title for m in models)]
    ]  # fmt: skip
    per_adapter = [IMAGES_PER_SECOND / ADAPTERS / count for count in gpus]
    figures = {
        "an image, s": [digits(device.image_seconds(m)) for m in models],
        f"GPUs at a load of {SERVED_LOAD:.0%}": gpus,
        "all adapters in bf16, on each GPU": [size(ADAPTERS * m.adapter_bytes / 2) for m in models],
        "requests for one adapter on one GPU, a minute": [digits(60 * x) for x in per_adapter],
        "chance of another within 1 s": [f"{1 - math.exp(-x):.2%}" for x in per_adapter],
        "merging and restoring, of an image's time": [
            f"{3 * 2 * m.unet / 1e12 / device.bandwidth / device.image_seconds(m):.2%}"
            for m in models
        ],
    }
    return markdown(rows + [[name, *values] for name, values in figures.items()])


def measured_table(path: Path) -> str:
    """Medians of a fleet's records: the first subject of each worker, and the others."""
    records: list[dict[str, Any]] = [json.loads(line) for line in path.open(encoding="utf-8")]
    workers = {record["worker"]: record["name"] for record in reversed(records)}
    cold = [r for r in records if workers[r["worker"]] == r["name"]]
    warm = [r for r in records if r not in cold]
    groups = {f"first of a worker ({len(cold)})": cold, f"others ({len(warm)})": warm}
    rows: list[list[object]] = [["measured, a subject", *groups]]
    figures = {
        "to its first step, s": ("start_seconds", digits),
        "from there to its end, s": ("train_seconds", digits),
        "processor time, s": ("cpu_seconds", digits),
        "most memory so far": ("peak_bytes", size),
    }
    for title, (name, shown) in figures.items():
        rows.append([title, *(shown(median(r[name] for r in group)) for group in groups.values())])
    steps = fmean(r["steps"] for r in records)
    rate = sum(r["train_seconds"] for r in warm) / sum(r["steps"] for r in warm)
    return markdown(rows) + f"\n\n{steps:.0f} steps each, {rate:.3f} s a step."


def tables(device: Device) -> list[str]:
    """All of the arithmetic."""
    return [counted_table(), gpu_table(device), fleet_table(device), serving_table(device)]


def count(family: str) -> dict[str, float]:
    """Parameters and products of a model, on the meta device."""
    import torch
    from common import unet, unet_inputs
    from diffusers import AutoencoderKL
    from full_size import VAE as VAE_CONFIG
    from torch.utils.flop_counter import FlopCounterMode

    latent = {"sd1": 64, "sdxl": 128}[family]
    counters = [FlopCounterMode(display=False) for _ in range(3)]
    with torch.device("meta"):
        model, vae = unet(family), AutoencoderKL(**VAE_CONFIG)
        with counters[0]:
            prediction = model(**unet_inputs(family, latent)).sample
        with counters[1]:
            prediction.backward(torch.empty_like(prediction))
        with counters[2], torch.no_grad():
            vae.decode(torch.empty(1, 4, latent, latent))
    forward, backward, decode = (counter.get_total_flops() / 1e12 for counter in counters)
    parameters = [sum(p.numel() for p in module.parameters()) for module in (model, vae)]
    return {
        "unet": parameters[0], "vae": parameters[1],
        "forward": forward, "backward": backward, "decode": decode,
    }  # fmt: skip


def main() -> None:
    """Print tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=Path, help="fleet.jsonl of a fleet: its measured costs")
    parser.add_argument("--count", action="store_true", help="count the constants anew")
    parser.add_argument("--tflops", type=float, default=Device.tflops, help="dense bf16 peak")
    parser.add_argument("--bandwidth", type=float, default=Device.bandwidth, help="TB/s")
    parser.add_argument("--utilisation", type=float, default=Device.utilisation, help="of the peak")
    parser.add_argument("--streaming", type=float, default=Device.streaming, help="of --bandwidth")
    parser.add_argument("--dispatch", type=float, default=Device.dispatch, help="s an operation")
    args = parser.parse_args()
    if args.count:
        print(json.dumps({family: count(family) for family in MODELS}, indent=1))
    elif args.records:
        print(measured_table(args.records))
    else:
        values = {field.name: getattr(args, field.name) for field in fields(Device)}
        print("\n\n".join(tables(Device(**values))))


if __name__ == "__main__":
    main()
