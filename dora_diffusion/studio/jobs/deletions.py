"""Questions before a deletion, with the object, its files and their size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from dora_diffusion.config.wording import counted, quoted
from dora_diffusion.data.photos import mask_path, photos_in
from dora_diffusion.studio.jobs.image_store import ImageStore
from dora_diffusion.studio.jobs.snapshot import read_run
from dora_diffusion.studio.jobs.store import Workspace
from dora_diffusion.studio.jobs.subjects import captions_of, photo_path, read_subject

FINAL = "It cannot be restored."


def run_question(workspace: Workspace, job_id: object) -> str:
    """Return the question before a run is deleted.

    Raises:
        UserError: If the run does not exist.
    """
    job = read_run(workspace, job_id)
    exports = _files(workspace.exports / job.id)
    copies = [path for folder in job.folder.glob("photos*") for path in _photos(folder)]
    counts = [
        "its adapter" if job.has_result else "",
        _some(len(job.checkpoints), "checkpoint"),
        _some(len(job.samples), "sample image"),
        _some(len(copies), "copy of a photo", "copies of photos"),
        _some(len(exports), "exported file"),
    ]
    return _question(job.title, counts, [*_files(job.folder), *exports])


def subject_question(workspace: Workspace, subject_id: object) -> str:
    """Return the question before a subject is deleted.

    Raises:
        UserError: If the subject does not exist.
    """
    subject = read_subject(workspace, subject_id)
    counts = [
        _some(len(subject.photos), "photo"),
        _some(sum(map(bool, captions_of(subject).values())), "caption"),
        _some(sum(mask_path(photo).exists() for photo in subject.photos), "mask"),
    ]
    files = _files(workspace.subject(subject.id))
    text = f"Runs that were trained on it keep their copies. {FINAL}"
    return _question(subject.title, counts, files, text)


def photo_question(workspace: Workspace, subject_id: object, photo: object) -> str:
    """Return the question before a photo is removed from a subject.

    Raises:
        UserError: If the photo does not exist.
    """
    path = photo_path(workspace, subject_id, photo)
    companions = {"its caption": path.with_suffix(".txt"), "its mask": mask_path(path)}
    counts = [name for name, file in companions.items() if file.exists()]
    title = f"{path.name} of {read_subject(workspace, subject_id).title}"
    return _question(title, counts, [path])


def image_question(images: ImageStore, name: object) -> str:
    """Return the question before a generated image is deleted.

    Raises:
        UserError: If the image does not exist.
    """
    from dora_diffusion.sampling.images import parse_parameters

    image = images.read(name)
    prompt = parse_parameters(image.parameters)["Prompt"]
    title = f"the image {image.path.name}" + (f", {quoted(prompt)}" if prompt else "")
    return _question(title, [], [image.path])


def _question(title: str, contents: Sequence[str], files: Iterable[Path], text: str = FINAL) -> str:
    listed = ", ".join(filter(None, contents))
    size = sum(path.stat().st_size for path in files) / 2**20
    return f"Delete {title}{f' with {listed}' if listed else ''} ({size:,.1f} MB)? {text}"


def _some(count: int, noun: str, plural: str | None = None) -> str:
    return counted(count, noun, plural) if count else ""


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _photos(folder: Path) -> list[Path]:
    try:
        return list(photos_in(folder))
    except OSError:  # not a folder, or not readable
        return []
