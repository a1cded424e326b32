"""Whole runs on tiny random pipelines: what they write and agree on, and what they refuse."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate.optimizer import AcceleratedOptimizer

from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.numerics.devices import default_device
from dora_diffusion.training import recipe
from dora_diffusion.training.events import StepDone
from dora_diffusion.training.features.code import FeatureCode
from dora_diffusion.training.hook import Hook
from dora_diffusion.training.recipe import train
from tests.training.helpers import make_config, names, warnings_of


def test_settings_without_effect_are_said_once_each(config):
    said = warnings_of(replace(config, text_encoder_lr=1e-3, keep_tags=3))
    assert said == [
        "keep_tags has no effect because shuffle_tags is off and tag_dropout is 0.0",
        "text_encoder_lr has no effect because train_text_encoder is off",
    ]


@pytest.mark.parametrize(
    "family", ["sd1_folder", pytest.param("sd2_folder", marks=pytest.mark.slow), "sdxl_folder"]
)
def test_every_family_trains_unet_and_text_encoders_with_prior(family, photos, tmp_path, request):
    folder = request.getfixturevalue(family)
    events = []
    config = make_config(
        folder, photos, tmp_path / "out",
        train_text_encoder=True,
        with_prior_preservation=True,
        prior_preservation_mode="images",
        num_class_images=3,
        gradient_accumulation_steps=2,
        num_validation_images=2,
        validation_prompt=["a sks mug on the moon"],
        random_flip=True,
    )  # fmt: skip
    result = train(config, events.append)
    adapter = read_adapter(result.adapter)
    parts = {name.split(".")[0] for name in adapter.layers}
    assert {"unet", "text_encoder"} <= parts
    assert ("text_encoder_2" in parts) == (family == "sdxl_folder")
    assert any(layer.down.ndim == 4 for layer in adapter.layers.values())
    moved = [layer.up.abs().sum() > 0 for layer in adapter.layers.values()]
    # SDXL reads the penultimate layers: the last layer of its first encoder gets no gradient.
    assert sum(moved) >= len(moved) - 4
    assert adapter.metadata.trigger == "sks mug"
    assert adapter.metadata.tags == ("mug",)
    captions = [path.read_text(encoding="utf-8").strip() for path in Path(photos).glob("*.txt")]
    assert adapter.metadata.tag_frequency == dict.fromkeys(sorted(captions), 1)
    assert adapter.metadata.thumbnail.startswith("data:image/jpeg;base64,")
    assert str(tmp_path).encode() not in result.adapter.read_bytes()
    output = tmp_path / "out"
    assert {path.name for path in output.iterdir()} == {
        "pytorch_lora_weights.safetensors", "config.yaml", "metrics.jsonl", "samples",
        "README.md", "class_images", "photos.json", "run.json", ".run.lock",
    }  # fmt: skip
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "sks mug" in card
    assert str(tmp_path) not in card
    assert (output / "samples" / "base_above_adapted.png").is_file()
    prompts = {path.read_text(encoding="utf-8").strip() for path in output.rglob("class-*.txt")}
    assert prompts
    assert not any("sks" in prompt for prompt in prompts)
    assert [e.step for e in events if isinstance(e, StepDone)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"instance_prompt": "a photo of a mug"}, "does not contain the token 'sks'"),
        ({"instance_data_dir": None}, "instance_data_dir is not set"),
        ({"targets": ["nothing.*"]}, "'nothing.*' matches no layer"),
        ({"rank": 500}, "rank 500 is larger than the layer"),
        ({"pretrained_model_name_or_path": "./nowhere"}, "nowhere"),
        ({"resolution": 33}, "33"),
        ({"resume_from_checkpoint": "latest"}, "no checkpoint to resume from"),
        ({"mixed_precision": "fp16"}, "fp16 needs a GPU; use bf16 or no"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings, message, sd1_folder, photos, tmp_path):
    if "fp16" in message and default_device() != "cpu":
        pytest.skip("fp16 works here")
    with pytest.raises(ValueError, match=r".") as error:
        train(make_config(sd1_folder, photos, tmp_path / "out", **settings))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("moment", ["optimizer", "moved", "done"])
def test_an_error_within_an_update_saves_no_half_of_it(tiny_run, monkeypatch, moment) -> None:
    """Optimizer and weights would be of two steps."""
    real, calls = AcceleratedOptimizer.step, itertools.count(1)

    def gone() -> None:
        raise OSError("the driver is gone")

    def step(self: AcceleratedOptimizer, closure: Any = None) -> None:
        real(self, closure)
        if moment == "optimizer" and next(calls) == 4:
            gone()

    class Fails(Hook):
        def fail(self, number: int) -> None:
            if number == 4:
                gone()

        moved = fail if moment == "moved" else Hook.moved
        done = fail if moment == "done" else Hook.done

    class Failing(FeatureCode):
        def hooks(self, step):
            return [Fails()]

    monkeypatch.setattr(AcceleratedOptimizer, "step", step)
    monkeypatch.setattr(recipe, "code_of", lambda config: [Failing(config)])
    config = tiny_run(max_train_steps=6, checkpointing_steps=2)
    with (
        pytest.raises(OSError, match="driver is gone"),
        pytest.warns(UserWarning, match="which interrupted an update of the weights"),
    ):
        train(config)
    assert names(Path(config.output_dir)) == ["checkpoint-2"]
