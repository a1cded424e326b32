"""Every setting is read where a run acts: none is lost on its way.

A spy notes who reads each setting, in one training for each group of settings that act together.
Code that checks a setting, compares it with a checkpoint's or describes it (the card, the saved
settings, metadata of files) does not count: a setting that is lost is still written there.
"""

from __future__ import annotations

import re
import shutil
import sys
import warnings
from collections.abc import Mapping
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import numpy as np
import pytest
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

from dora_diffusion.config import ConfigError, TrainConfig, without_effect
from dora_diffusion.config.base import StorageSettings
from dora_diffusion.config.subject import ModelSettings
from dora_diffusion.config.train import features_of, settings
from dora_diffusion.training import events
from dora_diffusion.training.recipe import train
from tests.conftest import shallow_config
from tests.training.helpers import SAMPLES

Settings = Mapping[str, Any]
USUAL: dict[str, Any] = {
    "pretrained_model_name_or_path": "{sd1}", "instance_data_dir": "{photos}",
    "instance_prompt": "a sks mug", "resolution": 32, "rank": 2, "conv_rank": 2,
    "targets": ["cross-attention"], "max_train_steps": 2, "learning_rate": 1e-3,
    "num_validation_images": 0, "validation_inference_steps": 2, "checkpointing_steps": 0,
}  # fmt: skip
# Settings that switch each group on.
GROUPS: dict[str, dict[str, Any]] = {
    "one subject": {
        "targets": ["attention+conv"], "train_text_encoder": True, "masked_loss": True,
        "unmasked_prior": 0.5, "shuffle_tags": True,
        "with_prior_preservation": True, "loss_type": "huber", "lr_scheduler": "polynomial",
        "timestep_distribution": "logit_normal", "ema_decay": 0.5,
    },
    "samples and results": {
        "num_validation_images": 1, "validation_split": 1, "validation_loss_steps": 1,
        "validation_steps": 1, "keep_best": True, "checkpointing_steps": 1,
        "report_to": "tensorboard", "push_to_hub": True, "hub_model_id": "me/mug",
    },
    "several subjects": {
        "dataset_config": [{"instance_data_dir": "{others}"}], "num_train_epochs": 1,
        "max_train_steps": None,
    },
    "class images": {
        "with_prior_preservation": True, "prior_preservation_mode": "images",
        "num_class_images": 2,
    },
    "words": {
        "train_text_encoder_ti": True, "token": "zwq", "instance_prompt": "a zwq mug",
        "instance_data_dir": "{bare}",
    },
    "slider": {
        "teach": "slider", "instance_data_dir": None, "instance_prompt": None,
        "target": ["a mug"], "positive": ["a red mug"], "negative": ["a dog"],
        "num_class_images": 4,
    },
    "full": {"method": "full", "full_weights": "targets"},
    "adalora": {"parametrization": "adalora", "rank": 4, "max_train_steps": 4},
    "vera": {"parametrization": "vera"},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
    "buckets": {"aspect_ratio_buckets": True, "resolution": 256, "max_train_steps": 1},
    "quantised": {"quantize": "nf4"},
    "inpainting": {"pretrained_model_name_or_path": "{inpainting}"},
    "resumed": {"resume_from_checkpoint": "latest", "max_train_steps": 3},
    "power": {"timestep_distribution": "power"},
}  # fmt: skip
# Settings of each group, with another value than the default; ``{name}`` is a file or folder.
CASES: dict[str, dict[str, Any]] = {
    "one subject": {
        "pretrained_model_name_or_path": "{sd2}", "variant": "fp16",
        "prediction_type": "v_prediction", "zero_terminal_snr": True,
        "pretrained_vae_model_name_or_path": "{vae}", "vae_tile_size": 32,
        "instance_data_dir": "{others}", "instance_prompt": "a red sks mug", "token": "zwq",
        "class_word": "red dog", "resolution": 64, "center_crop": False,
        "random_flip": True, "aspect_ratio_buckets": True, "masked_loss": True,
        "unmasked_prior": 1.0, "caption_per_line": True, "caption_prefix": "red",
        "shuffle_tags": True, "tag_dropout": 0.9, "keep_tags": 0,
        "caption_dropout": 0.9, "max_token_length": 150, "clip_skip": 1, "cache_latents": False,
        "dataloader_num_workers": 1, "with_prior_preservation": True,
        "prior_preservation_mode": "images", "prior_loss_weight": 0.1, "method": "lora",
        "targets": ["attention+conv"], "text_encoder_targets": ["*.fc1"],
        "train_text_encoder": True, "rank": 3, "lora_alpha": 8.0, "conv_rank": 3,
        "conv_alpha": 8.0, "rank_pattern": {"to_k": 4}, "alpha_pattern": {"mid_block.*": 8.0},
        "rslora": True, "parametrization": "vera", "init": "pissa", "init_adapter": "{adapter}",
        "lora_dropout": 0.5,
        "use_dora": False, "norm_axis": "input",
        "max_train_steps": 4, "train_batch_size": 2, "gradient_accumulation_steps": 2,
        "learning_rate": 2e-3, "text_encoder_lr": 2e-3, "magnitude_lr": 2e-3,
        "lr_pattern": {"*up_blocks*": 2e-3}, "loraplus_ratio": 4.0, "lr_scheduler": "cosine",
        "lr_warmup_steps": 2, "lr_num_cycles": 2, "lr_power": 2.0, "optimizer": "adafactor",
        "adam_beta1": 0.5, "adam_beta2": 0.5, "adam_weight_decay": 0.5,
        "adam_weight_decay_text_encoder": 0.5,
        "adam_epsilon": 0.1, "max_grad_norm": 1e-3,
        "ema_decay": 0.5, "snr_gamma": 0.1,
        "loss_type": "huber", "huber_schedule": "constant", "huber_c": 0.01,
        "noise_offset": 0.5, "timestep_distribution": "power", "logit_mean": 1.0,
        "logit_std": 0.1, "mixed_precision": "bf16", "gradient_checkpointing": True,
        "compile": True, "allow_tf32": True, "seed": 7, "quantize": "nf4",
    },
    "samples and results": {
        "validation_prompt": ["a red sks dog"], "sample_prompts": "{prompts}",
        "sample_at_start": True, "num_validation_images": 2, "validation_steps": 1,
        "sample_model": "{variants}", "validation_inference_steps": 1,
        "validation_guidance_scale": 1.0, "validation_data_dir": "{others}",
        "validation_split": 1, "validation_loss_steps": 1,
        "keep_best": True,
        "overwrite_output_dir": True, "checkpointing_steps": 1, "checkpointing_minutes": 1e-6,
        "checkpoints_total_limit": 1, "report_to": "tensorboard", "logging_dir": "other-logs",
        "push_to_hub": True, "hub_model_id": "me/other",
    },
    "several subjects": {
        "dataset_config": [{"instance_data_dir": "{others}", "instance_prompt": "a sks mug"}],
        "num_train_epochs": 2, "repeats": 2,
    },
    "class images": {
        "class_data_dir": "{others}", "class_prompt": "a red dog", "num_class_images": 3,
        "sample_batch_size": 1,
    },
    "words": {
        "train_text_encoder_ti": True, "new_words": ["zwq", "mug"],
        "num_new_tokens_per_abstraction": 1, "initializer_concept": ["dog"],
        "embedding_lr": 0.1,
    },
    "slider": {
        "target": ["a cat"], "positive": ["a red dog"], "negative": ["a red dog"],
        "anchors": ["a cat"], "slider_guidance": 2.0,
    },
    "full": {"full_weights": "all", "single_file": True, "save_precision": "float16"},
    "adalora": {
        "target_rank": 1, "allocation_warmup": 2, "allocation_final": 3,
        "allocation_interval": 3, "orthogonality_weight": 10.0,
    },
    "vera": {"vera_rank": 3},
    "prodigy": {
        "prodigy_beta3": 0.1, "prodigy_decouple": False, "prodigy_use_bias_correction": True,
        "prodigy_safeguard_warmup": False,
    },
    "buckets": {"min_bucket_reso": 256, "max_bucket_reso": 256, "bucket_reso_steps": 128},
    "quantised": {"quantize_convolutions": True},
    "inpainting": {"inpainting_mask": "subject"},
    "resumed": {"resume_from_checkpoint": "latest"},
    "power": {"timestep_power": 4.0},
}  # fmt: skip
VALUES = {name: value for values in CASES.values() for name, value in values.items()}
ELSEWHERE = {
    "validation_epochs": "tests/training/results/test_samples.py: it becomes validation_steps",
    "model_config": "tests/models/test_single_file.py: it needs a released model's whole file",
    "revision": "tests/models/test_load.py: only the hub has revisions",
    "output_dir": "tests/training/test_every_setting.py: each group has its own",
    "assistant_adapter": "tests/training/features/test_twin.py: it is a LoRA alone",
    "distilled": "tests/training/features/test_twin.py: it changes defaults of a command",
    "feature": "tests/training/features/test_outside.py: it is a file of code",
    "teach": "tests/training/test_slider.py: a slider has no photos, and a subject some",
    "offload": "tests/models/test_offload.py: it moves nothing where there is no GPU",
    "sharding": "tests/training/test_two_processes.py: it needs two processes",
}
"""Settings that one process on a CPU cannot show, and the tests that show them."""
ALONE: dict[str, Any] = {
    **VALUES,
    # Of photos that have captions it names the subject; weights are trained as one of two.
    "instance_prompt": "a sks dog", "full_weights": "targets", "model_config": "{sd1}",
    "revision": "main", "offload": "model", "sharding": "fsdp", "teach": "slider",
    "validation_epochs": 1, "assistant_adapter": "{adapter}", "distilled": True,
}  # fmt: skip
"""Each setting without those that it needs."""
DESCRIBE = (
    "dora_diffusion.config.derived", "dora_diffusion.config.exclusions",
    "dora_diffusion.training.results.card", "dora_diffusion.training.results.record",
    "dora_diffusion.training.results.resume",
)  # fmt: skip
"""Modules whose reading is no effect."""


