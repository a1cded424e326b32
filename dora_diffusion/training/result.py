"""What a run leaves in its folder: settings, the adapter or model, and the card."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from dora_diffusion import __version__, system
from dora_diffusion.config import TrainConfig
from dora_diffusion.data.captions import tag_frequency
from dora_diffusion.formats.adapter.metadata import (
    UNET_LAYERS,
    AdapterMetadata,
)
from dora_diffusion.formats.checkpoint.schedule import schedule_facts
from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.formats.names.unet import UNetLayout
from dora_diffusion.images import save_png, thumbnail
from dora_diffusion.training.card import model_card
from dora_diffusion.training.folders import UNFINISHED
from dora_diffusion.training.metrics import naming_step
from dora_diffusion.training.samples import SampleWriter, warning_of_full_disk
from dora_diffusion.training.session import Session


def write_result(session: Session, folder: Path, steps: int, samples: SampleWriter) -> Path:
    """Write what was learned, then its card and samples, which show the written file. Returns it.

    A result of before is replaced when the new one was read back, and its numbers are finite.

    Raises:
        TrainingError: If they are not.
        DiskFullError: If it cannot be written; samples and card are a warning.
    """
    weights, metadata = session.weights, result_metadata(session, steps)
    write = weights.writer()
    # On the same disk, and beside what a crash may leave of it: see `clear_folder`.
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=folder) as place:
        new = write(weights.result(Path(place)), metadata)
        with naming_step(weights.noun, steps):
            weights.check(new)
        written = folder / new.relative_to(place)
        if written.is_dir():
            shutil.rmtree(written)
        system.replace(new, written)
    weights.write_copies(folder, metadata)
    weights.reload(written)

    def show(grid: Image.Image) -> None:
        if not session.config.is_full:
            write(folder, _with_thumbnail(metadata, grid))

    lost = f"the {weights.noun} is written, but not all of its samples and card"
    with warning_of_full_disk(lost):
        if session.config.num_validation_images:
            samples.of_result(steps, show)
        _write_card(session, folder, written, steps, samples.files)
    return written


def result_metadata(session: Session, steps: int) -> AdapterMetadata:
    """The metadata that go into the result after so many optimizer steps."""
    components, subject = session.components, session.subject
    return AdapterMetadata(
        family=components.family.name,
        base_model=session.config.pretrained_model_name_or_path,
        trigger=subject.trigger,
        resolution=session.resolution,
        extra={
            **schedule_facts(components.scheduler.config),
            "training_steps": str(steps),
            "software": f"dora_diffusion {__version__}",
            **_variant(session.config),
            UNET_LAYERS: UNetLayout.from_config(components.unet.config).text(),
        },
        tags=(subject.class_word,) if subject.class_word else (),
        tag_frequency=tag_frequency(session.dataset.captions),
    )


def _variant(config: TrainConfig) -> dict[str, str]:
    """How an adapter was trained, where that was not A and B from their usual start."""
    if config.is_full:
        return {}
    usual = TrainConfig()
    names = ("init", "parametrization")
    return {n: getattr(config, n) for n in names if getattr(config, n) != getattr(usual, n)}


def _with_thumbnail(metadata: AdapterMetadata, shown: Image.Image) -> AdapterMetadata:
    """Metadata with what adapter managers show: a sample, never a photo of somebody's."""
    with tempfile.TemporaryDirectory() as place:
        file = save_png(shown, Path(place) / "thumbnail.png")
        return dataclasses.replace(metadata, thumbnail=thumbnail(file))


def _write_card(
    session: Session, folder: Path, written: Path, steps: int, samples: Mapping[str, Path]
) -> None:
    titles = {"adapted": "With the adapter", "base": "Without it, at the same seeds"}
    if session.config.is_full:
        titles = {"adapted": "Fine-tuned", "base": "The base model, at the same seeds"}
    images = {
        title: samples[name].relative_to(folder).as_posix()
        for name, title in titles.items()
        if name in samples
    }
    metadata, report = result_metadata(session, steps), str(session.weights.report)
    card = model_card(session.config, session.subject, metadata, written, report, images)
    save_text(folder / "README.md", card)
