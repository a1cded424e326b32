"""Files that a run leaves in its folder: settings, the adapter or model, and the card."""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from dora_diffusion import __version__, system
from dora_diffusion.config import TrainConfig
from dora_diffusion.data.captions import stated_rules
from dora_diffusion.formats.adapter.embeddings import EMBEDDINGS
from dora_diffusion.formats.adapter.metadata import (
    CAPTIONS,
    READING,
    UNET_LAYERS,
    AdapterMetadata,
)
from dora_diffusion.formats.checkpoint.schedule import schedule_facts
from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.formats.names.modules import UNetLayout
from dora_diffusion.sampling.images import save_png, thumbnail
from dora_diffusion.training.engine.accelerator import shards_model
from dora_diffusion.training.inputs.subject import caption_rules
from dora_diffusion.training.results.card import VALIDATION_LOSS, model_card
from dora_diffusion.training.results.checkpoint import read_state, restore_weights
from dora_diffusion.training.results.folders import UNFINISHED
from dora_diffusion.training.results.metrics import naming_step
from dora_diffusion.training.results.samples import SampleWriter, warning_of_full_disk
from dora_diffusion.training.session import Session
from dora_diffusion.training.trainable.adapters import Writer


def take_best(session: Session, steps: int, checkpoints: Mapping[int, Path]) -> int:
    """Load the weights of the lowest validation loss into the model. Returns their step.

    Args:
        session: Of a run that holds out photos, after its last step.
        steps: Optimizer steps done, whose weights are in the model.
        checkpoints: What can be returned to, by step.

    Warns:
        UserWarning: If the lowest is of a step without a checkpoint, or no lower than the base's.
    """
    validation = session.validation
    assert validation is not None
    best, lowest = validation.best({*checkpoints, steps}), validation.best()
    if best is None:
        return steps
    if best != lowest:
        warnings.warn(
            f"the validation loss was lowest at step {lowest}, of which there is no checkpoint: "
            f"the result is that of step {best}",
            stacklevel=4,
        )
    before = validation.losses.get(0, math.inf)
    if validation.losses[best] >= before:
        warnings.warn(
            f"at no step is the validation loss lower than the base model's ({before:.4g}): a "
            "lower learning rate or more photos may help",
            stacklevel=4,
        )
    if best != steps:
        restore_weights(session, read_state(checkpoints[best]))
    return best


def write_result(
    session: Session, folder: Path, steps: int, samples: SampleWriter
) -> tuple[Path, float | None]:
    """Write what was learned, then its card and samples, which show the written file.

    Returns the file, and of full fine-tuning the share of what was learned that it keeps.

    A result of before is replaced when the new one was read back, and its numbers are finite. Where
    the model is sharded all processes call it, and the first one writes.

    Raises:
        TrainingError: If they are not.
        DiskFullError: If it cannot be written; samples and card are a warning.
    """
    weights, metadata, accelerator = (
        session.weights, result_metadata(session, steps), session.accelerator,
    )  # fmt: skip
    write = weights.writer()
    written = weights.result(folder)
    if accelerator.is_main_process:
        written = _write_weights(session, folder, steps, write, metadata)
    if shards_model(accelerator):
        accelerator.wait_for_everyone()
    kept = weights.reload(written)

    def show(grid: Image.Image) -> None:
        if not session.config.is_full and accelerator.is_main_process:
            write(folder, _with_thumbnail(metadata, grid))

    lost = f"the {weights.noun} is written, but not all of its samples and card"
    with warning_of_full_disk(lost):
        if session.config.num_validation_images:
            samples.of_result(steps, show)
        if accelerator.is_main_process:
            _write_card(session, folder, written, steps, samples.files)
    return written, kept


def _write_weights(
    session: Session, folder: Path, steps: int, write: Writer, metadata: AdapterMetadata
) -> Path:
    weights = session.weights
    # On the same disk, and beside what a crash may leave of it: see `clear_folder`.
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=folder) as place:
        new = write(weights.result(Path(place)), metadata)
        with naming_step(weights.noun, steps):
            weights.check(new)
        written = folder / new.relative_to(place)
        for file in Path(place).glob(f"{EMBEDDINGS}/*"):
            (folder / EMBEDDINGS).mkdir(exist_ok=True)
            system.replace(file, folder / EMBEDDINGS / file.name)
        if written.is_dir():
            shutil.rmtree(written)
        system.replace(new, written)
    weights.write_copies(folder, metadata, write)
    return written


def result_metadata(session: Session, steps: int) -> AdapterMetadata:
    """The metadata that go into the result after so many optimizer steps."""
    components = session.components
    class_words = dict.fromkeys(subject.class_word for subject in session.subjects)
    return AdapterMetadata(
        family=components.family.name,
        base_model=session.config.pretrained_model_name_or_path,
        trigger=" ".join(filter(None, (session.trigger, *session.subjects[0].words))),
        resolutions=session.resolutions,
        extra={
            **schedule_facts(components.scheduler.config),
            "training_steps": str(steps),
            "software": f"dora_diffusion {__version__}",
            **_variant(session.config),
            **_reading(session),
            **_validation_loss(session, steps),
            **session.weights.origin,
            UNET_LAYERS: UNetLayout.from_config(components.unet.config).text(),
        },
        tags=tuple(filter(None, class_words)),
        tag_frequency=session.dataset.tag_frequency(),
    )


def _validation_loss(session: Session, steps: int) -> dict[str, str]:
    losses = session.validation.losses if session.validation else {}
    return {VALIDATION_LOSS: f"{losses[steps]:.6g}"} if steps in losses else {}


def _variant(config: TrainConfig) -> dict[str, str]:
    """Return the settings of an adapter that is not A and B from their usual start."""
    if config.is_full:
        return {}
    usual = TrainConfig()
    names = ("init", "parametrization")
    return {n: getattr(config, n) for n in names if getattr(config, n) != getattr(usual, n)}


def _reading(session: Session) -> dict[str, str]:
    """Return the caption settings, where they are not the defaults."""
    config, usual = session.config, TrainConfig()
    reading = {n: str(v) for n in READING if (v := getattr(config, n)) != getattr(usual, n)}
    captions = stated_rules({s.trigger: caption_rules(s.settings) for s in session.subjects})
    return reading | ({CAPTIONS: captions} if captions else {})


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
    metadata, report = result_metadata(session, steps), session.report
    card = model_card(session.config, session.subjects, metadata, written, report, images)
    save_text(folder / "README.md", card)
