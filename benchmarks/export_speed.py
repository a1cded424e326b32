"""Export at full size: peak memory, and time against copying the same file on the same disk.

    python benchmarks/export_speed.py --family sdxl --work /tmp/export
    python benchmarks/export_speed.py --family sdxl --work /tmp/export --prove

Makes a Diffusers folder of Stable Diffusion 1.5 or SDXL in float16 with random weights, a DoRA on
every Linear and Conv2d of the UNet and the text encoders, and exports a single file through the
command line, in a process of its own. The copy is of that file, synced as the export is.
Both take turns, and both find what they read in the system's cache.

With ``--prove``, exports every combination of folder and single file, float16 and bfloat16, default
and full targets instead, as on anybody's machine (no variable set that changes arithmetic or the
number of threads), and has each proven by ``verify``, tensor by tensor. What is done is kept in
``proof-FAMILY.json``: the same command resumes where it was stopped. Outputs are removed at once.
With ``--export-only`` they have the export's own check alone; a run without it adds the rest.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Container, Sequence
from pathlib import Path

import torch
from full_size import CLIP_BIG_G, CLIP_L, SCALING, UNETS, VAE, measured, tokenizer

from dora_diffusion.adapters.targets import match_targets
from dora_diffusion.config import AdapterConfig
from dora_diffusion.formats.adapter.file import AdapterFile, write_adapter
from dora_diffusion.formats.adapter.metadata import AdapterMetadata
from dora_diffusion.formats.checkpoint.models import PipelineFolder
from dora_diffusion.formats.checkpoint.weights import module_shapes
from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.formats.files.stream import TensorSpec, write_tensors
from dora_diffusion.formats.names.modules import COMPONENTS
from dora_diffusion.numerics.dora import weight_norm
from dora_diffusion.numerics.weights import LayerWeights

# What may change arithmetic or its order.
VARIABLES = ("MKL_CBWR", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "ATEN_CPU_CAPABILITY")
BLOCK = torch.randn(2**20, generator=torch.Generator().manual_seed(0)) / 30


def make_base(family: str, folder: Path) -> None:
    """Write a pipeline folder one tensor at a time; its random numbers repeat."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kinds = {
        "unet": (UNet2DConditionModel, UNETS[family]),
        "vae": (AutoencoderKL, {**VAE, "scaling_factor": SCALING[family]}),
        "text_encoder": (CLIPTextModel, {"vocab_size": 49408, **CLIP_L}),
    }
    tokenizer().save_pretrained(folder / "tokenizer")
    if family == "sdxl":
        kinds["text_encoder_2"] = (CLIPTextModelWithProjection, {"vocab_size": 49408, **CLIP_BIG_G})
        tokenizer().save_pretrained(folder / "tokenizer_2")
    DDIMScheduler().save_pretrained(folder / "scheduler")
    index = {"scheduler": ["diffusers", "DDIMScheduler"]}
    for component, (kind, settings) in kinds.items():
        is_text = component.startswith("text_encoder")
        with torch.device("meta"):
            model = kind(CLIPTextConfig(**settings)) if is_text else kind(**settings)
        index[component] = ["transformers" if is_text else "diffusers", kind.__name__]
        if is_text:
            model.config.save_pretrained(folder / component)
        else:
            model.save_config(folder / component)
        specs = {
            name: TensorSpec(torch.float16, tuple(tensor.shape))
            for name, tensor in model.state_dict().items()
            if tensor.is_floating_point()
        }
        stem = "model" if is_text else "diffusion_pytorch_model"
        write_tensors(
            folder / component / f"{stem}.safetensors", specs, lambda n, s=specs: fill(s[n])
        )
    name = "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline"
    tokenizers = {t: ["transformers", "CLIPTokenizer"] for t in ("tokenizer", "tokenizer_2")}
    index |= {t: kind for t, kind in tokenizers.items() if (folder / t).is_dir()}
    save_text(folder / "model_index.json", json.dumps({"_class_name": name, **index}))


