"""Cost of training and sampling on a CUDA device, and whether they are right there.

    benchmarks/gpu.sh --output /tmp/gpu
    benchmarks/gpu.sh --output /tmp/gpu --parts steps-sd1 sampling-sd1 --again

Each part (`gpu_parts`) is a process of its own with a time limit, and writes its rows as they come:
one that fails, or takes too long, is written as such, and the others go on. ``DEVICE=cpu`` runs
every line with tiny models, to test this script.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from common import LORA, markdown, torch
from gpu_parts import DEVICE, IS_SMALL, PARTS, Row

from dora_diffusion.studio.jobs.queue import end_tree

MINUTES = 9.5
# Columns of a table that come last, in this order.
RESULTS = ("ms", f"to {LORA}", "peak GiB", "merging, s", "first two, s")
# Written below a table: why a row has no figures.
REASONS = ("failed", "skipped")
# What rows have in common that are compared.
LOAD = ("batch", "checkpointing")


def write(path: Path, content: Row) -> None:
    """Write JSON, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read(path: Path) -> Row:
    """Read the result of a part; nothing where it has none."""
    if not path.is_file():
        return {}
    content: Row = json.loads(path.read_text(encoding="utf-8"))
    return content


def run_part(name: str, folder: Path) -> None:
    """Run a part in this process, and write each row when it is there."""
    rows: list[Row] = []
    begun = time.perf_counter()
    for row in PARTS[name].rows():
        rows.append(row)
        print(name, json.dumps(row), flush=True)
        write(folder / f"{name}.json", {"rows": rows})
    seconds = round(time.perf_counter() - begun, 1)
    write(folder / f"{name}.json", {"rows": rows, "seconds": seconds, "complete": True})


def start_part(name: str, folder: Path, limit: float) -> None:
    """Run a part in a process of its own, for at most so many seconds."""
    path = folder / f"{name}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--output", str(folder), "--only", name]
    with subprocess.Popen(command) as process:
        try:
            code = process.wait(limit)
            problem = f"ended with code {code}" if code else ""
        except subprocess.TimeoutExpired:
            problem = f"stopped after {limit:.0f} s"
        finally:
            # With what it started: tests, or compilers, would keep the device from what comes next.
            if process.poll() is None:
                end_tree(psutil.Process(process.pid))
    if problem:
        write(path, read(path) | {"problem": problem})


def about() -> Row:
    """The device and the versions."""
    row: Row = {"device": "CPU, tiny models", "torch": torch.__version__}
    if DEVICE == "cuda":
        properties = torch.cuda.get_device_properties(0)
        row["device"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        row["cuda"] = torch.version.cuda
    return row


def report(folder: Path) -> str:
    """Return everything that was written, as `lab/measurements/gpu-operations.md` shows it."""
    known = read(folder / "about.json")
    device = known.pop("device", "")
    blocks = [", ".join([device, *(f"{name} {version}" for name, version in known.items())])]
    for name, part in PARTS.items():
        content = read(folder / f"{name}.json")
        if content:
            blocks += [f"#### {part.title}", *table(content.get("rows", []))]
        if "problem" in content:
            blocks.append(f"Not complete: {content['problem']}.")
    return "\n\n".join(blocks) + "\n"


def table(rows: Sequence[Row]) -> list[str]:
    """A part's rows as a table; what has no figures says why below it."""
    rows = [row | ratio(row, rows) for row in rows]
    keys = list(dict.fromkeys(key for row in rows for key in row if key not in REASONS))
    keys = [key for key in keys if key not in RESULTS] + [key for key in RESULTS if key in keys]
    cells = [[cell(row.get(key, "")) for key in keys] for row in rows]
    blocks = [markdown(keys, cells)] if rows else []
    for row, line in zip(rows, cells, strict=True):
        what = ", ".join(text for text in line if text)
        blocks += [" ".join(f"{what}: {why}, {row[why]}".split()) for why in REASONS if why in row]
    return blocks


def ratio(row: Row, rows: Sequence[Row]) -> Row:
    """Return its time relative to PEFT's LoRA under the same load."""
    loras = [other for other in rows if other.get("peer") == LORA and "ms" in other]
    same = [other for other in loras if all(other.get(key) == row.get(key) for key in LOAD)]
    return {f"to {LORA}": f"{row['ms'] / same[0]['ms']:.2f}"} if same and "ms" in row else {}


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value).replace("|", r"\|")


def write_report(folder: Path) -> list[Row]:
    """Write gpu.json and gpu.md of what there is; returns the parts."""
    parts = {name: read(folder / f"{name}.json") for name in PARTS}
    write(folder / "gpu.json", {"about": read(folder / "about.json"), "parts": parts})
    (folder / "gpu.md").write_text(report(folder), encoding="utf-8")
    return list(parts.values())


def main() -> int:
    """Run the parts that are missing, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together")
    parser.add_argument("--again", action="store_true", help="do again what is complete")
    parser.add_argument("--only", choices=tuple(PARTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        run_part(args.only, args.output)
        return 0
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; DEVICE=cpu tests the script without one")
    end = time.monotonic() + 60 * args.minutes
    args.output.mkdir(parents=True, exist_ok=True)
    write(args.output / "about.json", about())
    for name in args.parts:
        path = args.output / f"{name}.json"
        if read(path).get("complete") and not args.again:
            continue
        left = end - time.monotonic()
        if left < 1:
            # What an earlier start has kept of it stays.
            write(path, {"problem": "no time was left"} | read(path))
        else:
            start_part(name, args.output, left if IS_SMALL else min(left, PARTS[name].limit))
        # At once: whoever started this may stop it.
        parts = write_report(args.output)
    parts = write_report(args.output)
    print((args.output / "gpu.md").read_text(encoding="utf-8"))
    failed = any("problem" in p or any("failed" in r for r in p.get("rows", ())) for p in parts)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
