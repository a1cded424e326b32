"""Subjects on disk: photos, captions, masks and crops, and previews of training.

::

    subjects/<id>/
      subject.json    title, class word, token, name of the sample, original names of the photos,
                      and the captions before their last joint change
      photos/         training data: 001.jpg, 001.txt, 001.mask.png
      originals/      photos before a manual crop
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dora_diffusion.cli.console.errors import explain
from dora_diffusion.config import read_config_file
from dora_diffusion.data.captions import read_caption
from dora_diffusion.data.checks import PhotoWarning, check_photos, transparency_use
from dora_diffusion.data.crops import cut, plan_crop
from dora_diffusion.data.images import open_photo
from dora_diffusion.data.photos import mask_path, photos_in, read_photos
from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.studio.jobs import store
from dora_diffusion.studio.jobs.store import DamagedFile, UserError, Workspace
from dora_diffusion.studio.jobs.uploads import Upload, original_of, shown, store_photos

CAPTION_LIMIT = 1000
PREVIEW_SIDE = 320
_SUBJECT = "subject.json"


@dataclass(frozen=True)
class StoredSubject:
    """A subject, read from its folder; ``sample`` is the bundled sample that it is a copy of."""

    id: str
    title: str
    class_word: str
    token: str
    photos: tuple[Path, ...]
    sample: str = ""

    @property
    def folder(self) -> Path:
        """Folder of the training photos."""
        return self.photos[0].parent


def subjects_in(workspace: Workspace) -> list[StoredSubject]:
    """Return all subjects, newest first."""
    return [read_subject(workspace, name) for name in reversed(store.ids_in(workspace.subjects))]


def read_subject(workspace: Workspace, subject_id: object) -> StoredSubject:
    """Read a subject. If its folder is damaged, its title is the error.

    Raises:
        UserError: If the subject does not exist.
    """
    folder, photos = workspace.subject(subject_id), tuple[Path, ...]()
    try:
        values = store.read_object(folder / _SUBJECT) or {}
        photos = tuple(photos_in(folder / "photos"))
    except (DamagedFile, OSError) as error:
        values = {"title": f"Damaged subject: {explain(error)[1]}"}
        with contextlib.suppress(OSError):
            photos = tuple(photos_in(folder / "photos"))
    return StoredSubject(
        id=folder.name,
        title=str(values.get("title") or "Subject"),
        class_word=str(values.get("class_word") or ""),
        token=str(values.get("token", "sks")),
        photos=photos,
        sample=str(values.get("sample") or ""),
    )


def new_subject(
    workspace: Workspace, title: str, class_word: str = "", token: str = "sks", sample: str = ""
) -> str:
    """Create an empty subject. Returns its id."""
    subject_id = store.new_id()
    folder = workspace.subjects / subject_id
    (folder / "photos").mkdir(parents=True)
    values = {"title": title, "class_word": class_word, "token": token, "sample": sample}
    store.write_json(folder / _SUBJECT, values | {"created": time.time()})
    return subject_id


def keep_words(workspace: Workspace, subject_id: object, class_word: object, token: object) -> None:
    """Save a subject's class word and token for later runs; both are empty for a style.

    Raises:
        UserError: If the subject does not exist, or a word is too long.
    """
    folder = workspace.subject(subject_id)
    words = {
        "class_word": store.clean_text(class_word, 100, "class"),
        "token": store.clean_text(token, 50, "token"),
    }
    store.write_json(folder / _SUBJECT, store.read_json(folder / _SUBJECT) | words)


def add_photos(workspace: Workspace, subject_id: str, files: Sequence[str | Path]) -> Upload:
    """Check uploaded photos and add them to a subject, with their captions.

    A text file is the caption of the photos with its name, in this upload or an earlier one.

    Raises:
        UserError: If the subject does not exist, or would have too many photos.
    """
    folder, paths = workspace.subject(subject_id), [Path(file) for file in files]
    texts = [path for path in paths if path.suffix == ".txt"]
    upload = store_photos([path for path in paths if path.suffix != ".txt"], folder / "photos")
    values = store.read_json(folder / _SUBJECT)
    earlier = values.get("names") or {}
    values["names"] = earlier | dict(upload.names)
    if upload.accepted:  # With other photos the subject is no longer the sample.
        values["sample"] = ""
    store.write_json(folder / _SUBJECT, values)
    stored = {path.name: path.stem for path in photos_in(folder / "photos")}
    captions, refused = _captions_beside(texts, [upload.names, earlier, stored])
    write_captions(workspace, subject_id, captions)
    return dataclasses.replace(
        upload, refused=(*upload.refused, *refused), captions=tuple(captions)
    )


def _captions_beside(
    texts: Sequence[Path], known: Sequence[Mapping[str, str]]
) -> tuple[dict[str, str], list[str]]:
    """Return captions by photo name, and a line for each text file without a photo.

    Args:
        texts: The text files.
        known: Mappings of photo names to original names; the first with a text's name counts.
    """
    captions, refused = dict[str, str](), []
    for text in texts:
        original = text.stem.casefold()
        matches = (
            [n for n, stem in names.items() if stem.casefold() == original] for names in known
        )
        try:
            photos = next(filter(None, matches), [])
            if not photos:
                raise UserError(f"{text.name}: no photo is called {text.stem}; add its photo too")
            caption = _clean_caption(read_caption(text, "", per_line=True))
            captions |= dict.fromkeys(photos, caption)
        except (ValueError, OSError) as error:
            refused.append(shown(str(error)))
    return captions, refused


def take_sample(workspace: Workspace, samples: Path, name: str) -> str:
    """Create a subject from a bundled sample. Returns its id.

    Raises:
        UserError: If the sample does not exist.
    """
    names = sample_names(samples)
    if name not in names:
        raise UserError(
            f"there is no sample subject {name!r}; there is {', '.join(names) or 'none here'}"
        )
    settings = read_config_file(samples / name / "config.yaml")
    title = name.replace("_", " ").capitalize()
    word = str(settings.get("class_word") or "")
    subject_id = new_subject(workspace, title, word, sample=name)
    folder = workspace.subjects / subject_id / "photos"
    photos = photos_in(samples / name)
    for photo, copy in zip(photos, store_photos(photos, folder).accepted, strict=True):
        caption = photo.with_suffix(".txt")
        if caption.is_file():
            shutil.copyfile(caption, copy.with_suffix(".txt"))
    return subject_id


def sample_names(samples: Path) -> list[str]:
    """Return the names of the bundled samples."""
    return sorted(path.parent.name for path in samples.glob("*/config.yaml"))


def save_caption(workspace: Workspace, subject_id: object, photo: object, text: object) -> str:
    """Write a photo's caption and return it. Without one, the instance prompt is used."""
    path = photo_path(workspace, subject_id, photo)
    caption = _clean_caption(text)
    if caption:
        save_text(path.with_suffix(".txt"), caption + "\n")
    else:
        path.with_suffix(".txt").unlink(missing_ok=True)
    return caption


