"""The subjects of a run, and prompts that name them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dora_diffusion.config import TrainConfig, read_config_file
from dora_diffusion.data.captions import CaptionRules
from dora_diffusion.data.images import PhotoError
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.sampling.conditioning import lacks_trigger
from dora_diffusion.training.inputs.dataset import list_subjects
from dora_diffusion.training.inputs.plan import plan_run
from dora_diffusion.training.inputs.subject import (
    class_caption_of,
    is_toy_word,
    outside_toy_world,
    subjects_of,
    triggers_of,
)
from dora_diffusion.training.processes import make_accelerator
from dora_diffusion.training.recipe import assemble, train
from tests.refusal import refused
from tests.training.helpers import same, small_samples, warnings_of


def test_a_prompt_that_watches_drift_is_warned_of_and_sampled(config):
    watch = replace(
        config,
        max_train_steps=1,
        validation_prompt=["a photo of a mug"],
        num_validation_images=1,
        validation_inference_steps=1,
    )
    said = warnings_of(watch)
    assert any("'a photo of a mug' does not contain the token 'sks': its" in text for text in said)
    assert (Path(config.output_dir) / "samples" / "adapted.png").is_file()


@pytest.mark.parametrize(
    ("word", "is_known"),
    [("mug", True), ("red Mugs", True), ("mug shot", False), ("dog", False), ("", False)],
)
def test_a_class_is_known_by_its_last_word(word: str, is_known: bool) -> None:
    assert is_toy_word(word) is is_known


def test_only_an_embedded_model_is_a_toy() -> None:
    warning = outside_toy_world("embedded:tiny-sd", " dog ")
    assert warning.startswith("embedded:tiny-sd is a toy model of a drawn world: it knows ")
    assert "but no dog." in warning
    assert outside_toy_world("embedded:tiny-sd", "mug") == ""
    assert outside_toy_world("embedded:tiny-sd", " ") == ""
    assert outside_toy_world("org/model", "dog") == ""


@pytest.fixture
def two(tiny_run, tmp_path):
    """Settings of a run on a mug and a teapot, which differ in all that subjects may differ in."""
    teapot = Path(shutil.copytree(small_samples() / "heart_teapot", tmp_path / "teapot"))
    for caption in teapot.glob("*.txt"):
        caption.write_text(caption.read_text("utf-8").replace("sks", "zwx"), encoding="utf-8")
    mug = {"repeats": 2, "random_flip": True, "with_prior_preservation": True}
    entries = [
        {**mug, "instance_data_dir": str(tmp_path / "photos")},
        {
            "instance_data_dir": str(teapot), "token": "zwx", "with_prior_preservation": True,
            "instance_prompt": "a photo of a zwx teapot", "resolution": 40, "center_crop": False,
            "class_prompt": "a teapot", "num_class_images": 2,
        },
    ]  # fmt: skip

    def make(**changes):
        return tiny_run(**{"dataset_config": entries, "train_batch_size": 2, **changes})

    return make


def test_captions_of_each_subject_are_stated(two, tmp_path):
    """An entry's rules, where the run has others."""
    config = two(max_train_steps=1)
    entries = [{**entry} for entry in config.dataset_config]
    entries[0] |= {"caption_prefix": "old"}
    entries[1] |= {"caption_per_line": True}
    config = two(max_train_steps=1, dataset_config=entries)
    train(config)
    stated = read_adapter(tmp_path / "out").metadata.extra["captions"]
    mug, teapot = (CaptionRules.from_stated(stated, trigger=t) for t in ("sks mug", "zwx teapot"))
    assert (mug, teapot) == (CaptionRules(prefix="old"), CaptionRules(per_line=True))


