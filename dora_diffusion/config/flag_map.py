"""Flags of Diffusers' DreamBooth LoRA scripts, and what to use for each here.

One table: the command line answers from it, and the documentation prints it (`as_markdown`). It
covers ``examples/dreambooth/train_dreambooth_lora.py`` and ``train_dreambooth_lora_sdxl.py``, and
``examples/advanced_diffusion_training/train_dreambooth_lora_sd15_advanced.py`` and
``train_dreambooth_lora_sdxl_advanced.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dora_diffusion.config.train import settings

Status = Literal["same", "renamed", "ignored", "absent"]


@dataclass(frozen=True)
class Answer:
    """What a flag of another script is here.

    Attributes:
        status: same: a setting of this name and meaning. renamed: accepted, and sets another
            setting. ignored: accepted, and needs nothing here. absent: refused.
        text: What differs, or what to use instead.
        setting: The setting that a renamed flag sets.
    """

    status: Status
    text: str
    setting: str = ""


# Settings of the same name and meaning, with what differs.
_SAME = {
    "pretrained_model_name_or_path": "also a single file or embedded:NAME",
    "pretrained_vae_model_name_or_path": "",
    "revision": "",
    "variant": "",
    "instance_data_dir": "with .txt captions beside the images",
    "instance_prompt": "must contain --token",
    "class_data_dir": "default: OUTPUT_DIR/class_images",
    "class_prompt": "default: each caption with the token taken out",
    "with_prior_preservation": "",
    "prior_loss_weight": "",
    "num_class_images": "",
    "validation_prompt": "takes several",
    "num_validation_images": "",
    "validation_epochs": "default: samples at the end only",
    "output_dir": "default: dreambooth-output",
    "seed": "default: 0, so that a run can be repeated",
    "resolution": "default: the base model's own",
    "center_crop": "",
    "random_flip": "drawn for every step",
    "train_text_encoder": "",
    "train_batch_size": "default: 1 instead of 4",
    "sample_batch_size": "",
    "num_train_epochs": "default: as many as the steps take",
    "max_train_steps": "default: 800, for SDXL 1000",
    "checkpointing_steps": "",
    "checkpoints_total_limit": "",
    "resume_from_checkpoint": "refuses other images and settings",
    "gradient_accumulation_steps": "",
    "gradient_checkpointing": "",
    "learning_rate": "default: 8e-5",
    "text_encoder_lr": "",
    "lr_scheduler": "",
    "lr_warmup_steps": "default: 0 instead of 500; takes effect with constant too",
    "lr_num_cycles": "",
    "lr_power": "",
    "snr_gamma": "default: 5; 0 turns it off",
    "noise_offset": "",
    "dataloader_num_workers": "needs --no-cache_latents",
    "optimizer": "AdamW and prodigy, also adamw8bit and adafactor",
    "use_8bit_adam": "",
    "adam_beta1": "",
    "adam_beta2": "",
    "adam_weight_decay": "default: 1e-4",
    "adam_weight_decay_text_encoder": "",
    "adam_epsilon": "",
    "prodigy_beta3": "",
    "prodigy_decouple": "",
    "prodigy_use_bias_correction": "default: off",
    "prodigy_safeguard_warmup": "",
    "max_grad_norm": "",
    "push_to_hub": "needs --hub_model_id; private",
    "hub_model_id": "NAME/MODEL",
    "logging_dir": "",
    "allow_tf32": "",
    "report_to": "tensorboard or wandb; default: none, since metrics.jsonl is always written",
    "mixed_precision": "default: auto",
    "rank": "default: 8, for Conv2d layers 4",
    "lora_alpha": "default: rank",
    "lora_dropout": "",
    "use_dora": "on by default; --no-use_dora trains plain LoRA",
    "cache_latents": "on by default",
}

_RENAMED = {
    "token_abstraction": Answer("renamed", "--token, one word", "token"),
}

_IGNORED = {
    "enable_xformers_memory_efficient_attention": "PyTorch's own memory-efficient attention is "
    "always used",
    "local_rank": "accelerate launch tells every process its place",
    "pre_compute_text_embeddings": "captions are encoded once, unless the text encoders train",
    "prior_generation_precision": "class images are generated in --mixed_precision",
    "repeats": "images are repeated until max_train_steps",
    "set_grads_to_none": "gradients are always freed",
}

_DATASET = "save the images in a folder, each with its caption in a .txt of the same name, and "
_DATASET += "use --instance_data_dir"
_PIVOTAL = "no new tokens are trained; choose a rare word with --token, and --train_text_encoder"
_ABSENT = {
    "dataset_name": _DATASET,
    "dataset_config_name": _DATASET,
    "image_column": _DATASET,
    "caption_column": _DATASET,
    "cache_dir": "set the environment variable HF_HOME",
    "tokenizer_name": "the tokenizer is the base model's; put another into its folder",
    "tokenizer_max_length": "the length is the tokenizer's own",
    "text_encoder_use_attention_mask": "CLIP is trained and sampled without a mask",
    "class_labels_conditioning": "it is for DeepFloyd IF, which is not supported",
    "validation_images": "it is for upscalers, which are not supported",
    "validation_scheduler": "samples use the base model's own scheduler",
    "do_edm_style_training": "EDM-style training is not supported",
    "output_kohya_format": "convert the result with 'dora-diffusion convert RUN FILE --to kohya' "
    "(or --to comfyui)",
    "scale_lr": "write the rate that you want: learning_rate x train_batch_size x "
    "gradient_accumulation_steps x processes",
    "crops_coords_top_left_h": "SDXL is told where each crop was taken",
    "crops_coords_top_left_w": "SDXL is told where each crop was taken",
    "image_interpolation_mode": "images are always resized with Lanczos",
    "hub_token": "set the environment variable HF_TOKEN; a command line stays in the shell's "
    "history",
    "enable_npu_flash_attention": "Ascend NPUs are not supported",
    "offset_noise": "use --noise_offset 0.1",
    "clip_skip": "the layer that conditions is the model family's own",
    "initializer_concept": _PIVOTAL,
    "num_new_tokens_per_abstraction": _PIVOTAL,
    "train_text_encoder_ti": _PIVOTAL,
    "train_text_encoder_ti_frac": _PIVOTAL,
    "train_text_encoder_frac": "the text encoders train for the whole run; train twice, or lower "
    "--text_encoder_lr",
    "lora_unet_blocks": "use --targets 'up_blocks.0.attentions.0.*', without 'unet.'",
    "use_blora": "use --targets 'up_blocks.0.attentions.0.*' 'up_blocks.0.attentions.1.*'",
}

DIFFUSERS_FLAGS: dict[str, Answer] = {
    **{name: Answer("same", text, name) for name, text in _SAME.items()},
    **_RENAMED,
    **{name: Answer("ignored", text) for name, text in _IGNORED.items()},
    **{name: Answer("absent", text) for name, text in _ABSENT.items()},
}
"""Flag without its dashes -> what it is here."""


def refusal(name: str) -> str | None:
    """Why a flag of Diffusers' scripts is refused and what to use; None for any other name."""
    answer = DIFFUSERS_FLAGS.get(name)
    if answer is None or answer.status != "absent":
        return None
    return f"{name} of Diffusers' scripts is not here: {answer.text}"


def as_markdown() -> str:
    """The table for documentation, by what happens to the flags."""
    defaults = {setting.name: setting.default_text for setting in settings()}
    lines = ["| Diffusers' flag | here | |", "|---|---|---|"]
    heads = {"same": "the same", "renamed": "accepted", "ignored": "accepted, not needed"}
    for name, answer in DIFFUSERS_FLAGS.items():
        text = answer.text
        if answer.status == "same" and not text:
            text = f"default: {defaults[name]}"
        lines.append(f"| `--{name}` | {heads.get(answer.status, 'not here')} | {text} |")
    return "\n".join(lines) + "\n"
