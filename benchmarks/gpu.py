"""What training and sampling take on a CUDA device, and whether they are right there.

    benchmarks/gpu.sh --output /tmp/gpu
    benchmarks/gpu.sh --output /tmp/gpu --parts steps-sd1 sampling-sd1 --again

Each part is a process of its own with a time limit, and writes its rows as they come: one that
fails, or takes too long, is written as such, and the others go on. UNets of full size have random
weights, made on the device. ``DEVICE=cpu`` runs every line with narrow ones, to test this script.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

DEVICE = os.environ.get("DEVICE", "cuda")
IS_SMALL = DEVICE == "cpu"
MINUTES = 9.5
RANK = 8
# Of one row: what it may take after its first two calls.
SECONDS = 0.05 if IS_SMALL else 3.0

Row = dict[str, Any]
Rows = Iterator[Row]

# What follows imports torch inside: the driver needs none of it.


@contextmanager
def dtype_of_new(dtype: Any) -> Iterator[None]:
    """Modules made inside have this dtype."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def base_unet(family: str, dtype: Any) -> Any:
    """The frozen UNet of a family with random weights, on the device."""
    import torch
    from diffusers import UNet2DConditionModel
    from dispatch_time import narrow_unet
    from full_size import UNETS

    torch.manual_seed(0)
    if IS_SMALL:
        return narrow_unet(family).to(dtype)
    with dtype_of_new(dtype), torch.device(DEVICE):
        return UNet2DConditionModel(**UNETS[family]).requires_grad_(False)


def inputs_of(family: str, batch: int, dtype: Any) -> dict[str, Any]:
    """Keyword arguments of a call of the UNet."""
    import torch
    from full_size import UNETS

    make = partial(torch.randn, device=DEVICE, dtype=dtype)
    side = 16 if IS_SMALL else UNETS[family]["sample_size"]
    width = 32 if IS_SMALL else UNETS[family]["cross_attention_dim"]
    inputs: dict[str, Any] = {
        # So that the frozen one has a backward pass too.
        "sample": make(batch, 4, side, side).requires_grad_(),
        "timestep": torch.full((batch,), 500, device=DEVICE),
        "encoder_hidden_states": make(batch, 8 if IS_SMALL else 77, width),
    }
    if family == "sdxl":
        inputs["added_cond_kwargs"] = {
            "text_embeds": make(batch, 32 if IS_SMALL else 1280),
            "time_ids": torch.full((batch, 6), 1024.0, device=DEVICE),
        }
    return inputs


def predict(inputs: dict[str, Any], model: Any) -> Any:
    """The UNet's prediction."""
    return model(**inputs).sample


def peer_of(name: str, base: Any) -> Any:
    """A peer of `common` on attention and convolutions, what trains in float32."""
    from common import make_peer

    from dora_diffusion.adapters.targets import match_targets

    peer = make_peer(name, base, match_targets(base, ["attention+conv"]), 4 if IS_SMALL else RANK)
    for parameter in peer.parameters():  # As Diffusers' scripts do with PEFT's.
        parameter.data = parameter.data.float()
    return peer


def compile_blocks(model: Any) -> None:
    """Compile the repeated blocks of a UNet, the same ones for every peer."""
    from dora_diffusion.adapters import compiled

    compiled.compile_blocks(model)


def synchronize() -> None:
    import torch

    if DEVICE == "cuda":
        torch.cuda.synchronize()


