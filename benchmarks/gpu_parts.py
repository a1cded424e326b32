"""Measurements of each part of `gpu.py`, as table rows, on the device that ``DEVICE`` names.

UNets of full size have random weights, made on the device; on a CPU they are tiny.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from common import FROZEN, LORA, OURS, PEFT_DORA, UNETS, Peer, make_peer, torch
from dispatch_time import Stepper
from torch import Tensor, nn

from dora_diffusion.adapters import compiled
from dora_diffusion.adapters.inject import merge_adapters
from dora_diffusion.adapters.scope import norm_scope
from dora_diffusion.adapters.targets import match_targets

DEVICE = os.environ.get("DEVICE", "cuda")
IS_SMALL = DEVICE == "cpu"
RANK = 4 if IS_SMALL else 8
# Of one row: what it may take after its first two calls.
SECONDS = 0.0 if IS_SMALL else 2.0

TINY: dict[str, Any] = {
    "sample_size": 8, "block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4,
    "cross_attention_dim": 16, "attention_head_dim": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
TINY_SDXL = {
    "use_linear_projection": True, "transformer_layers_per_block": (1, 2),
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
}  # fmt: skip

Row = dict[str, Any]
Rows = Iterator[Row]


@contextmanager
def dtype_of_new(dtype: torch.dtype) -> Iterator[None]:
    """Modules made inside have this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def settings_of(family: str) -> dict[str, Any]:
    """Return the UNet's settings for a family."""
    if not IS_SMALL:
        return UNETS[family]
    return TINY | (TINY_SDXL if family == "sdxl" else {})


def base_unet(family: str, dtype: torch.dtype) -> nn.Module:
    """The frozen UNet of a family with random weights, on the device."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with dtype_of_new(dtype), torch.device(DEVICE):
        return UNet2DConditionModel(**settings_of(family)).requires_grad_(False)


def inputs_of(family: str, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of a call of the UNet."""
    make = partial(torch.randn, device=DEVICE, dtype=dtype)
    settings = settings_of(family)
    inputs: dict[str, Any] = {
        # So that the frozen one has a backward pass too.
        "sample": make(batch, 4, *[settings["sample_size"]] * 2).requires_grad_(),
        "timestep": torch.full((batch,), 500, device=DEVICE),
        "encoder_hidden_states": make(batch, 77, settings["cross_attention_dim"]),
    }
    if family == "sdxl":
        pooled = settings["projection_class_embeddings_input_dim"]
        pooled -= 6 * settings["addition_time_embed_dim"]
        inputs["added_cond_kwargs"] = {
            "text_embeds": make(batch, pooled),
            "time_ids": torch.full((batch, 6), 1024.0, device=DEVICE),
        }
    return inputs


def predict(inputs: dict[str, Any], model: nn.Module) -> Tensor:
    """The UNet's prediction."""
    prediction: Tensor = model(**inputs).sample
    return prediction


def peer_of(name: str, base: nn.Module) -> Peer:
    """A peer of `common` on attention and convolutions, what trains in float32."""
    peer = make_peer(name, base, match_targets(base, ["attention+conv"]), RANK)
    for parameter in peer.parameters():  # As Diffusers' scripts do with PEFT's.
        parameter.data = parameter.data.float()
    return peer


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def measured(function: Callable[[], object]) -> Row:
    """Milliseconds of a call after two that do not count, and the peak of memory of those."""
    begun = time.perf_counter()
    for _ in range(2):
        function()
        synchronize()
    row: Row = {"first two, s": round(time.perf_counter() - begun, 2)}
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
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
    """A row for each of the settings; one that fails, or has no memory left, says so."""
    for setting in settings:
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        try:
            row = measure(**setting)
        except torch.OutOfMemoryError:
            row = {"failed": "out of memory"}
        except Exception as error:
            row = {"failed": f"{type(error).__name__}: {error}"[:300]}
        yield setting | row


def steps(family: str) -> Rows:
    """Whole training steps in bf16: each peer, batch 1 and 4."""
    base = base_unet(family, torch.bfloat16)

    def measure(peer: str, batch: int, checkpointing: bool) -> Row:
        one = peer_of(peer, base)
        if checkpointing:
            one.model.train().enable_gradient_checkpointing()
        inputs = inputs_of(family, batch, torch.bfloat16)
        return measured(Stepper(one, partial(predict, inputs), peer))

    # SDXL at batch 4 trains with its blocks recomputed.
    loads = {"sd1": [(1, False), (4, False)], "sdxl": [(1, False), (1, True), (4, True)]}
    return rows_of(
        [
            {"peer": peer, "batch": batch, "checkpointing": checkpointing}
            for batch, checkpointing in loads[family]
            for peer in (FROZEN, LORA, PEFT_DORA, OURS)
        ],
        measure,
    )


