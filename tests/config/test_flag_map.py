"""Every flag of Diffusers' DreamBooth LoRA scripts is answered."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from dora_diffusion.cli import main as cli
from dora_diffusion.cli.commands.train import train_config
from dora_diffusion.config import TrainConfig, settings
from dora_diffusion.config.fields import RENAMED
from dora_diffusion.config.flag_map import DIFFUSERS_FLAGS

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


@pytest.mark.parametrize("name", _SCRIPTS.split() + _ADVANCED.split())
def test_every_flag_is_answered(name, capsys):
    known = {setting.name: setting for setting in settings()}
    answer = DIFFUSERS_FLAGS.get(name)
    parser = cli.build_parser()
    if answer is not None and answer.status == "absent":
        assert answer.text
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(["train", f"--{name}", "1"])
        assert stop.value.code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last == f"error: --{name} of Diffusers' scripts is not here: {answer.text}"
        return
    is_switch = name in known and known[name].kind is bool
    choices = known[name].choices if name in known else None
    words = [f"--{name}"] if is_switch else [f"--{name}", choices[0] if choices else "1"]
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
        assert [str(w.message) for w in said] == [f"{name} is not needed: {answer.text}"]


def test_no_answer_is_about_a_setting() -> None:
    assert not {setting.name for setting in settings()} & set(DIFFUSERS_FLAGS)


def test_a_setting_under_the_name_that_it_had_is_taken_and_said(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("direction: vera\n", encoding="utf-8")
    for argv in (["--direction", "vera"], ["--config", str(file)]):
        with pytest.warns(UserWarning, match="^direction is called parametrization now$"):
            config = train_config(cli.build_parser().parse_args(["train", *argv]))
        assert config.parametrization == "vera"
    assert TrainConfig.from_dict({"direction": "adalora"}).parametrization == "adalora"
    assert not {setting.name for setting in settings()} & set(RENAMED)


def test_a_value_of_diffusers_type_bool_is_taken() -> None:
    argv = ["train", "--prodigy_decouple", "False", "--use_dora", "true", "--optimizer", "AdamW"]
    config = train_config(cli.build_parser().parse_args(argv))
    assert (config.prodigy_decouple, config.use_dora, config.optimizer) == (False, True, "adamw")