def measured(function: Callable[[], object]) -> Row:
    """Milliseconds of a call after two that do not count, and the peak of memory over all."""
    import torch

    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    for _ in range(2):
        function()
        synchronize()
    row: Row = {"first two, s": round(time.perf_counter() - begun, 2)}
    calls, begun = 0, time.perf_counter()
    while calls < 3 or (calls < 20 and time.perf_counter() - begun < SECONDS):
        function()
        synchronize()
        calls += 1
    row["ms"] = round(1000 * (time.perf_counter() - begun) / calls, 1)
    if DEVICE == "cuda":
        row["peak GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return row


def rows_of(settings: Iterable[Row], measure: Callable[..., Row]) -> Rows:
    """A row for each of the settings; one that runs out of memory says so."""
    import torch

    for setting in settings:
        try:
            yield setting | measure(**setting)
        except torch.OutOfMemoryError:
            yield setting | {"failed": "out of memory"}
        except Exception as error:
            yield setting | {"failed": f"{type(error).__name__}: {error}"[:300]}


def steps(family: str, compiled: bool = False) -> Rows:
    """Whole training steps in bf16: each peer, batch 1 and 4."""
    import torch
    from common import FROZEN, LORA, OURS, PEFT_DORA
    from dispatch_time import Stepper

    base = base_unet(family, torch.bfloat16)
    # Larger models train with their blocks recomputed.
    loads = [(1, False), (4, family == "sdxl")]
    if family == "sdxl" and not compiled:
        loads.insert(1, (1, True))
    if compiled:
        loads = loads[:1]

    def measure(peer: str, batch: int, checkpointing: bool) -> Row:
        one = peer_of(peer, base)
        if checkpointing:
            one.model.train().enable_gradient_checkpointing()
        if compiled:
            compile_blocks(one.model)
        inputs = inputs_of(family, batch, torch.bfloat16)
        return measured(Stepper(one, partial(predict, inputs), peer == OURS))

    peers = (LORA, OURS) if compiled else (FROZEN, LORA, PEFT_DORA, OURS)
    return rows_of(
        [{"peer": p, "batch": b, "checkpointing": c} for b, c in loads for p in peers], measure
    )


def half(family: str) -> Rows:
    """Steps in fp16 with the gradient scaler."""
    import torch
    from common import LORA, OURS
    from dispatch_time import Stepper

    base = base_unet(family, torch.float16)

    def measure(peer: str) -> Row:
        scaler = torch.amp.GradScaler(DEVICE)
        inputs = inputs_of(family, 1, torch.float16)
        one = peer_of(peer, base)
        step = Stepper(one, partial(predict, inputs), peer == OURS, torch.float16, scaler=scaler)
        row = measured(step)
        finite = all(bool(p.isfinite().all()) for p in one.parameters())
        return row | {"scale": scaler.get_scale(), "finite": finite}

    return rows_of([{"peer": p} for p in (LORA, OURS)], measure)


def adam8bit(family: str) -> Rows:
    """Steps with the 8-bit AdamW of bitsandbytes, beside the fused one."""
    import torch
    from common import OURS
    from dispatch_time import Stepper

    base = base_unet(family, torch.bfloat16)

    def measure(optimizer: str) -> Row:
        make = None
        if optimizer == "8-bit AdamW":
            from bitsandbytes.optim import AdamW8bit

            make = partial(AdamW8bit, lr=1e-4)
        inputs = inputs_of(family, 1, torch.bfloat16)
        one = peer_of(OURS, base)
        one.model.train().enable_gradient_checkpointing()
        return measured(Stepper(one, partial(predict, inputs), True, optimizer=make))

    return rows_of([{"optimizer": name} for name in ("AdamW", "8-bit AdamW")], measure)


def sampling(family: str) -> Rows:
    """One guided denoising step of the UNet, adapters attached and merged; merging itself."""
    import torch
    from common import FROZEN, LORA, OURS, PEFT_DORA

    from dora_diffusion.adapters.inject import merge_adapters, norm_scope

    base = base_unet(family, torch.bfloat16)
    inputs = inputs_of(family, 2, torch.bfloat16)

    @torch.no_grad()
    def measure(peer: str, merged: bool) -> Row:
        one = peer_of(peer, base)
        row: Row = {}
        if merged:
            # Into the base that the peers share: this row is the last one.
            synchronize()
            begun = time.perf_counter()
            merge_adapters(one.model)
            synchronize()
            row["merging, s"] = round(time.perf_counter() - begun, 2)
        call = partial(predict, inputs, one.model)
        if peer == OURS and not merged:
            with norm_scope(one.model):
                return measured(call)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=peer in (LORA, PEFT_DORA)):
            return row | measured(call)

    names = [(name, False) for name in (FROZEN, LORA, PEFT_DORA, OURS)] + [(OURS, True)]
    return rows_of([{"peer": name, "merged": merged} for name, merged in names], measure)


