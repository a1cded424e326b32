"""Tokens that were trained with an adapter, as textual-inversion files beside what is written.

Each file holds one tensor, named by its token. A1111 and ComfyUI call it by the name of the file,
Diffusers (`load_textual_inversion`) by the token.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from dora_diffusion.formats.files.stream import save_tensors
from dora_diffusion.wording import counted, listing

# What A1111 and ComfyUI call their folders of such files.
EMBEDDINGS = "embeddings"


def embedding_files(folder: Path, stem: str, tokens: Collection[str]) -> dict[str, Path]:
    """The file of each token.

    Args:
        folder: Where the adapter or model is; the files are in a folder of it.
        stem: What their names start with.
        tokens: The tokens, such as ``<s1>``.
    """
    files: dict[str, Path] = {}
    for number, token in enumerate(tokens, 1):
        word = re.sub(r"\W+", "", token) or str(number)
        file = folder / EMBEDDINGS / f"{stem}_{word}.safetensors"
        if file in files.values():
            file = file.with_stem(f"{file.stem}_{number}")
        files[token] = file
    return files


def write_embeddings(files: Mapping[str, Path], tokens: Mapping[str, Tensor]) -> None:
    """Write each token's vectors to its file, in the file's own precision."""
    for token, file in files.items():
        save_tensors(file, {token: tokens[token]}, {"format": "pt"})


def said_of_embeddings(files: Mapping[str, Path]) -> str:
    """What to say of trained tokens that were written to files."""
    names = [f"{token} in {file.name}" for token, file in files.items()]
    return (
        f"{counted(len(files), 'trained token')} had no place in it and went to the folder "
        f"{EMBEDDINGS} beside it: {listing(names, 8)}. Put them into the {EMBEDDINGS} folder of "
        "your program and write a file's name for its token; in diffusers, load each with "
        "load_textual_inversion"
    )
