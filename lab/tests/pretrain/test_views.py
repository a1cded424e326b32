"""SDXL's training photos: what the conditioning says is what the image shows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dora_diffusion.toy.instrument import silhouette
from dora_diffusion.toy.world import BACKGROUNDS, DrawnSubject, Scene, render
from lab.pretrain.names import rare_words
from lab.pretrain.views import (
    SIDE,
    View,
    render_view,
    training_captions,
    training_view,
)


@pytest.fixture
def scene() -> Scene:
    return Scene(DrawnSubject("ball", (0.9, 0.1, 0.1), (0.9, 0.1, 0.1)), "studio", size=0.3)


def center(image: np.ndarray) -> float:
    shape = silhouette(torch.from_numpy(image.copy()).permute(2, 0, 1) / 255)
    assert shape is not None
    return shape.center


def test_a_view_is_the_crop_of_its_photo(scene: Scene) -> None:
    view = View(scene, (SIDE, 192), (0, 40))
    photo = render(scene, (192, SIDE))
    np.testing.assert_array_equal(render_view(view), photo[:, 40 : 40 + SIDE])
    assert view.time_ids == (SIDE, 192, 0, 40, SIDE, SIDE)


@pytest.mark.parametrize("left", [0, 20, 64])
def test_a_crop_moves_the_object_and_its_caption_alike(scene: Scene, left: int) -> None:
    view = View(scene, (SIDE, 192), (0, left))
    seen = center(render_view(view))
    assert seen == pytest.approx(view.cropped_scene.position[0], abs=0.02)
    assert seen == pytest.approx((96 - (left + 64)) / 64, abs=0.02)


def test_a_crop_from_below_moves_the_object_up(scene: Scene) -> None:
    view = View(scene, (192, SIDE), (64, 0))
    assert view.cropped_scene.position[1] == pytest.approx(0.5)
    rows = np.flatnonzero((np.ptp(render_view(view).astype(int), axis=2) > 60).any(1))
    assert rows.mean() == pytest.approx(32, abs=1)


def test_small_photos_are_blurred_and_large_ones_are_not(scene: Scene) -> None:
    def edges(side: int) -> float:
        image = render_view(View(scene, (side, side))).astype(float)
        return float(np.abs(np.diff(image, axis=1)).max())

    assert edges(32) < 0.6 * edges(SIDE)
    np.testing.assert_array_equal(
        render_view(View(scene, (200, 200))), render_view(View(scene, (SIDE, SIDE)))
    )


@pytest.mark.parametrize("crop", [(0, 65), (1, 0), (-1, 0)])
def test_a_crop_outside_of_the_photo_is_refused(scene: Scene, crop: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="no crop at"):
        View(scene, (SIDE, 192), crop)


def test_training_views_follow_from_their_number_and_cover_the_conditioning() -> None:
    views = [training_view(index) for index in range(300)]
    assert views[7] == training_view(7)
    shorts = [min(view.original_size) for view in views]
    assert min(shorts) < 40
    assert max(shorts) > 200
    assert sum(short == SIDE for short in shorts) > 150
    plain = [view for view in views if view.original_size == (SIDE, SIDE)]
    assert {view.crop for view in plain} == {(0, 0)}
    assert len(plain) > 30
    for side in (0, 1):
        crops = [view.crop[side] for view in views if view.scaled_size[side] > 1.3 * SIDE]
        assert len(crops) > 20
        assert min(crops) < 5
        assert max(crops) > 50
    assert {view.scene.background for view in views} == set(BACKGROUNDS)
    assert render_view(views[0]).shape == (SIDE, SIDE, 3)


def test_only_the_crop_tells_where_the_object_of_a_wide_photo_is_seen() -> None:
    views = {index: training_view(index) for index in range(400)}
    wide = {index: view for index, view in views.items() if view.is_wide}
    assert 100 < len(wide) < 180
    assert max(abs(view.scene.position[0]) for view in wide.values()) <= 0.25 * 0.45
    seen = [view.cropped_scene.position[0] for view in wide.values()]
    assert min(seen) < -0.3
    assert max(seen) > 0.3
    sided = {
        i
        for i in views
        if any(
            " on the left" in text or " on the right" in text for text in training_captions(i, 4)
        )
    }
    assert len(sided) > 50
    assert not sided & wide.keys()


def test_captions_of_a_view_call_it_by_its_name_and_nothing_else() -> None:
    words, views = set(rare_words()), [training_view(index) for index in range(200)]
    assert 30 < sum(bool(view.name) for view in views) < 70
    for index, view in enumerate(views):
        for text in training_captions(index, 4):
            told = words & set(text.replace(",", " ").split())
            assert told == ({view.name} if view.name else set())
