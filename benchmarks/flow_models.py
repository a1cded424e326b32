"""Transformers of a flow at full size, for counts on fake tensors.

Shapes of the transformers are the defaults of Diffusers' classes or those of its conversion
scripts; of the text encoders, those of Qwen3-4B, Qwen3-8B and Qwen3-0.6B.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from fake_gpu import DEVICE
from torch import Tensor, nn

from dora_diffusion.models.components import Components
from dora_diffusion.models.conditioning import Conditioning

QWEN3_4B = {
    "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 40960,
}  # fmt: skip
QWEN3_8B = {**QWEN3_4B, "hidden_size": 4096, "intermediate_size": 12288}
QWEN3_06B = {
    **QWEN3_4B, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16,
}  # fmt: skip
ENCODERS = {"z-image": QWEN3_4B, "flux2-klein": QWEN3_4B, "flux2-klein-9b": QWEN3_8B,
            "anima": QWEN3_06B}  # fmt: skip
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "z-image": {},
    "flux2-klein": {
        "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24,
        "joint_attention_dim": 7680, "guidance_embeds": False,
    },
    "flux2-klein-9b": {
        "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32,
        "joint_attention_dim": 12288, "guidance_embeds": False,
    },
    "anima": {
        "num_attention_heads": 16, "rope_scale": (1.0, 4.0, 4.0), "extra_pos_embed_type": None,
    },
}  # fmt: skip
VAES: dict[str, dict[str, Any]] = {
    "z-image": {
        "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4, "sample_size": 1024,
        "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "flux2-klein": {},
    "flux2-klein-9b": {},
    "anima": {},
}  # fmt: skip
# Tokens of a caption with its chat template; FLUX.2-klein and Anima read the padding, too.
TOKENS = {"z-image": 64, "flux2-klein": 512, "flux2-klein-9b": 512, "anima": 512}
# Made outside of the fake device, since it reads numbers of its tensors.
SCHEDULER = FlowMatchEulerDiscreteScheduler(shift=3.0)


def make_transformer(family: str) -> nn.Module:
    """Build the transformer of a family."""
    from dora_diffusion.config.families import FAMILIES
    from dora_diffusion.models.families import find_class

    facts = FAMILIES[family]
    model: nn.Module = find_class(facts.code, facts.denoiser_class)(**TRANSFORMERS[family])
    return model


def make_parts(family: str, dtype: torch.dtype) -> tuple[nn.Module, Any, list[nn.Module]]:
    """Build transformer, autoencoder and text encoders on the fake device."""
    from transformers import Qwen3Config, Qwen3Model

    from dora_diffusion.config.families import FAMILIES
    from dora_diffusion.models.families import find_class

    facts = FAMILIES[family]
    vae = find_class(facts.code, facts.vae_class)(**VAES[family])
    if hasattr(vae, "bn"):
        vae.bn.num_batches_tracked = None  # A number, which the fake device does not take.
    vae = vae.to(DEVICE, dtype)
    encoders = [Qwen3Model(Qwen3Config(**ENCODERS[family]))]
    encoders += [find_class(facts.code, name)() for name in facts.text_encoder_classes[1:]]
    encoders = [encoder.to(DEVICE, dtype) for encoder in encoders]
    return make_transformer(family).to(DEVICE, dtype), vae, encoders


def states_of(family: str, width: int, prompts: int, dtype: torch.dtype) -> Conditioning:
    """Build the conditioning of prompts that were encoded before."""
    tokens = TOKENS[family]
    lengths = (tokens,) * prompts if family == "z-image" else None
    hidden = torch.empty(prompts, tokens, width, device=DEVICE, dtype=dtype)
    return Conditioning(hidden, None, lengths)


def encoded(components: Components, prompts: int) -> Conditioning:
    """Encode prompts of a fixed length."""
    family = components.family
    encoder, *conditioners = components.text_encoders
    ids = torch.zeros(prompts, TOKENS[family.name], dtype=torch.int64, device=DEVICE)
    mask = torch.ones_like(ids)
    keeps_all = not conditioners
    read = encoder(ids, attention_mask=mask, output_hidden_states=keeps_all, use_cache=False)
    for conditioner in conditioners:
        conditioner(read.last_hidden_state, ids, mask, mask)
    return states_of(family.name, family.prompt_width, prompts, encoder.dtype)


def predict(model: nn.Module, family: str, dtype: torch.dtype, pixels: int, batch: int) -> Tensor:
    """Predict for a batch. Inputs get gradients if no parameter of the model trains."""
    from dora_diffusion.config.families import FAMILIES
    from dora_diffusion.models.families import load_code
    from dora_diffusion.numerics.process import Flow

    facts, config = FAMILIES[family], model.config
    side = pixels // 8 // (facts.patch if facts.packs_patches else 1)
    latents = torch.empty(batch, config.in_channels, side, side, device=DEVICE, dtype=dtype)
    latents.requires_grad_(not any(p.requires_grad for p in model.parameters()))

    class Loaded:
        denoiser, process = model, Flow(1000, 3.0)

    conditioning = states_of(family, facts.prompt_width, batch, dtype)
    timesteps = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
    loaded: Any = Loaded
    return load_code(facts.code).predict(loaded, latents, timesteps, conditioning)