def test_a_run_of_two_subjects_resumes_bit_for_bit_and_names_both(two, tmp_path):
    train(two(output_dir=str(tmp_path / "whole")))
    train(two(max_train_steps=2, checkpointing_steps=2))
    resumed = two(checkpointing_steps=2, resume_from_checkpoint="latest")
    # As its own file says, in which what follows from other settings is written out.
    values = read_config_file(tmp_path / "out" / "config.yaml")
    again = {"max_train_steps": 4, "resume_from_checkpoint": "latest"}
    train(TrainConfig.from_dict({**values, **again}))
    assert same(tmp_path / "whole", tmp_path / "out")
    metadata = read_adapter(tmp_path / "out").metadata
    assert (metadata.trigger, metadata.tags) == ("sks mug, zwx teapot", ("mug", "teapot"))
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "Write **`sks mug`** or **`zwx teapot`** in a prompt to get that subject." in card
    assert not lacks_trigger("a zwx teapot", metadata)
    assert lacks_trigger("a teapot", metadata)
    entries = [resumed.dataset_config[0] | {"repeats": 3}, resumed.dataset_config[1]]
    with refused("resume_from_checkpoint", "repeats of entry 1 (2 -> 3)"):
        train(replace(resumed, dataset_config=entries, max_train_steps=6))


def test_a_batch_is_of_one_size_and_every_row_has_its_own_prior(two):
    config = two(train_batch_size=3)
    session = assemble(plan_run(config), make_accelerator(config))
    seen = set()
    for _, batch in zip(range(7), session.step.batches.samples, strict=False):
        (size,) = {crop.target_size for crop in batch.crops}
        seen.add(size)
        if size == (32, 32):
            assert batch.class_captions == [c.replace("sks ", "") for c in batch.captions]
            assert not batch.partners
        else:
            assert list(batch.partners) == [0, 1, 2]
            assert batch.captions[3:] == ["a teapot"] * 3
            assert batch.class_captions == [None] * 3
    assert seen == {(32, 32), (40, 40)}
    assert session.sampler.batches_per_epoch == 6  # ten mugs, five teapots
    assert session.trigger == "sks mug, zwx teapot"


def test_class_captions_name_the_class_of_every_subject() -> None:
    subjects = subjects_of(
        TrainConfig(dataset_config=[entry_of("sks", "dog"), entry_of("zwx", "cat")])
    )
    caption = "a photo of a zwx cat and a sks dog"
    assert class_caption_of(subjects, subjects[0], caption) == "a photo of a cat and a dog"


def entry_of(token: str, word: str, folder: str = "photos") -> dict[str, str]:
    return {
        "instance_data_dir": folder, "token": token, "instance_prompt": f"a {token} {word}".strip()
    }  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "entries", "words"),
    [
        ("token", [entry_of("sks", "dog"), entry_of("SKS", "cat")], "'SKS' denotes a 'dog' and"),
        ("dataset_config", [entry_of("sks", "dog"), {"token": "zwx"}],
         "entry 2: instance_data_dir is not set"),
        ("dataset_config", [entry_of("sks", "dog") | {"token": "zwx"}],
         "entry 1: instance_prompt 'a sks dog'"),
    ],
)  # fmt: skip
def test_what_makes_no_subject_is_named_by_its_entry(setting, entries, words: str) -> None:
    with refused(setting, words):
        subjects_of(TrainConfig(dataset_config=entries))


def test_folders_of_one_subject_may_be_several_and_a_style_needs_no_name() -> None:
    dogs = [entry_of("sks", "dog"), entry_of("sks", "Dog", "more"), entry_of("", "anything")]
    subjects = subjects_of(TrainConfig(dataset_config=dogs, validation_prompt=["a castle"]))
    assert triggers_of(subjects) == "sks dog"
    (style,) = subjects_of(TrainConfig(token="", instance_data_dir="drawings"))
    assert (style.trigger, style.class_caption("a castle")) == ("", "a castle")


def test_a_photo_of_two_subjects_and_a_missing_folder_are_refused_at_once(photos, tmp_path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(photos / "02.jpg", other / "copy.jpg")
    entries = [entry_of("sks", "mug", str(photos)), entry_of("zwx", "cup", str(other))]
    with pytest.raises(
        PhotoError, match=r"copy\.jpg is the same photo as .*02\.jpg, but they belong"
    ):
        list_subjects(subjects_of(TrainConfig(dataset_config=entries)))
    same_subject = [entries[0], entry_of("sks", "mug", str(other))]
    assert len(list_subjects(subjects_of(TrainConfig(dataset_config=same_subject)))) == 2
    with pytest.raises(PhotoError, match=r"/gone: .* give a folder of photos$"):
        list_subjects(
            subjects_of(TrainConfig(dataset_config=[entries[0], entry_of("z", "", "gone")]))
        )
