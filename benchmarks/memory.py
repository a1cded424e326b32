"""Measure what training takes of memory, at full size with random weights, one row a call.

    python benchmarks/memory.py --family sd1 --resolution 512 --checkpointing --work /tmp/full

Trains two steps in bfloat16 through the command line with the default adapter on the UNet and the
text encoders, on the CPU, and prints the peak memory of the process as a row of the table in
`dora_diffusion.memory`. A run that grows beyond ``--limit`` is ended, and said not to fit.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from full_size import UNETS, model_in


def peak_memory(command: list[str], limit: float) -> float | None:
    """Peak resident memory of a command in GiB; None if it was ended since it took more."""
    process = subprocess.Popen(command)
    status = Path(f"/proc/{process.pid}/status")
    while True:
        ended, code, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
            break
        peak = [x for x in status.read_text(encoding="utf-8").splitlines() if x.startswith("VmHWM")]
        if peak and int(peak[0].split()[1]) / 2**20 > limit:
            os.kill(process.pid, signal.SIGKILL)
            os.wait4(process.pid, 0)
            return None
        time.sleep(0.2)
    if code:
        raise SystemExit(f"failed: {' '.join(command)}")
    return round(usage.ru_maxrss / 2**20, 2)


def main() -> None:
    """Make the model once, train, print the row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=tuple(UNETS), required=True)
    parser.add_argument("--resolution", type=int, required=True)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--limit", type=float, default=16.5, help="GiB.")
    parser.add_argument("--photos", default="samples/bolt_mug")
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    base = model_in(args.work, args.family)
    command = [
        sys.executable, "-m", "dora_diffusion", "train",
        "--pretrained_model_name_or_path", str(base),
        "--instance_data_dir", args.photos, "--instance_prompt", "a photo of a sks mug",
        "--output_dir", str(args.work / "memory-output"), "--overwrite_output_dir",
        "--train_text_encoder", "--resolution", str(args.resolution), "--max_train_steps", "2",
        "--train_batch_size", str(args.batch), "--mixed_precision", "bf16",
        "--gradient_checkpointing" if args.checkpointing else "--no-gradient_checkpointing",
        "--num_validation_images", "0", "--checkpointing_steps", "0",
    ]  # fmt: skip
    peak = peak_memory(command, args.limit)
    row = {
        "family": args.family,
        "resolution": args.resolution,
        "gradient_checkpointing": args.checkpointing,
        "batch": args.batch,
        "peak_gib": peak if peak is not None else f"more than {args.limit}",
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
