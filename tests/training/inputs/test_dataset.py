"""A run's photos: what is left out, refused or said of them."""

from __future__ import annotations

import re
import shutil
import sys
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dora_diffusion.config import TrainConfig
from dora_diffusion.data.captions import read_caption
from dora_diffusion.data.images import PhotoError
from dora_diffusion.data.photos import Photo, mask_path
from dora_diffusion.training.inputs.dataset import check_captions
from dora_diffusion.training.inputs.plan import plan_run
from dora_diffusion.training.inputs.subject import subjects_of
from dora_diffusion.training.processes import make_accelerator
from dora_diffusion.training.recipe import assemble, train
from tests.refusal import refused
from tests.training.helpers import make_config, noise, open_run, warnings_of

PRIOR = {"with_prior_preservation": True}


def test_masked_loss_without_masks_is_refused(config):
    with pytest.raises(PhotoError, match=r"to be used, but none .*01\.mask\.png next to it"):
        train(replace(config, masked_loss=True))
    assert not list(Path(config.output_dir).glob("*.safetensors"))


def test_masks_that_are_not_read_are_said(config, photos):
    (photos / "01.mask.png").write_bytes(b"")
    assert any(
        text
        == "1 mask file (NAME.mask.png) next to the images has no effect because masked_loss is "
        "off"
        for text in warnings_of(config)
    )


def test_what_transparency_and_shuffling_do_is_said(config, photos):
    """Neither stops a run; both would be surprises in its result."""
    for name in ("01", "02"):
        image = Image.open(photos / f"{name}.jpg").convert("RGBA")
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(photos / f"{name}.png")
        (photos / f"{name}.jpg").unlink()
    for path in photos.glob("*.txt"):
        path.write_text("sks mug on grass, blue", encoding="utf-8")
    (photos / "03.txt").write_text("sks mug, blue, on grass", encoding="utf-8")
    (photos / "06.jpg").write_bytes((photos / "03.jpg").read_bytes())
    (photos / "lost.jpg").symlink_to("gone.jpg")
    text = "shuffle_tags has no effect because no caption has two or more tags"
    said = opened_with(replace(config, shuffle_tags=True, keep_tags=2))
    assert [line for line in said if line.startswith(text)]
    assert any("white: 01.png, 02.png; they are learned as a white back" in line for line in said)
    assert any("6 photos, but only 5 different: 03.jpg, 06.jpg are the" in line for line in said)
    assert any("left out links to missing files (lost.jpg)" in line for line in said)
    said = opened_with(replace(config, shuffle_tags=True, masked_loss=True))
    assert not [line for line in said if line.startswith(text) or "white" in line]


