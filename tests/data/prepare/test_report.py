"""Findings on photos, against plain computations and photos that are known to be alike."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageOps

from dora_diffusion.data.checks import (
    Report,
    add_cautions,
    doubts,
    look_at,
    measure_mask,
    sharpness,
    small_image,
)
from dora_diffusion.data.crops import Buckets
from dora_diffusion.data.photos import read_photo
from dora_diffusion.models.metric_models import open_metric_model
from dora_diffusion.toy.benchmark_subjects import SAMPLE_BACKGROUNDS, SAMPLE_SUBJECTS
from dora_diffusion.toy.world import render


@pytest.fixture(scope="module")
def views():
    """Photos that are large enough to be sharp: those of the toy fixtures are enlarged."""
    scenes = [
        SAMPLE_SUBJECTS["bolt_mug"].scene(place, seed)
        for seed, place in enumerate(SAMPLE_BACKGROUNDS)
    ]
    return [Image.fromarray(render(scene, (576, 512))) for scene in scenes]


@pytest.fixture
def photos(views, tmp_path):
    for index, view in enumerate(views):
        view.save(tmp_path / f"{index}.png")
    return tmp_path


def report_of(folder, model=None):
    report = Report()
    photos = [read_photo(path, "", measure=True) for path in sorted(folder.glob("*.png"))]
    for photo in photos:
        with Image.open(photo.path) as image:
            report.photos.append(look_at(photo, image, None, 128))
            report.images.append({"photo": small_image(image)})
    add_cautions(report, photos, 128, model)
    return report


@pytest.mark.parametrize("size", [(40, 32), (32, 40)])
def test_sharpness_is_the_variance_of_the_laplacian(size):
    values = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    grey = values.astype(float)
    laplacian = [
        grey[y - 1, x] + grey[y + 1, x] + grey[y, x - 1] + grey[y, x + 1] - 4 * grey[y, x]
        for y in range(1, size[0] - 1)
        for x in range(1, size[1] - 1)
    ]
    assert sharpness(Image.fromarray(values), side=32) == pytest.approx(np.var(laplacian), rel=1e-5)
    # Of the same photo at twice the size it is the same, nearly.
    photo = Image.fromarray(values).resize((640, 512), Image.Resampling.BICUBIC)
    small = photo.resize((320, 256), Image.Resampling.LANCZOS)
    assert sharpness(small, side=128) == pytest.approx(sharpness(photo, side=128), rel=0.05)


@pytest.mark.parametrize(("width", "height"), [(144, 128), (128, 300), (64, 64)])
def test_a_crop_keeps_what_it_covers_of_the_photo(width, height, tmp_path):
    image = Image.new("RGB", (width, height))
    image.save(tmp_path / "a.png")
    known = look_at(read_photo(tmp_path / "a.png", ""), image, None, 128)
    assert known["size"] == (width, height)
    square = known["square"]
    assert square[:2] == (128, 128)
    assert square[2] == pytest.approx(min(width, height) / max(width, height), abs=0.01)
    rows, columns = Buckets(128)((height, width))
    assert known["bucket"][:2] == (columns, rows)
    scale = max(columns / width, rows / height)
    expected = columns * rows / (width * height * scale**2)
    assert known["bucket"][2] == pytest.approx(expected, abs=0.02)


def test_near_duplicates_are_said_by_their_pixels_or_by_a_model(views, photos):
    views[0].resize((432, 384)).save(photos / "5.png")
    ImageOps.mirror(views[1]).save(photos / "6.png")
    cautions = report_of(photos).cautions
    assert [tuple(names) for kind, names, _ in cautions] == [("0.png", "5.png")]
    model = open_metric_model("efficientnet-lite0")
    by_model = report_of(photos, model).cautions
    # The toy's photos, of one drawn subject, are alike for a network that knows photos.
    assert {("0.png", "5.png"), ("1.png", "6.png")} <= {tuple(n) for _, n, _ in by_model}
    vectors = model.image_features([views[1], ImageOps.mirror(views[1])])
    value = f"{float(vectors[0] @ vectors[1]):.2f} by efficientnet-lite0"
    assert any(value in message for _, names, message in by_model if "6.png" in names)


def test_the_contact_sheet_shows_the_photo_and_outlines_its_square_crop(photos):
    report = report_of(photos)
    report.images[2]["plain"] = Image.new("RGB", (160, 160), "teal")
    sheet = np.asarray(report.contact_sheet())
    assert (sheet == (0, 128, 128)).all(-1).sum() == 160 * 160
    small = np.asarray(small_image(Image.new("RGB", (200, 100), "blue")))
    outlined = (small == (255, 255, 0)).all(-1)
    ys, xs = np.nonzero(outlined)
    assert (xs.min(), xs.max(), ys.min(), ys.max()) == (40, 119, 40, 119)
    assert (small[:40] == 255).all()


def drawn(*boxes, size=(192, 128)):
    mask = Image.new("L", size)
    for box in boxes:
        mask.paste(255, box)
    return mask


def figures(area=0.2, pieces=(0.2,), agreement=None):
    return {"area": area, "pieces": list(pieces), "agreement": agreement}


def test_area_and_agreement_are_those_of_the_values():
    random = np.random.default_rng(0)
    values, other = random.integers(0, 256, (2, 30, 50), np.uint8)
    measured = measure_mask(Image.fromarray(values), Image.fromarray(other))
    values, other = values / 255, other / 255
    assert measured["area"] == pytest.approx(values.mean(), abs=1e-6)
    agreement = np.minimum(values, other).sum() / np.maximum(values, other).sum()
    assert measured["agreement"] == pytest.approx(agreement, abs=1e-6)
    assert measure_mask(Image.fromarray(other.astype(np.uint8)))["agreement"] is None


def test_pieces_are_what_hangs_together():
    mask = drawn((0, 0, 96, 64), (120, 80, 150, 112), (30, 96, 36, 100))
    pieces = measure_mask(mask)["pieces"]
    # Of 192 x 128 at 64 x 64: three columns and two rows become one.
    assert pieces == [32 * 32 / 4096, 10 * 16 / 4096, 2 * 2 / 4096]
    assert measure_mask(Image.new("L", (64, 64)))["pieces"] == []
    # What touches at a corner alone does not hang together.
    assert len(measure_mask(drawn((0, 0, 96, 64), (96, 64, 192, 128)))["pieces"]) == 2


def test_the_toys_true_masks_are_one_piece_each_and_not_doubted(toy):
    measured = {
        str(index): measure_mask(mask, ImageOps.mirror(toy.masker(ImageOps.mirror(photo))))
        for index, (photo, mask) in enumerate(zip(toy.photos, toy.masks, strict=True))
    }
    for mask, truth in zip(measured.values(), toy.masks, strict=True):
        assert mask["area"] == pytest.approx(np.asarray(truth).mean() / 255)
        assert len(mask["pieces"]) == 1
        assert mask["agreement"] == 1
    assert doubts(measured) == {}


def test_several_large_pieces_and_a_mirrored_mask_that_differs_are_doubted():
    said = doubts({
        "a": figures(pieces=(0.1, 0.05, 0.04, 0.001)),
        "b": figures(pieces=(0.1, 0.02)),
        "c": figures(agreement=0.63),
        "d": figures(agreement=0.946),
    })  # fmt: skip
    assert said == {
        "a": "has 3 large pieces",
        "c": "has 63% in common with the mirrored photo's",
    }
