"""Settings with the name of another trainer's: the same, refused, or a note says what differs."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import pytest

from dora_diffusion.cli import main as cli
from dora_diffusion.cli.commands.train import train_config
from dora_diffusion.config import TrainConfig, settings
from dora_diffusion.config.flag_map import DIFFERENCES
from tests.config.test_flag_map import _ADVANCED, _FLOW, _SCRIPTS, _SD_SCRIPTS
from tests.every import every

# Keys of OneTrainer's TrainConfig.py, TrainModelPartConfig among them, and of its ConceptConfig.py.
_ONETRAINER = """
aspect_ratio_bucketing base_model_name batch_size clip_grad_norm compile concepts
continue_last_backup dropout_probability ema ema_decay ema_update_step_interval
embedding_learning_rate epochs force_v_prediction frames gradient_accumulation_steps
gradient_checkpointing huber_delta huber_strength layer_filter layer_filter_preset learning_rate
learning_rate_cycles learning_rate_scheduler learning_rate_warmup_steps lora_alpha lora_decompose
lora_decompose_output_axis lora_rank loss_weight_fn loss_weight_strength masked_training
masked_prior_preservation_weight max_noising_strength min_noising_strength model_type
noising_bias noising_weight offset_noise_weight optimizer output_model_destination
perturbation_noise_weight resolution rescale_noise_scheduler_to_zero_terminal_snr sample_after
samples save_every text_encoder text_encoder_layer_skip timestep_distribution timestep_shift
train_dtype unet unmasked_probability unmasked_weight vae validation workspace_dir balancing
balancing_strategy loss_weight include_subdirectories enabled path seed
"""
# Keys of ai-toolkit's config_modules.py: of train, network, model, datasets, sliders, ema, sample.
_AI_TOOLKIT = """
adapter_lr alpha anchors arch batch_size buckets bucket_tolerance cache_latents
cache_latents_to_disk caption_dropout_rate caption_ext cfg_scale compile content_or_style conv
conv_alpha default_caption diff_output_preservation diff_output_preservation_class
diff_output_preservation_multiplier dropout dtype ema_config ema_decay embedding_lr flip_x
folder_path force_consistent_noise gradient_accumulation gradient_accumulation_steps
gradient_checkpointing guidance_scale inverted_mask_prior is_reg keep_tokens learnable_snr_gos
linear linear_alpha linear_timesteps loss_target loss_type low_vram lr lr_scheduler
lr_scheduler_params mask_path max_denoising_steps max_grad_norm max_step_saves_to_keep
min_denoising_steps min_snr_gamma name_or_path negative negative_prompt network_weight neg_prompt
noise_offset noise_scheduler num_repeats optimal_noise_pairing_samples optimizer optimizer_params
positive prompts qtype quantize random_crop random_scale rank resolution sample_every
sample_steps save_every seed shuffle_tokens single_item_batching skip_first_sample snr_gamma steps
target_class text_encoder_lr timestep_type token_dropout_rate train_text_encoder train_unet
unet_lr vae_path weight weight_jitter
"""
_NAMES = {
    "sd-scripts": _SD_SCRIPTS,
    "Diffusers": _SCRIPTS + _ADVANCED + _FLOW,
    "OneTrainer": _ONETRAINER,
    "ai-toolkit": _AI_TOOLKIT,
}
# Shared names that mean the same, as these trainers' sources of 2025 and 2026 have it.
_SAME = {
    "sd-scripts": """
        bucket_reso_steps cache_latents dataset_config gradient_accumulation_steps
        gradient_checkpointing huber_c huber_schedule learning_rate loss_type lr_scheduler
        lr_warmup_steps masked_loss max_bucket_reso max_grad_norm max_token_length max_train_steps
        min_bucket_reso mixed_precision noise_offset output_dir pretrained_model_name_or_path
        prior_loss_weight resolution sample_prompts save_precision seed
        text_encoder_lr train_batch_size validation_split zero_terminal_snr
        """,
    "Diffusers": """
        adam_beta1 adam_beta2 adam_epsilon adam_weight_decay adam_weight_decay_text_encoder
        allow_tf32 cache_latents caption_dropout center_crop checkpointing_steps
        checkpoints_total_limit
        class_data_dir class_prompt clip_skip dataloader_num_workers gradient_accumulation_steps
        gradient_checkpointing hub_model_id initializer_concept instance_data_dir instance_prompt
        learning_rate logging_dir logit_std lora_alpha lora_dropout lr_num_cycles lr_power
        lr_scheduler max_grad_norm max_train_steps mixed_precision noise_offset num_class_images
        num_new_tokens_per_abstraction num_train_epochs num_validation_images optimizer output_dir
        pretrained_model_name_or_path pretrained_vae_model_name_or_path prior_loss_weight
        prodigy_beta3 prodigy_decouple prodigy_safeguard_warmup prodigy_use_bias_correction
        random_flip rank repeats report_to resolution resume_from_checkpoint revision
        sample_batch_size seed snr_gamma text_encoder_lr train_batch_size train_text_encoder
        train_text_encoder_ti use_dora validation_epochs
        validation_prompt variant with_prior_preservation
        """,
    "OneTrainer": """
        compile gradient_accumulation_steps gradient_checkpointing learning_rate lora_alpha
        resolution seed timestep_distribution
        """,
    "ai-toolkit": """
        cache_latents compile conv_alpha ema_decay embedding_lr gradient_checkpointing loss_type
        max_grad_norm negative noise_offset optimizer positive rank resolution seed text_encoder_lr
        train_text_encoder
        """,
}
# Shared names of which the other trainer's values are refused, each with such a value.
_REFUSED: dict[str, dict[str, Any]] = {
    "Diffusers": {"offload": True, "aspect_ratio_buckets": "672,1568;1024,1024"},
    "OneTrainer": {"optimizer": {"optimizer": "ADAMW"}, "timestep_distribution": "SIGMOID"},
    "ai-toolkit": {
        "quantize": True, "anchors": [{"prompt": "a car"}], "resolution": [512, 768],
        "loss_type": "mse",
    },
    "sd-scripts": {
        "loss_type": "smooth_l1", "resolution": "512,768", "lr_warmup_steps": 0.1,
        "text_encoder_lr": [1e-5, 2e-5],
    },
}  # fmt: skip
# A value that means something else, and for those that need others, these.
_VALUES: dict[str, Any] = {
    "clip_skip": 2, "caption_prefix": "sks dog,", "logging_dir": "tracker",
    "lr_warmup_steps": 10, "logit_mean": -0.5,
    "push_to_hub": True, "ema_decay": 0.99, "snr_gamma": 4.0, "gradient_accumulation_steps": 4,
    "lr_scheduler": "linear",
}  # fmt: skip
_WITH: dict[str, Any] = {
    "push_to_hub": {"hub_model_id": "me/mug"}, "caption_prefix": {"shuffle_tags": True},
}  # fmt: skip
_WITHOUT: dict[str, Any] = {"lr_warmup_steps": {"lr_scheduler": "cosine"}, "caption_prefix": {}}


def said(argv: list[str]) -> list[str]:
    """Notes of a command line that name another trainer."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_config(cli.build_parser().parse_args(["train", *argv]))
    lines = [str(warning.message) for warning in caught if warning.category is UserWarning]
    return [line for line in lines if any(f"; {trainer} " in line for trainer in _NAMES)]