def tests() -> Rows:
    """The tests that are marked for CUDA: on the device, here."""
    # One of them where this script is tested: the suite runs them all, on the emulated device.
    chosen = ["-k", "fresh_adapter"] if IS_SMALL else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda"]
    done = subprocess.run(
        [*command, *chosen, "tests/integration/test_cuda.py"],
        capture_output=True, text=True, encoding="utf-8", check=False,
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    row: Row = {"outcome": lines[-1].strip("= ") if lines else "no output"}
    if done.returncode:
        row["failed"] = "; ".join(failed) or (done.stdout + done.stderr)[-300:]
    yield row


# By name: what makes the rows, and the most seconds that it may take.
PARTS: dict[str, tuple[Callable[[], Rows], int]] = {
    "tests": (tests, 180),
    "steps-sd1": (partial(steps, "sd1"), 75),
    "steps-sdxl": (partial(steps, "sdxl"), 130),
    "sampling-sd1": (partial(sampling, "sd1"), 40),
    "sampling-sdxl": (partial(sampling, "sdxl"), 60),
    "fp16-sd1": (partial(half, "sd1"), 40),
    "adam8bit-sdxl": (partial(adam8bit, "sdxl"), 50),
    "compiled-sd1": (partial(steps, "sd1", compiled=True), 150),
    "compiled-sdxl": (partial(steps, "sdxl", compiled=True), 200),
}


def write(path: Path, content: Row) -> None:
    """Write JSON, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read(path: Path) -> Row:
    """What a part has written; nothing where it has not."""
    if not path.is_file():
        return {}
    content: Row = json.loads(path.read_text(encoding="utf-8"))
    return content


def run_part(name: str, folder: Path) -> None:
    """Do a part in this process, and write each row when it is there."""
    rows: list[Row] = []
    begun = time.perf_counter()
    for row in PARTS[name][0]():
        rows.append(row)
        print(name, json.dumps(row), flush=True)
        write(folder / f"{name}.json", {"rows": rows})
    seconds = round(time.perf_counter() - begun, 1)
    write(folder / f"{name}.json", {"rows": rows, "seconds": seconds, "complete": True})


def start_part(name: str, folder: Path, limit: float) -> None:
    """Do a part in a process of its own, for at most so many seconds."""
    path = folder / f"{name}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--output", str(folder), "--only", name]
    try:
        code = subprocess.run(command, timeout=limit, check=False).returncode
        problem = f"ended with code {code}" if code else ""
    except subprocess.TimeoutExpired:
        problem = f"stopped after {limit:.0f} s"
    if problem:
        write(path, read(path) | {"problem": problem})


def about() -> Row:
    """The device and the versions."""
    import torch

    row: Row = {"device": "CPU, narrow models", "torch": torch.__version__}
    if DEVICE == "cuda":
        properties = torch.cuda.get_device_properties(0)
        row["device"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        row["cuda"] = torch.version.cuda
    return row


def report(folder: Path) -> str:
    """Everything that was written, as `docs/cost.md` shows it."""
    known = read(folder / "about.json")
    lines = [", ".join(f"{key} {value}" for key, value in known.items()), ""]
    for name in PARTS:
        part = read(folder / f"{name}.json")
        if not part:
            continue
        rows = part.get("rows", [])
        lines += [f"### {name}", ""]
        header = list(dict.fromkeys(key for row in rows for key in row))
        if rows:
            table = [[str(row.get(key, "")) for key in header] for row in rows]
            table = [header, ["---"] * len(header), *table]
            lines += ["| " + " | ".join(cells) + " |" for cells in table] + [""]
        if "problem" in part:
            lines += [f"Not complete: {part['problem']}.", ""]
    return "\n".join(lines)


def main() -> int:
    """Do the parts that are missing, and write the report."""
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
    import torch

    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; DEVICE=cpu tests the script without one")
    end = time.monotonic() + 60 * args.minutes
    args.output.mkdir(parents=True, exist_ok=True)
    write(args.output / "about.json", about())
    for name in args.parts:
        if read(args.output / f"{name}.json").get("complete") and not args.again:
            continue
        left = end - time.monotonic()
        if left < 1:
            write(args.output / f"{name}.json", {"problem": "no time was left"})
            continue
        start_part(name, args.output, left if IS_SMALL else min(left, PARTS[name][1]))
    parts = {name: read(args.output / f"{name}.json") for name in PARTS}
    write(args.output / "gpu.json", {"about": read(args.output / "about.json"), "parts": parts})
    text = report(args.output)
    (args.output / "gpu.md").write_text(text, encoding="utf-8")
    print(text)
    failed = [
        p for p in parts.values() if "problem" in p or any("failed" in r for r in p.get("rows", ()))
    ]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
