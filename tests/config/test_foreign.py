"""Files of other trainers, in every place that takes a file: recognised, and answered whole."""

from __future__ import annotations

import fnmatch
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dora_diffusion.cli.main import main
from dora_diffusion.config import ConfigError, TrainConfig, read_config_file, settings
from dora_diffusion.config.answers import ForeignAnswers
from dora_diffusion.config.flag_map import OTHER_NAMES, refusal, rules, trainers
from dora_diffusion.config.foreign import ForeignFileError, foreign_file
from dora_diffusion.config.subject_list import subject_configs
from tests.every import every

FILES = Path(__file__).parent / "foreign"
# What each file is called, and some of what carries over from it, where names or values differ.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd_scripts.toml": ("a settings file of sd-scripts", {
        "rank": 64, "lora_alpha": 32, "conv_rank": 8, "method": "dora", "learning_rate": 8e-5,
        "optimizer": "adamw8bit", "adam_weight_decay": 0.1, "num_train_epochs": 2,
        "max_train_steps": None, "resolution": 1024, "aspect_ratio_buckets": True, "clip_skip": 0,
        "shuffle_tags": True, "dataset_config": "data", "snr_gamma": 5.0,
    }),
    "sd_scripts_command.sh": ("a settings file of sd-scripts", {
        "rank": 16, "conv_rank": 8, "method": "dora", "resolution": 1024, "lr_scheduler": "cosine",
    }),
    "sd_scripts_anima.sh": ("a settings file of sd-scripts", {
        "rank": 16, "method": "lora", "lora_alpha": 1, "targets": ["attention+ff"],
        "timestep_distribution": "logit_normal", "logit_mean": -1.0986, "logit_std": 1.2,
        "num_train_epochs": 10, "optimizer": "adamw8bit", "train_text_encoder": False,
    }),
    "kohya_gui.json": ("a preset of kohya's GUI", {
        "method": "lora", "rank": 32, "lora_alpha": 16, "conv_rank": 4, "num_train_epochs": 160,
        "optimizer": "prodigy", "learning_rate": 1.0, "resolution": 1024, "caption_dropout": 0.05,
        "checkpointing_steps": None, "validation_steps": 200, "save_precision": "bfloat16",
        "validation_prompt": ["a photo of a queen --w 1024 --h 1024", "a queen at night"],
    }),
    "onetrainer.json": ("a configuration of OneTrainer", {
        "method": "dora", "norm_axis": "input", "rank": 16, "lora_alpha": 1, "center_crop": False,
        "optimizer": "adamw8bit", "quantize": "int8", "learning_rate": 2e-4, "ema_decay": None,
        "snr_gamma": 5.0, "timestep_distribution": "logit_normal", "mixed_precision": "fp16",
        "validation_prompt": ["rex in snow", "rex at night"], "instance_data_dir": "photos/rex",
        "train_text_encoder": True, "text_encoder_lr": 1e-5, "gradient_checkpointing": True,
    }),
    "onetrainer_concepts.json": ("a configuration of OneTrainer", {
        "instance_data_dir": "photos/rex", "repeats": 2, "random_flip": True, "lora_alpha": None,
    }),
    "ai_toolkit.yaml": ("a configuration of ai-toolkit", {
        "method": "lora", "rank": 128, "lora_alpha": 64, "conv_rank": 16, "token": "p3r5on",
        "instance_data_dir": "/path/to/rex", "resolution": 1024, "max_train_steps": 3000,
        "learning_rate": 1.0, "ema_decay": 0.99, "quantize": "int8", "class_word": "person",
        "with_prior_preservation": True, "prior_loss_weight": 0.5, "validation_steps": 250,
    }),
    "simpletuner.json": ("a settings file of SimpleTuner", {
        "use_dora": True, "method": None, "rank": 16, "checkpointing_steps": 500, "ema_decay": None,
        "optimizer": "adamw", "quantize": "int8", "caption_dropout": 0.1, "push_to_hub": True,
    }),
    "simpletuner.env": ("a settings file of SimpleTuner", {
        "method": "lora", "use_dora": False, "rank": 64, "lora_alpha": 32, "seed": 42,
        "max_train_steps": 30000, "resolution": None, "mixed_precision": "bf16",
    }),
    "simpletuner_backend.json": ("a settings file of SimpleTuner", {
        "instance_data_dir": "photos/rex", "resolution": 1024, "center_crop": False, "repeats": 1,
        "use_dora": True,
    }),
    "diffusers_z_image.sh": ("a command line of Diffusers' scripts", {
        "pretrained_model_name_or_path": "Tongyi-MAI/Z-Image", "logit_mean": -0.5,
        "timestep_distribution": "logit_normal", "offload": "model", "use_dora": False, "rank": 8,
        "optimizer": "adamw8bit",
    }),
    "diffusers_flux2_klein.txt": ("a command line of Diffusers' scripts", {
        "rank": 16, "caption_dropout": 0.1, "aspect_ratio_buckets": True, "use_dora": False,
    }),
}  # fmt: skip


