"""Stored inputs of generation: input images and masks, styles, wildcards."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dora_diffusion.config.fields import ConfigError
from dora_diffusion.config.file import read_text
from dora_diffusion.config.prompts import styles_in
from dora_diffusion.data.captions import WILD
from dora_diffusion.data.images import PhotoError, open_photo
from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.studio.jobs.store import MissingError, UserError, Workspace
from dora_diffusion.studio.jobs.uploads import shown

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class PromptFile:
    """A file of styles, or of wildcards.

    Attributes:
        name: ``styles.csv``, or a name such as ``colours.txt``.
        names: Names of the styles, or the wildcard as written in prompts: ``__colours__``.
        problem: Reason why the file cannot be used.
    """

    name: str
    names: tuple[str, ...]
    problem: str = ""


MOST_PROMPT_FILES = 1000
_HASH = re.compile(r"[0-9a-f]{32}")
# A line of a wildcard file that is neither empty nor a comment.
_LINE = re.compile(r"^[ \t]*[^#\s]", re.MULTILINE)


def hashes_of(text: str) -> Iterator[str]:
    """Return the hashes of the input images in an image's parameters."""
    from dora_diffusion.sampling.images import INIT_IMAGE, MASK_IMAGE, parse_parameters

    fields = parse_parameters(text)
    return (fields[key] for key in (INIT_IMAGE, MASK_IMAGE) if _HASH.fullmatch(fields.get(key, "")))


def keep_input(workspace: Workspace, image: Image) -> str:
    """Store an input image or a mask ("L") under the hash of its pixels, once.

    Returns:
        The hash, as in the parameters of images made from it (`images.painted_fields`).
    """
    from dora_diffusion.sampling.images import pixel_hash, save_image

    name = pixel_hash(image, image.mode)
    path = workspace.inputs / f"{name}.png"
    if not path.exists():
        save_image(image, path)
    return name


def input_path(workspace: Workspace, name: object) -> Path | None:
    """Return the path of a stored image or mask; None if it does not exist."""
    path = workspace.inputs / f"{name}.png"
    return path if _HASH.fullmatch(str(name)) and path.is_file() else None


def read_input(workspace: Workspace, name: object) -> Image | None:
    """Read a stored image or mask; None if the name is empty.

    Raises:
        UserError: If the file does not exist or cannot be read.
    """
    if not name:
        return None
    path = input_path(workspace, name)
    if path is None:
        raise UserError("the image to start from is no longer here; choose it again")
    try:
        return open_photo(path)
    except PhotoError as error:
        raise UserError(f"the image to start from cannot be read ({error})") from error


def keep_prompt_files(workspace: Workspace, files: Sequence[Path]) -> list[PromptFile]:
    """Store files of styles and wildcards, either all or none.

    Args:
        workspace: The runs folder.
        files: Files of styles (``.csv``) or wildcards (``.txt``, stored under their names).

    Returns:
        The stored files, as in `list_prompt_files`.

    Raises:
        UserError: If a file cannot be read, is empty, or has a name that cannot be in a prompt; or
            if there would be too many files.
    """
    contents = dict[Path, str]()
    for file in files:
        suffix = file.suffix.lower()
        if suffix not in (".csv", ".txt"):
            raise UserError(
                f"{shown(file.name)} is neither a file of styles (.csv) nor one of wildcards (.txt)"
            )
        try:
            text, is_styles = read_text(file, "the file"), suffix == ".csv"
            is_empty = not (styles_in(file) if is_styles else _LINE.search(text))
        except ConfigError as error:
            raise UserError(str(error).replace(str(file), file.name)) from error
        if is_empty:
            raise UserError(f"{file.name} is empty; write a style or an alternative in each line")
        if not is_styles and not WILD.fullmatch(f"__{file.stem}__"):
            raise UserError(
                f"{shown(file.name)} cannot be named in a prompt; name it by letters, digits, - "
                "and _, such as colours.txt"
            )
        contents[workspace.styles if is_styles else workspace.wildcards / f"{file.stem}.txt"] = text
    if len({*_prompt_paths(workspace), *contents}) > MOST_PROMPT_FILES:
        raise UserError(
            f"at most {MOST_PROMPT_FILES} files of styles and wildcards are kept; delete some"
        )
    for path, text in contents.items():
        save_text(path, text)
    return [_described(workspace, path) for path in contents]


def delete_prompt_file(workspace: Workspace, name: object) -> None:
    """Delete a file of styles or wildcards.

    Raises:
        MissingError: If `list_prompt_files` has no file of this name.
    """
    paths = {_described(workspace, path).name: path for path in _prompt_paths(workspace)}
    if str(name) not in paths:
        raise MissingError("this file no longer exists; choose another one")
    paths[str(name)].unlink(missing_ok=True)


def list_prompt_files(workspace: Workspace) -> list[PromptFile]:
    """List the files of styles and wildcards, the styles first."""
    return [_described(workspace, path) for path in _prompt_paths(workspace)]


def _prompt_paths(workspace: Workspace) -> list[Path]:
    """Return the file of styles, if it exists, and the wildcard files with names for prompts."""
    files = (path for path in workspace.wildcards.rglob("*.txt") if not path.is_dir())
    texts = sorted(path for path in files if WILD.fullmatch(_wildcard(workspace, path)))
    return [workspace.styles, *texts] if workspace.styles.is_file() else texts


def _wildcard(workspace: Workspace, path: Path) -> str:
    return f"__{path.relative_to(workspace.wildcards).with_suffix('').as_posix()}__"


def _described(workspace: Workspace, path: Path) -> PromptFile:
    if path != workspace.styles:
        name = path.relative_to(workspace.wildcards).as_posix()
        return PromptFile(name, (_wildcard(workspace, path),))
    try:
        return PromptFile(path.name, _style_names(path, path.stat().st_mtime_ns))
    except ConfigError as error:
        return PromptFile(path.name, (), str(error).replace(str(path), path.name))


@functools.lru_cache(maxsize=8)
def _style_names(file: Path, written: int) -> tuple[str, ...]:
    return tuple(filter(None, styles_in(file)))
