"""Dataset files: a YAML list, sd-scripts' TOML and kohya's folders, as one list of subjects."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from dora_diffusion.config import ConfigError, TrainConfig, differences, without_effect
from dora_diffusion.config.derived import as_yaml
from dora_diffusion.config.subject import ENTRY_SETTINGS
from tests.training.helpers import SAMPLES

TWO: list[dict[str, Any]] = [
    {"instance_data_dir": "mug", "instance_prompt": "a sks mug", "repeats": 2},
    {"instance_data_dir": "cat", "instance_prompt": "a zwx cat", "token": "zwx", "weight": 0.5},
]


def read(path: Path, text: str, **settings: object) -> list[dict[str, Any]]:
    path.write_text(text, encoding="utf-8")
    return TrainConfig(dataset_config=str(path), **settings).dataset_config


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Kohya's layout: two folders of photos with captions, and class images."""
    for name, sample in (("10_sks mug", "bolt_mug"), ("3_zwx teapot", "heart_teapot")):
        shutil.copytree(SAMPLES / sample, tmp_path / "train" / name)
    for caption in (tmp_path / "train" / "3_zwx teapot").glob("*.txt"):
        text = caption.read_text("utf-8").replace("sks", "zwx")
        caption.write_text(text, encoding="utf-8")
    return tmp_path / "train"


def test_the_runs_settings_are_the_defaults_of_every_entry() -> None:
    config = TrainConfig(dataset_config=TWO, resolution=64, repeats=3, token="sks")
    first, second = config.subjects
    assert (first.repeats, first.token, first.weight, first.resolution) == (2, "sks", 1.0, 64)
    assert (second.repeats, second.token, second.weight, second.resolution) == (3, "zwx", 0.5, 64)
    assert TrainConfig(repeats=3).subjects == [TrainConfig(repeats=3)]


def test_a_yaml_file_is_kept_whole_by_the_runs_own_file(tmp_path: Path) -> None:
    entries = read(tmp_path / "two.yaml", yaml.safe_dump(TWO))
    assert entries == TWO
    config = TrainConfig(dataset_config=entries, learning_rate=1e-4)
    assert TrainConfig.from_dict(yaml.safe_load(as_yaml(config))) == config


