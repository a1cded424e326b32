"""Write today's golden files into a new folder. Those that are there stay as they are, for ever.

python -m tests.formats.golden.make tests/formats/golden/VERSION
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

import dora_diffusion
from dora_diffusion.cli.main import main as command
from dora_diffusion.formats.adapter.embeddings import embedding_files, write_embeddings
from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter
from dora_diffusion.formats.files.stream import TensorSpec
from dora_diffusion.numerics.weights import LayerWeights
from tests.formats.golden.formula import factors, magnitude, numbers

_BLOCK = "attentions.0.transformer_blocks.0"
_TEXT = "text_model.encoder.layers"
# One layer of every kind, square and not.
SD1 = {
    f"unet.down_blocks.0.{_BLOCK}.attn1.to_q": (4, 4),
    f"unet.down_blocks.0.{_BLOCK}.attn2.to_k": (4, 6),
    f"unet.mid_block.{_BLOCK}.ff.net.0.proj": (8, 4),
    "unet.mid_block.attentions.0.proj_in": (4, 4, 1, 1),
    "unet.up_blocks.1.resnets.2.conv1": (3, 5, 3, 3),
    "unet.conv_out": (3, 3, 3, 3),
    f"text_encoder.{_TEXT}.0.self_attn.q_proj": (4, 4),
    f"text_encoder.{_TEXT}.11.mlp.fc1": (5, 4),
}
SDXL = {
    f"unet.down_blocks.1.{_BLOCK}.attn1.to_out.0": (4, 4),
    f"unet.up_blocks.0.{_BLOCK}.attn2.to_v": (4, 6),
    "unet.up_blocks.1.upsamplers.0.conv": (3, 3, 3, 3),
    "unet.add_embedding.linear_1": (4, 5),
    f"text_encoder.{_TEXT}.0.self_attn.k_proj": (4, 4),
    f"text_encoder_2.{_TEXT}.31.mlp.fc2": (4, 5),
}
FACTS = AdapterMetadata(
    "sd1", "some/model", "sks dog", (512,),
    extra={"prediction_type": "epsilon", "training_steps": "800"},
    tags=("dog", "pet"), thumbnail="data:image/png;base64,iVBORw0KGgo=",
    tag_frequency={"a photo of a sks dog": 5},
)  # fmt: skip
# name -> target, axis (None: LoRA, "mixed": some of each), whether ranks differ, dtype, shapes
FILES: dict[str, tuple[str, str | None, bool, str, dict[str, tuple[int, ...]]]] = {
    "diffusers-lora.safetensors": ("diffusers", None, False, "float32", SD1),
    "diffusers-dora-ranks.safetensors": ("diffusers", "output", True, "float32", SD1),
    "diffusers-dora-sdxl-half.safetensors": ("diffusers", "output", False, "float16", SDXL),
    "peft-lora": ("peft", None, False, "float32", SD1),
    "peft-dora-ranks": ("peft", "output", True, "float32", SD1),
    "kohya-lora-ranks.safetensors": ("kohya", None, True, "float32", SD1),
    "kohya-dora-output.safetensors": ("kohya", "output", False, "float32", SD1),
    "kohya-dora-output-ranks-sdxl.safetensors": ("kohya", "output", True, "float32", SDXL),
    "kohya-dora-input-ranks.safetensors": ("kohya", "input", True, "float32", SD1),
    "kohya-mixed-half.safetensors": ("kohya", "mixed", False, "bfloat16", SD1),
    "comfyui-dora-output.safetensors": ("comfyui", "output", False, "float32", SD1),
    "dense-lora.safetensors": ("dense", None, False, "float32", SD1),
}
TOKENS = {"<s1>": [4], "<s2>": [2, 4]}
TRAIN = (
    "train", "--pretrained_model_name_or_path", "embedded:tiny-sd",
    "--instance_data_dir", "samples/bolt_mug", "--instance_prompt", "a photo of a sks mug",
    "--num_validation_images", "0", "--max_train_steps", "2", "--checkpointing_steps", "2",
    "--rank", "1", "--targets", "mid_block.*attn2.to_k",
)  # fmt: skip


class _Base(dict[str, torch.Tensor]):
    """A base model in memory."""

    family = None

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return {name: TensorSpec.of(tensor) for name, tensor in self.items()}


def describe(
    target: str, axis: str | None, ranks_differ: bool, dtype: str,
    shapes: dict[str, tuple[int, ...]],
) -> dict[str, Any]:  # fmt: skip
    """Expected content of a file, in plain words and numbers."""
    layers = {}
    for index, (name, shape) in enumerate(shapes.items()):
        rank = 1 + index % 3 if ranks_differ else 2
        factor = (0.5, 1.0, 2.0)[index % 3] if ranks_differ else 0.5
        own = (None if index % 2 else "output") if axis == "mixed" else axis
        layers[name] = {"shape": shape, "rank": rank, "alpha": factor * rank, "axis": own}
    facts = dataclasses.replace(FACTS, family="sdxl" if shapes is SDXL else "sd1")
    return {"target": target, "dtype": dtype, "layers": layers,
            "metadata": dataclasses.asdict(facts)}  # fmt: skip


def write(path: Path, described: dict[str, Any]) -> list[Path]:
    """Write a described file, and list what was written."""
    layers = {}
    for name, facts in described["layers"].items():
        down, up = factors(name, facts["shape"], facts["rank"])
        axis = facts["axis"]
        moved = magnitude(name, facts["shape"], axis) if axis else None
        layers[name] = LayerWeights(down, up, moved, facts["alpha"], axis or "output")
    base = _Base({f"{name}.weight": numbers(f"{name}.weight", facts["shape"])
                  for name, facts in described["layers"].items()})  # fmt: skip
    target = described["target"]
    written = write_adapter(
        path, AdapterFile(layers, AdapterMetadata(**described["metadata"])), target,
        dtype=getattr(torch, described["dtype"]),
        base=base if target in ("comfyui", "dense") else None,
    )  # fmt: skip
    return sorted(written.rglob("*.*")) if written.is_dir() else [written]


def main() -> None:
    """Write the files, a short run with its checkpoint, and what they hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True)  # and not one that exists
    files, hashes = {}, {}
    for name, values in FILES.items():
        files[name] = describe(*values)
        for path in write(folder / name, files[name]):
            hashes[path.relative_to(folder).as_posix()] = path
    embeddings = embedding_files(folder, "tokens", TOKENS)
    vectors = {token: {"text_encoder": numbers(token, shape)} for token, shape in TOKENS.items()}
    write_embeddings(embeddings, vectors)
    run = folder / "run"
    command([*TRAIN, "--output_dir", str(run)])
    for path in run.iterdir():
        if path.name not in ("checkpoint-2", "config.yaml"):
            path.unlink()
    trained = torch.load(run / "checkpoint-2" / "training_state.pt", weights_only=True)
    values = {
        name: hashlib.sha256(parameter.numpy().tobytes()).hexdigest()
        for name, parameter in trained["parameters"].items()
    }
    for path in [*embeddings.values(), *run.rglob("*.*")]:
        if path.is_file():
            hashes[path.relative_to(folder).as_posix()] = path
    text = json.dumps(
        {
            "written_by": dora_diffusion.__version__,
            "numbers": "tests/formats/golden/formula.py",
            "files": files,
            "tokens": TOKENS,
            "trained": values,
            "sha256": {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in hashes.items()},
        },
        indent=1,
    )
    (folder / "description.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
