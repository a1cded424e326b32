"""Class images: their progress as it is told, and images that are not images."""

from __future__ import annotations

import pytest
from PIL import Image

from dora_diffusion.commands.train import TrainProgress
from dora_diffusion.generate import BrokenImageError
from dora_diffusion.training.loop import train
from dora_diffusion.training.prior import ensure_class_images


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

    train(tiny_run(with_prior_preservation=True, num_class_images=6, max_train_steps=1), watch)
    show.close()
    numbers = [(e["done"], e["total"]) for e in events if e["event"] == "class_images"]
    assert numbers[0] == (0, 6)
    assert numbers[-1] == (6, 6)
    kinds = list(dict.fromkeys(event["event"] for event in events))
    assert kinds == ["load", "class_images", "start", "step", "done"]
    assert "class images: 100%" in capsys.readouterr().err


def test_a_black_class_image_is_not_trained_on(tiny_run, tmp_path, monkeypatch):
    import torch
    from diffusers import AutoencoderKL

    monkeypatch.setattr(
        AutoencoderKL, "decode", lambda self, latents, **_: (torch.full((1, 3, 32, 32), torch.nan),)
    )
    with pytest.raises(BrokenImageError, match="is not finite"):
        train(tiny_run(with_prior_preservation=True, num_class_images=1, sample_batch_size=1))
    assert not list((tmp_path / "out").rglob("*.png"))
