"""Masks from which nothing would be learned are refused before a run."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dora_diffusion.data.dataset import SampleTransform
from dora_diffusion.data.images import PhotoError
from dora_diffusion.data.photos import Photo, list_photos, open_mask, read_photos


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three images of 80 x 40 pixels."""
    random = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        pixels = random.integers(0, 255, (40, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    return tmp_path


def write_mask(photos: Path, name: str, left: int = 0, right: int = 80) -> None:
    mask = Image.new("L", (80, 40), 0)
    mask.paste(255, (left, 0, right, 40))
    mask.save(photos / f"{name}.mask.png")


def masked(folder: Path, **settings: object) -> list[Photo]:
    crops = SampleTransform(40, **settings).first_crops
    return read_photos(list_photos(folder), "a sks dog", mask_crops=crops)


def test_no_mask_at_all_is_refused_with_the_name_that_one_must_have(photos: Path) -> None:
    with pytest.raises(PhotoError) as error:
        masked(photos)
    assert "none of the 3 images has a mask" in str(error.value)
    assert "save the mask of a.png as a.mask.png" in str(error.value)


@pytest.mark.parametrize("alpha", [False, True])
def test_a_black_mask_is_refused_with_its_image(alpha: bool, photos: Path) -> None:
    for name in "abc":
        write_mask(photos, name)
    if alpha:
        (photos / "b.mask.png").unlink()
        image = Image.open(photos / "b.png").convert("RGBA")
        image.putalpha(0)
        image.save(photos / "b.png")
    else:
        write_mask(photos, "b", 0, 0)
    what = r"the alpha channel of b\.png" if alpha else r"b\.mask\.png"
    with pytest.raises(PhotoError, match=rf"{what} is black .*nothing of b\.png"):
        masked(photos)


def test_an_alpha_channel_among_mask_files_is_named(photos: Path) -> None:
    write_mask(photos, "a", 30, 50)
    for name in "ab":
        image = Image.open(photos / f"{name}.png").convert("RGBA")
        image.putalpha(Image.linear_gradient("L").resize((80, 40)))
        image.save(photos / f"{name}.png")
    with pytest.warns(UserWarning, match="without a mask") as caught:
        masked(photos)
    said = [str(w.message) for w in caught if w.category is UserWarning]
    assert [line.partition(":")[0] for line in said] == [
        "1 image of 3 without a mask; their whole area is learned",
        "1 image of 3 without a mask file",
    ]
    assert "transparent parts are not learned: b.png; " in said[1]


def test_a_link_to_a_mask_that_is_not_there_is_an_error(photos: Path) -> None:
    """Without its mask the whole photo would be learned."""
    write_mask(photos, "a")
    (photos / "b.mask.png").symlink_to("gone.png")
    with pytest.raises(PhotoError, match=r"b\.mask\.png: cannot be read"):
        masked(photos)


def test_a_mask_is_the_file_else_the_alpha_channel(photos: Path) -> None:
    for name in "ab":
        write_mask(photos, name, 30, 50)
    for name in "bc":
        image = Image.open(photos / f"{name}.png").convert("RGBA")
        image.putalpha(Image.linear_gradient("L").resize((80, 40)))
        image.save(photos / f"{name}.png")
    file, both, alpha = masked(photos)
    digest = hashlib.sha256((photos / "a.mask.png").read_bytes()).hexdigest()[:32]
    assert [photo.mask_digest for photo in (file, both, alpha)] == [digest, digest, ""]
    for photo in (file, both):
        assert np.asarray(open_mask(photo))[0].nonzero()[0].tolist() == list(range(30, 50))
    expected = Image.open(photos / "c.png").getchannel("A")
    np.testing.assert_array_equal(np.asarray(open_mask(alpha)), np.asarray(expected))
    assert {photo.mask_path for photo in read_photos(list_photos(photos), "")} == {None}
