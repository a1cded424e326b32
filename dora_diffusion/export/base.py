"""Open the model that adapters are merged into: a folder, a hub id, or a single file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from dora_diffusion.export.output import ExportError
from dora_diffusion.formats.checkpoint.file import CheckpointFile
from dora_diffusion.formats.checkpoint.folder import PipelineFolder
from dora_diffusion.formats.checkpoint.weights import StoredModel
from dora_diffusion.formats.files.header import PICKLED


def model_name(path: Path) -> str:
    """What a model is called: its hub id in the hub's cache, else its file or folder alone."""
    path = path.resolve()
    parts = path.parts[-3:]
    if len(parts) == 3 and parts[0].startswith("models--") and parts[1] == "snapshots":
        return parts[0].removeprefix("models--").replace("--", "/", 1)
    return path.name


@contextlib.contextmanager
def open_model(
    model: str | Path, variant: str | None = None, revision: str | None = None
) -> Iterator[StoredModel]:
    """Open a model and close its files afterwards.

    Args:
        model: A diffusers folder, a hub id, ``embedded:NAME``, or a ``.safetensors`` checkpoint.
        variant: Weight variant of a folder or hub id, such as ``"fp16"``.
        revision: Branch, tag or commit of a hub id.

    Raises:
        ExportError: If it is a pickle.
        TensorFileError: If its weights (of the variant) are missing, damaged or pickled.
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
        with CheckpointFile.open(file) as checkpoint:
            yield checkpoint
        return
    is_home = str(model).startswith("~")
    folder = resolve_folder(file if is_home else model, variant=variant, revision=revision)
    with PipelineFolder.open(folder, variant) as pipeline:
        yield pipeline