def test_an_entry_of_several_folders_is_one_for_each(tmp_path: Path) -> None:
    entries = read(tmp_path / "a.yaml", "- {instance_data_dir: [a, b], weight: '2'}")
    assert entries == [
        {"instance_data_dir": "a", "weight": 2.0},
        {"instance_data_dir": "b", "weight": 2.0},
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- {repeats: 0}", "entry 1: repeats is 0; it must be greater than 0"),
        ("- {}\n- {random_flips: 1}", "entry 2: there is no setting random_flips (did you mean"),
        ("- {cache_latents: false}", "entry 1: cache_latents is a setting of the whole run"),
        ("- {repeats: many}", "entry 1: repeats is 'many'; it must be a whole number"),
        ("instance_data_dir: a", "must hold a list of subjects"),
        ("- {}\n- a", "entry 2: 'a' is no subject; one begins with '- ' and a setting"),
        ("- {repeats: }", "entry 1: repeats is empty; give a value, or leave it out"),
        ("- {a: [}", "line 1: this is not valid YAML"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path / "bad.yaml", text)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_without_effect_are_said_by_entry() -> None:
    entries = [{**TWO[0], "keep_tags": 2}, {**TWO[1], "with_prior_preservation": True}]
    config = TrainConfig(dataset_config=entries, instance_prompt="a sks dog", class_word="dog")
    assert without_effect(config) == {
        "instance_prompt": "instance_prompt has no effect because each entry of dataset_config "
        "has its own",
        "keep_tags": "dataset_config, entry 1: keep_tags has no effect because shuffle_tags is off "
        "and tag_dropout is 0.0",
    }
    # What one entry uses has an effect.
    assert not without_effect(TrainConfig(dataset_config=entries[1:], prior_loss_weight=0.5))


def test_a_resumed_run_is_compared_entry_by_entry() -> None:
    config = TrainConfig(dataset_config=TWO)
    moved = [{**TWO[0], "instance_data_dir": "elsewhere"}, {**TWO[1], "repeats": 4}]
    refused, allowed = differences(config.to_dict(), TrainConfig(dataset_config=moved))
    assert (refused, allowed) == ({"repeats of entry 2": (1, 4)}, {})
    refused, _ = differences(config.to_dict(), TrainConfig(dataset_config=TWO[:1]))
    assert refused == {"dataset_config": ("2 entries", "1 entries")}
    refused, _ = differences(config.to_dict(), TrainConfig(dataset_config=TWO, resolution=64))
    assert refused == {}  # what was derived; and a change of all is said once
    refused, _ = differences(config.to_dict(), TrainConfig(dataset_config=TWO, random_flip=True))
    assert refused == {"random_flip": (False, True)}


def test_kohya_folders_are_the_same_images_as_often(folders: Path) -> None:
    (folders / "notes").mkdir()
    with pytest.warns(UserWarning, match="left out notes; a folder of a subject is called as"):
        entries = TrainConfig(dataset_config=str(folders)).dataset_config
    assert entries == [
        {
            "instance_data_dir": str(folders / "10_sks mug"), "repeats": 10, "token": "sks",
            "instance_prompt": "sks mug", "class_word": "mug",
        },
        {
            "instance_data_dir": str(folders / "3_zwx teapot"), "repeats": 3, "token": "zwx",
            "instance_prompt": "zwx teapot", "class_word": "teapot",
        },
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="holds no folder such as '10_sks dog'"):
        TrainConfig(dataset_config=str(folders / "10_sks mug"))


TOML = """
[general]
shuffle_caption = true
caption_extension = ".txt"
enable_bucket = true
min_bucket_reso = 256
max_bucket_reso = 1024
bucket_reso_steps = 64
bucket_no_upscale = false
color_aug = false
[[datasets]]
resolution = [512, 512]
batch_size = 2
  [[datasets.subsets]]
  image_dir = '{train}/10_sks mug'
  class_tokens = "sks mug"
  num_repeats = 10
  [[datasets.subsets]]
  image_dir = '{train}/10_sks mug'
  class_tokens = "a drawing"
  flip_aug = true
  random_crop = true
  keep_tokens = 2
  caption_dropout_rate = 0.1
  caption_tag_dropout_rate = 0.2
  caption_separator = ";"
  enable_wildcard = true
[[datasets]]
resolution = "512,512"
batch_size = 2
enable_bucket = false
shuffle_caption = false
  [[datasets.subsets]]
  image_dir = '{train}/3_zwx teapot'
  class_tokens = "zwx teapot"
  [[datasets.subsets]]
  is_reg = true
  image_dir = '{train}/3_zwx teapot'
  class_tokens = "teapot"
"""


def test_sd_scripts_subsets_are_entries(folders: Path, tmp_path: Path) -> None:
    pytest.importorskip("tomllib")
    text = TOML.replace("{train}", folders.as_posix())
    first, second, third = read(tmp_path / "sd.toml", text, train_batch_size=2)
    mug = {"instance_data_dir": f"{folders.as_posix()}/10_sks mug", "resolution": 512}
    mug |= {"aspect_ratio_buckets": True, "shuffle_tags": True}
    assert first == {
        **mug, "repeats": 10, "keep_tags": 0, "instance_prompt": "sks mug", "token": "sks",
        "class_word": "mug",
    }  # fmt: skip
    # Captions that never name the first word have no token.
    (folders / "10_sks mug" / "01.txt").write_text("mug, drawing", encoding="utf-8")
    assert second == {
        **mug, "random_flip": True, "center_crop": False, "keep_tags": 2, "caption_dropout": 0.1,
        "tag_dropout": 0.2, "caption_separator": ";", "wildcards": True, "caption_per_line": True,
        "instance_prompt": "a drawing", "token": "a", "class_word": "drawing",
    }  # fmt: skip
    assert third["aspect_ratio_buckets"] is third["shuffle_tags"] is False
    assert {name: third[name] for name in ENTRY_SETTINGS if "class" in name} == {
        "class_word": "teapot", "class_data_dir": f"{folders.as_posix()}/3_zwx teapot",
        "class_prompt": "teapot", "num_class_images": 5,
    }  # fmt: skip
    assert third["prior_preservation_mode"] == "images"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("color_aug = true", "color_aug cannot mean the same here"),
        ("token_warmup_step = 5", "token_warmup_step cannot mean the same here"),
        ("bucket_no_upscale = true", "bucket_no_upscale cannot mean"),
        (
            'shuffle_caption = true\ncaption_suffix = "x"',
            "caption_suffix cannot mean the same here",
        ),
        ("max_bucket_reso = 512", "max_bucket_reso cannot mean"),
        (
            'caption_extension = ".caption"',
            ".caption: captions are .txt files here",
        ),
        ("batch_size = 4", "batch_size 4: give the run --train_batch_size 4 too"),
        ("resolution = [512, 768]", "resolution [512, 768]: training is at a square"),
        ("is_reg = true", "there is no [[datasets.subsets]] to train on"),
    ],
)
def test_what_a_toml_asks_for_in_vain_is_named(tmp_path: Path, line: str, said: str) -> None:
    pytest.importorskip("tomllib")
    (tmp_path / "1.png").touch()
    head = "[[datasets]]\n[[datasets.subsets]]\nenable_bucket = true\n"
    with pytest.raises(ConfigError) as error:
        read(tmp_path / "sd.toml", f"{head}image_dir = '{tmp_path.as_posix()}'\n{line}\n")
    assert str(error.value).startswith(f"{tmp_path / 'sd.toml'}: ")
    assert said in str(error.value)
