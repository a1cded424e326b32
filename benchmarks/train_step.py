"""Cost of a real training step beside the UNet, and the time until the first one.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --calls

On the embedded models: a step of `train` against the same UNet, adapters and latents without the
trainer; a step with DoRA against one with LoRA, where issuing operations takes the time; AdamW's
implementations on the same gradients; the time from the command to the first optimizer step against
an empty Python that only imports torch and diffusers; and the training of the demo, from the
command to the written adapter and its samples, against the same with LoRA.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import median
from types import FrameType

import torch
from common import interleaved, machine, markdown, ratio
from torch import Tensor

import dora_diffusion
from dora_diffusion.adapters.layers import adapted_layers
from dora_diffusion.adapters.scope import norm_scope
from dora_diffusion.config import TrainConfig
from dora_diffusion.config.base import QUANTISATIONS
from dora_diffusion.training.inputs.plan import plan_run
from dora_diffusion.training.processes import make_accelerator
from dora_diffusion.training.recipe import assemble
from dora_diffusion.training.run import Run

PACKAGE = str(Path(dora_diffusion.__file__).parent)
ALONE, STEP = "UNet alone", "training step"
LORA_HERE = "the same with LoRA"
SETTINGS = {
    "pretrained_model_name_or_path": "embedded:tiny-sd",
    "instance_data_dir": "samples/bolt_mug",
    "instance_prompt": "a photo of a sks mug",
    "num_validation_images": 0,
    "checkpointing_steps": 0,
    "overwrite_output_dir": True,
}


def settings(output: str, **chosen: object) -> TrainConfig:
    """Return the settings of a run on an embedded model."""
    return TrainConfig(**(SETTINGS | chosen), output_dir=output)


def session(output: str, **chosen: object) -> Run:
    """A run on an embedded model, ready for its first step."""
    config = settings(output, **chosen)
    return assemble(plan_run(config), make_accelerator(config))


def bare_step(run: Run) -> None:
    """Forward and backward of the UNet on a batch that is ready."""
    unet = run.components.denoiser
    side = run.resolution // run.components.vae_factor
    batch = run.config.train_batch_size
    latents: Tensor = torch.randn(batch, unet.config.in_channels, side, side)
    states = torch.randn(batch, 77, unet.config.cross_attention_dim)
    with norm_scope(unet):
        unet(latents, torch.full((batch,), 500), states).sample.square().mean().backward()
    run.step.optimizer.zero_grad(set_to_none=True)


def step_beside_unet(output: str, rounds: int) -> None:
    run = session(output)
    number = iter(range(1, 10**9))
    steps = {ALONE: lambda: bare_step(run), STEP: lambda: run.step(next(number))}
    samples = interleaved(steps, rounds, at_least=0.5)
    rows = [[n, f"{1e3 * median(samples[n]):.0f}", ratio(samples, n, ALONE)] for n in steps]
    print(markdown(["embedded:tiny-sd", "ms", f"to {ALONE}"], rows), "\n")


def against_lora(output: str, rounds: int) -> None:
    """Whole steps from the fifth on, one of each in turn."""
    chosen = {
        "pretrained_model_name_or_path": "embedded:tiny-sdxl", "resolution": 128,
        "targets": ("attention",), "rank": 8, "train_batch_size": 1,
    }  # fmt: skip
    runs = {n: session(output, **chosen, use_dora=n == "DoRA") for n in (LORA_HERE, "DoRA")}
    number = iter(range(1, 10**9))
    steps = {n: partial(lambda run: run.step(next(number)), run) for n, run in runs.items()}
    interleaved(steps, 5)
    samples = interleaved(steps, 12 * rounds)
    rows = [[n, f"{1e3 * median(samples[n]):.0f}", ratio(samples, n, LORA_HERE)] for n in steps]
    print(markdown(["embedded:tiny-sdxl, 128 px, attention", "ms", "to LoRA"], rows), "\n")


def optimizers(output: str, rounds: int) -> None:
    trained = session(output).step.parameters
    kinds = {"plain": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    steps = {}
    for name, kind in kinds.items():
        parameters = [torch.nn.Parameter(p.detach().clone()) for p in trained]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        steps[name] = torch.optim.AdamW(parameters, **kind).step
    samples = interleaved(steps, rounds, at_least=0.2)
    rows = [[n, f"{1e3 * median(samples[n]):.1f}", ratio(samples, n, "plain")] for n in steps]
    print(markdown([f"AdamW, {len(trained)} tensors", "ms", "to plain"], rows), "\n")


def calls(output: str) -> None:
    """The project's functions that the last 3 of 14 steps enter, without comprehensions."""
    run, entered = session(output, max_train_steps=14), Counter[tuple[str, str]]()

    def note(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE) and "<" not in code.co_name:
            entered[code.co_filename.removeprefix(PACKAGE), code.co_qualname] += 1

    for number in range(1, 15):
        sys.setprofile(note if number > 11 else None)
        run.step(number)
        sys.setprofile(None)
    layers = sum(1 for _ in adapted_layers(run.components.denoiser))
    row = [layers, len({file for file, _ in entered}), len(entered), sum(entered.values()) // 3]
    print(markdown(["adapted layers", "modules", "functions", "calls of a step"], [row]), "\n")
    most = [[f"{file[1:]} {name}", count // 3] for (file, name), count in entered.most_common(12)]
    print(markdown(["entered most", "times"], most))


def on_quantised_bases(output: str, rounds: int) -> None:
    """Processor time of whole steps in turns, the first of each left out."""
    bases = {"none": {}, **{kind: {"quantize": kind} for kind in QUANTISATIONS}}
    runs = {name: session(output, **chosen) for name, chosen in bases.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(1, rounds + 2):
        for name, run in runs.items():
            begun = time.process_time()
            run.step(number)
            samples[name] += [time.process_time() - begun] * (number > 1)
    rows = [[n, f"{1e3 * median(samples[n]):.0f}", ratio(samples, n, "none")] for n in runs]
    print(markdown(["embedded:tiny-sd, quantize", "processor ms", "to none"], rows), "\n")


def children_seconds(command: list[str]) -> float:
    """Processor time of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def start_up(output: str, rounds: int) -> None:
    flags = [
        str(part)
        for key, value in SETTINGS.items()
        if value is not True
        for part in (f"--{key}", value)
    ]
    train = [
        sys.executable,
        "-m",
        "dora_diffusion",
        "train",
        *flags,
        "--overwrite_output_dir",
        "--output_dir",
        output,
        "--max_train_steps",
        "1",
    ]
    imports = [
        sys.executable,
        "-c",
        "import torch, diffusers; from diffusers import StableDiffusionPipeline",
    ]
    commands = {
        "import torch and diffusers": imports,
        "train, one step, adapter written": train,
        "train --help": [sys.executable, "-m", "dora_diffusion", "train", "--help"],
    }
    rows = []
    for name, command in commands.items():
        times = [children_seconds(command) for _ in range(rounds)]
        rows.append([name, f"{median(times):.1f}"])
    print(markdown(["command", "processor seconds"], rows))


def demo(output: str, steps: int, rounds: int) -> None:
    command = [
        sys.executable, "-m", "dora_diffusion", "train", "--config", "samples/bolt_mug/config.yaml",
        "--output_dir", output, "--overwrite_output_dir", "--max_train_steps", str(steps),
    ]  # fmt: skip
    commands = {LORA_HERE: [*command, "--no-use_dora"], "DoRA": command}
    samples: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, one in commands.items():
            samples[name].append(children_seconds(one))
    rows = [[n, f"{median(samples[n]):.1f}", ratio(samples, n, LORA_HERE)] for n in commands]
    print(markdown([f"the demo's training, {steps} steps", "seconds", "to LoRA"], rows), "\n")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--demo_steps", type=int, default=100, help="of the demo's training")
    parser.add_argument("--calls", action="store_true", help="count what a step enters, and end")
    parser.add_argument("--quantized", action="store_true", help="steps by quantize, and end")
    args = parser.parse_args()
    print(machine(), "\n")
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder) / "run")
        if args.calls:
            calls(output)
            return
        if args.quantized:
            on_quantised_bases(output, args.rounds)
            return
        step_beside_unet(output, args.rounds)
        against_lora(output, args.rounds)
        optimizers(output, args.rounds)
        demo(output, args.demo_steps, 3)
        start_up(output, 3)


if __name__ == "__main__":
    main()