def _clean_caption(text: object) -> str:
    lines = (
        store.clean_text(line, CAPTION_LIMIT, "caption") for line in str(text or "").splitlines()
    )
    return "\n".join(filter(None, lines))


def captions_of(subject: StoredSubject) -> dict[str, str]:
    """Return each photo's caption, line by line, by photo name; empty if missing or damaged."""
    captions = {}
    for photo in subject.photos:
        captions[photo.name] = ""
        with contextlib.suppress(ValueError, OSError):
            captions[photo.name] = read_caption(photo, "", per_line=True)
    return captions


def write_captions(workspace: Workspace, subject_id: object, captions: Mapping[str, str]) -> int:
    """Write captions of many photos, and save the previous ones. Returns how many changed.

    Raises:
        UserError: If a caption is too long; then none is written.
    """
    before = captions_of(read_subject(workspace, subject_id))
    new = {name: _clean_caption(text) for name, text in captions.items()}
    changed = [name for name, text in new.items() if name in before and text != before[name]]
    if changed:
        path = workspace.subject(subject_id) / _SUBJECT
        store.write_json(
            path, store.read_json(path) | {"captions": {name: before[name] for name in changed}}
        )
    for name in changed:
        save_caption(workspace, subject_id, name, new[name])
    return len(changed)


def undo_captions(workspace: Workspace, subject_id: object) -> int:
    """Undo the last joint change of captions; a second call redoes it.

    Raises:
        UserError: If there was no such change.
    """
    previous = store.read_json(workspace.subject(subject_id) / _SUBJECT).get("captions")
    if not previous:
        raise UserError("the captions of this subject were not changed together; nothing to undo")
    return write_captions(workspace, subject_id, previous)


def photo_path(workspace: Workspace, subject_id: object, photo: object) -> Path:
    """Return the path of a photo by its name.

    Raises:
        UserError: If the subject or the photo does not exist.
    """
    folder = workspace.subject(subject_id) / "photos"
    path = store.confined(folder, photo)
    if path not in photos_in(folder):
        raise UserError("this photo no longer exists; choose another one")
    return path