def opened_with(config):
    """The warnings of a run that is opened and not started."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assemble(plan_run(config), make_accelerator(config))
    return [str(w.message) for w in caught]


def test_without_the_cache_workers_load_pixels(config):
    bare = replace(config, cache_latents=False, dataloader_num_workers=1)
    session = assemble(plan_run(bare), make_accelerator(bare))
    batch = next(session.step.batches.samples)
    assert batch.moments is None
    assert batch.pixels.shape == (1, 3, 32, 32)


def test_photos_in_sub_folders_are_counted_and_named(config, photos):
    for name, count in (("10_sks", 2), ("old", 1)):
        (photos / name).mkdir()
        for number in range(count):
            shutil.copy(photos / "01.jpg", photos / name / f"{number}.jpg")
    said = warnings_of(replace(config, max_train_steps=1))
    assert any("left out 2 photos in 10_sks, 1 photo in old; sub-folders" in text for text in said)
    for photo in photos.glob("*.jpg"):
        photo.unlink()
    with pytest.raises(PhotoError, match="found 2 photos in 10_sks, 1 photo in old"):
        train(replace(config, output_dir=f"{config.output_dir}-2"))


def test_a_bad_photo_among_good_ones_is_left_out(sd1_folder, photos, tmp_path):
    (photos / "text.jpg").write_text("not an image", encoding="utf-8")
    whole = (photos / "01.jpg").read_bytes()
    (photos / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match=r"photo skipped: .*(text|truncated)\.jpg"):
        train(make_config(sd1_folder, photos, tmp_path / "out", max_train_steps=1))
    for path in photos.glob("0*.jpg"):
        path.unlink()
    with pytest.raises(PhotoError, match=r"2 of 2 photos unusable.*text\.jpg"):
        train(make_config(sd1_folder, photos, tmp_path / "out2", max_train_steps=1))


def test_one_photo_trains_with_a_warning(sd1_folder, photos, tmp_path):
    for path in photos.glob("0[2-9].jpg"):
        path.unlink()
    with pytest.warns(UserWarning, match=r"only 1 photo"):
        train(make_config(sd1_folder, photos, tmp_path / "out", max_train_steps=1))


def test_every_cached_latent_is_that_of_its_own_image(sd1_folder, tmp_path):
    """Over three epochs, in each one's order, with photos and class images of one size."""
    files = {}
    for kind, caption in (("photos", "a sks mug"), ("class", "a mug")):
        (tmp_path / kind).mkdir()
        for number in range(3):
            file = tmp_path / kind / f"{number}.png"
            noise((64, 64), len(files)).save(file)
            file.with_suffix(".txt").write_text(f"{caption}, number {number}", encoding="utf-8")
            files[f"{caption}, number {number}"] = file
    session = open_run(
        sd1_folder, tmp_path / "photos", tmp_path / "out", train_batch_size=2,
        with_prior_preservation=True, num_class_images=3, class_data_dir=str(tmp_path / "class"),
    )  # fmt: skip
    seen = []
    for _ in range(5):
        batch = next(session.step.batches.samples)
        for caption, moments in zip(batch.captions, batch.moments, strict=True):
            pixels = torch.from_numpy(np.array(Image.open(files[caption]))).permute(2, 0, 1)
            with torch.no_grad():
                posterior = session.components.vae.encode(pixels[None] / 127.5 - 1).latent_dist
            torch.testing.assert_close(moments, posterior.parameters[0], rtol=1e-4, atol=1e-4)
            seen.append(caption)
    assert min(seen.count(caption) for caption in files) > 1, "some came from the cache"


