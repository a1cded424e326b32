"""Training images by number: what they show, and what they never show."""

from __future__ import annotations

from dora_diffusion.toy.shapes import CLASSES, UNSEEN_CLASSES
from lab.pretrain.data import CAPTIONED, held_out_sighting, training_image, training_scene


def test_training_images_are_known_by_number_and_never_show_unseen_classes() -> None:
    assert training_scene(5) == training_scene(5)
    kinds = {training_scene(i).subject.kind for i in range(400)}
    assert kinds == set(CLASSES)
    assert any(held_out_sighting(i).subject.kind in UNSEEN_CLASSES for i in range(9))


def test_nonsense_shapes_have_no_name() -> None:
    assert {training_image(CAPTIONED + number)[1] for number in range(50)} == {""}
    assert {bool(training_image(number)[1]) for number in range(50)} == {False, True}
