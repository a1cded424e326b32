"""Every setting on Z-Image: it acts, has no effect and is named with the reason, or is refused."""

from __future__ import annotations

import dataclasses
import re
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from dora_diffusion.adapters.targets import TargetError
from dora_diffusion.cli import main as cli
from dora_diffusion.cli.commands.train import train_config
from dora_diffusion.cli.console.training import training_summary
from dora_diffusion.config import ConfigError, TrainConfig, without_effect
from dora_diffusion.config.families import FAMILIES
from dora_diffusion.config.presets import PRESETS, preset_settings
from dora_diffusion.models.load import load_components
from dora_diffusion.training import events, recipe
from dora_diffusion.training.inputs import base, plan
from tests.flux2_klein import write_flux2_klein
from tests.refusal import check
from tests.training import test_every_setting as every
from tests.training.test_every_setting import CASES, VALUES, filled
from tests.z_image import write_z_image

FAMILY = FAMILIES["z-image"]
FLOWS = {"z-image": "{z_image}", "flux2-klein": "{klein}"}
USUAL = {
    **every.USUAL, "pretrained_model_name_or_path": "{z_image}", "targets": ["attention"],
}  # fmt: skip
# Settings of features that the family refuses.
OF_REFUSED = {
    "train_text_encoder": {
        "text_encoder_targets", "text_encoder_lr", "adam_weight_decay_text_encoder",
    },
    "train_text_encoder_ti": {
        "new_words", "num_new_tokens_per_abstraction", "initializer_concept", "embedding_lr",
    },
}  # fmt: skip
REFUSALS = [
    (flow, key)
    for flow in FLOWS
    for key in FAMILIES[flow].refused
    if key.partition("=")[0] in VALUES
]
INACTIVE = {name: VALUES[name] for name in FAMILY.without_effect if name in VALUES}
# Without effect on every model that is no inpainting model, or has no adapted convolution.
INACTIVE |= {"conv_rank": 3, "conv_alpha": 8.0, "inpainting_mask": "subject"}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, dino_folder: Path) -> dict[str, Path]:
    """Files and folders that the cases name."""
    root = tmp_path_factory.mktemp("places")
    found = {**every.write_photos(root), "metric": dino_folder}
    return found | {
        "z_image": write_z_image(root / "z"),
        "klein": write_flux2_klein(root / "klein"),
    }


def settings_of(flow: str, group: str) -> dict[str, Any]:
    """Settings of a group of cases on a family, without those that it refuses."""
    values = {**every.GROUPS[group], "pretrained_model_name_or_path": FLOWS[flow]}
    values = {**USUAL, **{n: v for n, v in values.items() if n not in FAMILIES[flow].refused}}
    return {**values, "targets": ["attention"]}


def test_each_setting_is_told_apart() -> None:
    names = every.NAMES
    assert set(FAMILY.refused) | set(FAMILY.defaults) <= names
    assert set(INACTIVE).isdisjoint(FAMILY.refused)
    assert set(OF_REFUSED) <= set(FAMILY.refused)


