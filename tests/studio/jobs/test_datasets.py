"""Data sets as zips: what comes out goes in again, and what would do harm does not."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from PIL import Image

from dora_diffusion.data.photos import mask_path
from dora_diffusion.studio.jobs import datasets
from dora_diffusion.studio.jobs.datasets import export_dataset, import_dataset
from dora_diffusion.studio.jobs.store import UserError, Workspace
from dora_diffusion.studio.jobs.subjects import (
    captions_of,
    delete_subject,
    new_subject,
    read_subject,
    save_caption,
    subjects_in,
)
from tests.studio.jobs.helpers import photo


def test_a_data_set_that_is_exported_is_imported_as_it_was(
    workspace: Workspace, subject: str
) -> None:
    save_caption(workspace, subject, "001.jpg", "a sks dog\non grass")
    before = read_subject(workspace, subject)
    mask = Image.linear_gradient("L").resize(Image.open(before.photos[1]).size)
    mask.save(mask_path(before.photos[1]))
    made, upload = import_dataset(workspace, export_dataset(workspace, subject))
    after = read_subject(workspace, made)
    assert (len(upload.accepted), upload.captions, upload.refused) == (2, ("001.jpg",), ())
    assert captions_of(after) == captions_of(before)
    assert after.title == "dog"
    assert not mask_path(after.photos[0]).exists()
    assert Image.open(mask_path(after.photos[1])).tobytes() == mask.tobytes()
    for old, new in zip(before.photos, after.photos, strict=True):
        assert Image.open(old).size == Image.open(new).size
    delete_subject(workspace, subject)
    assert not (workspace.exports / subject).exists()
    with pytest.raises(UserError, match="no photos yet"):
        export_dataset(workspace, new_subject(workspace, "Nothing"))


def zipped(path: Path, files: dict[str, bytes], **options: object) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_folders_of_other_programs_are_taken_photo_by_photo(
    workspace: Workspace, tmp_path: Path
) -> None:
    good = photo(tmp_path / "good.jpg", (96, 64)).read_bytes()
    file = zipped(tmp_path / "My dog.zip", {
        "10_sks dog/a.JPG": good, "10_sks dog/a.txt": b"a sks dog", "10_sks dog/b.jpg": b"text",
        "__MACOSX/10_sks dog/._a.JPG": b"x", ".DS_Store": b"x", "readme.md": b"x",
        "10_sks dog/c.mov": b"x", "d.MP4": b"x", "__MACOSX/._d.MP4": b"x", "e.gif": b"x",
        "10_sks dog/a.mask.png": photo(tmp_path / "m.png", (40, 40)).read_bytes(),
    })  # fmt: skip
    made, upload = import_dataset(workspace, file)
    assert captions_of(read_subject(workspace, made)) == {"001.jpg": "a sks dog"}
    assert "b.jpg: not a JPEG" in upload.refused[0]
    assert upload.refused[1:] == (
        "a.mask.png: of another shape than its photo; left out",
        "left out e.gif; convert them to JPEG or PNG to use them",
        "left out c.mov, d.MP4; save frames of these videos as JPEG or PNG to use them",
    )
    clip = zipped(tmp_path / "clip.zip", {"clip.mp4": b"x"})
    with pytest.raises(UserError, match=r"no photo that can be taken: left out clip\.mp4; save"):
        import_dataset(workspace, clip)


def link(path: Path) -> Path:
    entry = zipfile.ZipInfo("a.jpg")
    entry.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(entry, "/etc/passwd")
    return path


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: zipped(p, {"../a.jpg": b"x"}), "leads out of it"),
        (lambda p: zipped(p, {"a/../../b.txt": b"x"}), "leads out of it"),
        (lambda p: zipped(p, {"/etc/a.jpg": b"x"}), "leads out of it"),
        (lambda p: zipped(p, {"..\\a.jpg": b"x"}), "leads out of it"),
        (lambda p: zipped(p, {"C:\\a.jpg": b"x"}), "leads out of it"),
        (link, "is a link"),
        (lambda p: zipped(p, {"a/1.jpg": b"x", "b/1.jpg": b"x"}), "two files of the name 1.jpg"),
        (lambda p: zipped(p, {f"{n}.jpg": b"x" for n in range(201)}), "holds 201 files"),
        (
            lambda p: zipped(p, {"a.txt": b" " * 70_000}, compression=zipfile.ZIP_DEFLATED),
            "too large: a.txt has over 64 kB",
        ),
        (
            lambda p: zipped(p, {"a.png": b"\0" * 3_000_000}, compression=zipfile.ZIP_DEFLATED),
            "too large: a.png has over 1953 kB",
        ),
        (lambda p: zipped(p, {"a.txt": b"only a caption"}), "holds no photo that can be taken"),
        (lambda p: p.write_bytes(b"text") and p, "not a zip that can be read"),
        (lambda p: p, "not an ordinary file"),
    ],
)
def test_what_would_do_harm_is_refused_and_leaves_nothing(
    workspace: Workspace, tmp_path: Path, make, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "MAX_BYTES", 2_000_000)
    with pytest.raises(UserError, match=reason):
        import_dataset(workspace, make(tmp_path / "set.zip"))
    assert subjects_in(workspace) == []
    assert list(workspace.cache.iterdir()) == []
    assert not (tmp_path / "a.jpg").exists()