def compiled_steps(family: str) -> Rows:
    """Training steps in bf16 with compiled blocks, batch 1."""
    base = base_unet(family, torch.bfloat16)
    inputs = inputs_of(family, 1, torch.bfloat16)

    def measure(peer: str) -> Row:
        torch._dynamo.reset()
        one = peer_of(peer, base)
        # Tiny blocks are traced, forward and backward; C++ would take minutes to compile.
        compiled.compile_blocks(one.model, backend="aot_eager" if IS_SMALL else "inductor")
        return measured(Stepper(one, partial(predict, inputs), peer))

    return rows_of([{"peer": peer} for peer in (OURS, LORA)], measure)


def half(family: str) -> Rows:
    """Steps in fp16 with the gradient scaler."""
    base = base_unet(family, torch.float16)
    inputs = inputs_of(family, 1, torch.float16)

    def measure(peer: str) -> Row:
        scaler = torch.amp.GradScaler(DEVICE)
        one = peer_of(peer, base)
        step = Stepper(one, partial(predict, inputs), peer, torch.float16, scaler=scaler)
        row = measured(step)
        finite = all(bool(p.isfinite().all()) for p in one.parameters())
        return row | {"scale": round(scaler.get_scale()), "finite": finite}

    return rows_of([{"peer": peer} for peer in (LORA, OURS)], measure)


def adam8bit(family: str) -> Rows:
    """Steps with the 8-bit AdamW of bitsandbytes, beside the fused one."""
    base = base_unet(family, torch.bfloat16)
    inputs = inputs_of(family, 1, torch.bfloat16)

    def measure(optimizer: str) -> Row:
        make = None
        if optimizer == "8-bit AdamW":
            if importlib.util.find_spec("bitsandbytes") is None:
                return {"skipped": "bitsandbytes is not installed"}
            from bitsandbytes.optim import AdamW8bit

            make = partial(AdamW8bit, lr=1e-4)
        one = peer_of(OURS, base)
        one.model.train().enable_gradient_checkpointing()
        return measured(Stepper(one, partial(predict, inputs), OURS, optimizer=make))

    return rows_of([{"optimizer": name} for name in ("AdamW", "8-bit AdamW")], measure)


def sampling(family: str) -> Rows:
    """One guided denoising step of the UNet, adapters attached and merged; merging itself."""
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
    # Some of them where this script is tested: the suite runs all, on the emulated device.
    chosen = ["-k", "fresh_adapter"] if IS_SMALL else []
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", "cuda"]
    lines: list[str] = []
    with subprocess.Popen(
        [*command, *chosen, "tests/integration/test_cuda.py"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            # Seen as they come: a test may hang.
            print(line, end="", flush=True)
            lines.append(line.strip())
    row: Row = {"outcome": lines[-1].strip("= ") if lines else "no output"}
    if process.returncode:
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        row["failed"] = "; ".join(failed) or " ".join(lines)[-300:]
    yield row


class Part(NamedTuple):
    """One part of the measurement.

    Attributes:
        title: Above its table.
        rows: Makes the rows.
        limit: The most seconds that it may take.
    """

    title: str
    rows: Callable[[], Rows]
    limit: float


SD1, SDXL = "SD1.5 at 512 px", "SDXL at 1024 px"
PARTS = {
    "tests": Part("Tests marked for CUDA", tests, 120),
    "steps-sd1": Part(f"Training step, {SD1}, bf16", partial(steps, "sd1"), 75),
    "steps-sdxl": Part(f"Training step, {SDXL}, bf16", partial(steps, "sdxl"), 130),
    "sampling-sd1": Part(f"Guided denoising step, {SD1}, bf16", partial(sampling, "sd1"), 40),
    "sampling-sdxl": Part(f"Guided denoising step, {SDXL}, bf16", partial(sampling, "sdxl"), 60),
    "fp16-sd1": Part(f"Training step, {SD1}, fp16 with gradient scaler", partial(half, "sd1"), 40),
    "adam8bit-sdxl": Part(
        f"Training step of this DoRA, {SDXL}, bf16, gradient checkpointing",
        partial(adam8bit, "sdxl"),
        50,
    ),
    "compiled-sd1": Part(
        f"Training step, {SD1}, bf16, compiled blocks", partial(compiled_steps, "sd1"), 150
    ),
    "compiled-sdxl": Part(
        f"Training step, {SDXL}, bf16, compiled blocks", partial(compiled_steps, "sdxl"), 200
    ),
}
