"""Class images: their progress as it is told, and images that are not images."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

from dora_diffusion.config import ConfigError
from dora_diffusion.console.training import TrainProgress
from dora_diffusion.generate import BrokenImageError
from dora_diffusion.training.events import (
    ClassImagesAnnounced,
    ClassImagesProgress,
    ModelLoading,
    StepDone,
    TrainingEnded,
    TrainingStarted,
)
from dora_diffusion.training.loop import train
from dora_diffusion.training.prior import _Announcer, ensure_class_images
from tests.training.helpers import make_config


def make(folder, count, told, stop_at=None):
    made = []

    def generate(prompt, seeds):
        if stop_at is not None and len(made) >= stop_at:
            raise KeyboardInterrupt
        made.extend(seeds)
        return [Image.new("RGB", (8, 8), "red") for _ in seeds]

    ensure_class_images(
        folder, ["a dog", "a dog on grass"], count=count, seed=1, identity="x",
        generate=generate, batch_size=2, on_image=lambda *numbers: told.append(numbers),
    )  # fmt: skip


def test_progress_begins_at_what_is_there_and_ends_at_all(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "own.png")
    told = []
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, 8, told, stop_at=4)
    assert told == [(1, 8), (3, 8), (5, 8)]
    told.clear()
    make(tmp_path, 8, told)
    assert told == [(5, 8), (7, 8), (8, 8)]
    told.clear()
    make(tmp_path, 8, told)
    assert told == [], "nothing to wait for"


def test_a_run_shows_class_images_before_its_first_step(tiny_run, capsys):
    events, show = [], TrainProgress()

    def watch(event):
        events.append(event)
        show(event)

    images = {"with_prior_preservation": True, "prior_preservation_mode": "images"}
    train(tiny_run(**images, num_class_images=6, max_train_steps=1), watch)
    show.close()
    numbers = [(e.done, e.total) for e in events if isinstance(e, ClassImagesProgress)]
    assert numbers[0] == (0, 6)
    assert numbers[-1] == (6, 6)
    kinds = list(dict.fromkeys(type(event) for event in events))
    assert kinds == [
        ModelLoading, ClassImagesAnnounced, ClassImagesProgress, TrainingStarted, StepDone,
        TrainingEnded,
    ]  # fmt: skip
    # The number before any is made, and the time while the first batch is.
    first, timed = (e for e in events if isinstance(e, ClassImagesAnnounced))
    assert (first.count, first.seconds, timed.count) == (6, None, 6)
    assert timed.seconds > 0
    assert events.index(timed) < events.index(ClassImagesProgress(4, 6))
    captured = capsys.readouterr()
    assert "class images: 100%" in captured.err
    assert "6 class images to make before the first step; --prior_preservation_mode" in captured.out
    assert "\n6 class images: about " in captured.out


def test_the_time_of_class_images_is_that_of_the_second_step_for_all(monkeypatch):
    clock = iter([100.0, 100.5, 103.5, 200.0])
    monkeypatch.setattr("dora_diffusion.training.prior.time.perf_counter", lambda: next(clock))
    told = []
    announcer = _Announcer(told.append, batch_size=4)
    announcer.on_image(1, 10)
    for step in (1, 2, 3, 4):
        announcer.on_step(step, 25)
    # 9 are missing: three batches of 25 steps. The clock is read at the ends of steps 1 and 2 ...
    assert told[0] == ClassImagesAnnounced(9)
    assert told[-1] == ClassImagesAnnounced(9, 0.5 * 25 * 3)


def test_a_black_class_image_is_not_trained_on(tiny_run, tmp_path, monkeypatch):
    from diffusers import AutoencoderKL

    monkeypatch.setattr(
        AutoencoderKL, "decode", lambda self, latents, **_: (torch.full((1, 3, 32, 32), torch.nan),)
    )
    with pytest.raises(BrokenImageError, match="is not finite"):
        train(
            tiny_run(
                with_prior_preservation=True,
                prior_preservation_mode="images",
                num_class_images=1,
                sample_batch_size=1,
            )
        )
    assert not list((tmp_path / "out").rglob("*.png"))


@pytest.mark.parametrize(
    ("changes", "caption", "message"),
    [
        (
            {"token": "", "class_word": "mug"},
            None,
            r"image-free with token '': the image-free prior",
        ),
        ({}, "a mug on a table", r"1 caption of 5 without the token 'sks' \(first: 'a mug on a"),
    ],
)
def test_an_image_free_prior_of_what_is_trained_is_refused(
    changes, caption, message, config, photos
):
    if caption:
        (photos / "01.txt").write_text(caption, encoding="utf-8")
    held = replace(
        config, with_prior_preservation=True, prior_preservation_mode="image-free", **changes
    )
    with pytest.raises(ConfigError, match=f"{message}.*very prediction that is being trained"):
        train(held)


def test_class_images_of_the_captions_themselves_are_refused(config):
    images = {"with_prior_preservation": True, "prior_preservation_mode": "images"}
    with pytest.raises(ConfigError, match="prior preservation with token '' needs class_prompt"):
        train(replace(config, **images, token="", class_word="mug"))


def test_class_images_are_reused_only_for_the_same_prompts(sd1_folder, photos, tmp_path):
    config = make_config(
        sd1_folder, photos, tmp_path / "a", with_prior_preservation=True, num_class_images=2,
        class_data_dir=str(tmp_path / "classes"), max_train_steps=1,
    )  # fmt: skip
    train(config)
    first = {p: p.stat().st_mtime_ns for p in (tmp_path / "classes").rglob("*.png")}
    assert len(first) == 2
    train(replace(config, output_dir=str(tmp_path / "b")))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "classes").rglob("*.png")} == first
    train(replace(config, output_dir=str(tmp_path / "c"), class_prompt="a painting of a mug"))
    assert len(list((tmp_path / "classes").rglob("*.png"))) == 4


def test_a_class_prompt_with_the_token_is_refused(sd1_folder, photos, tmp_path):
    config = make_config(
        sd1_folder, photos, tmp_path / "out",
        with_prior_preservation=True, class_prompt="a photo of a sks mug",
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"class_prompt .* contains the token 'sks'"):
        train(config)
