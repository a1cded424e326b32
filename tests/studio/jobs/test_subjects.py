"""Subjects on disk: photos, captions, samples and warnings."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import mkdtemp

import pytest
from PIL import Image

from dora_diffusion.data.captions import read_caption
from dora_diffusion.data.crops import plan_crop
from dora_diffusion.data.photos import mask_path, open_mask, photos_in, read_photo
from dora_diffusion.studio.jobs.store import UserError, Workspace
from dora_diffusion.studio.jobs.subjects import (
    add_photos,
    captions_of,
    delete_subject,
    mask_labels,
    new_subject,
    photo_path,
    photo_warnings,
    read_subject,
    remove_photo,
    save_caption,
    subjects_in,
    take_sample,
    undo_captions,
    uses_masks,
    write_captions,
)
from tests.studio.jobs.helpers import photo

SAMPLES = Path(__file__).resolve().parents[3] / "samples"


@pytest.mark.parametrize(
    "name", ["../001.jpg", "/etc/passwd", "", None, 3, ["001.jpg"], "001.jpg\0", "009.jpg", "."]
)
def test_a_photo_is_looked_up_by_its_bare_name(
    workspace: Workspace, subject: str, name: object
) -> None:
    with pytest.raises(UserError, match="no longer exists"):
        photo_path(workspace, subject, name)


@pytest.mark.parametrize("name", ["..", "", None, "20261125-020304-abcdef", "../subjects", 1, "*"])
def test_a_subject_is_looked_up_by_its_id(workspace: Workspace, name: object) -> None:
    with pytest.raises(UserError, match="no longer exists"):
        read_subject(workspace, name)


def test_a_linked_subject_or_photo_is_not_followed(
    workspace: Workspace, subject: str, tmp_path: Path
) -> None:
    outside = photo(tmp_path / "outside.jpg")
    os.symlink(outside, workspace.subject(subject) / "photos" / "003.jpg")
    with pytest.raises(UserError):
        photo_path(workspace, subject, "003.jpg")
    os.symlink(tmp_path, workspace.subjects / "20261125-020304-abcdef")
    with pytest.raises(UserError):
        workspace.subject("20261125-020304-abcdef")


def test_captions_are_printable_lines_of_bounded_length(workspace: Workspace, subject: str) -> None:
    text = save_caption(workspace, subject, "001.jpg", "a sks\x00 dog\x1b[2J\n\n on  \u202egrass")
    assert text == "a sks dog [2J\non grass"
    path = photo_path(workspace, subject, "001.jpg")
    assert read_caption(path, "", per_line=True) == text
    assert read_caption(path, "") == "a sks dog [2J on grass"
    with pytest.raises(UserError, match="at most 1000"):
        save_caption(workspace, subject, "001.jpg", "x" * 1001)
    save_caption(workspace, subject, "001.jpg", " ")
    assert read_caption(photo_path(workspace, subject, "001.jpg"), "") == ""


def test_a_removed_photo_takes_its_caption_along(workspace: Workspace, subject: str) -> None:
    save_caption(workspace, subject, "001.jpg", "a sks dog")
    remove_photo(workspace, subject, "001.jpg")
    folder = workspace.subject(subject) / "photos"
    assert sorted(path.name for path in folder.iterdir()) == ["002.jpg"]


@pytest.mark.parametrize("masked_loss", [False, True])
@pytest.mark.parametrize("painted", [(), ("opaque",), ("cut",), ("cut", "opaque")])
def test_each_photo_s_label_and_warning_are_what_a_run_does_with_it(
    workspace: Workspace, tmp_path: Path, painted: tuple[str, ...], masked_loss: bool
) -> None:
    """One painted mask, or masked_loss, has transparency mask the photos without a mask file."""
    subject = new_subject(workspace, "x")
    for name, alpha in (("cut", 0), ("opaque", 255)):
        image = Image.effect_noise((60, 60), 50).convert("RGBA")
        image.paste((0, 0, 0, alpha), (0, 0, 30, 60))
        image.save(tmp_path / f"{name}.png")
    names = ("cut", "opaque")
    stored = add_photos(workspace, subject, [tmp_path / f"{name}.png" for name in names]).accepted
    for name, path in zip(names, stored, strict=True):
        if name in painted:
            Image.new("L", (60, 60), 255).save(mask_path(path))
    used = uses_masks(read_subject(workspace, subject), masked_loss)
    assert used == (masked_loss or bool(painted))
    # As a run reads them.
    plan = plan_crop((60, 60), 56)
    photos = [read_photo(path, "", mask_crops=(lambda _: [plan]) if used else None)
              for path in stored]  # fmt: skip
    labels, said = {}, {}
    for shown in photos:
        mask = open_mask(shown)
        corner = mask is None or mask.getpixel((5, 30)) == 255
        use = "learned as white" if corner else "masked, not learned"
        use += " where the mask is bright" if shown.mask_path == mask_path(shown.path) else ""
        text = ["masked"] * (shown.mask_path == mask_path(shown.path))
        name = shown.path.name
        if shown.has_transparency:
            text += [f"transparent parts {use}"]
            said[name] = f"transparent parts of 1 image are {use}: {name}"
            said[name] += "" if used else "; use masked_loss to exclude them"
        if text:
            labels[name] = ", ".join(text)
    assert list(said) == [stored[0].name]
    before = read_subject(workspace, subject)
    assert mask_labels(before, 32, masked_loss) == labels
    lines = [
        (name, line)
        for name, group in photo_warnings(before, 32, masked_loss).items()
        for line in group
        if "transparent" in line
    ]
    assert lines == [*said.items()]


@pytest.mark.skipif(not (SAMPLES / "bolt_mug").is_dir(), reason="the samples are not there")
def test_a_sample_becomes_a_subject_with_its_captions(workspace: Workspace) -> None:
    subject = read_subject(workspace, take_sample(workspace, SAMPLES, "bolt_mug"))
    assert (subject.class_word, len(subject.photos)) == ("mug", 5)
    assert read_caption(subject.photos[0], "").startswith("a photo of a sks mug")
    with pytest.raises(UserError, match="there is bolt_mug, heart_teapot, ring_robot"):
        take_sample(workspace, SAMPLES, "../samples/bolt_mug")


def test_subjects_are_listed_newest_first_and_deleted(workspace: Workspace, subject: str) -> None:
    assert [one.id for one in subjects_in(workspace)] == [subject]
    delete_subject(workspace, subject)
    assert subjects_in(workspace) == []
    assert photos_in(workspace.subjects / subject) == []


def texts(folder: Path, **captions: str) -> list[Path]:
    """Caption files by their names."""
    paths = [folder / f"{name}.txt" for name in captions]
    for path, text in zip(paths, captions.values(), strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def test_text_files_are_the_captions_of_the_photos_beside_them(
    workspace: Workspace, tmp_path: Path
) -> None:
    subject = new_subject(workspace, "x")

    def add(photos: list[str], **captions: str) -> tuple[tuple[str, ...], dict[str, str]]:
        # Elsewhere each time: no two names of a folder may differ in case alone everywhere.
        folder = Path(mkdtemp(dir=tmp_path))
        files = [photo(folder / f"{name}.jpg") for name in photos]
        upload = add_photos(workspace, subject, [*texts(folder, **captions), *files])
        return upload.refused, captions_of(read_subject(workspace, subject))

    assert add(["a", "002"], a="a sks dog\n on  grass", b="x") == (
        ("b.txt: no photo is called b; add its photo too",),
        {"001.jpg": "a sks dog\non grass", "002.jpg": ""},
    )
    # Of this upload, then of an earlier one, then as the page shows it.
    assert add(["b"], A="on sand")[1] == {"001.jpg": "on sand", "002.jpg": "", "003.jpg": ""}
    captions = add(["003"], **{"003": "new", "002": "own"})[1]
    assert captions == {"001.jpg": "on sand", "002.jpg": "own", "003.jpg": "", "004.jpg": "new"}
    assert add([], **{"001": "by number"})[1]["001.jpg"] == "by number"
    (refused,), after = add([], a="x" * 1001)
    assert "at most 1000" in refused
    assert after["001.jpg"] == "by number"


def test_captions_that_are_changed_together_can_be_taken_back(
    workspace: Workspace, subject: str
) -> None:
    save_caption(workspace, subject, "001.jpg", "by hand\nand more")

    def now() -> dict[str, str]:
        return captions_of(read_subject(workspace, subject))

    before = now()
    with pytest.raises(UserError, match="nothing to undo"):
        undo_captions(workspace, subject)
    assert write_captions(workspace, subject, dict.fromkeys(before, "all the same")) == 2
    assert set(now().values()) == {"all the same"}
    assert write_captions(workspace, subject, dict.fromkeys(before, "all the same")) == 0
    assert undo_captions(workspace, subject) == 2
    assert now() == before
    undo_captions(workspace, subject)
    assert set(now().values()) == {"all the same"}
    # Of captions one of which is too long, none is written.
    with pytest.raises(UserError, match="at most 1000"):
        write_captions(workspace, subject, {"001.jpg": "new", "002.jpg": "x" * 1001})
    assert set(now().values()) == {"all the same"}
