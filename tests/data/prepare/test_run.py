"""Files of a preparation, against the toy renderer's true masks and the files that were there."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageColor

from dora_diffusion.data.captions import CaptionEdit, class_caption, with_trigger
from dora_diffusion.data.photos import list_photos, mask_path
from dora_diffusion.data.prepare import COLOURS, Preparation, PrepareError


def digests(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def preparation(toy, tmp_path):
    return Preparation(
        tmp_path / "out", 128, mask=toy.masker, token="sks", class_word="mug", plain_copies=True
    )


def plain_of(folder, stem):
    [path] = [p for p in folder.glob(f"{stem}-plain-*.png") if not p.name.endswith(".mask.png")]
    return path, path.stem.rpartition("-")[2]


def test_nothing_is_written_without_a_target(photos, toy):
    before = digests(photos.parent)
    report = Preparation(resolution=128).run(list_photos(photos))
    assert digests(photos.parent) == before
    assert [photo["name"] for photo in report.photos] == [f"{i}.png" for i in range(5)]
    assert not report.written


def test_a_copy_is_the_photo_inside_its_mask_and_the_colour_outside(preparation, photos, toy):
    preparation.run(list_photos(photos))
    colours = set()
    for index, (photo, mask) in enumerate(zip(toy.photos, toy.masks, strict=True)):
        path, colour = plain_of(preparation.target, index)
        colours.add(colour)
        plain, photo, weight = (np.asarray(Image.open(path)), np.asarray(photo), np.asarray(mask))
        rgb = np.array(ImageColor.getrgb(colour))
        assert (plain[weight == 0] == rgb).all()
        assert (plain[weight == 255] == photo[weight == 255]).all()
        share = weight[..., None] / 255
        assert np.abs(plain - (share * photo + (1 - share) * rgb)).max() <= 1
        assert 0.05 < (weight > 127).mean() < 0.6
        caption = path.with_suffix(".txt").read_text(encoding="utf-8")
        assert caption == f"a photo of sks mug, on a plain {colour} background\n"
        for name in (mask_path(path), preparation.target / f"{index}.mask.png"):
            assert np.asarray(Image.open(name)).tolist() == weight.tolist()
    assert len(colours) > 1
    assert colours <= set(COLOURS)


def test_the_photos_are_copied_as_they_are_and_captioned(preparation, photos):
    report = preparation.run(list_photos(photos))
    for path in photos.iterdir():
        copy = preparation.target / path.name
        assert copy.read_bytes() == path.read_bytes()
        assert copy.with_suffix(".txt").read_text(encoding="utf-8") == "a photo of sks mug\n"
    assert report.written == {"photos": 5, "captions": 5, "masks": 5, "copies": 5}
    assert [photo["caption"] for photo in report.photos] == ["a photo of sks mug"] * 5


def test_captions_and_masks_that_are_there_are_kept_and_extended(preparation, photos, toy):
    (photos / "1.txt").write_text("a mug on the sand", encoding="utf-8")
    own = Image.new("L", toy.photos[2].size)
    own.paste(255, (20, 20, 60, 90))
    own.save(photos / "2.mask.png")
    before = digests(photos)
    report = preparation.run(list_photos(photos))
    assert digests(photos) == before
    target = preparation.target
    assert (target / "1.txt").read_bytes() == (photos / "1.txt").read_bytes()
    path, colour = plain_of(target, 1)
    assert path.with_suffix(".txt").read_text(encoding="utf-8") == (
        f"a mug on the sand, on a plain {colour} background\n"
    )
    assert (target / "2.mask.png").read_bytes() == (photos / "2.mask.png").read_bytes()
    plain = np.asarray(Image.open(plain_of(target, 2)[0]))
    assert (plain[20:90, 20:60] == np.asarray(toy.photos[2])[20:90, 20:60]).all()
    assert (report.written["captions"], report.written["masks"]) == (4, 4)


def test_a_second_run_changes_no_file_and_adds_what_is_missing(preparation, photos):
    preparation.run(list_photos(photos))
    first = digests(preparation.target)
    (preparation.target / "3.mask.png").unlink()
    plain_of(preparation.target, 4)[0].unlink()
    (preparation.target / "0.txt").write_text("my own words", encoding="utf-8")
    report = preparation.run(list_photos(photos))
    assert +report.written == {"masks": 1, "copies": 1}
    assert (preparation.target / "0.txt").read_text(encoding="utf-8") == "my own words"
    del first["0.txt"]
    assert first.items() <= digests(preparation.target).items()


def test_colours_follow_the_seed_and_the_photo_not_the_others(preparation, photos, tmp_path):
    for index in (2, 3, 4):
        (photos / f"{index}.png").unlink()

    def colours(**changes):
        run = replace(preparation, target=tmp_path / f"out{len(list(tmp_path.iterdir()))}")
        run = replace(run, **changes)
        run.run(list_photos(photos))
        stems = [path.stem for path in photos.glob("*.png")]
        return {stem: plain_of(run.target, stem)[1] for stem in stems}

    first = colours()
    assert colours() == first
    assert colours(seed=1) != first
    (photos / "0.png").unlink()
    assert colours().items() <= first.items()


def test_in_place_adds_captions_and_masks_and_touches_nothing(preparation, photos):
    (photos / "1.txt").write_text("a mug", encoding="utf-8")
    (photos / "2.txt").write_text("", encoding="utf-8")
    before = digests(photos)
    run = replace(preparation, target=photos, plain_copies=False)
    report = run.run(list_photos(photos))
    after = digests(photos)
    assert before.items() <= after.items()
    assert set(after) - set(before) == {
        *(f"{i}.mask.png" for i in range(5)), "0.txt", "3.txt", "4.txt",
    }  # fmt: skip
    # An empty caption is somebody's file, and trained as none.
    assert [photo["caption"] for photo in report.photos][2] is None
    with pytest.raises(PrepareError, match="copies need an output folder other than the photos'"):
        replace(preparation, target=photos).run(list_photos(photos))


def test_a_damaged_photo_is_listed_and_the_others_go_on(preparation, photos):
    (photos / "1.png").write_bytes((photos / "1.png").read_bytes()[:900])
    (photos / "2.txt").write_bytes(b"\xff\xfe\x00")
    report = preparation.run(list_photos(photos))
    assert [reason.split(":")[0] for reason in report.unreadable] == ["1.png", "2.txt"]
    assert report.written["photos"] == 3
    assert not list(preparation.target.glob("[12]*"))
    assert "skipped: 1.png: damaged or cut short" in report.text()
    for path in photos.glob("*.png"):
        path.write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(PrepareError, match=r"no photo can be used: 0\.png: damaged"):
        preparation.run(list_photos(photos))


def test_a_photo_without_a_subject_gets_no_mask_and_that_is_said(preparation, photos, toy):
    nothing = toy.photos[2].tobytes()
    masks = lambda image: (  # noqa: E731
        Image.new("L", image.size) if image.tobytes() == nothing else toy.masker(image)
    )
    report = replace(preparation, mask=masks).run(list_photos(photos))
    assert not (preparation.target / "2.mask.png").exists()
    assert not list(preparation.target.glob("2-plain*"))
    assert [name for kind, names, _ in report.cautions if kind == "no mask" for name in names] == [
        "2.png"
    ]
    assert report.photos[2]["look_at"][-2:] == ["no mask", "no plain"]


def test_a_mask_that_is_another_one_when_mirrored_is_doubted(preparation, photos, toy):
    half = toy.photos[3].tobytes()

    def masks(image):
        mask = toy.masker(image)
        if image.tobytes() == half:
            mask.paste(0, (0, 0, mask.width, mask.height // 2))
        return mask

    report = replace(preparation, mask=masks).run(list_photos(photos))
    doubted = ["doubtful mask" in photo["look_at"] for photo in report.photos]
    assert doubted == [False, False, False, True, False]
    assert "in common with the mirrored photo's" in report.text()


def test_an_alpha_channel_is_a_mask_that_is_there(preparation, photos, toy):
    rgba = toy.photos[0].copy()
    rgba.putalpha(toy.masks[0])
    rgba.save(photos / "0.png")
    run = replace(preparation, mask=None)
    report = run.run(list_photos(photos))
    assert not list(preparation.target.glob("?.mask.png"))
    assert report.photos[0]["mask"]["area"] == pytest.approx(
        np.asarray(toy.masks[0]).mean() / 255, abs=1e-6
    )
    path, colour = plain_of(preparation.target, 0)
    outside = np.asarray(toy.masks[0]) == 0
    assert (np.asarray(Image.open(path))[outside] == ImageColor.getrgb(colour)).all()


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a brown dog on grass with a dog", "a brown sks dog on grass with a dog"),
        ("A Dog on grass", "A sks Dog on grass"),
        ("an animal on grass", "sks dog, an animal on grass"),
        ("grass, dog, outdoors", "sks dog, grass, outdoors"),
        ("doggy, hotdog", "sks dog, doggy, hotdog"),
        ("a sks dog", "a sks dog"),
    ],
)
def test_the_trigger_goes_in_and_the_class_caption_takes_it_out(caption, expected):
    assert with_trigger(caption, "sks", "dog") == expected
    assert "sks" not in class_caption(expected, "sks", "dog")
    if expected.replace("sks ", "") == caption:
        assert class_caption(expected, "sks", "dog") == caption.replace("sks ", "")
    assert with_trigger(caption, "", "dog") == caption


def test_a_token_without_a_class_word_goes_in_front():
    assert with_trigger("a mug on grass", "sks", "") == "sks, a mug on grass"


EDITS = {
    "text": (CaptionEdit(text="a photo of a sks mug"), ["a photo of a sks mug"] * 3),
    "no text": (CaptionEdit(text=""), ["", "", ""]),
    "replace": (CaptionEdit(find="mug", replace="cup"), ["a cup, cups", "red\na cup", ""]),
    "remove": (CaptionEdit(find="a mug"), [", mugs", "red", ""]),
    "prefix": (CaptionEdit(prefix="red,"), ["red, a mug, mugs", "red, red\nred, a mug", ""]),
    "remove a tag": (CaptionEdit(remove_tag="mugs"), ["a mug", "red\na mug", ""]),
    "first tag": (CaptionEdit(first_tag="mugs "), ["mugs, a mug", "mugs, red\nmugs, a mug", ""]),
    "add a tag": (CaptionEdit(add_tag="mugs"), ["a mug, mugs", "red, mugs\na mug, mugs", ""]),
    "last tag": (CaptionEdit(remove_tag="a mug"), ["mugs", "red", ""]),
    "all": (
        CaptionEdit(
            text="a mug", find="a ", replace="one ", remove_tag="sun", first_tag="red",
            add_tag="one mug", prefix="sks,",
        ), ["sks, red, one mug"] * 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("place", ["in place", "output", "copies"])
@pytest.mark.parametrize("name", EDITS)
def test_captions_are_changed_where_the_photos_are_written(photos, toy, tmp_path, name, place):
    for index in (3, 4):
        (photos / f"{index}.png").unlink()
    own = ["a mug, mugs", "red\na mug", ""]
    for index, caption in enumerate(own[:2]):
        (photos / f"{index}.txt").write_text(f"{caption}\n", encoding="utf-8")
    edit, expected = EDITS[name]
    before = digests(photos)
    run = Preparation(photos if place == "in place" else tmp_path / "out", 128, edit=edit)
    if place == "copies":
        run = replace(run, mask=toy.masker, plain_copies=True, originals=False)
    run.run(list_photos(photos))

    def written(index: int) -> str:
        if place == "copies":
            files = run.target.glob(f"{index}-plain-*.txt")
            text = "\n".join(path.read_text(encoding="utf-8") for path in files)
            return re.sub(", on a plain .* background", "", text).strip()
        path = run.target / f"{index}.txt"
        return path.read_text(encoding="utf-8").strip() if path.exists() else ""

    assert [written(index) for index in range(3)] == expected
    if place != "in place":
        assert digests(photos) == before
    # What was written by hand since then is kept by a second run into the same output.
    if place == "output" and name != "no text":
        (run.target / "0.txt").write_text("my own words", encoding="utf-8")
        run.run(list_photos(photos))
        assert written(0) == "my own words"
        assert [written(index) for index in (1, 2)] == expected[1:]


def test_a_replacement_of_nothing_is_refused():
    with pytest.raises(ValueError, match="but find is empty"):
        CaptionEdit(replace="x")


def test_an_output_with_something_else_in_it_is_refused(preparation, photos):
    preparation.target.mkdir()
    (preparation.target / ".DS_Store").touch()
    (preparation.target / "holiday.jpg").touch()
    with pytest.raises(PrepareError, match=r"contains holiday\.jpg, not from these photos"):
        preparation.run(list_photos(photos))
    (preparation.target / "holiday.jpg").rename(preparation.target / "0.png")
    Image.new("RGB", (40, 40)).save(preparation.target / "0.png")
    with pytest.raises(PrepareError, match=r"0\.png is not .*give a new output folder"):
        preparation.run(list_photos(photos))


def test_photos_that_would_share_files_are_refused(preparation, photos):
    Image.new("RGB", (40, 40)).save(photos / "3.jpg")
    with pytest.raises(PrepareError, match=r"3\.jpg, 3\.png would share a caption and a mask"):
        preparation.run(list_photos(photos))
    Preparation(resolution=128).run(list_photos(photos))
