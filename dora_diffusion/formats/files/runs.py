"""Names of files and folders in a run's folder, and file names from text of the user."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from dora_diffusion import system
from dora_diffusion.config.pipeline_index import is_pipeline

PIPELINE_NAME = "model"
"""Folder of the model in the output folder of full fine-tuning."""
_LONGEST = 60
# Reserved names of devices in Windows, with any suffix.
_DEVICE = re.compile(r"con|nul|aux|prn|com\d|lpt\d")
RESULT_NAME = "result"
SAMPLE, SAVE = "SAMPLE", "SAVE"
REQUESTS = (SAMPLE, SAVE)
"""Request files: a run samples or saves after its current step, and removes the file."""
# File with the ranking of checkpoints, and the name of the base model in it.
COMPARISON, BASE_NAME = "comparison.json", "base"
# With more checkpoints, a comparison would not fit a page and take longer than the run.
MOST_COMPARED = 8
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
"""Name of a checkpoint's folder, with its step."""
KOHYA_FILE, VERA_FILE = "dora_kohya.safetensors", "vera.safetensors"
# A checkpoint of VeRA has only the compact file.
INPUT_AXIS_FILES = {"kohya": KOHYA_FILE, "diffusion_model": "dora_diffusion_model.safetensors"}
"""Files of a run with magnitudes on the input axis, by key format."""
ADAPTER_FILES = ("pytorch_lora_weights.safetensors", *INPUT_AXIS_FILES.values(), VERA_FILE)


def runs_folder() -> Path:
    """Return ``runs`` in the working folder, or in the user's data folder on Windows.

    The working folder of a program from the Windows start menu is not writable. An existing folder
    ``runs`` there is used anyway.
    """
    here = Path("runs")
    if not system.is_windows() or here.is_dir():
        return here
    import platformdirs

    return Path(platformdirs.user_data_dir("dora-diffusion", appauthor=False)) / "runs"


def result_adapter(folder: Path) -> Path | None:
    """Return the adapter file of a completed run or a checkpoint, or None."""
    return next((folder / name for name in ADAPTER_FILES if (folder / name).is_file()), None)


def adapter_checkpoints(folder: Path) -> tuple[str, ...]:
    """Return the names of a run's complete checkpoints with an adapter, oldest first."""
    numbered = [
        (int(match[1]), path.name)
        for path in folder.glob("checkpoint-*")
        if (match := CHECKPOINT.fullmatch(path.name)) and result_adapter(path)
    ]
    return tuple(name for _, name in sorted(numbered))


def candidates(checkpoints: Sequence[str], result_step: int | None) -> tuple[str, ...]:
    """Select the checkpoints to rank, evenly spaced over the run and including the last ones.

    Args:
        checkpoints: Names of the checkpoints, oldest first.
        result_step: Step of the run's result; None if there is no result.
    """
    names = list(checkpoints)
    if result_step is not None:
        # A checkpoint of the last step has the same weights as the result.
        last = f"checkpoint-{result_step}"
        names = [name for name in names if name != last] + [RESULT_NAME]
    if len(names) > MOST_COMPARED:
        last_index = len(names) - 1
        indices = (round(i * last_index / (MOST_COMPARED - 1)) for i in range(MOST_COMPARED))
        names = [names[index] for index in indices]
    return tuple(names)


def file_stem(words: str, default: str) -> str:
    """Convert text to a file name without suffix: lower-case ASCII letters and digits, and "-".

    Accents are removed. If nothing is left, the name is ``default``.

    Example:
        >>> file_stem("sks Käthe's mug: 1/2?", "subject"), file_stem("猫", "subject")
        ('sks-kathe-s-mug-1-2', 'subject')
        >>> file_stem("con", "subject")
        'con-subject'
    """
    letters = unicodedata.normalize("NFKD", words.casefold()).encode("ascii", "ignore").decode()
    stem = re.sub("[^a-z0-9]+", "-", letters).strip("-")[:_LONGEST].rstrip("-") or default
    return f"{stem}-{default}" if _DEVICE.fullmatch(stem) else stem


def pipeline_in(folder: Path) -> Path | None:
    """Return the pipeline folder: the folder itself, or the result of full fine-tuning in it."""
    candidates = (folder, folder / PIPELINE_NAME)
    return next((path for path in candidates if is_pipeline(path)), None)
