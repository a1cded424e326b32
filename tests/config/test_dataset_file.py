"""Dataset files: entries of subjects, and what of their settings wins, is said and is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dora_diffusion.config import TrainConfig, differences, settings, without_effect
from dora_diffusion.config.derived import as_yaml
from tests.every import every
from tests.refusal import refused

TWO: list[dict[str, Any]] = [
    {"instance_data_dir": "mug", "instance_prompt": "a sks mug", "repeats": 2},
    {"instance_data_dir": "cat", "instance_prompt": "a zwx cat", "token": "zwx", "keep_tags": 2},
]


def read(path: Path, text: str, **settings: object) -> list[dict[str, Any]]:
    path.write_text(text, encoding="utf-8")
    return TrainConfig(dataset_config=str(path), **settings).dataset_config


def test_the_runs_settings_are_the_defaults_of_every_entry() -> None:
    config = TrainConfig(dataset_config=TWO, resolution=64, repeats=3, token="sks")
    first, second = config.subjects
    assert (first.repeats, first.token, first.keep_tags, first.resolution) == (2, "sks", 1, 64)
    assert (second.repeats, second.token, second.keep_tags, second.resolution) == (3, "zwx", 2, 64)
    assert TrainConfig(repeats=3).subjects == [TrainConfig(repeats=3)]


def test_a_yaml_file_is_kept_whole_by_the_runs_own_file(tmp_path: Path) -> None:
    entries = read(tmp_path / "two.yaml", yaml.safe_dump(TWO))
    assert entries == TWO
    config = TrainConfig(dataset_config=entries, learning_rate=1e-4)
    assert TrainConfig.from_dict(yaml.safe_load(as_yaml(config))) == config


def test_an_entry_of_several_folders_is_one_for_each(tmp_path: Path) -> None:
    entries = read(tmp_path / "a.yaml", "- {instance_data_dir: [a, b], repeats: '2'}")
    assert entries == [
        {"instance_data_dir": "a", "repeats": 2},
        {"instance_data_dir": "b", "repeats": 2},
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- {repeats: 0}", "entry 1: repeats is 0"),
        ("- {}\n- {random_flips: 1}", "entry 2: there is no setting random_flips (did you mean"),
        *((f"- {{{name}: 1}}", f"entry 1: {name} is a setting of the whole run")
          for name in ("cache_latents", "clip_skip", "max_token_length")),
        ("- {repeats: many}", "entry 1: repeats is 'many'"),
        ("instance_data_dir: a", "must hold a list of subjects"),
        ("- {}\n- a", "entry 2: 'a' is not a subject"),
        ("- {repeats: 0, rank: 2}\n- {keep_tags: x}", "entry 1: repeats is 0; it must be "
         "greater than 0; rank is a setting of the whole run; give it outside of "
         "dataset_config; dataset_config, entry 2: keep_tags is 'x'"),
        ("- {validation_split: 1.5}\n- {resolution: 70}", "entry 1: "
         "validation_split is 1.5; give a share below 1, or a whole number of photos; "
         "dataset_config, entry 2: resolution is 70"),
        ("- {repeats: }", "entry 1: repeats is empty"),
        ("- {a: [}", "line 1: this is not valid YAML"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    with refused("dataset_config", said):
        read(tmp_path / "bad.yaml", text)


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


def two_values(name: str) -> tuple[Any, Any]:
    """Two valid values of a setting, neither its default."""
    setting = next(each for each in settings() if each.name == name)
    texts = {"prior_preservation_mode": ("images", "image-free"), "inpainting_mask": INPAINTING}
    if setting.kind is bool:
        return (not setting.default,) * 2
    if setting.kind is float:
        return 0.25, 0.5
    return texts.get(name, ("first", "second")) if setting.kind is str else (64, 128)


INPAINTING = ("random", "subject")


def test_an_entrys_setting_wins_and_the_runs_is_said() -> None:
    """Of every setting that an entry may have, in the file of a run or on its command line."""
    with every() as case:
        for name in (setting.name for setting in settings() if setting.of_subject):
            with case(name):
                check_entry(name)


def check_entry(name: str) -> None:
    setting = next(each for each in settings() if each.name == name)
    run, own = two_values(name)
    own = setting.default if setting.kind is bool else own
    config = TrainConfig(dataset_config=[{name: own}], num_validation_images=0, **{name: run})
    assert getattr(config.subjects[0], name) == own
    assert getattr(config, name) == run
    why = without_effect(config)[name]
    assert why.startswith(f"{name} has no effect because ")
    assert why.endswith("each entry of dataset_config has its own")
    # A flag at its default is given all the same.
    at_default = TrainConfig(dataset_config=[{name: run}])
    assert name in without_effect(at_default, {name})
    # Where one entry lacks it, the run's is that one's.
    mixed = TrainConfig(dataset_config=[{name: own}, {"repeats": 2}], **{name: run})
    if name != "repeats":
        assert [getattr(subject, name) for subject in mixed.subjects] == [own, run]
        assert "each entry" not in without_effect(mixed).get(name, "")


def test_the_runs_resolution_is_that_of_samples_alone() -> None:
    entries = [{"resolution": 512}, {"resolution": 768}]
    said = without_effect(TrainConfig(dataset_config=entries, resolution=64))["resolution"]
    assert said == (
        "resolution has no effect because each entry of dataset_config has its own, but for sample "
        "images"
    )
    # What a run writes into its own file is nothing that was asked for in vain.
    again = TrainConfig(dataset_config=entries, resolution=768)
    assert "resolution" not in without_effect(again)
