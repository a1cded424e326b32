"""Every setting, changed alone, changes what a run does: none is lost on its way to where it acts.

What a run only says of its settings (its card, its ``config.yaml``, the metadata of its files) does
not count: a setting that is lost is still written there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import sys
import types
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from dora_diffusion.config import ConfigError, TrainConfig, without_effect
from dora_diffusion.config.train import settings
from dora_diffusion.training import events, processes
from dora_diffusion.training.recipe import train
from tests.conftest import shallow_config
from tests.training.helpers import SAMPLES

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """Another value than the default, and the settings beside which it acts.

    Attributes:
        value: The other value; ``{name}`` is a place.
        beside: The settings of both runs.
        into: The place that both runs begin with in their output folder.
    """

    value: Any
    beside: Settings = field(default_factory=dict)
    into: str = ""


PRIOR = {"with_prior_preservation": True}
CLASS_IMAGES = {**PRIOR, "prior_preservation_mode": "images", "num_class_images": 2}
WORDS = {
    "train_text_encoder_ti": True, "token": "zwq", "instance_prompt": "a zwq mug",
    "instance_data_dir": "{bare}",
}  # fmt: skip
SAMPLED = {"num_validation_images": 1}
HELD_OUT = {"validation_split": 1}
BUCKETS = {"aspect_ratio_buckets": True, "resolution": 256, "max_train_steps": 1}
TAGS = {"shuffle_tags": True}
FULL = {"method": "full", "targets": ["cross-attention"], "full_weights": "targets"}
TEXT = {"train_text_encoder": True}
SLIDER = {
    "teach": "slider", "instance_data_dir": None, "instance_prompt": None,
    "target": ["a mug"], "positive": ["a red mug"], "negative": ["a dog"], "num_class_images": 4,
}  # fmt: skip
ALLOCATED = {"parametrization": "adalora", "rank": 4}
FIVE = {**ALLOCATED, "max_train_steps": 5, "allocation_interval": 1}
PRODIGY = {"optimizer": "prodigy", "learning_rate": 1.0, "max_train_steps": 8}
LOGIT_NORMAL = {"timestep_distribution": "logit_normal"}
USUAL = {
    "pretrained_model_name_or_path": "{sd1}", "instance_data_dir": "{photos}",
    "instance_prompt": "a sks mug", "resolution": 32, "rank": 2, "conv_rank": 2,
    "targets": ["cross-attention"], "max_train_steps": 2, "learning_rate": 1e-3,
    "num_validation_images": 0, "validation_inference_steps": 2, "checkpointing_steps": 0,
}  # fmt: skip
CASES: dict[str, Case] = {
    "pretrained_model_name_or_path": Case("{sd2}"),
    "variant": Case("fp16", {"pretrained_model_name_or_path": "{variants}"}),
    "prediction_type": Case("v_prediction"),
    "zero_terminal_snr": Case(True, {"prediction_type": "v_prediction"}),
    "pretrained_vae_model_name_or_path": Case("{vae}"),
    "quantize": Case("nf4"),
    "quantize_convolutions": Case(True, {"quantize": "nf4"}),
    "vae_tile_size": Case(32, {"resolution": 64}),
    "dataset_config": Case([{"instance_data_dir": "{others}", "instance_prompt": "a sks mug"}]),
    "instance_data_dir": Case("{others}"),
    "instance_prompt": Case("a red sks mug", {"instance_data_dir": "{bare}"}),
    "token": Case(
        "zwq", {"instance_prompt": "a zwq sks mug", "instance_data_dir": "{bare}", **PRIOR}
    ),
    "class_word": Case("red dog", PRIOR),
    "repeats": Case(2, {"num_train_epochs": 1, "max_train_steps": None}),
    "weight": Case(2.0, {"max_grad_norm": 0.0}),
    "train_text_encoder_ti": Case(True, {**WORDS, "train_text_encoder_ti": False}),
    "new_words": Case(["zwq", "mug"], WORDS),
    "num_new_tokens_per_abstraction": Case(1, WORDS),
    "initializer_concept": Case(["dog"], WORDS),
    "embedding_lr": Case(0.1, WORDS),
    "train_text_encoder_ti_frac": Case(0.3, WORDS),
    "target": Case(["a cat"], SLIDER),
    "positive": Case(["a red dog"], SLIDER),
    "negative": Case(["a red dog"], SLIDER),
    "anchors": Case(["a cat"], SLIDER),
    "slider_guidance": Case(2.0, {**SLIDER, "max_grad_norm": 0.0}),
    "resolution": Case(64),
    "center_crop": Case(False),
    "random_flip": Case(True, {"max_train_steps": 8}),
    "aspect_ratio_buckets": Case(True, {"resolution": 256, "max_train_steps": 1}),
    "min_bucket_reso": Case(256, BUCKETS),
    "max_bucket_reso": Case(256, BUCKETS),
    "bucket_reso_steps": Case(128, BUCKETS),
    "masked_loss": Case(True),
    "unmasked_prior": Case(1.0, {"masked_loss": True}),
    "inpainting_mask": Case("subject", {"pretrained_model_name_or_path": "{inpainting}"}),
    "caption_per_line": Case(True),
    "caption_prefix": Case("red"),
    "caption_suffix": Case("red"),
    "wildcards": Case(True, {"wildcard_dir": "{photos}"}),
    "wildcard_dir": Case("{words}", {"wildcards": True, "wildcard_dir": "{photos}"}),
    "shuffle_tags": Case(True),
    "tag_dropout": Case(0.9),
    "keep_tags": Case(0, TAGS),
    "caption_separator": Case(" ", TAGS),
    "caption_dropout": Case(0.9),
    "max_token_length": Case(150, {"instance_data_dir": "{long}"}),
    "clip_skip": Case(1),
    "cache_latents": Case(False, {"center_crop": False, "max_train_steps": 12}),
    "dataloader_num_workers": Case(1, {"cache_latents": False}),
    "with_prior_preservation": Case(True),
    "prior_preservation_mode": Case("images", {**PRIOR, "num_class_images": 2}),
    "class_data_dir": Case("{others}", CLASS_IMAGES),
    "class_prompt": Case("a red dog", CLASS_IMAGES),
    "num_class_images": Case(3, CLASS_IMAGES),
    "prior_loss_weight": Case(0.1, {**PRIOR, "max_grad_norm": 0.0}),
    "sample_batch_size": Case(1, {**CLASS_IMAGES, "num_class_images": 4}),
    "method": Case("lora"),
    "init_adapter": Case("{adapter}"),
    "full_weights": Case("all", FULL),
    "targets": Case(["attention+conv"]),
    "text_encoder_targets": Case(["*.fc1"], TEXT),
    "train_text_encoder": Case(True),
    "rank": Case(3),
    "lora_alpha": Case(8.0),
    "conv_rank": Case(3, {"targets": ["attention+conv"]}),
    "conv_alpha": Case(8.0, {"targets": ["attention+conv"]}),
    "rank_pattern": Case({"to_k": 4}),
    "alpha_pattern": Case({"mid_block.*": 8.0}),
    "rslora": Case(True),
    "parametrization": Case("vera"),
    "vera_rank": Case(3, {"parametrization": "vera"}),
    "target_rank": Case(1, {**ALLOCATED, "max_train_steps": 4, "allocation_warmup": 0}),
    "allocation_warmup": Case(2, {**FIVE, "allocation_final": 1}),
    "allocation_final": Case(3, {**FIVE, "allocation_warmup": 0, "allocation_final": 0}),
    "allocation_interval": Case(
        3, {**ALLOCATED, "max_train_steps": 6, "allocation_warmup": 0, "allocation_final": 1}
    ),
    "orthogonality_weight": Case(10.0, {**ALLOCATED, "max_train_steps": 4}),
    "init": Case("pissa"),
    "lora_dropout": Case(0.5),
    "use_dora": Case(False),
    "norm_axis": Case("input"),
    "max_train_steps": Case(4),
    "num_train_epochs": Case(2, {"num_train_epochs": 1, "max_train_steps": None}),
    "train_batch_size": Case(2),
    "gradient_accumulation_steps": Case(2),
    "learning_rate": Case(2e-3),
    "text_encoder_lr": Case(2e-3, TEXT),
    "magnitude_lr": Case(2e-3),
    "lr_pattern": Case({"*up_blocks*": 2e-3}),
    "loraplus_ratio": Case(4.0),
    "lr_scheduler": Case("cosine"),
    "lr_warmup_steps": Case(2),
    "lr_num_cycles": Case(2, {"lr_scheduler": "cosine_with_restarts", "max_train_steps": 4}),
    "lr_power": Case(2.0, {"lr_scheduler": "polynomial"}),
    "optimizer": Case("adafactor"),
    "use_8bit_adam": Case(True),
    "adam_beta1": Case(0.5),
    "adam_beta2": Case(0.5),
    "adam_weight_decay": Case(0.5),
    "adam_weight_decay_text_encoder": Case(0.5, {**TEXT, "text_encoder_lr": 1e-3}),
    "adam_epsilon": Case(0.1),
    "prodigy_beta3": Case(0.1, PRODIGY),
    "prodigy_decouple": Case(False, {**PRODIGY, "adam_weight_decay": 0.5}),
    "prodigy_use_bias_correction": Case(True, PRODIGY),
    "prodigy_safeguard_warmup": Case(False, {**PRODIGY, "lr_warmup_steps": 2}),
    "max_grad_norm": Case(1e-3, {"adam_epsilon": 1e-3}),
    "ema_decay": Case(0.5),
    "snr_gamma": Case(0.1),
    # Without gamma, whose default depends on it.
    "debiased_estimation_loss": Case(True, {"snr_gamma": 0.0}),
    "loss_type": Case("huber"),
    "huber_schedule": Case("constant", {"loss_type": "huber"}),
    "huber_c": Case(0.01, {"loss_type": "huber"}),
    "noise_offset": Case(0.5),
    "timestep_distribution": Case("power"),
    "logit_mean": Case(1.0, LOGIT_NORMAL),
    "logit_std": Case(0.1, LOGIT_NORMAL),
    "timestep_power": Case(4.0, {"timestep_distribution": "power"}),
    "mixed_precision": Case("bf16"),
    "gradient_checkpointing": Case(True),
    "compile": Case(True),
    "allow_tf32": Case(True),
    "seed": Case(7),
    "validation_prompt": Case(["a red sks dog"], SAMPLED),
    "sample_prompts": Case("{prompts}", SAMPLED),
    "sample_at_start": Case(True, SAMPLED),
    "num_validation_images": Case(2),
    "validation_steps": Case(1, SAMPLED),
    "validation_epochs": Case(1, {**SAMPLED, "max_train_steps": 5}),
    "validation_inference_steps": Case(1, SAMPLED),
    "validation_guidance_scale": Case(1.0, SAMPLED),
    "validation_data_dir": Case("{others}"),
    "validation_split": Case(1),
    "validation_loss_steps": Case(1, HELD_OUT),
    "validation_metric_model": Case("{metric}", {**HELD_OUT, **SAMPLED, "validation_steps": 1}),
    "keep_best": Case(True, {**HELD_OUT, "validation_loss_steps": 1, "learning_rate": 1.0}),
    "early_stopping_patience": Case(
        1, {**HELD_OUT, "validation_loss_steps": 1, "learning_rate": 1.0, "max_train_steps": 6}
    ),
    "overwrite_output_dir": Case(True, into="run"),
    "checkpointing_steps": Case(1),
    "checkpointing_minutes": Case(1e-6, {"checkpointing_steps": 100}),
    "checkpoints_total_limit": Case(1, {"checkpointing_steps": 1}),
    "resume_from_checkpoint": Case("latest", into="run"),
    "single_file": Case(True, FULL),
    "save_precision": Case("float16", FULL),
    "report_to": Case("tensorboard"),
    "logging_dir": Case("other-logs", {"report_to": "tensorboard"}),
    "push_to_hub": Case(True, {"hub_model_id": "me/mug"}),
    "hub_model_id": Case("me/other", {"push_to_hub": True, "hub_model_id": "me/mug"}),
}
ELSEWHERE = {
    "model_config": "tests/models/test_single_file.py: it needs a released model's whole file",
    "revision": "tests/models/test_load.py: only the hub has revisions",
    "output_dir": "tests/training/test_every_setting.py: each case reads its own",
    "teach": "tests/training/test_slider.py: a slider has no photos, and a subject some",
    "offload": "tests/models/test_offload.py: it moves nothing where there is no GPU",
    "sharding": "tests/training/test_two_processes.py: it needs two processes",
}
"""Settings that one process on a CPU cannot show, and the tests that show them."""
STEPS = "max_train_steps"
ALONE: dict[str, Any] = {
    **{name: case.value for name, case in CASES.items() if case.beside.keys() - {STEPS}},
    # Of photos that have captions it names the subject; weights are trained as one of two.
    "instance_prompt": "a sks dog", "full_weights": "targets", "model_config": "{sd1}",
    "revision": "main", "offload": "model", "sharding": "fsdp", "teach": "slider",
}  # fmt: skip
"""Settings that act only beside others, or not here at all; `output_dir` always acts."""


def is_said_by_itself(name: str) -> bool:
    """True if settings alone, without a model or photos, tell that one of them does nothing."""
    try:
        return bool(without_effect(TrainConfig(**{**USUAL, name: ALONE[name]}), {name}))
    except ConfigError:
        return False


TOGETHER = [name for name in ALONE if is_said_by_itself(name)]
"""Those that are told before a run begins: one run has them all."""


def one_level(folder: Path, root: Path, family: str, in_channels: int = 4) -> Path:
    """A model with a UNet of one level: some two hundred runs train it."""
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
    """Photos, captions, masks and words that the cases name."""
    photos = root / "photos"
    photos.mkdir()
    for number, source in enumerate(sorted((SAMPLES / "bolt_mug").glob("*.jpg"))[:3]):
        with Image.open(source) as image:
            image.resize((120 - 5 * number, 70 + 2 * number)).save(photos / f"{number}.png")
        text = f"a sks mug, red{number}, {{on|in}} snow, __where__\na sks mug, line two"
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
    for name, line in (("words", "here"), ("photos", "there")):
        (root / name).mkdir(exist_ok=True)
        (root / name / "where.txt").write_text(line, encoding="utf-8")
    (root / "prompts.txt").write_text("a red sks dog\n", encoding="utf-8")
    found = {"photos": photos, "others": others, "bare": bare, "long": long}
    return found | {"words": root / "words", "prompts": root / "prompts.txt"}


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
    sd1_inpainting_folder: Path, dino_folder: Path,
) -> dict[str, Path]:  # fmt: skip
    """Files and folders that the cases name."""
    root = tmp_path_factory.mktemp("places")
    sd1, sd2 = (one_level(sd1_folder, root, "sd1"), one_level(sd2_folder, root, "sd2"))
    inpainting = one_level(sd1_inpainting_folder, root, "sd1", 9)
    found = write_photos(root)
    run = root / "run"
    found |= {**write_variants(sd1, root), "run": run}
    found |= {"sd1": sd1, "sd2": sd2, "inpainting": inpainting}
    found |= {"metric": dino_folder, "adapter": run / "pytorch_lora_weights.safetensors"}
    steps = {"max_train_steps": 2, "checkpointing_steps": 2, "output_dir": str(run)}
    seen(TrainConfig(**filled({**USUAL, **steps}, found)))
    return found


def filled(value: Any, places: Mapping[str, Path]) -> Any:
    """A value with its places put in."""
    if isinstance(value, list):
        return [filled(each, places) for each in value]
    if isinstance(value, Mapping):
        return {name: filled(each, places) for name, each in value.items()}
    return value.format_map(places) if isinstance(value, str) and value.startswith("{") else value


def seen(config: TrainConfig, said: list[str] | None = None) -> dict[str, Any]:
    """Train, and return what is left of it: losses, weights, images and files."""
    told: list[events.Event] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(config, told.append)
    if said is not None:
        said += [str(warning.message) for warning in caught]
    folder = Path(config.output_dir)
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if "tfevents" in name:  # with the time in its name
            name = name.partition("events")[0]
        found[name] = ""
        if path.suffix == ".safetensors":
            found[name] = {
                key: (tensor.dtype, hashlib.sha256(tensor.float().numpy()).hexdigest())
                for key, tensor in load_file(path).items()
            }
        elif path.suffix == ".png":
            with Image.open(path) as image:
                found[name] = hashlib.sha256(image.tobytes()).hexdigest()
    found["trigger"] = [e.trigger for e in told if isinstance(e, events.TrainingStarted)]
    found["losses"] = [event.loss for event in told if isinstance(event, events.StepDone)]
    found["held out"] = [
        {name: value for name, value in event.record.items() if "time" not in name}
        for event in told
        if isinstance(event, events.Validated)
    ]
    return found


@pytest.fixture(scope="module")
def usual_runs() -> dict[str, Any]:
    """Outcomes of runs, by their settings: what one case changes, another one may begin with."""
    return {}


def watched(monkeypatch: pytest.MonkeyPatch, denoiser: type) -> list[str]:
    """Calls of libraries where no number of a run changes, or which are not installed."""
    asked: list[str] = []

    class Adam8bit(torch.optim.AdamW):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            asked.append("AdamW8bit")
            super().__init__(*args, **kwargs)

    def note(place: Any, name: str, told: Callable[..., object] = lambda *_, **__: "") -> None:
        real = getattr(place, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            asked.append(f"{name} {told(*args, **kwargs)}")
            return real(*args, **kwargs)

        monkeypatch.setattr(place, name, wrapped)

    note(denoiser, "enable_gradient_checkpointing")
    note(denoiser, "forward", lambda _, *given, **named: len((*given, *named.values())[0]))
    note(AutoencoderKL, "encode", lambda *_, **__: sum("encode" in each for each in asked))
    note(torch, "save", lambda *_, **__: len(asked))
    note(processes, "allow_tf32")

    def loader(self: Any, *args: Any, real: Any = DataLoader.__init__, **kwargs: Any) -> None:
        asked.append(f"{kwargs.get('num_workers')} workers")
        real(self, *args, **{**kwargs, "num_workers": 0})

    def push(folder: Path, name: str, *, private: bool) -> str:
        asked.append(f"push {sorted(os.listdir(folder))} {name} {private}")
        return name

    library = types.ModuleType("bitsandbytes")
    library.optim = types.SimpleNamespace(AdamW8bit=Adam8bit)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)
    monkeypatch.setattr(DataLoader, "__init__", loader)
    monkeypatch.setattr(
        "dora_diffusion.adapters.compiled.compile_blocks",
        lambda unet: asked.append("compile"),
    )
    monkeypatch.setattr("dora_diffusion.adapters.compiled.require_compiler", lambda device: None)
    monkeypatch.setattr("dora_diffusion.export.hub.check", lambda name: None)
    monkeypatch.setattr("dora_diffusion.export.hub.push", push)
    return asked


@pytest.fixture
def acts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calls of libraries during a test."""
    return watched(monkeypatch, UNet2DConditionModel)