def flags(values: dict[str, Any]) -> list[str]:
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in values.items()]


def test_every_shared_name_is_the_same_or_has_a_difference() -> None:
    ours = {setting.name for setting in settings()}
    for trainer, names in _NAMES.items():
        differs = {name for name, one in DIFFERENCES.items() if one.trainer == trainer}
        same, refused = {*_SAME[trainer].split()}, {*_REFUSED[trainer]}
        assert ours & {*names.split()} == same | differs | refused, trainer
        assert not same & differs, trainer


def test_every_difference_is_said_where_it_is_given(tmp_path: Path) -> None:
    with every() as case:
        for name, (trainer, text, needs, *_) in DIFFERENCES.items():
            with case(name):
                values = {**_WITH.get(name, {}), name: _VALUES[name]}
                shown = "on" if values[name] is True else values[name]
                line = f"{name} is {shown}; {trainer} {text}"
                assert said(flags(values)) == [line]
                file = tmp_path / "config.yaml"
                file.write_text("".join(f"{n}: {v!r}\n" for n, v in values.items()), "utf-8")
                assert said(["--config", str(file)]) == [line]
                assert len(line.splitlines()) == 1
                assert len(line) < 160
                # With its default value, and where nothing differs, there is nothing to say.
                assert bool(needs) == (name in _WITHOUT or name == "lr_scheduler")
                if name in _WITHOUT:
                    assert said(flags({**_WITHOUT[name], name: _VALUES[name]})) == []
                assert said(flags({**_WITH.get(name, {}), "rank": 4})) == []
    assert said(["--lr_scheduler", "cosine"]) == []
    assert said(["--clip_skip", "1"]) == [], "sd-scripts' 2, as most mean it"
    assert said(["--snr_gamma", "5"]) == [], "everybody's"


def test_what_another_trainer_has_as_value_is_refused() -> None:
    known = {setting.name: setting for setting in settings()}
    with every() as case:
        for trainer, values in _REFUSED.items():
            for name, value in values.items():
                with case(f"{trainer} {name}"), pytest.raises(ValueError, match=name):
                    TrainConfig.from_dict({known[name].name: value})


@pytest.mark.parametrize("command", ["generate", "evaluate", "serve"])
def test_commands_that_make_images_say_it_too(command: str) -> None:
    words = {
        "generate": ["--prompt", "a mug", "--output", "images"],
        "evaluate": ["mug", "--subject", "photos"],
        "serve": [],
    }
    argv = [command, *words[command], "--base", "embedded:tiny-sd", "--clip_skip", "2"]
    args: argparse.Namespace = cli.build_parser({command}).parse_args(argv)
    with pytest.warns(UserWarning, match="^clip_skip is 2; sd-scripts counts the last layer as 1"):
        cli.read_settings(args)
