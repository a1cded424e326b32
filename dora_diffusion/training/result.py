"""What a run leaves in its folder: settings, the adapter file, and the model card."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from dora_diffusion import __version__
from dora_diffusion.adapters.inject import remove_adapters
from dora_diffusion.adapters.state import LiveWeights, load_adapter_state
from dora_diffusion.config import TrainConfig
from dora_diffusion.data.captions import tag_frequency
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.formats.adapter.metadata import UNET_LAYERS
from dora_diffusion.formats.adapter.vera import write_vera
from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.formats.names.unet import UNetLayout
from dora_diffusion.images import save_png, thumbnail
from dora_diffusion.numerics.weights import LayerWeights
from dora_diffusion.training.adapters import key_format_of_run
from dora_diffusion.training.card import KOHYA_FILE, model_card
from dora_diffusion.training.samples import SampleWriter, warning_of_full_disk
from dora_diffusion.training.session import Session


def write_result(session: Session, folder: Path, steps: int, samples: SampleWriter) -> Path:
    """Write the adapter, then its card and samples, which show the written file. Returns it.

    Raises:
        DiskFullError: If the adapter cannot be written; samples and card are a warning.
    """
    layers = session.adapters.state()
    adapter = write_adapter_file(session, folder, steps, layers)
    if vectors := session.adapters.vectors():
        write_vera(folder, vectors, adapter_metadata(session, steps))
    _reload(session, adapter)
    with warning_of_full_disk("the adapter is written, but not all of its samples and card"):
        if session.config.num_validation_images:
            samples.of_result(
                steps, lambda grid: write_adapter_file(session, folder, steps, layers, grid)
            )
        _write_card(session, adapter, steps, samples.files)
    return adapter


def adapter_metadata(session: Session, steps: int) -> AdapterMetadata:
    """The metadata that go into the adapter file after so many optimizer steps."""
    components, subject = session.components, session.subject
    return AdapterMetadata(
        family=components.family.name,
        base_model=session.config.pretrained_model_name_or_path,
        trigger=subject.trigger,
        resolution=session.resolution,
        extra={
            "prediction_type": components.prediction_type,
            "training_steps": str(steps),
            "software": f"dora_diffusion {__version__}",
            **_variant(session.config),
            UNET_LAYERS: UNetLayout.from_config(components.unet.config).text(),
        },
        tags=(subject.class_word,) if subject.class_word else (),
        tag_frequency=tag_frequency(session.dataset.captions),
    )


def _variant(config: TrainConfig) -> dict[str, str]:
    """How it was trained, where that was not A and B from their usual start."""
    usual = TrainConfig()
    names = ("init", "direction")
    return {n: getattr(config, n) for n in names if getattr(config, n) != getattr(usual, n)}


def write_adapter_file(
    session: Session,
    folder: Path,
    steps: int,
    layers: Mapping[str, LayerWeights],
    shown: Image.Image | None = None,
) -> Path:
    """Write the adapter where every tool reads it exactly.

    An output-axis adapter is written in the key format of Diffusers. That cannot hold a magnitude
    on the input axis, which therefore is written in kohya's.

    Args:
        session: The run.
        folder: Where to write.
        steps: Optimizer steps done.
        layers: The adapter.
        shown: What adapter managers show of it: a sample, never a photo of somebody's.
    """
    metadata = adapter_metadata(session, steps)
    if shown is not None:
        with tempfile.TemporaryDirectory() as place:
            file = save_png(shown, Path(place) / "thumbnail.png")
            metadata = dataclasses.replace(metadata, thumbnail=thumbnail(file))
    adapter = AdapterFile(dict(layers), metadata)
    target = key_format_of_run(session.config)
    if target == "kohya":
        layout = UNetLayout.from_config(session.components.unet.config)
        return write_adapter(folder / KOHYA_FILE, adapter, target, unet_layout=layout)
    return write_adapter(folder, adapter, target)


def write_checkpoint_adapter(session: Session, folder: Path, steps: int) -> Path:
    """Write the adapter of a checkpoint: of a VeRA the compact file alone."""
    if vectors := session.adapters.vectors():
        return write_vera(folder, vectors, adapter_metadata(session, steps))
    return write_adapter_file(session, folder, steps, session.adapters.state())


def _reload(session: Session, file: Path) -> None:
    """Replace the live adapter by what the file holds: samples then show the file."""
    components = session.components.adaptable()
    for model in session.adapters.modules.values():
        remove_adapters(model)
    load_adapter_state(components, read_adapter(file, LiveWeights(components)).layers)


def _write_card(session: Session, adapter: Path, steps: int, samples: Mapping[str, Path]) -> None:
    titles = {"adapted": "With the adapter", "base": "Without it, at the same seeds"}
    images = {
        title: samples[name].relative_to(adapter.parent).as_posix()
        for name, title in titles.items()
        if name in samples
    }
    metadata, report = adapter_metadata(session, steps), str(session.adapters.report)
    card = model_card(session.config, session.subject, metadata, adapter, report, images)
    save_text(adapter.parent / "README.md", card)
