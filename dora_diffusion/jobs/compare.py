"""The job of comparing checkpoints: fixed-seed images, judged as ``evaluate`` judges them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dora_diffusion.jobs.checkpoints import adapter_of, candidates
from dora_diffusion.jobs.comparison import (
    BASE_NAME,
    ComparedCheckpoint,
    comparison_folder,
    write_comparison,
)
from dora_diffusion.jobs.errors import RequestError
from dora_diffusion.jobs.loading import ModelFiles, load_model
from dora_diffusion.jobs.questions import Questions, questions_about
from dora_diffusion.jobs.queue import create_job
from dora_diffusion.jobs.records import CompareRequest, ProgressFile
from dora_diffusion.jobs.snapshot import Job, read_run
from dora_diffusion.jobs.workspace import Workspace

if TYPE_CHECKING:
    from PIL.Image import Image

    from dora_diffusion.models.components import Components

_SHOWN_OTHERS = 3
_SIDE = 160


def start_comparison(workspace: Workspace, run: Job) -> str:
    """Queue a job that compares a run's checkpoints. Returns its id.

    Raises:
        RequestError: If there is nothing to compare.
    """
    names = candidates(run)
    if not names:
        raise RequestError("this run has no checkpoint yet; wait until it has saved one")
    request = CompareRequest(run=run.id, base=run.base, checkpoints=names)
    return create_job(workspace, request, f"Compare {run.title}")


def comparing(jobs: Sequence[Job], run_id: str) -> Job | None:
    """The newest comparison job of a run."""
    about_it = (job for job in jobs if job.kind == "compare" and job.request.run == run_id)
    return next(about_it, None)


def run_comparison(workspace: Workspace, request: CompareRequest, note: ProgressFile) -> None:
    """Ask every checkpoint of a run for the same images, and measure them."""
    note(phase="loading the model")
    run = read_run(workspace, request.run)
    paths = {name: adapter_of(run, name) for name in request.checkpoints}
    adapters = {name: path for name, path in paths.items() if path is not None}

    def show(done: int, total: int) -> None:
        note(often=done < total, phase="generating images", done=done, total=total)

    folder = comparison_folder(workspace, run.id)
    compare(request.base, adapters, questions_about(run), folder, show, ModelFiles.of(run.settings))


def compare(
    base: str,
    adapters: Mapping[str, Path],
    questions: Questions,
    folder: Path,
    on_image: Callable[[int, int], None],
    files: ModelFiles | None = None,
) -> list[ComparedCheckpoint]:
    """Ask the base and every adapter, write images and figures into a folder.

    Args:
        base: The base model.
        adapters: Name -> adapter file.
        questions: What to ask.
        folder: Where the images and comparison.json go.
        on_image: Called with images done and in all.
        files: How the base is loaded.

    Returns:
        The rows of the comparison; an adapter that gives NaN or black images has none.

    Raises:
        BrokenImageError: If the base gives such images.
    """
    from dora_diffusion.generate import BrokenImageError, generate_images

    components = load_model(base, None, files or ModelFiles())
    folder.mkdir(parents=True, exist_ok=True)
    count = len(questions.requests)
    total = (1 + len(adapters)) * count
    rows: list[ComparedCheckpoint] = []
    notes = list(questions.notes)
    before: list[Image] = []
    for number, name in enumerate((BASE_NAME, *adapters)):

        def on_step(step: int, steps: int, done: int = number * count) -> None:
            on_image(done + step * count // steps, total)

        try:
            with _adapter_on(components, adapters.get(name)):
                images = generate_images(
                    components, questions.prompts, questions.seeds, questions.settings,
                    on_step=on_step, require_finite=True,
                )  # fmt: skip
        except BrokenImageError as error:
            if name == BASE_NAME:
                raise
            notes.append(f"{name} was left out: {error}.")
            continue
        before = before or images
        similarities, drift = questions.judge(images, before)
        similarity = sum(similarities) / len(similarities) if similarities else None
        strips = _write_strips(folder, name, images, questions.subjects)
        rows.append(ComparedCheckpoint(name, similarity, drift, strips, tuple(similarities or ())))
        on_image((number + 1) * count, total)
    write_comparison(folder, rows, notes, questions.similar_to)
    return rows


@contextmanager
def _adapter_on(components: Components, adapter: Path | None) -> Iterator[None]:
    """The model with an adapter, and without it again afterwards."""
    from dora_diffusion.adapters.inject import remove_adapters
    from dora_diffusion.adapters.state import load_adapter

    if adapter is not None:
        load_adapter(components.adaptable(), adapter, family=components.family.name)
    try:
        yield
    finally:
        for model in components.adaptable().values():
            remove_adapters(model)


def _write_strips(
    folder: Path, name: str, images: Sequence[Image], subjects: int
) -> tuple[Path, Path]:
    """The subject, and other things, each as a strip. Small images are enlarged."""
    from dora_diffusion.generate import image_grid
    from dora_diffusion.images import save_png

    def strip(file: str, shown: Sequence[Image]) -> Path:
        thumbnails = [_thumbnail(image) for image in shown]
        return save_png(image_grid(thumbnails, columns=len(shown), gap=4), folder / file)

    others = images[subjects : subjects + _SHOWN_OTHERS]
    return strip(f"{name}.png", images[:subjects]), strip(f"{name}-others.png", others)


def _thumbnail(image: Image) -> Image:
    from PIL import Image as PILImage

    scale = _SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, PILImage.Resampling.LANCZOS)
