"""What is said of photos, against plain computations and photos that are known to be alike."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from dora_diffusion.data.crops import Buckets
from dora_diffusion.data.curate.report import Report, add_cautions, look_at, sharpness, small_image
from dora_diffusion.data.photos import read_photo
from dora_diffusion.lab.toy.benchmark_subjects import BOLT_MUG, SAMPLE_BACKGROUNDS
from dora_diffusion.lab.toy.world import render
from dora_diffusion.models.metric_models import open_metric_model


@pytest.fixture(scope="module")
def views():
    """Photos that are large enough to be sharp: those of the toy fixtures are enlarged."""
    scenes = [BOLT_MUG.scene(place, seed) for seed, place in enumerate(SAMPLE_BACKGROUNDS)]
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


def test_a_photo_out_of_focus_is_said_the_sharp_ones_are_not(views, photos):
    assert [kind for kind, _, _ in report_of(photos).cautions] == []
    views[3].filter(ImageFilter.GaussianBlur(1)).save(photos / "3.png")
    report = report_of(photos)
    [(kind, names, message)] = report.cautions
    assert (kind, list(names)) == ("soft", ["3.png"])
    assert message.startswith("3.png: its sharpness is ")
    assert report.photos[3]["look_at"] == ["soft"]
    assert "soft" in report.text()


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
