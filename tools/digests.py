"""Digests of what the commands write, to show that a change of the code changes no number.

    python -m tools.digests run OUTPUT.json [--work FOLDER] [--only WORD]
    python -m tools.digests compare BEFORE.json AFTER.json

`run` performs short trainings of the embedded models in many settings, resumed runs, packs, a
fleet, conversions, merges and images, all in one process, and writes the SHA-256 of each file's
tensors, pixels or logged numbers. Results that are there already are not computed again, so that a
run can be stopped. `compare` names every output that differs, and exits with 1 if there is one.
Digests of two machines, or of two versions of torch, may differ.

To compare with former code, run it there: `PYTHONPATH=FORMER python tools/digests.py run ...`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from PIL import Image
from safetensors import safe_open

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "samples"
MUG, TEAPOT, ROBOT = SAMPLES / "bolt_mug", SAMPLES / "heart_teapot", SAMPLES / "ring_robot"
PLAIN, MASKED = "plain", "masked"
"""Photos of the mug that are made in the folder of results: without captions, and with masks."""
TRAIN = {
    "pretrained_model_name_or_path": "embedded:tiny-sd",
    "instance_data_dir": str(MUG),
    "instance_prompt": "a photo of a sks mug",
    "learning_rate": 2e-3,
    "max_train_steps": 6,
    "train_batch_size": 2,
    "checkpointing_steps": 0,
    "mixed_precision": "no",
}
MASKS = {
    "instance_data_dir": MASKED,
    "masked_loss": True,
    "train_batch_size": 3,
    "unmasked_prior": 0.7,
}
SLIDER = {
    "teach": "slider",
    "method": "lora",
    "target": ["a photo of a dog"],
    "positive": ["a photo of a red dog"],
    "negative": ["a photo of a toy"],
    "num_class_images": 4,
    "validation_inference_steps": 2,
    "instance_data_dir": None,
    "instance_prompt": None,
}
SETTINGS: dict[str, dict[str, object]] = {
    "dora": {"checkpointing_steps": 2},
    "lora": {"use_dora": False},
    "full": {"method": "full", "learning_rate": 1e-5},
    "adalora": {
        "parametrization": "adalora",
        "allocation_warmup": 1,
        "allocation_interval": 1,
        "checkpointing_steps": 2,
    },
    "vera": {"parametrization": "vera"},
    "pissa": {"init": "pissa"},
    "rslora-alpha": {"rslora": True, "lora_alpha": 4, "conv_rank": 2, "loraplus_ratio": 4},
    "input-axis": {"norm_axis": "input"},
    "dropout": {"lora_dropout": 0.2},
    "text-encoder": {"train_text_encoder": True, "text_encoder_lr": 1e-3},
    "words": {
        "instance_data_dir": PLAIN,
        "instance_prompt": "a photo of a <bolt> mug",
        "token": "<bolt>",
        "train_text_encoder_ti": True,
    },
    "words-prior": {
        "instance_data_dir": PLAIN,
        "instance_prompt": "a photo of a <bolt> mug",
        "token": "<bolt>",
        "train_text_encoder_ti": True,
        "with_prior_preservation": True,
    },
    "text-encoder-prior": {"train_text_encoder": True, "with_prior_preservation": True},
    "prior-bf16": {"with_prior_preservation": True, "mixed_precision": "bf16"},
    "full-prior": {"method": "full", "learning_rate": 1e-5, "with_prior_preservation": True},
    "masks": MASKS,
    "masks-prior": {**MASKS, "with_prior_preservation": True},
    "slider": SLIDER,
    "slider-anchors": {**SLIDER, "anchors": ["the cat in a backpack"]},
    "average": {"ema_decay": 0.9},
    "average-all": {
        "ema_decay": 0.9,
        "train_text_encoder": True,
        "with_prior_preservation": True,
        "checkpointing_steps": 2,
    },
    "schedule-free": {"optimizer": "adamw-schedule-free", "checkpointing_steps": 2},
    "adalora-prodigy": {
        "parametrization": "adalora",
        "rank": 4,
        "target_rank": 2,
        "allocation_interval": 1,
        "allocation_final": 1,
        "optimizer": "prodigy",
        "learning_rate": 1.0,
    },
    "huber": {"loss_type": "huber", "huber_schedule": "snr", "snr_gamma": 0},
    "v-prediction": {"prediction_type": "v_prediction", "snr_gamma": 5.0},
    "timesteps": {"timestep_distribution": "logit_normal", "noise_offset": 0.05},
    "recomputed-prior": {"gradient_checkpointing": True, "with_prior_preservation": True},
    "held-out-average": {
        "validation_split": 0.2,
        "validation_loss_steps": 3,
        "ema_decay": 0.5,
        "keep_best": True,
    },
    "prior": {"with_prior_preservation": True},
    "class-images": {
        "with_prior_preservation": True,
        "prior_preservation_mode": "images",
        "num_class_images": 2,
    },
    "accumulation": {"gradient_accumulation_steps": 2},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
    "adafactor": {"optimizer": "adafactor", "max_grad_norm": 0.1},
    "bf16": {"mixed_precision": "bf16"},
    "checkpointing": {"gradient_checkpointing": True, "train_text_encoder": True},
    "loss": {"snr_gamma": 5, "noise_offset": 0.1, "lr_scheduler": "cosine", "lr_warmup_steps": 1},
    "flips": {"snr_gamma": 0, "random_flip": True, "caption_dropout": 0.3},
    "crops": {"aspect_ratio_buckets": True, "cache_latents": False, "num_train_epochs": 1},
    "held-out": {"validation_split": 0.4, "validation_loss_steps": 2, "keep_best": True},
    "sdxl": {"pretrained_model_name_or_path": "embedded:tiny-sdxl", "max_train_steps": 3},
    "sdxl-text": {
        "pretrained_model_name_or_path": "embedded:tiny-sdxl",
        "max_train_steps": 2,
        "train_text_encoder": True,
        "with_prior_preservation": True,
    },
    "samples": {
        "validation_prompt": ["a photo of a sks mug"],
        "validation_inference_steps": 4,
        "num_validation_images": 2,
    },
    "compile-targets": {"targets": "attention", "adam_weight_decay": 0.1, "magnitude_lr": 1e-4},
}
RESUMED = ("dora", "average-all", "adalora", "schedule-free")
SUBJECTS: list[dict[str, object]] = [
    {"name": "mug", "instance_data_dir": str(MUG), "seed": 1, "ema_decay": 0.5},
    {
        "name": "teapot",
        "instance_data_dir": str(TEAPOT),
        "instance_prompt": "a photo of a sks teapot",
        "rank": 3,
        "max_train_steps": 4,
        "snr_gamma": 5,
        "loss_type": "huber",
        "huber_schedule": "exponential",
    },
    {
        "name": "robot",
        "instance_data_dir": str(ROBOT),
        "rank": 4,
        "conv_rank": 1,
        "lora_alpha": 8,
        "learning_rate": 3e-4,
        "max_grad_norm": 0.01,
        "prior_loss_weight": 0.5,
        "lr_scheduler": "cosine",
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "timestep_distribution": "power",
    },
]
PACKS: dict[str, dict[str, object]] = {
    "pack-three": {},
    "pack-prior": {"with_prior_preservation": True},
    "pack-text-encoder": {"train_text_encoder": True},
}
RANKED = ("lora", "lora-diffusers", "smaller-rank")
CONVERSIONS = ("diffusers", "peft", "kohya", "comfyui", "dense", *RANKED)


def commands(work: Path) -> Iterator[tuple[str, list[str]]]:
    """Each output's name, with the arguments of the command that writes it into that folder."""
    base = ["--base", "embedded:tiny-sd"]
    make_photos(work)
    for name, settings in SETTINGS.items():
        yield name, ["train", *_config(work, name, settings)]
    for name in RESUMED:
        start = ["--resume_from_checkpoint", str(work / name / "checkpoint-2")]
        resumed = f"resumed-{name}"
        yield resumed, ["train", *_config(work, resumed, SETTINGS[name]), *start]
    listed = work / "three.yaml"
    listed.write_text(yaml.safe_dump(SUBJECTS), encoding="utf-8")
    several = {"instance_data_dir": None, "instance_prompt": None}
    shared = {"instance_data_dir": None, "rank": 2, "conv_rank": 2, "train_batch_size": 1}
    for name, settings in PACKS.items():
        yield name, ["train", *_config(work, name, shared | settings), "--pack", str(listed)]
    yield (
        "init",
        [
            *("train", *_config(work, "init", {"init_adapter": str(work / "dora"), "rank": 16})),
        ],
    )
    subjects = [
        {"instance_data_dir": str(MUG), "instance_prompt": "a photo of a sks mug"},
        {
            "instance_data_dir": str(work / f"{PLAIN}-teapot"),
            "instance_prompt": "a photo of a zwq teapot",
            "token": "zwq",
        },
    ]
    named = work / "named.yaml"
    named.write_text(
        yaml.safe_dump([{"name": n, **s} for n, s in zip(("mug", "pot"), subjects, strict=True)]),
        encoding="utf-8",
    )
    one = work / "one.yaml"
    one.write_text(yaml.safe_dump(subjects), encoding="utf-8")
    yield (
        "subjects",
        [
            *("train", *_config(work, "subjects", several | {"dataset_config": str(one)})),
        ],
    )
    yield "pack", ["train", *_config(work, "pack", several), "--pack", str(named)]
    yield "fleet", ["fleet", str(named), *_config(work, "fleet", several)]
    for target in CONVERSIONS:
        extra = [] if target in ("diffusers", "peft", "kohya") else [*base]
        extra += ["--rank", "4"] if target in RANKED else []
        file = work / f"to-{target}" / ("folder" if target == "peft" else "x.safetensors")
        yield f"to-{target}", ["convert", str(work / "dora"), str(file), "--to", target, *extra]
    for name, adapter in (("dora", "dora"), ("words", "words"), ("input", "input-axis")):
        merge = ["export", *base, "--adapter", f"{work / adapter}:0.7", "--output"]
        yield f"merged-{name}", [*merge, str(work / f"merged-{name}" / "x.safetensors")]
    yield (
        "merged-folder",
        [
            *("export", *base, "--adapter", str(work / "text-encoder"), "--output"),
            *(str(work / "merged-folder" / "model"), "--dtype", "bfloat16"),
        ],
    )
    pair = [str(work / "dora"), f"{work / 'lora'}:0.5"]
    yield (
        "combined",
        [
            *("combine", *pair, *base, "--rank", "4", "--output"),
            str(work / "combined" / "x.safetensors"),
        ],
    )
    yield (
        "extracted",
        [
            *(
                "extract",
                *base,
                "--tuned",
                str(work / "merged-dora" / "x.safetensors"),
                "--rank",
                "4",
            ),
            *("--output", str(work / "extracted" / "x.safetensors")),
        ],
    )
    for adapter in ("dora", "words", "sdxl", "vera"):
        model = "embedded:tiny-sdxl" if adapter == "sdxl" else "embedded:tiny-sd"
        yield (
            f"image-{adapter}",
            [
                *("generate", "--base", model, "--adapter", str(work / adapter), "--seed", "3"),
                *("--prompt", "a photo of a sks mug", "--num_images", "2", "--steps", "4"),
                *("--output", str(work / f"image-{adapter}" / "x.png")),
            ],
        )
    many = work / "many.yaml"
    rows = [{"adapter": str(work / name), "seed": 5} for name in ("dora", "lora", "input-axis")]
    many.write_text(yaml.safe_dump(rows), encoding="utf-8")
    yield (
        "image-rows",
        [
            *("generate", *base, "--adapters_file", str(many), "--prompt", "a photo of a sks mug"),
            *("--steps", "4", "--output", str(work / "image-rows" / "x.png")),
        ],
    )


