"""Every flag of Diffusers' DreamBooth LoRA scripts and of sd-scripts is answered."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest

from dora_diffusion.cli import main as cli
from dora_diffusion.cli.commands.train import train_config
from dora_diffusion.config import settings
from dora_diffusion.config.flag_map import DIFFUSERS_FLAGS, OTHER_NAMES, refusal
from tests.every import every

# As their argument parsers list them: train_dreambooth_lora.py, train_dreambooth_lora_sdxl.py.
_SCRIPTS = """
pretrained_model_name_or_path pretrained_vae_model_name_or_path revision variant tokenizer_name
dataset_name dataset_config_name instance_data_dir cache_dir image_column caption_column repeats
class_data_dir instance_prompt class_prompt validation_prompt num_validation_images
validation_epochs do_edm_style_training with_prior_preservation prior_loss_weight num_class_images
output_dir output_kohya_format seed resolution center_crop random_flip train_text_encoder
train_batch_size sample_batch_size num_train_epochs max_train_steps checkpointing_steps
checkpoints_total_limit resume_from_checkpoint gradient_accumulation_steps gradient_checkpointing
learning_rate text_encoder_lr scale_lr lr_scheduler snr_gamma lr_warmup_steps lr_num_cycles
lr_power dataloader_num_workers optimizer use_8bit_adam adam_beta1 adam_beta2 prodigy_beta3
prodigy_decouple adam_weight_decay adam_weight_decay_text_encoder adam_epsilon
prodigy_use_bias_correction prodigy_safeguard_warmup max_grad_norm push_to_hub hub_token
hub_model_id logging_dir allow_tf32 report_to mixed_precision prior_generation_precision
local_rank enable_xformers_memory_efficient_attention enable_npu_flash_attention rank use_dora
lora_dropout image_interpolation_mode pre_compute_text_embeddings tokenizer_max_length
text_encoder_use_attention_mask validation_images class_labels_conditioning
crops_coords_top_left_h crops_coords_top_left_w
"""
# train_dreambooth_lora_sd15_advanced.py and train_dreambooth_lora_sdxl_advanced.py besides.
_ADVANCED = """
token_abstraction num_new_tokens_per_abstraction initializer_concept train_text_encoder_ti
train_text_encoder_ti_frac train_text_encoder_frac clip_skip noise_offset lora_unet_blocks
use_blora cache_latents
"""
# train_dreambooth_lora_z_image.py, train_dreambooth_lora_flux2_klein.py and
# train_dreambooth_lora_flux2.py, also for pairs of images; train_dreambooth_lora_lumina2.py has a
# system prompt.
_FLOW = """
pretrained_model_name_or_path revision bnb_quantization_config_path do_fp8_training variant
dataset_name dataset_config_name instance_data_dir cache_dir image_column caption_column repeats
class_data_dir instance_prompt class_prompt max_sequence_length text_encoder_out_layers
validation_prompt skip_final_inference final_validation_prompt num_validation_images
validation_epochs rank lora_alpha lora_dropout with_prior_preservation prior_loss_weight
num_class_images output_dir seed resolution aspect_ratio_buckets use_aspect_ratio_buckets
center_crop random_flip caption_dropout train_batch_size sample_batch_size num_train_epochs
max_train_steps checkpointing_steps checkpoints_total_limit resume_from_checkpoint
gradient_accumulation_steps gradient_checkpointing learning_rate guidance_scale text_encoder_lr
scale_lr lr_scheduler lr_warmup_steps lr_num_cycles lr_power dataloader_num_workers
weighting_scheme logit_mean logit_std mode_scale optimizer use_8bit_adam adam_beta1 adam_beta2
prodigy_beta3 prodigy_decouple adam_weight_decay adam_weight_decay_text_encoder lora_layers
adam_epsilon prodigy_use_bias_correction prodigy_safeguard_warmup max_grad_norm push_to_hub
hub_token hub_model_id logging_dir allow_tf32 cache_latents report_to mixed_precision
upcast_before_saving offload prior_generation_precision local_rank enable_npu_flash_attention
fsdp_text_encoder remote_text_encoder cond_image_column system_prompt
"""


def test_every_flag_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    parser = cli.build_parser()
    with every() as case:
        for name in dict.fromkeys((_SCRIPTS + _ADVANCED + _FLOW).split()):
            with case(name):
                check_flag(name, parser, capsys)


def check_flag(name: str, parser: Any, capsys: pytest.CaptureFixture[str]) -> None:
    known = {setting.name: setting for setting in settings()}
    answer = DIFFUSERS_FLAGS.get(name)
    if answer is not None and answer.status == "absent":
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(["train", f"--{name}", "1"])
        assert stop.value.code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last == f"error: --{refusal(name)}"
        return
    is_switch = name in known and known[name].kind is bool
    choices = known[name].choices if name in known else None
    value = choices[0] if choices else "64" if name == "resolution" else "1"
    words = [f"--{name}"] if is_switch else [f"--{name}", value]
    args = parser.parse_args(["train", *words])
    if answer is None or answer.status == "renamed":
        setting = name if answer is None else answer.setting
        assert setting in known
        assert hasattr(args, setting)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if name not in ("push_to_hub", "lora_dropout"):  # refused at this value
            train_config(args)
    if answer is not None and answer.status == "ignored":
        lines = [str(w.message) for w in said if w.category is UserWarning]
        assert lines == [f"{name} is not needed: {answer.text}"]


def test_a_value_of_diffusers_type_bool_is_taken() -> None:
    argv = ["train", "--prodigy_decouple", "False", "--use_dora", "true", "--optimizer", "AdamW"]
    config = train_config(cli.build_parser().parse_args(argv))
    assert (config.prodigy_decouple, config.use_dora, config.optimizer) == (False, True, "adamw")


# As the argument parsers of its train_network.py and sdxl_train_network.py list them.
_SD_SCRIPTS = """
adaptive_noise_scale alpha_mask async_upload base_weights base_weights_multiplier bucket_no_upscale
bucket_reso_steps cache_info cache_latents cache_latents_to_disk cache_text_encoder_outputs
cache_text_encoder_outputs_to_disk caption_dropout_every_n_epochs caption_dropout_rate
caption_extension caption_extention caption_prefix caption_separator caption_suffix
caption_tag_dropout_rate clip_skip color_aug conditioning_data_dir config_file
cpu_offload_checkpointing dataset_class dataset_config dataset_repeats debiased_estimation_loss
debug_dataset deepspeed dim_from_weights disable_mmap_load_safetensors dynamo_backend enable_bucket
enable_wildcard face_crop_aug_range flip_aug fp8_base fp8_base_unet full_bf16 full_fp16
fused_backward_pass gradient_accumulation_steps gradient_checkpointing highvram huber_c huber_scale
huber_schedule huggingface_path_in_repo huggingface_repo_id huggingface_repo_type
huggingface_repo_visibility huggingface_token in_json initial_epoch initial_step ip_noise_gamma
ip_noise_gamma_random_strength keep_tokens keep_tokens_separator learning_rate log_config
log_prefix log_tracker_config log_tracker_name log_with logging_dir loss_type lowram lr_decay_steps
lr_scheduler lr_scheduler_args lr_scheduler_min_lr_ratio lr_scheduler_num_cycles lr_scheduler_power
lr_scheduler_timescale lr_scheduler_type lr_warmup_steps masked_loss max_bucket_reso
max_data_loader_n_workers max_grad_norm max_timestep max_token_length max_train_epochs
max_train_steps mem_eff_attn metadata_author metadata_description metadata_license metadata_tags
metadata_title min_bucket_reso min_snr_gamma min_timestep mixed_precision multires_noise_discount
multires_noise_iterations network_alpha network_args network_dim network_dropout network_module
network_train_text_encoder_only network_train_unet_only network_weights no_half_vae no_metadata
noise_offset noise_offset_random_strength optimizer_args optimizer_type output_config output_dir
output_name persistent_data_loader_workers pretrained_model_name_or_path prior_loss_weight
random_crop reg_data_dir resize_interpolation resolution resume resume_from_huggingface
sample_at_first sample_every_n_epochs sample_every_n_steps sample_prompts sample_sampler
save_every_n_epochs save_every_n_steps save_last_n_epochs save_last_n_epochs_state
save_last_n_steps save_last_n_steps_state save_model_as save_n_epoch_ratio save_precision
save_state save_state_on_train_end save_state_to_huggingface scale_v_pred_loss_like_noise_pred
scale_weight_norms sdpa secondary_separator seed shuffle_caption skip_cache_check
skip_until_initial_step text_encoder_lr token_warmup_min token_warmup_step tokenizer_cache_dir
torch_compile train_batch_size train_data_dir training_comment unet_lr use_8bit_adam
use_lion_optimizer v2 v_parameterization v_pred_like_loss vae vae_batch_size validation_seed
validation_split wandb_api_key wandb_run_name weighted_captions xformers zero_terminal_snr
"""


def test_every_flag_of_sd_scripts_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    """As a setting, or by what to use; never by a guess."""
    parser = cli.build_parser()
    with every() as case:
        for name in set(_SD_SCRIPTS.split()) - {"config_file"}:  # It is --config.
            with case(name):
                check_sd_scripts_flag(name, parser, capsys)


def check_sd_scripts_flag(name: str, parser: Any, capsys: pytest.CaptureFixture[str]) -> None:
    known = {setting.name for setting in settings()}
    text = None if name in known else refusal(name)
    assert name not in OTHER_NAMES
    assert (text is None) == (name in known)
    if text is None:
        return
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["train", f"--{name}", "1"])
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"error: --{text}"
    text = re.sub(r"'dora-diffusion [^']*'", "", text)  # tests/tools parses these commands
    named = {flag for flag in re.findall(r"--(?:no-)?([a-z_\d]+)", text) if flag != "prodigy_"}
    assert named <= {*known, name, "config", "dry_run", "to", "base"}


def test_an_advice_that_begins_with_a_flag_keeps_its_dashes() -> None:
    assert refusal("keep_tokens_separator") == (
        "keep_tokens_separator of sd-scripts is not here: --keep_tags keeps a number of tags in "
        "place"
    )