def test_each_setting_has_a_case() -> None:
    names = [setting.name for setting in settings()]
    assert sorted(names) == sorted([*CASES, *ELSEWHERE])
    assert set(ELSEWHERE) - set(ALONE) == {"output_dir"}
    root = Path(__file__).parents[2]
    for name, place in ELSEWHERE.items():
        path = root / place.partition(":")[0]
        assert name in path.read_text(encoding="utf-8"), f"{path} says nothing of {name}"


@pytest.mark.parametrize("name", CASES)
def test_a_setting_alone_changes_what_is_done(
    name: str, places: dict[str, Path], tmp_path: Path, acts: list[str], usual_runs: dict[str, Any]
) -> None:
    case = CASES[name]

    def trained(output: Path, values: Settings) -> Any:
        if case.into:
            shutil.copytree(places[case.into], output)
        acts.clear()
        try:
            found = seen(TrainConfig(**filled({**values, "output_dir": str(output)}, places)))
        except ConfigError as error:
            if not case.into:
                raise
            return str(error).replace(str(output), "")
        return found, sorted(set(acts))

    def outcome(part: str, changes: Settings) -> Any:
        values = {**USUAL, **case.beside, **changes}
        key = f"{sorted(values.items(), key=str)} {case.into}"
        if key not in usual_runs:
            usual_runs[key] = trained(tmp_path / part, values)
        return usual_runs[key]

    assert outcome("changed", {name: case.value}) != outcome("usual", {})