def remove_photo(workspace: Workspace, subject_id: object, photo: object) -> None:
    """Delete a photo with its caption and mask."""
    path = photo_path(workspace, subject_id, photo)
    for file in (path.with_suffix(".txt"), mask_path(path), original_of(path), path):
        file.unlink(missing_ok=True)


def delete_subject(workspace: Workspace, subject_id: object) -> bool:
    """Delete a subject; runs keep their copies. Returns the result of `remove_folder`."""
    folder = workspace.subject(subject_id)
    if folder.name in store.ids_in(workspace.exports):
        store.remove_folder(workspace.exports / folder.name)
    return store.remove_folder(folder)


def training_crop(photo: Path, side: int = PREVIEW_SIDE, *, masked: bool = True) -> Image.Image:
    """Return a photo's training crop (the middle square) at a given size, masked parts dimmed."""
    crop, mask = _crop(photo, *_stamps(photo), side)
    if mask is None or not masked:
        return crop
    return Image.composite(crop, crop.point(lambda value: value // 4), mask)


def mask_overlay(photo: Path, side: int) -> Image.Image | None:
    """Return an overlay (RGBA) that darkens the masked parts of a training crop; None if none."""
    mask = _crop(photo, *_stamps(photo), side)[1]
    if mask is None:
        return None
    overlay = Image.new("RGBA", mask.size)
    overlay.putalpha(mask.point(lambda value: (255 - value) * 3 // 5))
    return overlay


def _stamps(photo: Path) -> tuple[int, int]:
    mask = mask_path(photo)
    return photo.stat().st_mtime_ns, mask.stat().st_mtime_ns if mask.exists() else 0


@functools.lru_cache(maxsize=256)
def _crop(
    photo: Path, modified: int, mask_modified: int, side: int
) -> tuple[Image.Image, Image.Image | None]:
    """Return the crops of a photo and of its mask ("L"), if it has one."""
    image, mask = open_photo(photo), None
    record = plan_crop((image.height, image.width), side)
    if mask_modified:
        mask = cut(open_photo(mask_path(photo)).convert("L").resize(image.size), record)
    return cut(image, record), mask


def uses_masks(subject: StoredSubject, masked_loss: object) -> bool:
    """Return whether a run masks the loss of a subject: if it is asked to, or a mask is painted."""
    return bool(masked_loss) or any(mask_path(photo).exists() for photo in subject.photos)


def photo_warnings(
    subject: StoredSubject, resolution: int, masked_loss: object = False
) -> dict[str, list[str]]:
    """Return warnings by photo name; the key ``""`` has the warnings about all photos.

    Args:
        subject: The subject.
        resolution: Training resolution in pixels.
        masked_loss: Whether the run is asked to mask the loss.
    """
    warnings: dict[str, list[str]] = {}
    for warning in _checked(subject, resolution, masked_loss)[0]:
        for name in warning.names or ("",):
            warnings.setdefault(name, []).append(warning.message)
    return warnings


def mask_labels(
    subject: StoredSubject, resolution: int, masked_loss: object = False
) -> dict[str, str]:
    """Return labels by photo name for photos that are masked in training or have transparency.

    The arguments are as in `photo_warnings`.
    """
    transparent = _checked(subject, resolution, masked_loss)[1]
    labels = {}
    for photo in subject.photos:
        use = transparent.get(photo.name)
        label = ["masked"] * mask_path(photo).exists() + [f"transparent parts {use}"] * bool(use)
        if label:
            labels[photo.name] = ", ".join(label)
    return labels


def _checked(
    subject: StoredSubject, resolution: int, masked_loss: object
) -> tuple[list[PhotoWarning], dict[str, str]]:
    """Return warnings about photos, and the use of transparent parts by photo name."""
    stamps = tuple((str(path), *_stamps(path)) for path in subject.photos)
    return _check(stamps, resolution, uses_masks(subject, masked_loss))


@functools.lru_cache(maxsize=32)
def _check(
    stamps: tuple[tuple[str, int, int], ...], resolution: int, is_masked: bool
) -> tuple[list[PhotoWarning], dict[str, str]]:
    paths = [Path(path) for path, *_ in stamps]
    try:
        photos = read_photos(paths, "", skip_unreadable=True, measure=True)
    except (ValueError, OSError) as error:  # no readable photo, or a damaged caption
        return [PhotoWarning("unreadable", (), str(error))], {}
    uses = {photo.path.name: transparency_use(photo, is_masked) for photo in photos}
    return check_photos(photos, resolution, uses_masks=is_masked), uses
