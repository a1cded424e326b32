"""Files of other programs next to an adapter: trained tokens, and notes on unread files."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from dora_diffusion.config.wording import listing
from dora_diffusion.formats.adapter.embeddings import COMPONENTS, EMBEDDINGS
from dora_diffusion.formats.adapter.stored import PIVOTAL, StoredFile
from dora_diffusion.formats.files.stream import PICKLED
from dora_diffusion.formats.layouts.dotted import DIFFUSERS
from dora_diffusion.formats.layouts.layout import Note

_EMBEDDING = re.compile(r"(?:^|[_.-])(?:learned_)?(?:emb|embeds|embeddings?)(?=[_.-]|\d|$)")


class UnreadFile(Note):
    """Note on a file next to an adapter that seems to belong to it, but is not read."""


def tokens_beside(adapter: Path, notes: list[str]) -> dict[str, dict[str, Tensor]]:
    """Return the tokens that Diffusers' advanced scripts have written next to an adapter.

    Row n of ``clip_l``, and of SDXL's ``clip_g``, is the vector of the token ``<sn>``.

    Args:
        adapter: An adapter file that contains no tokens.
        notes: List to which a line on unread files is appended.

    Raises:
        AdapterFormatError: If the tokens' file is damaged.
    """
    folder = adapter.parent
    files = [*folder.iterdir(), *folder.glob(f"{EMBEDDINGS}/*")]
    files = sorted(file for file in files if _belongs(file, adapter))
    read = _pivotal_file(adapter, files)
    if unread := [file.relative_to(folder).as_posix() for file in files if file != read]:
        notes.append(UnreadFile(f"next to it and not read: {listing(unread, 5)}"))
    tokens: dict[str, dict[str, Tensor]] = {}
    for key, rows in StoredFile(read).tensors().items() if read else ():
        for number, row in enumerate(rows.view(-1, rows.shape[-1])):
            tokens.setdefault(f"<s{number}>", {})[COMPONENTS[key]] = row
    return tokens


def _belongs(file: Path, adapter: Path) -> bool:
    """Return whether a file has the adapter's name, or is an embedding for the adapter."""
    if file.suffix not in (".safetensors", *PICKLED) or file == adapter:
        return False
    rest = file.stem.removeprefix(adapter.stem)
    if _has_folder(adapter):
        is_embedding = file.parent.name == EMBEDDINGS or _EMBEDDING.search(file.stem) is not None
    else:
        is_embedding = rest != file.stem and _EMBEDDING.match(rest) is not None
    return not rest or is_embedding or file.stem.startswith("learned_embeds")


def _has_folder(adapter: Path) -> bool:
    """Return whether an adapter has its format's default name, and so a separate folder."""
    return adapter.name == DIFFUSERS.file_name


def _pivotal_file(adapter: Path, files: list[Path]) -> Path | None:
    """Return the scripts' file of tokens: named after adapter or folder, or the only one."""
    known = [f for f in files if f.stem.endswith(PIVOTAL) and f.suffix == ".safetensors"]
    known = [f for f in known if StoredFile(f).specs.keys() <= {"clip_l", "clip_g"}]
    names = [adapter.stem, adapter.absolute().parent.name]
    named = [file for name in names for file in known if file.stem == name + PIVOTAL]
    only = known if len(known) == 1 and _has_folder(adapter) else []
    return next(iter(named or only), None)
