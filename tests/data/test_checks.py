"""Warnings about photo sets, on the samples and spoiled copies of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageFilter

from dora_diffusion.data.checks import (
    PhotoWarning,
    check_photos,
    copies,
    near_duplicates,
    too_few,
)
from dora_diffusion.data.images import open_photo
from dora_diffusion.data.photos import list_photos, mask_path, read_photo, read_photos


def check(paths: list[Path], resolution: int = 512, **options: Any) -> list[PhotoWarning]:
    return check_photos(read_photos(paths, "a dog", measure=True), resolution, **options)


def test_spoiled_copies_are_named(samples_root: Path, tmp_path: Path) -> None:
    paths = list_photos(samples_root / "bolt_mug")[:3]
    sharp = open_photo(paths[0])
    sharp.resize((500, 500)).save(tmp_path / "copy.jpg", quality=60)
    open_photo(paths[1]).filter(ImageFilter.GaussianBlur(4)).save(tmp_path / "soft.png")
    found = check([*paths, tmp_path / "copy.jpg", tmp_path / "soft.png"])
    assert {(warning.kind, warning.names) for warning in found} == {
        ("small", ("copy.jpg",)),
        ("duplicate", (paths[0].name, "copy.jpg")),
        ("blurred", ("soft.png",)),
        ("duplicate", (paths[1].name, "soft.png")),
    }
    small = next(warning for warning in found if warning.kind == "small")
    assert small.message.startswith("copy.jpg: 500 x 500 is smaller than the training size 512")


def test_few_and_many_photos(tmp_path: Path) -> None:
    paths = []
    for index in range(31):
        paths.append(tmp_path / f"{index:02d}.png")
        Image.effect_noise((16, 16), 50 + index).save(paths[-1])
    assert [w.kind for w in check(paths[:2], 8) if not w.names] == ["few"]
    assert [w.kind for w in check(paths[:30], 8) if not w.names] == []
    assert [w.kind for w in check(paths, 8) if not w.names] == ["many"]
    assert check(paths[:1], 8)[0].message.startswith("only 1 photo: ")
    with pytest.raises(ValueError, match=r"00\.png was read without measure=True"):
        check_photos([read_photo(paths[0], "")], 8)


def test_copies_are_counted_by_content_and_are_no_more_photos(tmp_path: Path, write_images) -> None:
    """Twenty copies of two photos, under other names, are two photos."""
    paths = write_images(tmp_path, 22, size=(20, 20))
    for number, path in enumerate(paths):
        path.write_bytes(paths[number % 2].read_bytes())
    photos = read_photos(paths, "a dog")
    assert copies(photos[:2]) == ""
    assert copies(photos).startswith(
        "22 photos, but only 2 different: 00.png, 02.png, 04.png and 8 more are the same file"
    )
    assert too_few(photos).startswith("only 2 photos: ")
    assert too_few(photos[:2]) == too_few(photos)
    (near, _) = [w for w in check(paths, 8) if w.kind == "duplicate"]
    assert len(near.names) == 11
    assert near.message == (
        "00.png, 02.png, 04.png, 06.png, 08.png and 6 more are nearly the same photo; keep one of "
        "them"
    )


def test_transparent_parts_are_said_with_what_becomes_of_them(tmp_path: Path, write_images) -> None:
    paths = write_images(tmp_path, 4, size=(20, 20))
    for path, alpha in zip(paths, (255, 254, 0, None), strict=True):
        if alpha is not None:
            image = Image.open(path).convert("RGBA")
            image.putpixel((3, 5), (0, 0, 0, alpha))
            image.save(path)
    Image.new("L", (20, 20), 255).save(mask_path(paths[2]))
    said = {
        uses_masks: [w for w in check(paths, 8, uses_masks=uses_masks) if w.kind == "transparent"]
        for uses_masks in (None, False, True)
    }
    image, where = "transparent parts of 1 image are", "learned as white where the mask is bright"
    assert [[tuple(w.names) for w in found] for found in said.values()] == [
        [("01.png",), ("02.png",)], [("01.png", "02.png")], [("01.png",), ("02.png",)]
    ]  # fmt: skip
    assert [[w.message for w in found] for found in said.values()] == [
        [f"{image} learned as white (with masked_loss: masked, not learned): 01.png",
         f"{image} learned as white (with masked_loss: {where}): 02.png"],
        ["transparent parts of 2 images are learned as white: 01.png, 02.png; use masked_loss to "
         "exclude them"],
        [f"{image} masked, not learned: 01.png", f"{image} {where}: 02.png"],
    ]  # fmt: skip


def test_groups_join_photos_that_are_near_to_one_of_them() -> None:
    """A chain: each differs from the next in 4 bits, the ends in 12."""
    bits = {f"{n}": 2 ** (4 * n) - 1 for n in range(4)} | {"far": 2**64 - 1}
    shuffled = {name: bits[name] for name in ("3", "far", "0", "2", "1")}
    assert near_duplicates(shuffled) == [("3", "0", "2", "1")]
    assert near_duplicates({"a": bits["0"], "b": bits["far"]}) == []
