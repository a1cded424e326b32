"""Gain of a pack: subject-steps per second, and how many subjects fit a GPU.

    OMP_NUM_THREADS=1 python benchmarks/packs.py --work /tmp/packs             # speed, on this CPU
    python benchmarks/packs.py --memory                                        # SDXL at 1024 px

Speed: a pack of the embedded model and a run of one subject take turns, ``--rounds`` times; of each
counts its quickest step, in processor time, with all that a run does in it. What a round has
measured is kept in ``WORK/rounds.jsonl``, and not measured again.

Memory: as `memory.py` counts it, the peak of live bytes of a step of K subjects on a GPU of full
size, of which none is needed. What operations are issued, `launches.py --packs` counts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
import warnings
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import markdown
from fake_gpu import DEVICE, Answers, fake_gpu
from live_bytes import GIB, LiveBytes
from memory import (
    Encoded,
    OneBatch,
    accelerator,
    batch_of,
    cached,
    label_weights,
    make_components,
    make_states,
)

from dora_diffusion.adapters.inject import AdapterSet
from dora_diffusion.config import TrainConfig
from dora_diffusion.config.subject_list import subject_configs
from dora_diffusion.models.memory import PROCESS_GIB
from dora_diffusion.training.events import StepDone
from dora_diffusion.training.pack import train_pack
from dora_diffusion.training.pack_step import PackStep
from dora_diffusion.training.recipe import build_step, train
from dora_diffusion.training.trainable.adapters import inject_trained

SAMPLES = Path(__file__).resolve().parents[1] / "samples"
CARDS = (12, 16, 24, 80)
# As `memory.py` leaves of a card: a tenth, and half a gigabyte for the screen.
SPARE, SCREEN_GIB = 1.1, 0.5


class Clock:
    """Times of a run's steps, in processor seconds."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, event: Any) -> None:
        """Note a step, but for the last one, which is told when results are written."""
        if isinstance(event, StepDone) and event.step < event.total_steps:
            self.times.append(time.process_time())

    def per_second(self) -> float:
        """Steps per second; the quickest of them, since other work on the machine only slows."""
        return 1 / min(later - one for one, later in zip(self.times, self.times[1:], strict=False))


def settings(work: Path, steps: int) -> TrainConfig:
    """Return the settings that all subjects share."""
    shutil.rmtree(work / "out", ignore_errors=True)
    return TrainConfig(
        max_train_steps=steps,
        num_validation_images=0,
        checkpointing_steps=0,
        output_dir=str(work / "out"),
    )


def configs_of(count: int, work: Path, steps: int) -> dict[str, TrainConfig]:
    """Return the configs of so many subjects."""
    entry = {"instance_data_dir": str(SAMPLES / "bolt_mug"), "instance_prompt": "a sks mug"}
    entries = [{**entry, "name": f"subject-{k}", "seed": k} for k in range(count)]
    return subject_configs(entries, settings(work, steps))


def measure(count: int, work: Path, steps: int) -> dict[str, float]:
    """Subject-steps per second of a pack, and of a subject by itself."""
    packed, alone = Clock(), Clock()
    of_first = {"subject-0": packed}
    train_pack(configs_of(count, work, steps), lambda name, event: tell(of_first, name, event))
    train(configs_of(1, work, steps)["subject-0"], alone)
    return {"subjects": count, "packed": count * packed.per_second(), "alone": alone.per_second()}


def tell(clocks: dict[str, Clock], name: str, event: Any) -> None:
    """Send an event to the clock of a subject, if it has one."""
    if name in clocks:
        clocks[name](event)


def print_speed(args: argparse.Namespace) -> None:
    """Measure what is missing, and print the median of all rounds."""
    args.work.mkdir(parents=True, exist_ok=True)
    file = args.work / "rounds.jsonl"
    lines = file.read_text("utf-8").splitlines() if file.is_file() else []
    rounds = [json.loads(line) for line in lines]
    for number in range(args.rounds):
        for count in args.subjects:
            if sum(made["subjects"] == count for made in rounds) <= number:
                rounds.append(measure(count, args.work, args.steps))
                with file.open("a", encoding="utf-8") as log:
                    log.write(json.dumps(rounds[-1]) + "\n")
    rows = []
    for count in args.subjects:
        own = [made for made in rounds if made["subjects"] == count]
        ratios = [made["packed"] / made["alone"] for made in own]
        packed, alone = (statistics.median(m[key] for m in own) for key in ("packed", "alone"))
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        rows.append(
            [count, f"{packed:.1f}", f"{alone:.1f}", f"{statistics.median(ratios):.2f}", spread]
        )
    header = ("subjects", "packed, subject-steps/s", "one by one", "ratio", "over rounds")
    print(markdown(header, rows))


def count_pack(family: str, resolution: int, config: TrainConfig, count: int) -> LiveBytes:
    """Count the peak of a step of so many subjects, a row each, in bf16."""
    config = replace(config, max_train_steps=2)
    with ExitStack() as stack:
        stack.enter_context(fake_gpu())
        live = LiveBytes(DEVICE)
        components = make_components(family, torch.bfloat16)
        label_weights(live, components, False)
        live.label = "adapter"
        stack.enter_context(Answers())
        stack.enter_context(live)
        batch = batch_of(components, resolution // components.vae_factor, config)
        batches: Any = OneBatch(components, batch)
        steps = []
        for _ in range(count):
            AdapterSet.of(components.denoiser).detach()
            weights = inject_trained(components, config)
            step = build_step(config, accelerator(), components, weights, batches)
            step.encode = Encoded(components, cached)  # type: ignore[assignment]
            make_states(step)
            steps.append(step)
        steps[0].adapters.attach()
        pack = PackStep(steps)
        live.label = "step"
        live.reset_peak()
        for outcome in pack([1] * count):
            if isinstance(outcome, Exception):
                raise outcome
    return live


def print_memory(args: argparse.Namespace) -> None:
    """Count, and say how many subjects fit."""
    for checkpointing in (False, True):
        config = TrainConfig(gradient_checkpointing=checkpointing, offload="model")
        peaks = {}
        for count in args.subjects:
            live = count_pack(args.family, args.resolution, config, count)
            peaks[count] = (live.peak - live.at_peak.get("idle", 0)) / GIB + PROCESS_GIB
            parts = {k: round(v / GIB, 2) for k, v in live.at_peak.items()}
            print(f"{count} subjects: {peaks[count]:.2f} GiB, {parts}", flush=True)
        first, last = min(peaks), max(peaks)
        each = (peaks[last] - peaks[first]) / max(1, last - first)
        base = peaks[first] - first * each
        fits = [int(((card - SCREEN_GIB) / SPARE - base) / each) for card in CARDS]
        rows = [[*(f"{peaks[count]:.2f}" for count in peaks), f"{each:.2f}", *fits]]
        header = [*(f"{count} subjects" for count in peaks), "each more"]
        header += [f"fit {card} GB" for card in CARDS]
        print(f"\n{args.family}, {args.resolution} px, bf16, checkpointing {checkpointing}, GiB\n")
        print(markdown(tuple(header), rows), flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("/tmp/packs"))
    parser.add_argument("--subjects", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--family", default="sdxl")
    parser.add_argument("--resolution", type=int, default=1024)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    print_memory(args) if args.memory else print_speed(args)


if __name__ == "__main__":
    main()