def fill(spec: TensorSpec) -> torch.Tensor:
    """A tensor of repeated random numbers."""
    count = torch.Size(spec.shape).numel()
    block = BLOCK.to(spec.dtype)[: max(count, 1)]
    return block.repeat(-(-count // len(block)))[:count].view(spec.shape)


def make_adapter(
    family: str,
    base: Path,
    path: Path,
    rank: int,
    components: Sequence[str] = COMPONENTS,
    only: Container[str] | None = None,
) -> int:
    """Write a DoRA on every Linear and Conv2d of some components; returns their number.

    ``only`` limits it to some modules, by canonical name.
    """
    generator = torch.Generator().manual_seed(1)
    layers = {}
    with PipelineFolder.open(base) as pipeline:
        for name, (out, into, *kernel) in module_shapes(pipeline).items():
            component = name.partition(".")[0]
            if component not in components or (component != "unet" and "embedding" in name):
                continue
            if only is not None and name not in only:
                continue
            down = torch.randn(rank, into, *kernel, generator=generator) / 100
            up = torch.randn(out, rank, *[1] * len(kernel), generator=generator) / 100
            magnitude = weight_norm(pipeline[f"{name}.weight"], "output") * 1.01
            layers[name] = LayerWeights(down, up, magnitude, float(rank))
    write_adapter(path, AdapterFile(layers, AdapterMetadata(family)))
    return len(layers)


def warm(path: Path) -> None:
    """Read a file, or all files of a folder, so that it is in the system's cache."""
    buffer = bytearray(2**20)
    for file in [path] if path.is_file() else path.rglob("*.safetensors"):
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def copy_seconds(source: Path, target: Path) -> float:
    """Seconds to copy a file and sync it to the disk, as an export does."""
    started = time.perf_counter()
    shutil.copyfile(source, target)
    with open(target, "rb+") as file:
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    target.unlink()
    return round(seconds, 1)


def default_targets(family: str) -> set[str]:
    """Canonical names of the layers that are trained by default."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[family])
    return {f"unet.{path}" for path in match_targets(unet, AdapterConfig().targets)}


def machine() -> dict[str, str]:
    """Describe the machine and the version of torch."""
    cpu = next(
        (line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")),
        platform.machine(),
    )
    return {"machine": f"{cpu}, {os.cpu_count()} cores", "torch": torch.__version__}


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text("utf-8").splitlines() if path.is_file() else []


def prove(family: str, rank: int, base: Path, work: Path, export_only: bool) -> None:
    """Export in every way, and verify each."""
    adapters = {"default": work / f"{family}-default.safetensors"}
    adapters["full"] = work / f"{family}-full.safetensors"
    only = {"default": default_targets(family), "full": None}
    results = work / f"proof-{family}.json"
    report = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {"cases": {}}
    report |= machine()
    layers = report.setdefault("adapted_layers", {})
    for name, path in adapters.items():
        if name not in layers or not path.is_file():
            layers[name] = make_adapter(family, base, path, rank, only=only[name])
    for name in VARIABLES:
        os.environ.pop(name, None)
    for targets, dtype, layout in itertools.product(
        adapters, ("float16", "bfloat16"), ("folder", "file")
    ):
        case = f"{targets} targets, {dtype}, {layout}"
        done = report["cases"].get(case, {})
        if "export" not in done or ("verify" not in done and not export_only):
            output = work / ("proof.safetensors" if layout == "file" else "proof")
            report["cases"][case] = prove_one(base, adapters[targets], output, dtype, export_only)
            save_text(results, json.dumps(report, indent=2))
    print(json.dumps(report, indent=2))


def prove_one(
    base: Path, adapter: Path, output: Path, dtype: str, export_only: bool
) -> dict[str, dict[str, float]]:
    """Export and verify through the command line; a failure ends the program."""
    command = (sys.executable, "-m", "dora_diffusion")
    inputs = ("--base", str(base), "--adapter", str(adapter))
    options = ("--output", str(output), "--overwrite", "--dtype", dtype)
    try:
        done = {"export": measured([*command, "export", *inputs, *options])}
        if not export_only:
            done["verify"] = measured([*command, "verify", str(output), *inputs])
        return done
    finally:
        shutil.rmtree(output, ignore_errors=True)
        output.unlink(missing_ok=True)


def main() -> None:
    """Make, then export and copy in turns, and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=tuple(UNETS), default="sdxl")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--prove", action="store_true")
    parser.add_argument("--export-only", action="store_true")
    args = parser.parse_args()
    base, adapter = args.work / args.family, args.work / f"{args.family}.safetensors"
    output, copy = args.work / "merged.safetensors", args.work / "copy.safetensors"
    if not (base / "model_index.json").is_file():
        make_base(args.family, base)
    if args.prove:
        prove(args.family, args.rank, base, args.work, args.export_only)
        return
    layers = make_adapter(args.family, base, adapter, args.rank)
    command = [
        *(sys.executable, "-m", "dora_diffusion", "export", "--overwrite"),
        *("--base", str(base), "--adapter", str(adapter), "--output", str(output)),
    ]
    exports, copies = [], []
    for _ in range(args.repeats):
        output.unlink(missing_ok=True)
        warm(base)
        exports.append(measured(command))
        warm(output)
        copies.append(copy_seconds(output, copy))
    seconds = [export["seconds"] for export in exports]
    report = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}",
        "torch": torch.__version__,
        "family": args.family,
        "adapted_layers": layers,
        "file_gb": round(output.stat().st_size / 1e9, 2),
        "export_seconds": seconds,
        "copy_seconds": copies,
        "times_the_copy": round(statistics.median(seconds) / statistics.median(copies), 2),
        "peak_gib": max(export["peak_gib"] for export in exports),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