@pytest.fixture
def alone(
    places: dict[str, Path], tmp_path: Path, acts: list[str], usual_runs: dict[str, Any]
) -> Callable[..., tuple[bool, list[str]]]:
    """Trains with settings; whether that is as without them to the bit, and what is said."""

    def compare(steps: int, changes: Settings) -> tuple[bool, list[str]]:
        said = list[str]()

        def outcome(part: str, changes: Settings) -> Any:
            acts.clear()
            said.clear()
            values = {**USUAL, STEPS: steps, "output_dir": str(tmp_path / part), **changes}
            return seen(TrainConfig(**filled(values, places)), said), sorted(set(acts))

        if (key := f"alone {steps}") not in usual_runs:
            usual_runs[key] = outcome("usual", {})
        return outcome("changed", changes) == usual_runs[key], said

    return compare


def lines_on(name: str, said: list[str]) -> list[str]:
    return [line for line in said if re.search(rf"\b{name}\b.*has no effect", line)]


def test_settings_that_are_said_to_do_nothing_do_nothing(alone: Any) -> None:
    """To the bit, all of them together: each line says why that is, and none is lost."""
    assert len(TOGETHER) > 60
    is_same, said = alone(1, {name: ALONE[name] for name in TOGETHER})
    assert {name for name in TOGETHER if len(lines_on(name, said)) != 1} == set()
    assert is_same


@pytest.mark.parametrize("name", [name for name in ALONE if name not in TOGETHER])
def test_a_setting_that_does_nothing_by_itself_is_said_to(name: str, alone: Any) -> None:
    """And what is said to do nothing does nothing, to the bit."""
    with contextlib.suppress(ValueError):  # Refused, with what it needs.
        # Each photo more than once, where what is kept of it counts.
        is_same, said = alone(4 if name == "cache_latents" else 1, {name: ALONE[name]})
        assert len(lines_on(name, said)) == is_same, said


def test_what_a_run_does_is_the_same_again(places: dict[str, Path], tmp_path: Path) -> None:
    """Without it, the cases would tell nothing."""
    both = [
        seen(TrainConfig(**filled({**USUAL, **SAMPLED, "output_dir": str(folder)}, places)))
        for folder in (tmp_path / "one", tmp_path / "two")
    ]
    assert both[0] == both[1]