def is_said_by_itself(name: str) -> bool:
    """True if settings alone, without a model or photos, tell that one of them does nothing."""
    try:
        return bool(without_effect(TrainConfig(**{**USUAL, name: ALONE[name]}), {name}))
    except ConfigError:
        return False


TOGETHER = [name for name in ALONE if is_said_by_itself(name)]
"""Those that are told before a run begins: one run has them all."""


def one_level(folder: Path, root: Path, family: str, in_channels: int = 4) -> Path:
    """A model with a UNet of one level: a dozen runs train it."""
    made = Path(shutil.copytree(folder, root / folder.name))
    shutil.rmtree(made / "unet")
    sizes: dict[str, Any] = {
        "block_out_channels": (32,), "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",), "in_channels": in_channels,
        "attention_head_dim": (4,),
    }  # fmt: skip
    UNet2DConditionModel(**shallow_config(family) | sizes).save_pretrained(made / "unet")
    return made


def write_photos(root: Path) -> dict[str, Path]:
    """Photos, captions and masks that the cases name."""
    photos = root / "photos"
    photos.mkdir()
    for number, source in enumerate(sorted((SAMPLES / "bolt_mug").glob("*.jpg"))[:3]):
        with Image.open(source) as image:
            image.resize((120 - 5 * number, 70 + 2 * number)).save(photos / f"{number}.png")
        text = f"a sks mug, red{number}, on snow\na sks mug, line two"
        (photos / f"{number}.txt").write_text(text, encoding="utf-8")
        rows = np.linspace(0, 255, 70).astype(np.uint8)
        mask = Image.fromarray(np.repeat(rows[:, None], 70, axis=1))
        mask.resize((120 - 5 * number, 70 + 2 * number)).save(photos / f"{number}.mask.png")
    others, bare, long = (root / name for name in ("others", "bare", "long"))
    for folder in (others, bare, long):
        shutil.copytree(photos, folder)
    for folder in (others, bare):
        for path in (*folder.glob("*.txt"), *folder.glob("*.mask.png")):
            path.unlink()
    for number, path in enumerate(sorted(others.glob("*.png"))):
        with Image.open(path) as image:
            flipped = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        flipped.save(path)
        path.with_suffix(".txt").write_text(f"a sks mug upside down {number}", encoding="utf-8")
    for path in long.glob("*.txt"):
        path.write_text("a sks mug " + "on the red snow " * 30, encoding="utf-8")
    (root / "prompts.txt").write_text("a red sks dog\n", encoding="utf-8")
    found = {"photos": photos, "others": others, "bare": bare, "long": long}
    return found | {"prompts": root / "prompts.txt"}


