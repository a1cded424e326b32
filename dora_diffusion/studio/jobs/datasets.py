"""Import and export of a subject's photos, captions and masks as a zip."""

from __future__ import annotations

import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from PIL import Image

from dora_diffusion.data.images import PhotoError, decode_photo
from dora_diffusion.data.photos import MASK_SUFFIX, PHOTO_SUFFIXES, left_out, mask_path
from dora_diffusion.formats.files.atomic import atomic_file
from dora_diffusion.formats.files.runs import file_stem
from dora_diffusion.studio.jobs import subjects
from dora_diffusion.studio.jobs.store import UserError, Workspace
from dora_diffusion.studio.jobs.uploads import (
    MAX_BYTES,
    MAX_FILE,
    MAX_PHOTOS,
    Upload,
    require_file,
    shown,
)

_MOST_ENTRIES = 4 * MAX_PHOTOS
_MOST_TEXT = 64 * 2**10
# Errors for zips that are damaged, encrypted, truncated, or compressed by an unknown method.
_UNREADABLE = (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error)


def export_dataset(workspace: Workspace, subject_id: object) -> Path:
    """Write a subject's photos, captions and masks to a zip for download.

    Raises:
        UserError: If the subject does not exist, or has no photos.
    """
    subject = subjects.read_subject(workspace, subject_id)
    if not subject.photos:
        raise UserError("the subject has no photos yet; add some first")
    output = workspace.exports / subject.id / f"{file_stem(subject.title, 'dataset')}.zip"
    output.parent.mkdir(exist_ok=True)
    # No compression: photos are already compressed.
    with atomic_file(output) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for photo in subject.photos:
            for file in (photo, photo.with_suffix(".txt"), mask_path(photo)):
                if file.is_file():
                    archive.write(file, file.name)
    return output


def import_dataset(workspace: Workspace, file: Path) -> tuple[str, Upload]:
    """Create a subject from a zip of photos, captions and masks. Returns its id and the upload.

    Photos are checked like uploads. Files whose names differ only in the suffix belong together.

    Raises:
        UserError: If the zip cannot be read, is too large, or contains no usable photo. No subject
            is created then.
    """
    require_file(file, MAX_FILE)
    with tempfile.TemporaryDirectory(dir=workspace.cache) as folder:
        try:
            with zipfile.ZipFile(file) as archive:
                files = list(_extracted(archive, Path(folder)))
                paths = map(_path_of, archive.infolist())
                others = left_out([path.name for path in paths if not _is_hidden(path)])
        except _UNREADABLE as error:
            raise UserError(f"{shown(file.name)}: not a zip that can be read: {error}") from error
        masks = {f.name[: -len(MASK_SUFFIX)]: f for f in files if f.name.endswith(MASK_SUFFIX)}
        photos_and_texts = [path for path in files if path not in masks.values()]
        subject_id = subjects.new_subject(workspace, shown(file.stem, 60))
        try:
            upload = subjects.add_photos(workspace, subject_id, photos_and_texts)
            if not upload.accepted:
                refused = [*upload.refused, *others]
                reason = f": {refused[0]}" if refused else ""
                raise UserError(f"{shown(file.name)} holds no photo that can be taken{reason}")
        except BaseException:
            subjects.delete_subject(workspace, subject_id)
            raise
        refused = [line for p in upload.accepted if (line := _add_mask(p, upload, masks))]
    return subject_id, Upload(
        upload.accepted,
        (*upload.refused, *refused, *map(shown, others)),
        upload.names,
        upload.captions,
    )


def _add_mask(photo: Path, upload: Upload, masks: dict[str, Path]) -> str:
    """Write a photo's mask. Returns an error line; empty if the mask is valid or missing."""
    mask = masks.get(upload.names[photo.name])
    if mask is None:
        return ""
    try:
        image = decode_photo(mask)[0].convert("L")
        with Image.open(photo) as whole:
            size = whole.size
        if abs(image.width * size[1] - image.height * size[0]) > image.width + image.height:
            return f"{mask.name}: of another shape than its photo; left out"
        image.resize(size).save(mask_path(photo))
    except PhotoError as error:
        return shown(str(error))
    return ""


def _extracted(archive: zipfile.ZipFile, folder: Path) -> Iterator[Path]:
    """Extract photos, captions and masks from all folders of a zip by their bare names.

    Raises:
        UserError: If a path leads out of the zip, a name is repeated, or the zip is too large.
    """
    entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    if len(entries) > _MOST_ENTRIES:
        raise UserError(f"the zip holds {len(entries)} files; at most {_MOST_ENTRIES} are taken")
    left = MAX_FILE
    for entry in entries:
        path = _path_of(entry)
        name, suffix = path.name, path.suffix.lower()
        if ".." in path.parts or path.is_absolute() or ":" in entry.filename:
            raise UserError(f"the zip names {shown(entry.filename)}, which leads out of it")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise UserError(f"the zip holds {shown(entry.filename)}, which is a link")
        if _is_hidden(path) or suffix not in (*PHOTO_SUFFIXES, ".txt"):
            continue
        target = folder / f"{shown(path.stem, 100).replace('?', '_')}{suffix}"
        if target.exists():
            raise UserError(f"the zip holds two files of the name {shown(name)}; rename one")
        # Read to the limit: sizes in the header may be wrong.
        most = min(left, _MOST_TEXT if suffix == ".txt" else MAX_BYTES)
        with archive.open(entry) as source:
            content = source.read(most + 1)
        if len(content) > most:
            raise UserError(f"the zip is too large: {shown(name)} has over {most // 2**10} kB")
        left -= len(content)
        target.write_bytes(content)
        yield target


def _path_of(entry: zipfile.ZipInfo) -> PurePosixPath:
    return PurePosixPath(entry.filename.replace("\\", "/"))


def _is_hidden(path: PurePosixPath) -> bool:
    return path.name.startswith((".", "__")) or "__MACOSX" in path.parts
