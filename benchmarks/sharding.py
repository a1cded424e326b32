"""Memory of two processes that share a model, at full size, with random weights.

    python benchmarks/sharding.py --family sd1 --work /tmp/full

Trains a DoRA by two CPU processes (gloo): with whole models (``--sharding none``), and with one
model between them (``--sharding fsdp``). Of each: bytes of the UNet that are alive in a process
before its first step, counted by storage, resident memory then and at its peak, losses, and times.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import machine
from full_size import UNETS, model_in

from dora_diffusion.config import TrainConfig
from dora_diffusion.training import recipe

GIB = 2**30


def alive(model: Any) -> int:
    """Bytes of the storages of a model's parameters in this process, each counted once."""
    sizes = {}
    for parameter in model.parameters():
        here = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        sizes[here.untyped_storage().data_ptr()] = here.untyped_storage().nbytes()
    return sum(sizes.values())


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf(
        "SC_PAGE_SIZE"
    )


def train(settings: dict[str, Any]) -> None:
    """Train in one of the processes, and print what it was."""
    told: dict[str, Any] = {"rank": int(os.environ["RANK"])}
    assemble = recipe.assemble

    def assembled(*args: Any, **kwargs: Any) -> Any:
        run = assemble(*args, **kwargs)
        told["unet_gib"] = round(alive(run.components.denoiser) / GIB, 3)
        told["resident_gib"] = round(resident() / GIB, 2)
        told["started"] = time.perf_counter()
        return run

    recipe.assemble = assembled
    recipe.train(TrainConfig.from_dict(settings))
    told["seconds"] = round(time.perf_counter() - told.pop("started"), 1)
    told["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    print(json.dumps(told), flush=True)


def by_two(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Train by two processes; what each printed last."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, __file__, "--settings", json.dumps(settings)]
    processes = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, encoding="utf-8",
            env=os.environ | shared | {
                "ACCELERATE_USE_CPU": "true", "RANK": str(rank), "LOCAL_RANK": str(rank),
            },
        )
        for rank in (0, 1)
    ]  # fmt: skip
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("a process failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def main() -> None:
    """Make the model, train, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=tuple(UNETS), default="sd1")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--precision", choices=("no", "bf16"), default="bf16")
    parser.add_argument("--photos", default="samples/bolt_mug")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.settings:
        train(json.loads(args.settings))
        return
    for sharding in ("none", "fsdp"):
        output = args.work / f"{args.family}-{sharding}"
        settings = {
            "pretrained_model_name_or_path": str(model_in(args.work, args.family)),
            "instance_data_dir": args.photos, "instance_prompt": "a photo of a sks mug",
            "output_dir": str(output), "overwrite_output_dir": True,
            "resolution": args.resolution, "max_train_steps": args.steps,
            "mixed_precision": args.precision, "gradient_checkpointing": True,
            "num_validation_images": 0, "checkpointing_steps": 0, "sharding": sharding,
        }  # fmt: skip
        told = by_two(settings)
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses = [json.loads(line)["loss"] for line in lines]
        print(json.dumps({"sharding": sharding, "processes": told, "losses": losses}), flush=True)
    print(machine())


if __name__ == "__main__":
    main()
