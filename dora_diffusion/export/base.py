"""Open the model that adapters are merged into: a folder, a hub id, or a single file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_diffusion.export.output import ExportError
from dora_diffusion.families import Family, detect_folder_family
from dora_diffusion.formats.checkpoint.file import CheckpointFile, detect_checkpoint_family
from dora_diffusion.formats.checkpoint.folder import PipelineFolder
from dora_diffusion.formats.files.header import PICKLED
from dora_diffusion.formats.files.stream import read_header


@dataclass(frozen=True)
class OpenModel:
    """An opened model.

    Attributes:
        path: Its folder or file.
        family: What kind of model it is.
        weights: Its tensors by canonical name.
    """

    path: Path
    family: Family
    weights: PipelineFolder | CheckpointFile

    @property
    def name(self) -> str:
        """What it is called: its hub id in the hub's cache, else its file or folder alone."""
        path = self.path.resolve()
        parts = path.parts[-3:]
        if len(parts) == 3 and parts[0].startswith("models--") and parts[1] == "snapshots":
            return parts[0].removeprefix("models--").replace("--", "/", 1)
        return path.name

    @property
    def files(self) -> dict[str, list[Path]]:
        """The weight files of each component; of a single file, itself as ``"checkpoint"``."""
        if isinstance(self.weights, CheckpointFile):
            return {"checkpoint": self.weights.reader.files}
        return {name: reader.files for name, reader in self.weights.readers.items()}

    def schedule(self) -> dict[str, Any]:
        """The settings of its scheduler; of a single file, those that it states."""
        if isinstance(self.weights, CheckpointFile):
            return self.weights.schedule()
        usual = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
        return {**usual, **self.weights.config("scheduler")}


@contextlib.contextmanager
def open_model(model: str | Path, variant: str | None = None) -> Iterator[OpenModel]:
    """Open a model and close its files afterwards.

    Args:
        model: A diffusers folder, a hub id, ``embedded:NAME``, or a ``.safetensors`` checkpoint.
        variant: Weight variant of a folder, such as ``"fp16"``.

    Raises:
        ExportError: If it is a pickle.
        TensorFileError: If its weights are missing, damaged or pickled.
        UnsupportedModelError, ModelNotFoundError: If it is another kind of model, or none.
    """
    # Imported here: the model layer may import heavy libraries.
    from dora_diffusion.models.locate import resolve_folder

    file = Path(model).expanduser()
    if file.suffix in PICKLED:
        raise ExportError(
            f"{file.name} is a pickle, which can run code when opened; give a .safetensors file"
        )
    if file.suffix == ".safetensors" and file.is_file():
        family = detect_checkpoint_family(read_header(file).specs, file.name)
        with CheckpointFile.open(file, family) as checkpoint:
            yield OpenModel(file, family, checkpoint)
        return
    is_home = str(model).startswith("~")
    folder = resolve_folder(file if is_home else model, variant=variant)
    with PipelineFolder.open(folder, variant) as pipeline:
        yield OpenModel(folder, detect_folder_family(folder), pipeline)