def _config(work: Path, name: str, settings: dict[str, object]) -> list[str]:
    """Write a training's settings, and return the flags that read them."""
    file = work / f"{name}.yaml"
    values = {**TRAIN, **settings, "output_dir": str(work / name)}
    if values["instance_data_dir"] in (PLAIN, MASKED):
        values["instance_data_dir"] = str(work / str(values["instance_data_dir"]))
    file.write_text(
        yaml.safe_dump({k: v for k, v in values.items() if v is not None}), encoding="utf-8"
    )
    return ["--config", str(file)]


def make_photos(work: Path) -> None:
    """Copy photos without their captions, and with masks beside them."""
    for name, source in ((PLAIN, MUG), (f"{PLAIN}-teapot", TEAPOT), (MASKED, MUG)):
        (work / name).mkdir(exist_ok=True)
        for photo in source.glob("*.jpg"):
            shutil.copy(photo, work / name)
    for photo in sorted((work / MASKED).glob("*.jpg"))[3:]:
        photo.unlink()
    for number, is_whole in (("01", False), ("02", True)):
        with Image.open(MUG / f"{number}.jpg") as image:
            mask = Image.new("L", image.size, 255 if is_whole else 0)
        mask.paste(255, (0, 0, mask.width // 2, mask.height))
        mask.save(work / MASKED / f"{number}.mask.png")


def perform(work: Path, only: str) -> dict[str, str]:
    """Run the commands whose results are not there, and digest all files."""
    from dora_diffusion.cli.main import main as command

    work.mkdir(parents=True, exist_ok=True)
    digests: dict[str, str] = {}
    for name, words in commands(work):
        if only not in name:
            continue
        folder = work / name
        done = folder / ".done"
        if not done.exists():
            folder.mkdir(exist_ok=True)
            output = io.StringIO()
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                code = command(words)
            if code:
                print(f"{name}: {output.getvalue().strip().splitlines()[-1]}", flush=True)
                continue
            done.touch()
            print(name, flush=True)
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".safetensors", ".png") or path.name == "metrics.jsonl":
                digests[f"{name}/{path.relative_to(folder).as_posix()}"] = digest(path)
    return digests


def digest(path: Path) -> str:
    """SHA-256 of pixels, of logged numbers, or of tensors with their names, dtypes and shapes."""
    digested = hashlib.sha256()
    if path.suffix == ".jsonl":
        for line in path.read_text(encoding="utf-8").splitlines():
            numbers = json.loads(line)
            numbers.pop("seconds", None)
            digested.update(json.dumps(numbers, sort_keys=True).encode())
        return digested.hexdigest()
    if path.suffix == ".png":
        with Image.open(path) as image:
            digested.update(f"{image.size} {image.mode}".encode() + image.tobytes())
        return digested.hexdigest()
    with safe_open(path, framework="pt") as file:
        for key in sorted(file.keys()):
            tensor = file.get_tensor(key)
            digested.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digested.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digested.hexdigest()


def compare(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """A line for each output that differs, is missing, or is new."""
    lines = []
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            lines.append(f"missing: {name}")
        elif name not in before:
            lines.append(f"new: {name}")
        elif before[name] != after[name]:
            lines.append(f"differs: {name}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description="Digest what the commands write.")
    actions = parser.add_subparsers(dest="action", required=True)
    run = actions.add_parser("run", help="perform the commands and write digests")
    run.add_argument("output", type=Path)
    run.add_argument("--work", type=Path, default=Path("build/digests"), help="Folder of results.")
    run.add_argument("--only", default="", help="Outputs whose names hold this word.")
    against = actions.add_parser("compare", help="name what differs")
    against.add_argument("before", type=Path)
    against.add_argument("after", type=Path)
    args = parser.parse_args()
    if args.action == "run":
        os.environ["HF_HUB_OFFLINE"] = "1"
        torch.set_num_threads(1)
        digests = perform(args.work.resolve(), args.only)
        args.output.write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")
        print(f"{args.output}: {len(digests)} digests")
        return 0
    pair = [json.loads(path.read_text(encoding="utf-8")) for path in (args.before, args.after)]
    lines = compare(*pair)
    print("\n".join(lines or [f"{len(pair[0])} digests, all equal"]))
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
