"""Tiny Anima pipelines with random weights, of the released classes."""

from __future__ import annotations

import string
import warnings
from pathlib import Path

import torch
from diffusers import (
    AnimaTextConditioner,
    AutoencoderKLQwenImage,
    CosmosTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    ModularPipeline,
)
from diffusers.modular_pipelines import AnimaAutoBlocks
from transformers import Qwen3Config, Qwen3Model, T5TokenizerFast

from tests.z_image import tokenizer

PARTS = (
    "transformer", "text_conditioner", "text_encoder", "tokenizer", "t5_tokenizer", "vae",
    "scheduler",
)  # fmt: skip


def t5_tokenizer() -> T5TokenizerFast:
    """Build a tokenizer of T5's class whose tokens are characters."""
    characters = [*string.ascii_letters, *string.digits, *string.punctuation, "\u2581"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -1.0) for c in characters)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0)


def write_anima(folder: Path, *, seed: int = 0) -> Path:
    """Write a pipeline for images of 64 pixels: 16 patches of 2 x 2 latents."""
    torch.manual_seed(seed)
    transformer = CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        mlp_ratio=2.0, text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 128, 128),
        rope_scale=(1.0, 4.0, 4.0), extra_pos_embed_type=None,
    )  # fmt: skip
    text_encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer()), hidden_size=24, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=1024,
        )
    )  # fmt: skip
    conditioner = AnimaTextConditioner(
        source_dim=24, target_dim=16, model_dim=16, num_layers=2, num_attention_heads=2,
        target_vocab_size=len(t5_tokenizer()),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, num_res_blocks=1, dim_mult=[1, 1, 1, 1],
        latents_mean=[0.1, -0.2, 0.3, -0.1], latents_std=[0.5, 0.8, 1.1, 0.7],
    )  # fmt: skip
    with torch.no_grad():  # The head of Diffusers' class is zero at first.
        transformer.proj_out.weight.normal_(std=0.3)
    pipeline = AnimaAutoBlocks().init_pipeline()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = (
        transformer, conditioner, text_encoder, tokenizer(), t5_tokenizer(), vae, scheduler,
    )  # fmt: skip
    pipeline.update_components(**dict(zip(PARTS, parts, strict=True)))
    pipeline.save_pretrained(str(folder), overwrite_modular_index=True)
    return folder


def diffusers_pipeline(folder: Path, dtype: torch.dtype = torch.float32) -> ModularPipeline:
    """Load a folder as Diffusers does, which needs torchvision or a stand-in."""
    from diffusers.models.transformers import transformer_cosmos

    vars(transformer_cosmos).setdefault("transforms", _Resizing)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = ModularPipeline.from_pretrained(str(folder))
        pipeline.load_components(torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class _Resizing:
    """Part of torchvision's ``transforms`` that Diffusers' transformer calls."""

    class InterpolationMode:
        NEAREST = "nearest"

    class functional:
        @staticmethod
        def resize(image: torch.Tensor, size: list[int], interpolation: str) -> torch.Tensor:
            """Resize an image ``(B, C, H, W)``."""
            return torch.nn.functional.interpolate(image, size=size, mode=interpolation)