def write_variants(model: Path, root: Path) -> dict[str, Path]:
    """A variant of a model, and another autoencoder for it."""
    variants = Path(shutil.copytree(model, root / "variants"))
    for path in [*variants.rglob("*.safetensors")]:
        moved = {name: tensor * 1.01 for name, tensor in load_file(path).items()}
        save_file(moved, path.with_suffix(".fp16.safetensors"), {"format": "pt"})
    vae = Path(shutil.copytree(model / "vae", root / "vae"))
    [weights] = vae.glob("*.safetensors")
    save_file({n: t * 1.1 for n, t in load_file(weights).items()}, weights, {"format": "pt"})
    return {"variants": variants, "vae": vae}


@pytest.fixture(scope="module")
def places(
    tmp_path_factory: pytest.TempPathFactory, sd1_folder: Path, sd2_folder: Path,
    sd1_inpainting_folder: Path,
) -> dict[str, Path]:  # fmt: skip
    """Files and folders that the cases name."""
    root = tmp_path_factory.mktemp("places")
    sd1, sd2 = (one_level(sd1_folder, root, "sd1"), one_level(sd2_folder, root, "sd2"))
    inpainting = one_level(sd1_inpainting_folder, root, "sd1", 9)
    found = write_photos(root)
    run = root / "run"
    found |= {**write_variants(sd1, root), "run": run}
    found |= {"sd1": sd1, "sd2": sd2, "inpainting": inpainting}
    found |= {"adapter": run / "pytorch_lora_weights.safetensors"}
    steps = {"max_train_steps": 2, "checkpointing_steps": 2, "output_dir": str(run)}
    train(TrainConfig(**filled({**USUAL, **steps}, found)))
    return found


