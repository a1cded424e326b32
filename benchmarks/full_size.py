"""Train and export at full size, with random weights: does a real model fit, and does it all work?

    python benchmarks/full_size.py --family sd1 --resolution 512 --work /tmp/full
    python benchmarks/full_size.py --family sdxl --resolution 1024 --work /tmp/full

Makes a Diffusers folder with the architecture of Stable Diffusion 1.5 or SDXL, trains a few steps
on photos through the command line, exports both ways, and prints times and peak memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

CLIP_L = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "projection_dim": 768, "hidden_act": "quick_gelu",
}  # fmt: skip
CLIP_BIG_G = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
    "num_attention_heads": 20, "projection_dim": 1280, "hidden_act": "gelu",
}  # fmt: skip
UNETS = {
    "sd1": {
        "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8,
    },
    "sdxl": {
        "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20],
        "block_out_channels": (320, 640, 1280), "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10], "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip
VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "sample_size": 512,
}  # fmt: skip
SCALING = {"sd1": 0.18215, "sdxl": 0.13025}


def tokenizer():
    """A CLIP tokenizer with the real number of tokens: bytes, and names nobody types."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += [f"filler{i}</w>" for i in range(49406 - len(words))]
    vocab = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def make_model(family: str, folder: Path, dtype: torch.dtype) -> None:
    """Write a pipeline folder with random weights."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    parts = {
        "unet": UNet2DConditionModel(**UNETS[family]),
        "vae": AutoencoderKL(**VAE, scaling_factor=SCALING[family]),
        "text_encoder": CLIPTextModel(CLIPTextConfig(vocab_size=49408, **CLIP_L)),
        "tokenizer": tokenizer(),
        "scheduler": DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
        ),
    }
    if family == "sdxl":
        parts["text_encoder_2"] = CLIPTextModelWithProjection(
            CLIPTextConfig(vocab_size=49408, **CLIP_BIG_G)
        )
        parts["tokenizer_2"] = tokenizer()
        pipeline = StableDiffusionXLPipeline(**parts)
    else:
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    torch.set_default_dtype(torch.float32)
    pipeline.save_pretrained(folder)


def measured(command: list[str]) -> dict[str, float]:
    """Run a command; its seconds, those of processors, and its peak resident memory in GiB."""
    started = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    seconds = round(time.perf_counter() - started, 1)
    processors = round(usage.ru_utime + usage.ru_stime, 1)
    peak = round(usage.ru_maxrss / 2**20, 2)
    return {"seconds": seconds, "processor_seconds": processors, "peak_gib": peak}


def model_in(work: Path, family: str) -> Path:
    """The folder of a family's model in bfloat16 with random weights; made where it is missing."""
    base = work / family
    if not (base / "model_index.json").is_file():
        # In a process of its own: a child's peak memory starts at its parent's.
        maker = multiprocessing.get_context("spawn").Process(
            target=make_model, args=(family, base, torch.bfloat16)
        )
        maker.start()
        maker.join()
    return base


def main() -> None:
    """Make, train, export, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=tuple(UNETS), required=True)
    parser.add_argument("--resolution", type=int, required=True)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--photos", default="samples/bolt_mug")
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    base = model_in(args.work, args.family)
    output, cli = args.work / f"{args.family}-output", [sys.executable, "-m", "dora_diffusion"]
    report = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
    }
    report["train"] = measured(
        [
            *cli, "train", "--pretrained_model_name_or_path", str(base),
            "--instance_data_dir", args.photos, "--instance_prompt", "a photo of a sks mug",
            "--output_dir", str(output), "--overwrite_output_dir", "--train_text_encoder",
            "--resolution", str(args.resolution), "--max_train_steps", str(args.steps),
            "--mixed_precision", "bf16", "--gradient_checkpointing",
            "--num_validation_images", "0", "--checkpointing_steps", "0",
        ]
    )  # fmt: skip
    for name in ("merged", "merged.safetensors"):
        target = args.work / f"{args.family}-{name}"
        report[f"export {name}"] = measured(
            [
                *cli, "export", "--base", str(base), "--adapter", str(output),
                "--output", str(target), "--overwrite",
            ]
        )  # fmt: skip
    report["steps"] = [
        json.loads(line)
        for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
