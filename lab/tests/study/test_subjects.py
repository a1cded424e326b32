"""Subjects of a study."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.models.embedded import MODELS, model_folder
from dora_diffusion.sampling.settings import SamplingSettings
from dora_diffusion.toy.benchmark_subjects import SUBJECTS
from dora_diffusion.toy.judges import KNOWN
from dora_diffusion.training.inputs.subject import Subject
from lab.study.subjects import PhotoSource, ToySource, find_subject
from tests.refusal import refused


@pytest.mark.parametrize(("word", "noun"), [("mug", "a sks mug"), ("", "a sks")])
def test_photos_are_labelled_with_what_the_first_image_is_asked_to_show(
    tmp_path: Path, word: str, noun: str
) -> None:
    for place, name in enumerate(("photos", "held_out")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (32, 32 + place)).save(tmp_path / name / "1.png")
    given = {name: str(tmp_path / name) for name in ("photos", "held_out")}
    prompt = {"instance_prompt": f"a photo of a sks {word}".strip(), "class_word": word}
    source = PhotoSource.read({**given, **prompt, "name": "My mug"}, [])
    assert source.label.startswith("My mug ")
    assert noun in source.label


def test_a_method_s_token_takes_the_place_of_the_usual_one(tmp_path: Path) -> None:
    source, prompts = ToySource(SUBJECTS["cross_mug"]), {}
    for token in ("sks", "<new>"):
        settings = source.training(tmp_path, TrainConfig(token=token))
        texts = sorted(Path(settings["instance_data_dir"]).glob("*.txt"))
        prompts[token] = [settings["instance_prompt"], *(text.read_text("utf-8") for text in texts)]
    assert len(prompts["sks"]) == 6
    assert [prompt.replace("sks", "<new>") for prompt in prompts["sks"]] == prompts["<new>"]
    assert prompts["<new>"][0] == "a photo of a <new> mug"


def test_a_study_may_draw_a_subject_that_is_in_no_list() -> None:
    drawn = {"kind": "mug", "seed": 4, "mark": "cross", "word": "mug", "color": "purple"}
    assert find_subject(drawn, "embedded:tiny-sd", []) == ToySource(SUBJECTS["cross_mug"])
    other = find_subject({**drawn, "seed": 99}, "embedded:tiny-sd", [])
    assert other.name == "cross_mug"
    assert other.digest != ToySource(SUBJECTS["cross_mug"]).digest


@pytest.mark.parametrize(
    ("given", "base", "said"),
    [
        ({"kind": "mug", "seed": 4, "mark": "anchor"}, "embedded:tiny-sd", "pattern 'anchor'"),
        ({"kind": "mug", "mark": "star"}, "embedded:tiny-sd", "'seed'"),
        ({"kind": "mug", "seed": 4, "mark": "star", "length": 2}, "embedded:tiny-sd", "'length'"),
        ({"kind": "mug", "seed": "four", "mark": "star"}, "embedded:tiny-sd", "cannot draw"),
        ({"kind": "mug", "seed": 4, "mark": "star"}, "some/model", "does not know"),
        ("cross_mag", "embedded:tiny-sd", "kind, seed and mark"),
    ],
)
def test_a_subject_that_cannot_be_drawn_is_refused(given: object, base: str, said: str) -> None:
    with refused("subjects", said):
        find_subject(given, base, [])


def test_a_folder_with_an_embedded_model_s_vocabulary_knows_the_toy_world(
    sd1_folder: Path,
) -> None:
    known, settings = KNOWN["cross_mug"], SamplingSettings(2, 1.0)
    learned = [Subject("sks", "mug", TrainConfig())]
    for folder in map(model_folder, MODELS):
        assert find_subject("cross_mug", str(folder), []) == ToySource(SUBJECTS["cross_mug"])
        assert known.questions(learned, settings, str(folder)).requests
    with refused("subjects", "does not know"):
        find_subject("cross_mug", str(sd1_folder), [])
    with pytest.raises(ConfigError, match="does not know"):
        known.questions(learned, settings, str(sd1_folder))


def test_a_masked_loss_has_masks_beside_the_photos(tmp_path: Path) -> None:
    source = ToySource(SUBJECTS["cross_mug"])
    for masked in (False, True, False):
        settings = source.training(tmp_path, TrainConfig(masked_loss=masked))
        folder = Path(settings["instance_data_dir"])
        assert len([*folder.glob("*.mask.png")]) == (5 if masked else 0)
        assert len([*folder.glob("*.txt")]) == 5
