"""The toy world: images follow from scenes alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dora_diffusion.toy import shapes
from dora_diffusion.toy.benchmark_subjects import SAMPLE_SUBJECTS, find_subject
from dora_diffusion.toy.judges import compose
from dora_diffusion.toy.shapes import CLASSES, UNSEEN_CLASSES
from dora_diffusion.toy.world import BACKGROUNDS, DrawnSubject, Emblem, Scene, render

EVERY_CLASS = [*CLASSES, *UNSEEN_CLASSES]


def a_scene(kind: str = "mug", background: str = "grass", **changes: object) -> Scene:
    subject = DrawnSubject(kind, (0.8, 0.2, 0.2), (0.2, 0.2, 0.8), emblem=Emblem("star", (1, 1, 0)))
    return replace(Scene(subject, background, seed=3), **changes)


def shrunk(image: np.ndarray, factor: int) -> np.ndarray:
    height, width, _ = image.shape
    blocks = image.reshape(height // factor, factor, width // factor, factor, 3)
    return blocks.mean((1, 3))


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_an_image_shrunk_is_the_small_image(background: str) -> None:
    scene = a_scene("teapot", background, rotation=0.1)
    small, large = render(scene, 64), render(scene, 256)
    assert np.abs(shrunk(large, 4) - small).mean() < 3.0  # of 255


@pytest.mark.parametrize("kind", EVERY_CLASS)
def test_an_object_fills_the_share_of_the_frame_that_its_size_says(kind: str) -> None:
    scene = a_scene(kind, "studio", size=0.7)
    elsewhere = replace(scene, position=(9.0, 9.0))
    changed = np.abs(render(scene, 64).astype(int) - render(elsewhere, 64)).max(-1) > 24
    rows, columns = np.nonzero(changed)
    extent = max(np.ptp(rows), np.ptp(columns)) + 1
    assert 0.8 * 0.7 * 64 <= extent <= 1.25 * 0.7 * 64


def test_rendering_is_deterministic_and_depends_on_the_seed() -> None:
    scene = a_scene()
    np.testing.assert_array_equal(render(scene, 64), render(scene, 64))
    assert (render(scene, 64) != render(replace(scene, seed=4), 64)).any()


def test_a_wide_image_has_the_square_one_in_its_middle() -> None:
    scene = a_scene()
    wide = render(scene, (96, 64))
    assert wide.shape == (64, 96, 3)
    np.testing.assert_array_equal(wide[:, 16:80], render(scene, 64))


def test_samples_leave_places_unphotographed() -> None:
    assert len(find_subject("bolt_mug").held_out_backgrounds) >= 3
    prompt = SAMPLE_SUBJECTS["bolt_mug"].prompt("snow")
    assert prompt == "a photo of a sks mug in the snow"


def test_distances_are_distances() -> None:
    x, y = np.meshgrid(np.linspace(-2, 2, 41), np.linspace(-2, 2, 41))
    square = [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]
    np.testing.assert_allclose(
        shapes.polygon(x, y, square), shapes.box(x, y, (0, 0), (1, 1)), atol=1e-9
    )
    np.testing.assert_allclose(
        shapes.ellipse(x, y, (0, 0), (1, 1))[x**2 + y**2 > 0.1],
        shapes.circle(x, y, (0, 0), 1)[x**2 + y**2 > 0.1],
        atol=1e-6,
    )


@pytest.mark.parametrize(
    "build",
    [
        lambda: DrawnSubject("unicorn", (0, 0, 0), (0, 0, 0)),
        lambda: DrawnSubject("mug", (0, 0, 0), (0, 0, 0), pattern="tartan"),
        lambda: a_scene(background="mars"),
        lambda: a_scene(size=0.0),
    ],
)
def test_nonsense_is_refused(build) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"no (class|pattern|background)|size"):
        build()


def test_place_keeps_the_object_in_the_frame() -> None:
    generator = np.random.default_rng(0)
    for _ in range(100):
        scene = compose(a_scene().subject, "sea", generator)
        assert abs(scene.position[0]) + scene.size <= 1.0 + 1e-6
