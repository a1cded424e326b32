"""The benchmark's subjects: new, disjoint, legible, and the same everywhere."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dora_diffusion.toy.benchmark_subjects import (
    PHOTOS,
    REPORTED,
    SAMPLES,
    SUBJECTS,
    TUNING,
    draw_subject,
    find_subject,
    write_photos,
)
from dora_diffusion.toy.shapes import CLASSES, UNSEEN_CLASSES
from dora_diffusion.toy.world import BACKGROUNDS, COLORS, render, render_mask

ROBOT_BODY = (0.7045033553437224, 0.19197217036037878, 0.9547967425274093)


def kinds(subjects):
    return {subject.sample.subject.kind for subject in subjects}


def test_reported_and_tuning_subjects_share_nothing():
    assert len(REPORTED) >= 8
    assert not kinds(REPORTED) & kinds(TUNING)
    assert len(SUBJECTS) == len({*REPORTED, *TUNING, *SAMPLES})


def test_some_classes_have_a_word_and_some_have_none():
    known = [subject for subject in REPORTED if subject.known_class]
    assert 3 <= len(known) <= len(REPORTED) - 3
    for subject in (*REPORTED, *TUNING):
        kind = subject.sample.subject.kind
        assert subject.known_class == (kind in CLASSES)
        assert subject.word == (kind if subject.known_class else "toy")
    assert kinds(REPORTED) >= set(UNSEEN_CLASSES)


@pytest.mark.parametrize("subject", [*REPORTED, *TUNING], ids=lambda s: s.name)
def test_its_colors_stand_apart_and_are_no_palette_colors(subject):
    what = subject.sample.subject
    sign = what.emblem.rgb if what.emblem else what.pattern_rgb
    colors = np.array([what.body, what.accent, sign])
    gaps = np.linalg.norm(colors[:, None] - colors[None], axis=-1)[np.triu_indices(3, 1)]
    assert gaps.min() > 0.45
    unnamed = colors[1:] if what.color else colors
    palette = np.array(list(COLORS.values()))
    assert np.linalg.norm(unnamed[:, None] - palette[None], axis=-1).min() > 0.2


@pytest.mark.parametrize("subject", [*REPORTED, *TUNING], ids=lambda s: s.name)
def test_photos_show_five_places_and_truth_the_other_five(subject):
    assert len(set(subject.photo_backgrounds)) == PHOTOS
    assert {*subject.photo_backgrounds, *subject.held_out_backgrounds} == set(BACKGROUNDS)
    assert len(subject.held_out_backgrounds) == PHOTOS
    assert not any(subject.sample.scene(b, k).flip for b in BACKGROUNDS for k in range(3))


def test_a_seed_is_a_subject():
    again = draw_subject("mug", 4, mark="cross", word="mug", color="purple")
    assert again == find_subject("cross_mug")
    other = draw_subject("mug", 5, mark="cross", word="mug", color="purple")
    assert other.sample.subject.accent != again.sample.subject.accent
    two = draw_subject("mug", 4, mark="cross", word="mug", color="purple", photos=2)
    assert two.sample.subject == again.sample.subject
    assert two.photo_backgrounds == again.photo_backgrounds[:2]
    assert (two.name, len(two.held_out_backgrounds)) == ("cross_mug_2", len(BACKGROUNDS) - 2)
    # The draw itself, so that another numpy that draws otherwise is noticed.
    assert REPORTED[0].sample.subject.body == pytest.approx(ROBOT_BODY, abs=1e-12)
    for wrong, said in (
        ({"color": "mauve"}, "no colour 'mauve'; there are red, .*, black$"),
        ({"mark": "anchor"}, "no emblem or pattern 'anchor'; there are star, .*, checked$"),
        ({"kind": "zeppelin"}, "no class 'zeppelin'"),
        ({"photos": 0}, "photos is 0; it must be from 1 to 5"),
        ({"photos": 6}, "photos is 6; it must be from 1 to 5"),
    ):
        with pytest.raises(ValueError, match=said):
            draw_subject(**{"kind": "mug", "seed": 4, "mark": "cross", **wrong})
    with pytest.raises(ValueError, match="no subject 'nobody'"):
        find_subject("nobody")


def test_photos_come_with_true_captions(tmp_path):
    subject = find_subject("moon_robot")
    photos = write_photos(subject, tmp_path)
    assert len(photos) == PHOTOS
    assert (
        photos[0].with_suffix(".txt").read_text(encoding="utf-8")
        == "a photo of a sks toy on a wooden floor\n"
    )
    with Image.open(photos[0]) as first, Image.open(photos[1]) as second:
        assert first.size == second.size
        assert np.asarray(first).std() > 20
    assert [p.read_bytes() for p in write_photos(subject, tmp_path / "b")] == [
        p.read_bytes() for p in photos
    ]


def test_a_mask_is_white_where_the_subject_is_and_nowhere_else(tmp_path):
    subject = find_subject("cross_mug")
    plain = write_photos(subject, tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.mask.png"))
    for photo, other in zip(write_photos(subject, tmp_path, with_masks=True), plain, strict=True):
        assert photo.read_bytes() == other.read_bytes()
    # The same object on another ground: pixels are the same inside of the mask alone.
    scene = subject.sample.scene("snow", 1)
    others = replace(scene, background="sand")
    first, second = (render(each, 128).astype(int) for each in (scene, others))
    mask, equal = render_mask(scene, 128), (first == second).all(axis=2)
    assert np.array_equal(mask, render_mask(others, 128))
    assert equal[mask == 255].all()
    assert not equal[mask == 0].mean() > 0.01
    assert 0.1 < (mask == 255).mean() < 0.6
    # Edges alone are in between.
    assert ((mask > 0) & (mask < 255)).mean() < 0.03