@pytest.mark.parametrize(
    ("flow", "group"),
    [*product(FLOWS, ["one subject", "full"]), ("z-image", "samples and results")],
)
def test_settings_are_read_where_they_act(
    flow: str,
    group: str,
    places: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = {**settings_of(flow, group), "output_dir": str(tmp_path / "out")}
    read = every.read_by(TrainConfig(**filled(values, places)), monkeypatch)
    family = FAMILIES[flow]
    idle = {*family.refused, *family.without_effect, *INACTIVE}.union(*OF_REFUSED.values())
    assert CASES[group].keys() - read - idle == set()


def test_settings_without_effect_are_named_with_the_reason(
    places: dict[str, Path], tmp_path: Path
) -> None:
    """All of them together change nothing, to the bit."""
    quantised = {"quantize": "int8", "max_train_steps": 1}

    def run(part: str, **changes: Any) -> tuple[Any, list[str]]:
        said = list[str]()
        values = {**USUAL, **quantised, "output_dir": str(tmp_path / part), **changes}
        return every.trained(TrainConfig(**filled(values, places)), said), said

    usual, _ = run("usual")
    changed, said = run("changed", **INACTIVE)
    assert changed == usual
    for name in INACTIVE:
        [line] = [line for line in said if f"{name} has no effect" in f"{line} "]
        if name in FAMILY.without_effect:
            assert line == f"{name} has no effect on Z-Image: {FAMILY.without_effect[name]}"


@pytest.mark.parametrize(("flow", "key"), REFUSALS)
def test_a_setting_is_refused_before_weights_are_read(
    flow: str,
    key: str,
    places: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = key.partition("=")[0]
    monkeypatch.setattr(recipe, "load_base", lambda *_: pytest.fail("the model was loaded"))
    family, group = FAMILIES[flow], next(g for g, cases in CASES.items() if name in cases)
    values = {**settings_of(flow, group), name: VALUES[name], "output_dir": str(tmp_path / "out")}
    with pytest.raises(ConfigError, match=rf"\({re.escape(family.title)}\)") as error:
        recipe.train(TrainConfig(**filled(values, places)))
    check(error.value, name, family.refused[key])


def test_the_family_of_a_model_that_is_not_here_is_asked_when_it_is(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (plan, base):
        monkeypatch.setattr(module, "known_family", lambda name: None)
    values = {**USUAL, "train_text_encoder": True, "output_dir": str(tmp_path / "out")}
    with pytest.raises(ConfigError) as error:
        recipe.train(TrainConfig(**filled(values, places)), load=load_components)
    check(error.value, "train_text_encoder", FAMILY.refused["train_text_encoder"])


@pytest.mark.parametrize("feature", sorted(OF_REFUSED))
def test_settings_of_a_refused_feature_are_named(feature: str) -> None:
    for name in OF_REFUSED[feature]:
        [line] = without_effect(TrainConfig(), {name}, FAMILY).values()
        assert feature in line


@pytest.mark.parametrize("target", ["cross-attention", "b-lora-content", "b-lora-style"])
def test_presets_of_unets_name_those_of_the_transformer(
    target: str, places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before class images are generated and photos are encoded."""
    monkeypatch.setattr(recipe, "open_data", lambda *_: pytest.fail("the photos were read"))
    values = {**USUAL, "targets": [target], "output_dir": str(tmp_path / "out")}
    with pytest.raises(TargetError) as error:
        recipe.train(TrainConfig(**filled(values, places)))
    assert f"targets: the preset {target!r} matches no layer of ZImageTransformer2DModel" in str(
        error.value
    )
    assert str(error.value).endswith(
        "Its presets are attention, attention+conv, attention+ff, full."
    )


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("validation_prompt", {"validation_prompt": ["a mug --w 72"], "num_validation_images": 1}),
        ("bucket_reso_steps", {"aspect_ratio_buckets": True, "bucket_reso_steps": 8}),
        ("resolution", {"resolution": 40}),
        ("clip_skip", {"clip_skip": 2}),
    ],
)
def test_values_that_the_model_cannot_have_are_refused_before_training(
    setting: str, values: dict[str, Any], places: dict[str, Path], tmp_path: Path
) -> None:
    values = {**USUAL, **values, "output_dir": str(tmp_path / "out")}
    said = {"clip_skip": "choose 0 to 1"}.get(setting, "multiple of 16")
    with pytest.raises(ValueError, match=rf"{said}") as error:
        recipe.train(TrainConfig(**filled(values, places)), _no_step)
    assert setting in (getattr(error.value, "setting", "") or str(error.value))


def _no_step(event: events.Event) -> None:
    assert not isinstance(event, events.StepDone)


def test_defaults_of_the_family(places: dict[str, Path], tmp_path: Path) -> None:
    config = TrainConfig(**filled({**USUAL, "learning_rate": None}, places))
    config = dataclasses.replace(config, output_dir=str(tmp_path / "out"))
    done = list[events.Event]()
    recipe.train(config, done.append)
    records = [event.record for event in done if isinstance(event, events.StepDone)]
    assert {record["lr"]["transformer/down"] for record in records} == {1e-4}


def parsed(model: Path, *flags: str) -> TrainConfig:
    words = ["train", "--pretrained_model_name_or_path", str(model), *flags]
    return train_config(cli.build_parser().parse_args(words))


def test_a_command_line_starts_from_the_familys_settings(places: dict[str, Path]) -> None:
    model, defaults = places["z_image"], dict(FAMILY.defaults)
    assert defaults == {"validation_guidance_scale": 6.0, "validation_inference_steps": 50}
    for config in (parsed(model), parsed(model, "--validation_inference_steps", "7")):
        assert config.validation_guidance_scale == 6.0
    assert config.validation_inference_steps == 7
    with pytest.warns(UserWarning, match="quantize_convolutions has no effect on Z-Image"):
        parsed(model, "--no-quantize_convolutions")
    assert summary_of(parsed(model, "--quantize", "int8", "--quantize_convolutions")) == [
        f"quantize_convolutions has no effect on Z-Image: "
        f"{FAMILY.without_effect['quantize_convolutions']}"
    ]
    with pytest.raises(ConfigError, match="train_text_encoder cannot be used"):
        summary_of(parsed(model, "--train_text_encoder"))


def summary_of(config: TrainConfig) -> list[str]:
    """Lines on settings without effect of the summary of a run, which loads no model."""
    config = dataclasses.replace(
        config, instance_data_dir=str(every.SAMPLES / "bolt_mug"), instance_prompt="a sks mug"
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        training_summary(config)
    return [str(w.message) for w in caught if "has no effect" in str(w.message)]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_is_said_to_be_made_for_stable_diffusion(
    name: str, places: dict[str, Path]
) -> None:
    """It is not refused, but for the settings that are the point of it."""
    words = ["--instance_prompt", "a <sks> sks mug"]
    if name == "slider":
        words = ["--target", "a mug", "--positive", "a red mug", "--negative", "a blue mug"]
    with pytest.warns(UserWarning, match="made for Stable Diffusion") as caught:
        config = parsed(places["z_image"], "--preset", name, *words)
    assert [str(w.message) for w in caught if "preset" in str(w.message)] == [
        f"preset {name} was made for Stable Diffusion: its settings were not tried on Z-Image"
    ]
    values = preset_settings(name, FAMILY)
    assert values["validation_guidance_scale"] == config.validation_guidance_scale == 6.0
    assert values["max_train_steps"] == round(PRESETS[name].steps * FAMILY.default_steps)
    refused = {setting for setting in FAMILY.refused if values.get(setting)}
    assert refused == ({"train_text_encoder_ti"} if name == "fast-word" else set())
