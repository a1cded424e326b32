"""Descriptions of settings: names of precisions, and the range that each value must be in."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dora_diffusion.cli import main as cli
from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.config.fields import DTYPES, PRECISIONS, Setting, dtype_name, precision_name
from dora_diffusion.config.train import settings
from tests.every import every
from tests.refusal import refused


@pytest.mark.parametrize(
    ("words", "dtype", "precision"),
    [
        (("float32", "fp32"), "float32", "no"),
        (("float16", "fp16"), "float16", "fp16"),
        (("bfloat16", "bf16"), "bfloat16", "bf16"),
    ],
)
def test_a_precision_has_one_name_per_library(
    words: tuple[str, ...], dtype: str, precision: str
) -> None:
    assert {dtype_name(word) for word in words} == {dtype}
    assert {precision_name(word) for word in (*words, precision)} == {precision}


def test_what_the_flags_take_is_what_the_libraries_know() -> None:
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in DTYPES)
    assert PRECISIONS == ("auto", "no", "fp16", "bf16")


def a_setting(kind: type, **limits: Any) -> Setting:
    forms = {"is_list": False, "default": None, "help": "", "group": ""}
    return Setting("x", kind, **{**forms, **limits})


@pytest.mark.parametrize(
    ("setting", "value", "line"),
    [
        (a_setting(int, above=0), 0, "x is 0; it must be greater than 0"),
        (a_setting(float, least=0), -1.0, "x is -1.0; it must not be negative"),
        (a_setting(int, least=16), 15, "x is 15; it must be at least 16"),
        (a_setting(float, most=1), 1.5, "x is 1.5; it must be at most 1"),
        (a_setting(float, below=1), 1.0, "x is 1.0; it must be less than 1"),
        (a_setting(float), math.nan, "x is nan; it must be a finite number"),
        (a_setting(float, least=0), -math.inf, "x is -inf; it must be a finite number"),
        (a_setting(int), "8", "x is '8'; it must be a whole number"),
        (a_setting(float), "8", "x is '8'; it must be a number"),
        (a_setting(float, above=0, is_list=True), [1, 0], "x is 0; it must be greater than 0"),
        (a_setting(float, least=0, is_list=True, is_map=True), {"to_k": -1},
         "x is -1; it must not be negative"),
        (a_setting(int, is_list=True, is_map=True), ["to_k=4"],
         "x is ['to_k=4']; it must be a mapping, of patterns to values"),
        (a_setting(str, choices=("output", "input")), "inptu",
         "x is 'inptu'; it must be one of output, input (did you mean input?)"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)  # fmt: skip
def test_a_value_that_cannot_be_is_named_with_its_range(
    setting: Setting, value: Any, line: str
) -> None:
    with refused("x") as error:
        setting.check(value)
    assert str(error.value) == line
    setting.check(None)


# Range -> settings of numbers, of a training and of commands.
TRAINING = {
    "(-inf, inf)": "max_token_length logit_mean",
    "(0, inf)":
        "slider_guidance lora_alpha conv_alpha alpha_pattern "
        "loraplus_ratio adam_epsilon huber_c logit_std timestep_power",
    "[0, inf)":
        "lr_power validation_guidance_scale vae_tile_size embedding_lr unmasked_prior keep_tags "
        "clip_skip dataloader_num_workers "
        "prior_loss_weight allocation_warmup allocation_final orthogonality_weight "
        "learning_rate text_encoder_lr magnitude_lr lr_pattern lr_warmup_steps adam_beta1 "
        "adam_beta2 adam_weight_decay adam_weight_decay_text_encoder prodigy_beta3 "
        "max_grad_norm snr_gamma noise_offset seed num_validation_images "
        "validation_steps validation_split checkpointing_steps checkpointing_minutes",
    "[1, inf)":
        "repeats num_new_tokens_per_abstraction resolution min_bucket_reso max_bucket_reso "
        "bucket_reso_steps num_class_images sample_batch_size rank conv_rank rank_pattern "
        "vera_rank target_rank allocation_interval "
        "max_train_steps num_train_epochs train_batch_size gradient_accumulation_steps "
        "lr_num_cycles validation_epochs validation_loss_steps "
        "checkpoints_total_limit",
    "[0, 1)": "lora_dropout ema_decay",
    "[0, 1]": "tag_dropout caption_dropout",
    "[1, 1000]": "validation_inference_steps",
}  # fmt: skip
COMMANDS = {
    "(0, inf)": "convert.strength adapter_memory",
    "[1, inf)":
        "batch_size grid_limit replicas queue num_seeds workers pack",
    "(0, 86400]": "timeout",
    "[0, 10]": "serve.window",
    "[1, 10000]": "num_images",
    "[0, inf)":
        "clip_skip vae_tile_size replica_gpus num_cpus num_gpus generate.seed "
        "generate.guidance_scale",
    "[1, 1000]": "generate.steps",
    "[0, 1]": "guidance_rescale",
    "(0, 1]": "denoise",
    "[16, 8192]": "width height",
    "[1, 65535]": "serve.port",
}  # fmt: skip
KINDS: dict[str, Any] = {name: cli.settings_of(name) for name in cli.COMMANDS if name != "train"}


def numbers(given: tuple[Setting, ...]) -> list[Setting]:
    return [setting for setting in given if setting.kind in (int, float)]


def form_of(setting: Setting, value: Any) -> Any:
    """A value as a setting has it: one of a list, or of a mapping."""
    return {"to_k": value} if setting.is_map else [value] if setting.is_list else value


def passes(setting: Setting, value: float) -> bool:
    try:
        setting.check(form_of(setting, value))
    except ConfigError:
        return False
    return True


def range_of(setting: Setting) -> str:
    """The range that passes, by values on both sides of every end that there is."""
    ends, step = (
        (0, 1, 10, 16, 1000, 8192, 10_000, 65_535, 86_400),
        1 if setting.kind is int else 2**-30,
    )
    points = sorted({point for end in ends for point in (end - step, end, end + step)})
    inside = [value for value in points if passes(setting, value)]
    low, high = inside[0], inside[-1]
    assert inside == [point for point in points if low <= point <= high]
    start = f"[{low:g}" if low in ends else f"({low - step:g}"
    end = f"{high:g}]" if high in ends else f"{high + step:g})"
    start = "(-inf" if low == points[0] else start
    return f"{start}, {'inf)' if high == points[-1] else end}"


def test_each_number_has_its_range() -> None:
    expected = {name: limits for limits, names in TRAINING.items() for name in names.split()}
    assert {s.name: range_of(s) for s in numbers(settings())} == expected
    limits_of = {name: limits for limits, names in COMMANDS.items() for name in names.split()}
    used = set()
    with every() as case:
        for command, kind in KINDS.items():
            for setting in numbers(kind.settings()):
                keys = {f"{command}.{setting.name}", setting.name} & {*limits_of}
                used |= keys
                with case(f"{command}.{setting.name}"):
                    expected_range = limits_of[keys.pop()] if keys else "(-inf, inf)"
                    assert range_of(setting) == expected_range
    assert used == {*limits_of}


def test_settings_check_themselves_wherever_they_are_made() -> None:
    """In Python too; a file's and a command line's values are made numbers before."""
    with every() as case:
        for command, kind in (("train", TrainConfig), *KINDS.items()):
            known = settings() if kind is TrainConfig else kind.settings()
            given = {
                s.name: form_of(s, s.choices[0] if s.choices else s.kind("1"))
                for s in known
                if s.is_required
            }
            wrong = [(s, v) for s in numbers(known) for v in (math.nan, "1e-4")]
            wrong += [(s, "no such word") for s in known if s.choices and not s.is_list]
            for setting, value in wrong:
                with case(f"{command}: {setting.name} = {value}"), refused(setting.name):
                    values = given | {setting.name: form_of(setting, value)}
                    kind(**values) if kind is TrainConfig else kind.of(**values)
