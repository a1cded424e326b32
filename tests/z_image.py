"""Tiny Z-Image pipelines with random weights, of the released classes and their own tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# As Qwen3's: thinking is on unless it is turned off.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)


def tokenizer() -> Qwen2Tokenizer:
    """Build a byte-level tokenizer of Qwen's class without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, END, START, STOP])}
    built = Qwen2Tokenizer(
        vocab=vocabulary, merges=[], unk_token=END, eos_token=STOP, pad_token=END,
        additional_special_tokens=[START], model_max_length=1024,
    )  # fmt: skip
    built.chat_template = TEMPLATE
    return built


def write_z_image(folder: Path, *, shift: float = 6.0, seed: int = 0, n_heads: int = 2) -> Path:
    """Write a pipeline for images of 64 pixels: 16 patches of 2 x 2 latents, padded to 32."""
    torch.manual_seed(seed)
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=24 * n_heads, n_layers=2, n_refiner_layers=1, n_heads=n_heads,
        n_kv_heads=n_heads,
        cap_feat_dim=32, axes_dims=[8, 8, 8], axes_lens=[1024, 64, 64],
    )  # fmt: skip
    text_encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer()), hidden_size=32, intermediate_size=48, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=1024,
        )
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 8, 8), layers_per_block=1, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2, sample_size=64, scaling_factor=0.3611, shift_factor=0.1159,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    with torch.no_grad():  # Diffusers' padding tokens are zeros at first.
        transformer.x_pad_token.normal_()
        transformer.cap_pad_token.normal_()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    ZImagePipeline(scheduler, vae, text_encoder, tokenizer(), transformer).save_pretrained(folder)
    return folder
