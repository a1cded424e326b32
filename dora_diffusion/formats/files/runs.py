"""Names of files and folders: from users' words, and of what lies in a run's folder."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from dora_diffusion import system

PIPELINE_NAME = "model"
"""Folder of the model in that of a run of full fine-tuning."""
_LONGEST = 60
# Of the search for adapters: a run's checkpoint in a folder of runs is on the third level.
_LEVELS, _MOST_FOLDERS = 3, 5000
# Windows keeps them for devices, whatever suffix they have.
_DEVICE = re.compile(r"con|nul|aux|prn|com\d|lpt\d")
RESULT_NAME = "result"
SAMPLE, SAVE = "SAMPLE", "SAVE"
REQUESTS = (SAMPLE, SAVE)
"""Files that ask a run for something after its current step; it removes them."""
# How they rank, and what the model without any of them is called there.
COMPARISON, BASE_NAME = "comparison.json", "base"
# More rows than a page can show, and a comparison that takes longer than the run.
MOST_COMPARED = 8
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
"""Name of a checkpoint's folder, with its step."""
# Of a VeRA's checkpoints, the compact file alone.
KOHYA_FILE = "dora_kohya.safetensors"
ADAPTER_FILES = ("pytorch_lora_weights.safetensors", KOHYA_FILE, "vera.safetensors")


def runs_folder() -> Path:
    """``runs`` where the app is started; on Windows the user's own folder for such data.

    A program that is started from Windows' menu has no working folder that it may write to. A
    folder ``runs`` that is there is taken all the same.
    """
    here = Path("runs")
    if not system.is_windows() or here.is_dir():
        return here
    import platformdirs

    return Path(platformdirs.user_data_dir("dora-diffusion", appauthor=False)) / "runs"


def result_adapter(folder: Path) -> Path | None:
    """The adapter file that a finished run left, or that a checkpoint holds."""
    return next((folder / name for name in ADAPTER_FILES if (folder / name).is_file()), None)


def adapter_files(folder: Path) -> list[Path]:
    """Return the tensor files of a folder and of three levels of folders in it, nearest first.

    Hidden folders and those of pipelines are left out.
    """
    files, level = list[Path](), [folder]
    for _ in range(1 + _LEVELS):
        files += sorted((f for path in level for f in path.glob("*.safetensors")), reverse=True)
        inner = (path for above in level for path in above.glob("*") if _may_hold_adapters(path))
        level = list(islice(inner, _MOST_FOLDERS))
    return files


def _may_hold_adapters(path: Path) -> bool:
    is_open = path.is_dir() and not path.name.startswith(".")
    return is_open and not (path / "model_index.json").is_file()


def adapter_checkpoints(folder: Path) -> tuple[str, ...]:
    """Names of a run's complete checkpoints with an adapter, oldest first."""
    numbered = [
        (int(match[1]), path.name)
        for path in folder.glob("checkpoint-*")
        if (match := CHECKPOINT.fullmatch(path.name)) and result_adapter(path)
    ]
    return tuple(name for _, name in sorted(numbered))


def candidates(checkpoints: Sequence[str], result_step: int | None) -> tuple[str, ...]:
    """Return the checkpoints that can be ranked: spread over the run, the last ones always.

    Args:
        checkpoints: Their names, oldest first.
        result_step: Steps of the run's result; None where it has none.
    """
    names = list(checkpoints)
    if result_step is not None:
        # At the last step there often is a checkpoint too, with the same weights.
        last = f"checkpoint-{result_step}"
        names = [name for name in names if name != last] + [RESULT_NAME]
    if len(names) > MOST_COMPARED:
        last_place = len(names) - 1
        places = (round(i * last_place / (MOST_COMPARED - 1)) for i in range(MOST_COMPARED))
        names = [names[place] for place in places]
    return tuple(names)


def file_stem(words: str, default: str) -> str:
    """Words as the first part of a file's name: small ASCII letters and digits, joined by "-".

    Letters lose their accents, and what is left of none is ``default``.

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
    """The pipeline that a folder is, or that a run of full fine-tuning left in it; else None."""
    places = (folder, folder / PIPELINE_NAME)
    return next((place for place in places if (place / "model_index.json").is_file()), None)
