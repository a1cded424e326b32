"""A server under load: many clients, many adapters, too many requests, and replicas that die.

    OMP_NUM_THREADS=1 python benchmarks/serving.py --work /tmp/serving

Makes adapters with random weights, starts `dora-diffusion serve`, and compares each answer with the
image of the same seed that its adapter alone gives. Then samples the same requests without a server
in three ways: in mixed batches, one by one, and with each adapter merged for its request.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import psutil
import torch
from common import clock, machine, markdown
from PIL import Image

from dora_diffusion import SamplingSettings, generate_images, load_components
from dora_diffusion.adapters.inject import (
    inject_adapters,
    layer_adapters,
    merge_adapters,
    remove_adapters,
)
from dora_diffusion.adapters.state import attach_file, save_adapter
from dora_diffusion.config import AdapterConfig
from dora_diffusion.config.images import ImageRequest
from dora_diffusion.formats.adapter.metadata import AdapterMetadata
from dora_diffusion.sampling.pool import AdapterPool

PORT = 8765
ALONE = "one by one"
WAYS = ("batched", ALONE, "merged")
PROMPTS = ("a photo of a sks dog", "a sks mug on the snow", "a red sks toy", "a sks cat at night")


def make_adapters(args: argparse.Namespace) -> list[str]:
    """Write adapters that differ, of several ranks; returns their names."""
    folder, names = args.work / "adapters", [f"customer{n}" for n in range(args.adapters)]
    unet = load_components(args.base).denoiser
    for number, name in enumerate(names):
        if (folder / f"{name}.safetensors").exists():
            continue
        generator = torch.Generator().manual_seed(number)
        rank = (4, 8, 16)[number % 3]
        config = AdapterConfig(targets=("attention+conv",), rank=rank, conv_rank=rank)
        inject_adapters(unet, config, generator=generator)
        with torch.no_grad():
            for adapter in layer_adapters(unet):
                adapter.up.normal_(std=0.05, generator=generator)
        metadata = AdapterMetadata("sd1", trigger="sks")
        save_adapter(unet, folder / f"{name}.safetensors", metadata=metadata)
        remove_adapters(unet)
    return names


def make_requests(args: argparse.Namespace, names: list[str]) -> list[dict[str, object]]:
    """Requests for each adapter in turn, and their seeds."""
    return [
        {
            "adapter": names[number % len(names)],
            "prompt": PROMPTS[number % len(PROMPTS)],
            "seed": number,
            "steps": args.steps,
        }
        for number in range(args.requests)
    ]


def rows_of(args: argparse.Namespace, requests: list[dict[str, object]]) -> list[ImageRequest]:
    file = "{}/adapters/{}.safetensors"
    return [
        ImageRequest(str(r["prompt"]), int(str(r["seed"])), file.format(args.work, r["adapter"]))
        for r in requests
    ]


def sampled(
    args: argparse.Namespace, requests: list[dict[str, object]], way: str
) -> tuple[list[Image.Image], float]:
    """Images without a server, and the seconds of each."""
    settings, rows = SamplingSettings(steps=args.steps), rows_of(args, requests)
    components = load_components(args.base)
    pool = AdapterPool(components, budget=args.memory * 10**6)
    if way != "merged":
        pool.names([row.adapter for row in rows])
        pool.generate(rows[: args.batch_size], settings, batch_size=args.batch_size)
    begun, images = clock(), []
    if way == "merged":
        base = {name: tensor.clone() for name, tensor in components.denoiser.state_dict().items()}
        for row in rows:
            attach_file(components.adaptable(), str(row.adapter), family="sd1")
            merge_adapters(components.denoiser)
            images += generate_images(components, row.prompt, [row.seed], settings)
            components.denoiser.load_state_dict(base)
    else:
        size = args.batch_size if way == "batched" else 1
        images = pool.generate(rows, settings, batch_size=size)
    return images, (clock() - begun) / len(rows)


async def ask(
    args: argparse.Namespace,
    requests: list[dict[str, object]],
    clients: int,
    on_answer: Callable[[int], None] = lambda count: None,
) -> tuple[list[httpx.Response], list[float], float]:
    """The answers in order, the seconds of each, and those of all together."""
    waiting, answers = list(enumerate(requests)), {}
    seconds: list[float] = []

    async def client() -> None:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{PORT}", timeout=600) as http:
            while waiting:
                number, request = waiting.pop(0)
                begun = time.perf_counter()
                answers[number] = await http.post("/v1/images", json=request)
                seconds.append(time.perf_counter() - begun)
                on_answer(len(seconds))

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    total = time.perf_counter() - begun
    return [answers[number] for number in range(len(requests))], seconds, total


def differences(answers: list[httpx.Response], expected: list[Image.Image]) -> tuple[int, int]:
    """The largest difference of a pixel (of 255), and how many images are the same to the bit."""
    pairs = [
        (np.asarray(Image.open(io.BytesIO(a.content)), np.int16), np.asarray(e, np.int16))
        for a, e in zip(answers, expected, strict=True)
    ]
    most = [int(abs(one - other).max()) for one, other in pairs]
    return max(most), most.count(0)


def replicas() -> list[psutil.Process]:
    """The processes with a model."""
    return [p for p in psutil.process_iter() if "ServeReplica:dora-diffusion" in _title(p)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


async def load(
    args: argparse.Namespace, requests: list[dict[str, object]], expected: list[Image.Image]
) -> None:
    """Send requests as many clients do, all at once, and while replicas are killed."""
    answers, seconds, total = await ask(args, requests, args.clients)
    print(f"statuses: {dict(Counter(answer.status_code for answer in answers))}")
    cuts = statistics.quantiles(seconds, n=100)
    print(f"{len(requests) / total:.2f} images/s, p50 {cuts[49]:.2f} s, p99 {cuts[98]:.2f} s")
    most, same = differences(answers, expected)
    print(f"beside one by one: at most {most} of 255, {same} of {len(requests)} to the bit")

    answers, _, _ = await ask(args, requests, len(requests))
    print(f"{len(requests)} at once: {dict(Counter(answer.status_code for answer in answers))}")
    after = {answer.headers.get("Retry-After") for answer in answers} - {None}
    print(f"Retry-After: {sorted(map(int, after))} s")

    every, killed = len(requests) // (args.kills + 1), []

    def kill(count: int) -> None:
        if count % every == 0 and len(killed) < args.kills:
            killed.extend(replicas()[:1])
            killed[-1].kill()

    answers, _, total = await ask(args, requests, args.clients, kill)
    most, _ = differences(answers, expected)
    codes = dict(Counter(answer.status_code for answer in answers))
    print(f"{len(killed)} replicas killed: {codes}, {total:.0f} s, at most {most} of 255")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--base", default="embedded:tiny-sd")
    parser.add_argument("--adapters", type=int, default=50)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--memory", type=int, default=2000, help="MB of adapters.")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=WAYS, help="Besides one by one.")
    parser.add_argument("--no-server", dest="server", action="store_false")
    args = parser.parse_args()
    names = make_adapters(args)
    requests = make_requests(args, names)
    print(f"{args.requests} requests, {args.adapters} adapters, {args.steps} steps. {machine()}\n")
    ways = {way: sampled(args, requests, way) for way in {**dict.fromkeys(args.ways), ALONE: None}}
    alone = ways[ALONE][1]
    table = [[way, f"{each * 1000:.0f}", f"{alone / each:.2f}"] for way, (_, each) in ways.items()]
    print(markdown(["without a server", "ms an image", "times one by one"], table), flush=True)
    if not args.server:
        return
    command = [sys.executable, "-m", "dora_diffusion", "serve", "--base", args.base]
    command += ["--adapters", str(args.work / "adapters"), "--port", str(PORT)]
    command += ["--batch_size", str(args.batch_size), "--adapter_memory", str(args.memory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as server:
        assert server.stdout is not None
        for line in server.stdout:
            if "is ready" in line:
                break
        try:
            asyncio.run(load(args, requests, ways[ALONE][0]))
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