def filled(value: Any, places: Mapping[str, Path]) -> Any:
    """A value with its places put in."""
    if isinstance(value, list):
        return [filled(each, places) for each in value]
    if isinstance(value, Mapping):
        return {name: filled(each, places) for name, each in value.items()}
    return value.format_map(places) if isinstance(value, str) and value.startswith("{") else value


NAMES = {setting.name for setting in settings()}
OF_BASE = {field.name for kind in (ModelSettings, StorageSettings) for field in fields(kind)}


class Spied(TrainConfig):
    """Settings that know which of them acting code has read."""

    read: ClassVar[set[str]] = set()

    def __getattribute__(self, name: str) -> Any:
        if name in NAMES and acts(sys._getframe(1)):
            self.read.add(name)
        elif name == "base_model":  # It reads the settings as one mapping.
            self.read.update(OF_BASE)
        return super().__getattribute__(name)


def acts(frame: FrameType | None) -> bool:
    """True if the first module outside of the config that asks does more than describe."""
    while frame is not None:
        module = frame.f_globals["__name__"]
        if frame.f_code.co_name in ("__post_init__", "to_dict") or module.startswith(DESCRIBE):
            return False
        # Properties of the settings ask by way of the config and of the spy.
        if not module.startswith(("dora_diffusion.config", "functools", __name__)):
            return bool(module.startswith("dora_diffusion."))
        frame = frame.f_back
    return False


def read_by(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Train, and return the settings that acting code has read, or that turn on code."""
    monkeypatch.setattr("dora_diffusion.export.hub.check", lambda name: None)
    monkeypatch.setattr("dora_diffusion.export.hub.push", lambda *_, **__: "")
    monkeypatch.setattr(Spied, "read", set())
    spied = Spied(**config.to_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(spied)
    return Spied.read.union(one.on.setting for one in features_of(TrainConfig) if one.code)


def test_each_setting_has_a_case() -> None:
    listed = [name for values in CASES.values() for name in values]
    assert sorted(listed) == sorted(NAMES - ELSEWHERE.keys())
    assert set(ELSEWHERE) - set(ALONE) == {"output_dir", "feature"}
    root = Path(__file__).parents[2]
    for name, place in ELSEWHERE.items():
        path = root / place.partition(":")[0]
        assert name in path.read_text(encoding="utf-8"), f"{path} says nothing of {name}"


@pytest.mark.parametrize("group", GROUPS)
def test_settings_are_read_where_they_act(
    group: str, places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {**USUAL, **GROUPS[group], "output_dir": str(tmp_path / "out")}
    if "resume_from_checkpoint" in values:
        shutil.copytree(places["run"], tmp_path / "out")
    read = read_by(TrainConfig(**filled(values, places)), monkeypatch)
    assert CASES[group].keys() - read == set()


def test_settings_of_the_base_model_are_those_of_its_load() -> None:
    usual = TrainConfig().base_model
    for name in OF_BASE & VALUES.keys():
        needs = {"prediction_type": "v_prediction"} if name == "zero_terminal_snr" else {}
        needs |= {"quantize": "nf4"} if name == "quantize_convolutions" else {}
        [base, other] = (
            TrainConfig(**v).base_model for v in (needs, {**needs, name: VALUES[name]})
        )
        assert base != other, name
        assert needs or base == usual


def test_settings_that_are_said_to_do_nothing_do_nothing(
    places: dict[str, Path], tmp_path: Path
) -> None:
    """To the bit, all of them together: each line says why that is, and none is lost."""
    assert len(TOGETHER) > 55
    results, said = [], list[str]()
    for part, changes in (("usual", {}), ("changed", {name: ALONE[name] for name in TOGETHER})):
        said.clear()
        values = {**USUAL, "max_train_steps": 1, "output_dir": str(tmp_path / part), **changes}
        results.append(trained(TrainConfig(**filled(values, places)), said))
    for name in TOGETHER:
        assert len([s for s in said if re.search(rf"\b{name}\b.*has no effect", s)]) == 1, name
    assert results[0] == results[1]


def trained(config: TrainConfig, said: list[str]) -> tuple[list[float], list[str], dict[str, str]]:
    """Train, and return losses, names of files and digests of weights; warnings go to `said`."""
    losses: list[float] = []

    def note(event: events.Event) -> None:
        if isinstance(event, events.StepDone):
            losses.append(event.loss)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(config, note)
    said += [str(warning.message) for warning in caught]
    folder = Path(config.output_dir)
    weights = {
        f"{path.name} {key}": sha256(tensor.float().numpy()).hexdigest()
        for path in folder.rglob("*.safetensors")
        for key, tensor in load_file(path).items()
    }
    return losses, sorted(path.name for path in folder.rglob("*")), weights
