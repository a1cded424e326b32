"""Sample sheets of a run: when, of what, and the text in their files."""

from __future__ import annotations

import errno
import json
import os
import warnings
from dataclasses import replace
from pathlib import Path

from PIL import Image

from dora_diffusion.config import read_config_file
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.models.load import load_components
from dora_diffusion.sampling.generate import generate_images
from dora_diffusion.sampling.images import parse_parameters, read_parameters
from dora_diffusion.sampling.settings import SamplingSettings
from dora_diffusion.training.events import SamplingProgress
from dora_diffusion.training.recipe import train
from tests.refusal import refused
from tests.training.helpers import find

PROMPTS = ["a photo of a sks mug on the snow", "a sks mug, at night"]


def test_a_runs_sheets_say_what_they_are(tiny_run, sd1_folder, tmp_path):
    config = tiny_run(
        max_train_steps=2, validation_steps=1, num_validation_images=2, seed=5,
        validation_prompt=PROMPTS, validation_guidance_scale=4.0,
    )  # fmt: skip
    events = []
    result = train(config, events.append)
    samples = tmp_path / "out" / "samples"
    assert sorted(path.name for path in samples.iterdir()) == [
        "adapted.png", "base.png", "base_above_adapted.png", "step-000001.png",
    ]  # fmt: skip
    facts = {name: parse_parameters(read_parameters(samples / f"{name}.png"))
             for name in ("base", "adapted", "step-000001", "base_above_adapted")}  # fmt: skip
    for name, step in (("base", "2"), ("adapted", "2"), ("step-000001", "1")):
        assert facts[name]["Prompt"] == PROMPTS[0]
        assert json.loads(facts[name]["Prompts"]) == PROMPTS
        assert (facts[name]["Seed"], facts[name]["Seeds"]) == ("5", "5, 6")
        assert facts[name]["Training step"] == step
        assert (facts[name]["Steps"], facts[name]["CFG scale"]) == ("2", "4")
        assert facts[name]["Size"] == "32x32"
        assert str(tmp_path) not in str(facts[name])
    assert "Adapter" not in facts["base"]
    assert facts["base_above_adapted"] == facts["adapted"]
    assert facts["adapted"]["Adapter"] == facts["step-000001"]["Adapter"] == "out"
    # What the text says makes the image that is there.
    settings = SamplingSettings(steps=2, guidance_scale=4.0, width=32, height=32)
    base = generate_images(load_components(sd1_folder), PROMPTS[1], [6], settings)[0]
    with Image.open(samples / "base.png") as sheet:
        assert len(find(sheet, base)) == 1
    with Image.open(samples / "step-000001.png") as sheet:
        assert find(sheet, base) == []
    told = [(e.done, e.total) for e in events if isinstance(e, SamplingProgress)]
    # The model's own scheduler, PNDM, takes three steps where it is asked for two.
    assert told == [(step, 6) for step in range(1, 7)] * 3
    assert result.samples["base"] == samples / "base.png"


def test_a_file_of_prompts_says_how_each_is_sampled_and_that_some_watch_drift(
    tiny_run, sd1_folder, tmp_path
):
    file = tmp_path / "prompts.txt"
    lines = [
        "a sks mug --n blurry --w 40 --h 24 --d 7 --l 3 --s 3 --ss euler",
        "a photo of a mug --drift",
    ]
    file.write_text("\n".join(lines), encoding="utf-8")
    config = tiny_run(
        max_train_steps=1, num_validation_images=2, sample_prompts=str(file), sample_at_start=True,
        seed=5,
    )  # fmt: skip
    events = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(config, events.append)
    assert "token" not in str([one.message for one in caught])
    components = load_components(sd1_folder)
    own = SamplingSettings(3, 3.0, "euler", 40, 24, "blurry")
    usual = SamplingSettings(2, 7.5, width=32, height=32)
    expected = generate_images(components, "a sks mug", [7, 8], own)
    expected += generate_images(components, "a photo of a mug", [5, 6], usual)
    samples = tmp_path / "out" / "samples"
    for name in ("base", "step-000000"):  # a fresh adapter is the base
        with Image.open(samples / f"{name}.png") as sheet:
            assert [len(find(sheet, image)) for image in expected] == [1, 1, 1, 1]
    facts = parse_parameters(read_parameters(samples / "step-000000.png"))
    assert json.loads(facts["Prompts"]) == lines
    assert (facts["Prompt"], facts["Negative prompt"]) == ("a sks mug", "blurry")
    assert (facts["Size"], facts["Last size"], facts["Sampler"]) == ("40x24", "32x32", "euler")
    told = [(e.done, e.total) for e in events if isinstance(e, SamplingProgress)]
    # Three steps of Euler, and PNDM's three of two.
    assert told == [(step, 6) for step in range(1, 7)] * 3
    # What ran says its prompts itself.
    settings = read_config_file(tmp_path / "out" / "config.yaml")
    assert settings["validation_prompt"] == lines
    assert settings["sample_prompts"] is None


def test_a_scheduler_that_is_none_is_refused(tiny_run):
    with refused("validation_prompt", "--ss is 'lms'"):
        tiny_run(validation_prompt=["a sks mug --ss lms"], num_validation_images=1)


def test_samples_every_epoch_are_samples_every_so_many_steps(config):
    train(
        replace(
            config, max_train_steps=6, validation_epochs=1, num_validation_images=1,
            validation_inference_steps=1, train_batch_size=2,
        )
    )  # fmt: skip
    names = sorted(p.name for p in (Path(config.output_dir) / "samples").glob("step-*.png"))
    assert names == ["step-000003.png"]  # 5 photos in batches of 2


def test_samples_that_a_full_disk_refuses_are_a_warning(tiny_run, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dora_diffusion.training.results.write.save_image", full)
    config = tiny_run(max_train_steps=2, validation_steps=1, num_validation_images=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = train(config)
    told = [str(one.message) for one in caught if "No space left" in str(one.message)]
    assert told[0].startswith("no samples at step 1: ")
    assert told[1].startswith("the adapter was written, but not all of its samples and card: ")
    assert read_adapter(result.adapter).layers
    assert os.listdir(tmp_path / "out")