def check(tmp_path, captions, **settings):
    """The warnings of `check_captions` of photos with these texts."""
    photos = []
    for number, text in enumerate(captions):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
        path = tmp_path / f"{number}.jpg"
        caption = read_caption(path, "", per_line=True)
        photos.append(Photo(path, str(number), (8, 8), caption))
    settings = {"instance_data_dir": "x", "instance_prompt": "a sks dog", **settings}
    config = TrainConfig(**settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_captions(subjects_of(config)[0], photos)
    return [str(each.message) for each in caught if each.category is UserWarning]


@pytest.mark.parametrize(
    ("captions", "settings", "message"),
    [
        (["a sks dog", "sks, on grass"], {}, ""),
        (["a sks dog\na dog"], {}, "1 caption of several lines, which are joined; set"),
        (["a sks dog\na dog"], {"caption_per_line": True}, "missing from 1 of 2 captions: 'a dog'"),
        (["a sks dog"], {"caption_per_line": True}, "no effect because no caption file has two li"),
        (["a sks dog"], {"tag_dropout": 0.1}, "tag_dropout has no effect because no caption has"),
        (["sun, a sks dog"], {"tag_dropout": 0.1}, "may drop the token 'sks' of 'sun, a"),
        (["sun, a sks dog, sea"], {"tag_dropout": 0.1, "keep_tags": 2}, ""),
        (["sun, sea"], {"tag_dropout": 0.1, "caption_prefix": "sks,"}, ""),
        (["sun"], {"tag_dropout": 0.1, "caption_prefix": "sks,"}, "tag_dropout has no effect"),
        (["sks; a; b"], {"shuffle_tags": True}, "two or more tags, separated by commas, after"),
        (["sks mug, , b, c"], {"shuffle_tags": True}, "1 caption with empty tags, first 'sks mug,"),
        (["sks, a, b,"], {"tag_dropout": 0.1}, "1 caption with empty tags"),
        ([",sks, a"], {"tag_dropout": 0.1}, "1 caption with empty tags"),
        (["sks mug, , b, c,"], {}, ""),
    ],
)  # fmt: skip
def test_what_of_captions_has_no_effect_or_may_lack_the_token_is_said(
    captions, settings, message, tmp_path
):
    said = check(tmp_path, captions, **settings)
    assert len(said) == bool(message), said
    assert not message or message in said[0]


@pytest.mark.parametrize(
    ("caption", "settings", "message"),
    [
        ("a dog\nthe dog", {"caption_per_line": True}, "in none of the 2 captions"),
        ("a sks dog\na dog", {"caption_per_line": True, **PRIOR}, "1 caption of 2 without the tok"),
        ("sun, sks dog", {"tag_dropout": 0.1, **PRIOR}, "may drop the token 'sks'"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_captions_that_teach_nothing_are_refused(caption, settings, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        check(tmp_path, [caption], **settings)


def test_no_class_image_is_made_before_all_captions_were_looked_at(tiny_run, photos, monkeypatch):
    """They may take an hour."""
    asked = []
    monkeypatch.setattr(
        "dora_diffusion.training.inputs.prior.class_images", lambda *a: asked.append(a)
    )
    common = {"instance_data_dir": str(photos), "class_word": "mug", **PRIOR}
    entries = [
        {**common, "instance_prompt": "a sks mug", "prior_preservation_mode": "images"},
        {**common, "instance_prompt": "a zwx mug", "token": "zwx", "class_prompt": "a zwx mug"},
    ]
    other = photos.parent / "other"
    shutil.copytree(photos, other)
    for number, path in enumerate(sorted(other.glob("*.jpg"))):
        Image.new("RGB", (40 + number, 40)).save(path)
        path.with_suffix(".txt").write_text("a zwx mug", encoding="utf-8")
    entries[1]["instance_data_dir"] = str(other)
    config = tiny_run(dataset_config=entries, instance_prompt=None, with_prior_preservation=True)
    with refused("class_prompt", "contains the token"):
        assemble(plan_run(config), make_accelerator(config))
    assert asked == []


@pytest.mark.parametrize("caches", [True, False])
def test_a_run_opens_each_photo_and_mask_once(tiny_run, photos, tmp_path, caches):
    """Two subjects, held-out photos, masks and class images, from the list to the last epoch."""
    other, classes = tmp_path / "other", tmp_path / "classes"
    for folder, start in ((other, 10), (classes, 20)):
        folder.mkdir()
        for number in range(4):
            noise((40, 40), start + number).save(folder / f"{number}.png")
    for path in sorted(photos.glob("*.jpg")):
        with Image.open(path) as photo:
            Image.new("L", photo.size, 255).save(mask_path(path))
    common = {"instance_prompt": "a sks mug", "class_word": "mug", "validation_split": 1}
    config = tiny_run(
        dataset_config=[
            {"instance_data_dir": str(photos), "masked_loss": True, **common},
            {"instance_data_dir": str(other), "token": "zwx", "instance_prompt": "a zwx mug",
             "class_word": "mug"},
        ],
        with_prior_preservation=True, prior_preservation_mode="images",
        class_data_dir=str(classes), num_class_images=4, validation_split=1,
        cache_latents=caches, max_train_steps=12, instance_data_dir=None,
    )  # fmt: skip
    opened, files = Counter(), {*photos.glob("*.jpg"), *photos.glob("*.png"), *other.iterdir(),
                                *classes.iterdir()}  # fmt: skip
    listening = True

    def note(event, arguments):
        if listening and event == "open" and isinstance(arguments[0], (str, Path)):
            path = Path(arguments[0])
            opened.update([path] if path in files else [])

    sys.addaudithook(note)
    try:
        train(config)
    finally:
        listening = False
    assert max(opened.values()) == 1
    assert set(opened) >= {path for path in files if ".mask" not in path.name}
    assert sum(".mask" in path.name for path in opened) == 4, "the fifth photo is held out"
