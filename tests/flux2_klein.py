"""Tiny FLUX.2-klein pipelines with random weights, of the released classes."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.z_image import tokenizer


def write_flux2_klein(
    folder: Path, *, seed: int = 0, is_distilled: bool = False, is_9b: bool = False
) -> Path:
    """Write a pipeline for images of 64 pixels: 16 patches of 2 x 2 latents.

    With ``is_9b``, its text states are three times as wide as its transformer, and the heads of its
    text encoder together as wide as the encoder.
    """
    states = 32 if is_9b else 8
    torch.manual_seed(seed)
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=3 * states, timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2), guidance_embeds=False,
    )  # fmt: skip
    text_encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer()), hidden_size=states, intermediate_size=8,
            num_hidden_layers=28, num_attention_heads=states // 4, num_key_value_heads=1,
            head_dim=4, tie_word_embeddings=True,
        )
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 4, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=2,
        sample_size=64,
    )  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipeline = Flux2KleinPipeline(
        scheduler, vae, text_encoder, tokenizer(), transformer, is_distilled=is_distilled
    )
    pipeline.save_pretrained(folder)
    return folder


def write_flux2_klein_9b(folder: Path) -> Path:
    """Write a pipeline with the proportions of the 9B model."""
    return write_flux2_klein(folder, is_9b=True)
