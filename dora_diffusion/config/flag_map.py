"""Flags of other trainers that are no settings here, and what to use.

The command line answers from it; docs/howto/from-diffusers-scripts.md and from-kohya.md have what
differs in those that are. It covers sd-scripts' ``train_network.py`` and ``sdxl_train_network.py``,
and of Diffusers
``examples/dreambooth/train_dreambooth_lora.py`` and ``train_dreambooth_lora_sdxl.py``, and
``examples/advanced_diffusion_training/train_dreambooth_lora_sd15_advanced.py`` and
``train_dreambooth_lora_sdxl_advanced.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dora_diffusion.config.kohya import REFUSED
from dora_diffusion.config.train import settings
from dora_diffusion.config.wording import closest


@dataclass(frozen=True)
class Answer:
    """Answer to a flag of another script.

    Attributes:
        status: renamed: accepted, and sets another setting. ignored: accepted, and needs nothing
            here. absent: refused.
        text: What to use instead.
        setting: The setting that a renamed flag sets.
    """

    status: Literal["renamed", "ignored", "absent"]
    text: str
    setting: str = ""


_IGNORED = {
    "enable_xformers_memory_efficient_attention": "PyTorch's own memory-efficient attention is "
    "always used",
    "local_rank": "accelerate launch tells every process its place",
    "pre_compute_text_embeddings": "captions are encoded once, unless the text encoders train",
    "prior_generation_precision": "class images are generated in --mixed_precision",
    "set_grads_to_none": "gradients are always freed",
}

_DATASET = "save the images in a folder, each with its caption in a .txt of the same name, and "
_DATASET += "use --instance_data_dir"
_ABSENT = {
    "dataset_name": _DATASET,
    "dataset_config_name": _DATASET,
    "image_column": _DATASET,
    "caption_column": _DATASET,
    "cache_dir": "set the environment variable HF_HOME",
    "tokenizer_name": "the tokenizer is the base model's; put another into its folder",
    "tokenizer_max_length": "longer captions are read in chunks: --max_token_length 150",
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
    "train_text_encoder_frac": "the text encoders train for the whole run; train twice, or lower "
    "--text_encoder_lr",
    "lora_layers": "use --targets with names or patterns of layers",
    "lora_unet_blocks": "use --targets 'up_blocks.0.attentions.0.*', without 'unet.'",
    "use_blora": "use --targets 'up_blocks.0.attentions.0.*' 'up_blocks.0.attentions.1.*'",
}

_UNSUPPORTED = "it is not supported"
_MEMORY = "PyTorch's own memory-efficient attention is always used"
_CARD = "edit README.md of the run, which is its card"
_OF_TRACKERS = "set the tracker's own environment variables, such as WANDB_NAME or WANDB_API_KEY"
_SD_SCRIPTS = {
    **{name: text for name, text in REFUSED.items() if name != "validation_split"},
    "alpha_mask": "use --masked_loss",
    "cache_info": "it is not needed",
    "caption_dropout_every_n_epochs": "use --caption_dropout",
    "caption_extension": "captions are .txt files",
    "caption_extention": "captions are .txt files",
    "config_file": "write the settings into a YAML file, and give it as --config",
    "cpu_offload_checkpointing": "use --gradient_checkpointing and --offload",
    "debug_dataset": "use --dry_run",
    "dim_from_weights": "give the file as --init_adapter, and --rank",
    "dynamo_backend": "use --compile",
    "in_json": "a caption is a .txt file beside its image",
    "keep_tokens_separator": "--keep_tags keeps a number of tags in place",
    "lr_scheduler_args": "use --lr_num_cycles or --lr_power",
    "lr_scheduler_type": "use --lr_scheduler",
    "network_args": "use --conv_rank, --conv_alpha, --loraplus_ratio, --norm_axis or --targets",
    "network_module": "DoRA is the default, and --method lora trains a plain LoRA",
    "network_train_text_encoder_only": "the UNet trains in every run",
    "network_train_unet_only": "it is the default",
    "no_half_vae": "a VAE that float16 would overflow runs in float32",
    "optimizer_args": "use --adam_weight_decay, --adam_beta1, --adam_beta2, --adam_epsilon or a "
    "--prodigy_* setting",
    "output_config": "every run writes its config.yaml",
    "output_name": "name the file at 'dora-diffusion convert RUN NAME.safetensors --to PROGRAM'",
    "persistent_data_loader_workers": "workers are kept anyway",
    "random_crop": "use --no-center_crop",
    "reg_data_dir": "use --with_prior_preservation --class_data_dir FOLDER",
    "sample_sampler": "samples use the base model's own scheduler",
    "save_every_n_epochs": "use --checkpointing_steps; --dry_run counts the images of an epoch",
    "save_model_as": "adapters are .safetensors files",
    "train_data_dir": "use --dataset_config for a folder with folders such as '10_sks dog', or "
    "--instance_data_dir for one folder of photos",
    "use_lion_optimizer": "Lion is not supported; see --optimizer",
    "v2": "it is read from the model",
    "v_parameterization": "it is read from the model, or use --prediction_type v_prediction",
    "vae_batch_size": "images are encoded one by one",
    "xformers": _MEMORY, "sdpa": _MEMORY, "mem_eff_attn": _MEMORY,
    "lowram": "see --offload", "highvram": "see --offload",
    **dict.fromkeys(("base_weights", "base_weights_multiplier"),
                    "merge the adapter into the model with 'dora-diffusion export'"),
    **dict.fromkeys(("cache_latents_to_disk", "cache_text_encoder_outputs",
                     "cache_text_encoder_outputs_to_disk", "skip_cache_check"),
                    "latents and captions are encoded once and kept in memory; --offload takes "
                    "what encoded them off the GPU"),
    **dict.fromkeys(("full_bf16", "full_fp16", "fp8_base", "fp8_base_unet"),
                    "what trains is float32; use --mixed_precision for the rest"),
    **dict.fromkeys(("huggingface_repo_id", "huggingface_repo_type", "huggingface_path_in_repo",
                     "huggingface_repo_visibility", "save_state_to_huggingface", "async_upload"),
                    "use --push_to_hub and --hub_model_id"),
    "huggingface_token": "set the environment variable HF_TOKEN",
    **dict.fromkeys(("initial_epoch", "initial_step", "skip_until_initial_step",
                     "resume_from_huggingface"), "use --resume_from_checkpoint"),
    **dict.fromkeys(("log_config", "log_prefix", "log_tracker_config", "log_tracker_name",
                     "wandb_api_key", "wandb_run_name"), _OF_TRACKERS),
    **dict.fromkeys(("metadata_author", "metadata_description", "metadata_license",
                     "metadata_tags", "metadata_title", "training_comment"), _CARD),
    **dict.fromkeys(("save_last_n_epochs", "save_last_n_epochs_state", "save_last_n_steps_state",
                     "save_n_epoch_ratio"), "use --checkpoints_total_limit"),
    **dict.fromkeys(("save_state", "save_state_on_train_end"),
                    "each checkpoint has the state; see --checkpointing_steps"),
    **dict.fromkeys((
        "adaptive_noise_scale", "dataset_class", "deepspeed", "disable_mmap_load_safetensors",
        "fused_backward_pass", "huber_c", "huber_scale", "huber_schedule", "ip_noise_gamma",
        "ip_noise_gamma_random_strength", "loss_type", "lr_decay_steps",
        "lr_scheduler_min_lr_ratio", "lr_scheduler_timescale", "max_timestep", "min_timestep",
        "multires_noise_discount", "multires_noise_iterations", "no_metadata",
        "noise_offset_random_strength", "scale_v_pred_loss_like_noise_pred", "scale_weight_norms",
        "token_warmup_min", "tokenizer_cache_dir", "v_pred_like_loss", "validation_seed",
        "weighted_captions",
    ), _UNSUPPORTED),
}  # fmt: skip

# What people type, and what other trainers call it.
_OTHER_NAMES = {
    "pretrained_model_name_or_path": "model base base_model model_name checkpoint ckpt",
    "pretrained_vae_model_name_or_path": "vae",
    "instance_data_dir": "data data_dir image_dir images photos dataset folder",
    "instance_prompt": "prompt caption",
    "repeats": "num_repeats dataset_repeats",
    "token": "trigger trigger_word identifier",
    "class_word": "class class_name subject",
    "class_data_dir": "regularization_dir",
    "output_dir": "output out",
    "max_train_steps": "steps max_steps num_steps train_steps iterations",
    "num_train_epochs": "epochs num_epochs max_train_epochs",
    "train_batch_size": "batch batch_size",
    "learning_rate": "lr unet_lr",
    "text_encoder_lr": "text_encoder_learning_rate te_lr",
    "rank": "network_dim dim lora_rank lora_r r",
    "lora_alpha": "network_alpha alpha",
    "conv_rank": "conv_dim",
    "lr_num_cycles": "lr_scheduler_num_cycles",
    "lr_power": "lr_scheduler_power",
    "dataloader_num_workers": "max_data_loader_n_workers num_workers",
    "checkpoints_total_limit": "save_last_n_steps",
    "lora_dropout": "network_dropout dropout",
    "init_adapter": "network_weights lora_path pretrained_lora",
    "init": "init_lora_weights lora_init",
    "new_words": "new_tokens placeholder_token placeholder",
    "num_new_tokens_per_abstraction": "num_vectors num_vectors_per_token token_count",
    "initializer_concept": "initializer_token init_word initial_embedding_text",
    "embedding_lr": "embedding_learning_rate token_lr ti_lr",
    "target_rank": "target_r",
    "allocation_warmup": "tinit",
    "allocation_final": "tfinal",
    "allocation_interval": "deltat",
    "orthogonality_weight": "orth_reg_weight",
    "optimizer": "optimizer_type",
    "compile": "torch_compile compile_model",
    "mixed_precision": "precision dtype fp16 bf16",
    "validation_prompt": "sample_prompt validation_prompts",
    "sample_at_start": "sample_at_first",
    "validation_steps": "sample_every_n_steps sample_every",
    "validation_epochs": "sample_every_n_epochs",
    "validation_data_dir": "val_data_dir eval_data_dir validation_dir held_out",
    "validation_split": "val_split eval_split validation_fraction",
    "keep_best": "load_best_model_at_end save_best",
    "early_stopping_patience": "patience early_stopping",
    "checkpointing_steps": "save_every_n_steps save_every save_steps",
    "resume_from_checkpoint": "resume",
    "aspect_ratio_buckets": "enable_bucket buckets",
    "random_flip": "flip_aug flip",
    "caption_dropout": "caption_dropout_rate",
    "shuffle_tags": "shuffle_caption shuffle_tokens",
    "keep_tags": "keep_tokens",
    "tag_dropout": "caption_tag_dropout_rate",
    "wildcards": "enable_wildcard",
    "snr_gamma": "min_snr_gamma",
    "prediction_type": "v_pred v_prediction",
    "zero_terminal_snr": "ztsnr zero_snr rescale_betas_zero_snr",
    "debiased_estimation_loss": "debiased debiased_estimation",
    "gradient_accumulation_steps": "gradient_accumulation",
    "with_prior_preservation": "prior_preservation regularization",
    "report_to": "log_with",
}
OTHER_NAMES = {word: name for name, words in _OTHER_NAMES.items() for word in words.split()}
"""Name that is none here -> the setting that is meant."""

DIFFUSERS_FLAGS: dict[str, Answer] = {
    "token_abstraction": Answer("renamed", "--token, one word", "token"),
    **{name: Answer("ignored", text) for name, text in _IGNORED.items()},
    **{name: Answer("absent", text) for name, text in _ABSENT.items()},
}
"""Flag without its dashes -> what it is here; the others are settings of the same name."""


def refusal(name: str) -> str | None:
    """Return why a flag of other trainers is refused and what to use; None for other names."""
    answer = DIFFUSERS_FLAGS.get(name)
    if answer is not None and answer.status == "absent":
        return f"{name} of Diffusers' scripts is not here: {answer.text}"
    text = _SD_SCRIPTS.get(name)
    return text and f"{name} of sd-scripts is not here: {text}"


def meant_by(name: str) -> str | None:
    """The setting that is meant by a name that is none; None where nothing is close."""
    known = [setting.name for setting in settings()]
    return OTHER_NAMES.get(name.lower().replace("-", "_")) or closest(name, known)
