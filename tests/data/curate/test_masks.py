"""What is measured of masks, and which are doubted."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageOps

from dora_diffusion.data.curate.masks import doubts, measure_mask


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


def test_almost_nothing_and_almost_everything_are_doubted():
    said = doubts({"a": figures(0.004), "b": figures(0.97), "c": figures(0.02)})
    assert said == {"a": "covers 0.4% of the photo", "b": "covers 97.0% of the photo"}


def test_an_area_far_from_the_others_is_doubted():
    areas = {"a": 0.20, "b": 0.22, "c": 0.19, "d": 0.21, "e": 0.07}
    said = doubts({name: figures(area) for name, area in areas.items()})
    assert said == {"e": "covers 7% of the photo, where most others cover 20%"}
    # Where the others are not alike either, it is not far from them.
    areas = {"a": 0.13, "b": 0.13, "c": 0.26, "d": 0.16, "e": 0.04, "f": 0.39}
    assert doubts({name: figures(area) for name, area in areas.items()}) == {}
    # Of three, nobody knows which is the odd one.
    areas = {"a": 0.2, "b": 0.2, "c": 0.05}
    assert doubts({name: figures(area) for name, area in areas.items()}) == {}


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


def test_no_masks_are_not_doubted():
    assert doubts({}) == {}
