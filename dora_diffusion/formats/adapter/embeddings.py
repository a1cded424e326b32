"""Tokens that were trained with an adapter, as textual-inversion files beside what is written.

Each file holds one tensor, named by its token. A1111 and ComfyUI call it by the name of the file,
Diffusers (`load_textual_inversion`) by the token.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dora_diffusion.formats.adapter.metadata import OWN
from dora_diffusion.formats.adapter.stored import StoredFile
from dora_diffusion.formats.files.stream import save_tensors
from dora_diffusion.formats.layouts.layout import AdapterFormatError, Note
from dora_diffusion.wording import counted, listing

# What A1111 and ComfyUI call their folders of such files, and our field that names the files.
EMBEDDINGS = "embeddings"
# The width of a token's vector is that of the text encoder.
_READS_TOKENS = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


class MissingToken(Note):
    """The file of a trained token is not there."""


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


def field_of(files: Mapping[str, Path]) -> dict[str, str]:
    """The metadata field of an adapter whose tokens are in these files, by its name."""
    if not files:
        return {}
    return {EMBEDDINGS: json.dumps([file.name for file in files.values()], ensure_ascii=False)}


def read_embeddings(
    folder: Path, metadata: Mapping[str, str], notes: list[str]
) -> dict[str, Tensor]:
    """The tokens that an adapter of ours has in files beside it.

    Args:
        folder: Where the adapter is.
        metadata: Its metadata.
        notes: Gets a line for each file that is missing.

    Raises:
        AdapterFormatError: If one is damaged.
    """
    names: list[object] = []
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        names = list(json.loads(metadata.get(OWN + EMBEDDINGS, "[]")))
    tokens: dict[str, Tensor] = {}
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\]+\.safetensors", name):
            continue  # none that we have written
        file = folder / EMBEDDINGS / name
        if file.is_file():
            tokens |= StoredFile(file).tensors()
        else:
            notes.append(
                MissingToken(
                    f"its trained token's file {EMBEDDINGS}/{name} is not beside it, so that "
                    "prompts do not know the token"
                )
            )
    return tokens


def check_tokens(
    tokens: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]] | None
) -> None:
    """Refuse tokens that are damaged, or of another width than the model's.

    Args:
        tokens: Vectors ``(C,)``, or ``(n, C)``, by token.
        shapes: Of the model's modules, None if it is not known.

    Raises:
        AdapterFormatError: If there is one.
    """
    for token, tensor in tokens.items():
        is_vector = tensor.is_floating_point() and tensor.ndim in (1, 2) and tensor.numel()
        if not is_vector or not torch.isfinite(tensor).all():
            raise AdapterFormatError(
                f"its token {token} is no vector of finite numbers; the file is damaged"
            )
        width = (shapes or {}).get(_READS_TOKENS, tensor.shape)[-1]
        if tensor.shape[-1] != width:
            raise AdapterFormatError(
                f"its token {token} was made for another model: it has {tensor.shape[-1]} numbers, "
                f"and this text encoder reads {width}"
            )


def said_of_embeddings(files: Mapping[str, Path]) -> list[str]:
    """What to say of trained tokens that were written to files; nothing if there are none."""
    if not files:
        return []
    names = [f"{token} in {file.name}" for token, file in files.items()]
    return [
        f"{counted(len(files), 'trained token')} had no place in it and went to the folder "
        f"{EMBEDDINGS} beside it: {listing(names, 8)}. Put them into the {EMBEDDINGS} folder of "
        "your program and write a file's name for its token; in diffusers, load each with "
        "load_textual_inversion"
    ]