def printed(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Error of a command."""
    assert main(argv) == 1
    said = capsys.readouterr()
    assert said.out == ""
    return said.err.removeprefix("error: ").removesuffix("\n")


def answers(file: Path) -> str:
    """Settings of a file of another trainer, as YAML."""
    foreign = foreign_file(file)
    assert foreign is not None
    return ForeignAnswers(foreign).text


PLACES: dict[str, Callable[[str, Any], str]] = {
    "config": lambda file, capsys: printed(["train", "--config", file], capsys),
    "config_file": lambda file, capsys: printed(["train", "--config_file", file], capsys),
    "dataset_config": lambda file, capsys: printed(["train", "--dataset_config", file], capsys),
    "pack": lambda file, capsys: printed(["train", "--pack", file], capsys),
    "generate": lambda file, capsys: printed(["generate", "--config", file], capsys),
}
IN_PYTHON: dict[str, Callable[[Path], Any]] = {
    "read_config_file": read_config_file,
    "TrainConfig": lambda file: TrainConfig(dataset_config=file),
    "subject_configs": lambda file: subject_configs(file, TrainConfig()),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_another_trainer_is_answered_in_every_place(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    title, expected = KINDS[name]
    file = FILES / name
    text = answers(file)
    with every() as case:
        for place, answer in PLACES.items():
            with case(place):
                assert answer(str(file), capsys) == (
                    f"{file} is {title}. Copy these lines into a YAML file, and give that as "
                    f"--config:\n{text}"
                )
        for place, function in IN_PYTHON.items():
            with case(place):
                with pytest.raises(ForeignFileError) as info:
                    function(file)
                assert str(info.value) == (
                    f"{file} is {title}; 'dora-diffusion train --config {file}' lists its settings "
                    "as YAML"
                )
    assert not any(len(line) > 100 for line in text.splitlines() if line.startswith("#"))
    check_answers(text, file)
    values = yaml.safe_load(text)
    # A folder of kohya's must exist, and is not here.
    config = TrainConfig.from_dict({n: v for n, v in values.items() if n != "dataset_config"})
    with every() as case:
        for setting, value in expected.items():
            with case(setting):
                if value is None:
                    assert setting not in values
                else:
                    assert values.get(setting, getattr(config, setting)) == value
                    assert getattr(config, setting) == value or setting == "dataset_config"


def check_answers(text: str, file: Path) -> None:
    """Each setting of the file has its line, or its place in a comment; none is guessed."""
    assert "did you mean" not in text
    assert "no setting is known" not in text
    answered = set()
    for line in text.replace("\n#   ", " ").splitlines():
        key, _, comment = line.removeprefix("# ").partition(": ")
        own = comment.partition("  # ")[2]
        names = key.split(", ") if line.startswith("# ") else [own or key]
        answered |= {name.partition(" (")[0] for name in names}
    groups = {name.removesuffix("*") for name in answered if name.endswith(".*")}
    assert not [name for name in answered for start in groups if name.startswith(start)
                and name != f"{start}*"]  # fmt: skip
    with every() as case:
        for name in names_in(file):
            with case(name):
                assert any(fnmatch.fnmatchcase(name, pattern) for pattern in answered)


def names_in(file: Path) -> set[str]:
    """Names of all settings of a file; nested ones with dots."""
    text = file.read_text("utf-8")
    if file.suffix in (".sh", ".txt"):
        launch, _, flags = re.sub(r"(?m)^#.*", "", text).partition(".py")
        names = {f"accelerate.{name}" for name in re.findall(r"--([a-z_\d]+)", launch)}
        return names | {*re.findall(r"--([a-z_\d]+)", flags)} - {"network_args"}
    if file.suffix == ".env":
        return {*re.findall(r"export ([A-Z_]+)=", text), "lora_rank", "lora_alpha"}
    if file.suffix == ".toml":
        tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
        return {name for table in tomllib.loads(text).values() for name in table} - {
            "network_args", "optimizer_args",
        }  # fmt: skip
    data = yaml.safe_load(text) if file.suffix == ".yaml" else json.loads(text)
    if file.name == "onetrainer_concepts.json":
        data = {"concepts": data}
    names = {re.sub(r"^(config\.process\.|config\.)", "", name) for name in leaves(data)}
    return {name.lstrip("-") for name in names} - {"optimizer_args"}


def leaves(value: Any, name: str = "") -> Iterator[str]:
    if isinstance(value, dict) and value:
        for key in value.keys() - {"__version"}:
            yield from leaves(value[key], f"{name}.{key}" if name else key)
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        for item in value:
            yield from leaves(item, name)
    else:
        yield name


def test_no_name_of_another_trainer_is_taken_for_a_misspelt_one_here(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Neither as a flag, nor in a file or in Python."""
    ours = {setting.name for setting in settings()}
    names = {name for trainer in trainers() for name in rules(trainer)}
    # A word that several programs have is not said to be of one.
    texts = [text for name in OTHER_NAMES if (text := refusal(name))]
    assert all(" of sd-scripts is not here: " in text for text in texts)
    with every() as case:
        for name in names - ours:
            if "." in name or "*" in name or name in ("config_file", "token_abstraction"):
                continue
            with case(name):
                with pytest.raises(ConfigError) as info:
                    TrainConfig.from_dict({name: 7})
                hint = f"there is no setting {name} (did you mean {OTHER_NAMES.get(name)}?)"
                assert str(info.value) in (hint, refusal(name), f"there is no setting {name}")
    with every() as case:
        for name, trainer, setting in (
            ("LoRA_type", "kohya's GUI", "method"),
            ("epoch", "kohya's GUI", "num_train_epochs"),
            ("network_dim", "sd-scripts", "rank"),
            ("network_alpha", "sd-scripts", "lora_alpha"),
        ):
            with case(name):
                with pytest.raises(SystemExit):
                    main(["train", f"--{name}", "1"])
                last = capsys.readouterr().err.splitlines()[-1]
                assert last == f"error: --{name} of {trainer} is not here: use --{setting}"


def test_a_rule_names_settings_that_exist() -> None:
    ours = {setting.name for setting in settings()}
    with every() as case:
        for trainer in trainers():
            for name, rule in rules(trainer).items():
                with case(f"{trainer} {name}"):
                    if isinstance(rule, dict):
                        assert rule.keys() <= ours
                    elif " " not in rule:
                        assert rule.removeprefix("-") in ours
                    else:
                        # tests/tools parses the commands.
                        own = re.sub(r"'dora-diffusion [^']*'", "", rule)
                        named = {*re.findall(r"--([a-z_\d]{4,})", own)} - {"prodigy_"}
                        assert named <= ours | {"config", "base", "dry_run"}


@pytest.mark.parametrize("unet_only", [False, True])
def test_what_a_setting_of_sd_scripts_turns_on_is_turned_on(
    unet_only: bool, tmp_path: Path
) -> None:
    file = tmp_path / "settings.toml"
    lines = ['network_module = "networks.lora"', 'reg_data_dir = "reg"', "text_encoder_lr = 5e-5"]
    lines += ["network_train_unet_only = true"] * unet_only
    file.write_text("\n".join(lines), "utf-8")
    values = yaml.safe_load(answers(file))
    assert (values["with_prior_preservation"], values["class_data_dir"]) == (True, "reg")
    taught = (values.get("train_text_encoder"), values.get("text_encoder_lr"))
    assert taught == ((None, None) if unet_only else (True, 5e-5))


def test_what_cannot_be_together_is_said(tmp_path: Path) -> None:
    file = tmp_path / "job.sh"
    file.write_text(
        "DIR=dog\naccelerate launch train_dreambooth_lora_sdxl.py \\\n --instance_data_dir=${DIR} "
        "--push_to_hub --use_dora", "utf-8",
    )  # fmt: skip
    assert answers(file).splitlines() == [
        "instance_data_dir: dog",
        "push_to_hub: true",
        "# use_dora: as by default here",
        "# push_to_hub is on; Diffusers publishes for everyone; here the repository is private",
        "# Change this before you train: push_to_hub needs --hub_model_id NAME/MODEL",
        "# The page howto/from-diffusers-scripts has the other differences.",
    ]


OWN = {
    "a.yaml": "rank: 4\nmethod: lora  # as train_dreambooth_lora_sdxl.py --rank=4\n",
    "b.json": '{"rank": 4, "method": "lora"}',
    "d.txt": "# as in train_dreambooth_lora_sdxl.py --rank 3, don't\nrank: 4\nmethod: lora\n",
    "c.txt": "# like train_dreambooth_lora_sdxl.py\nrank: 4\nmethod: lora\n",
}


@pytest.mark.parametrize("name", OWN)
def test_a_file_of_this_program_is_read(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(OWN[name], encoding="utf-8")
    assert read_config_file(file) == {"rank": 4, "method": "lora"}


def test_a_command_line_of_this_program_is_not_another_trainers(tmp_path: Path) -> None:
    file = tmp_path / "train.sh"
    for name in ("train_dreambooth_dora.py", "train_dreambooth_lora.py"):
        file.write_text(f"python {name} --rank 4\n", encoding="utf-8")
        assert (foreign_file(file) is None) == name.endswith("dora.py")
