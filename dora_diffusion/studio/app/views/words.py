"""Styles and wildcards of prompts: files that are uploaded once, and kept in the runs folder."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from dora_diffusion.config.fields import ConfigError
from dora_diffusion.config.file import read_text
from dora_diffusion.config.prompts import styles_in
from dora_diffusion.config.wording import counted, listing
from dora_diffusion.data.captions import WILD
from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.studio.app import html
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.views import ui
from dora_diffusion.studio.app.views.request import LABELS
from dora_diffusion.studio.client import RemotePromptFile
from dora_diffusion.studio.jobs.store import MissingError, UserError, Workspace
from dora_diffusion.studio.jobs.uploads import shown

MOST_FILES = 1000
# Of a file of wildcards, a line that is neither empty nor a comment.
_LINE = re.compile(r"^[ \t]*[^#\s]", re.MULTILINE)
_NONE = html.empty(
    "No styles or wildcards yet",
    "Upload a styles.csv as A1111 has it, or .txt files with an alternative on each line: that of "
    "colours.txt is __colours__ in a prompt.",
)


class WordsView:
    """The fields; ``fields`` are those of a request, by name."""

    def __init__(self) -> None:
        with gr.Accordion("Styles and wildcards", open=False):
            text = "In their order: a style's text takes the prompt at its {prompt}, or follows it."
            # A name that a browser kept stays until the clock brings the list.
            options: dict[str, Any] = {"multiselect": True, "allow_custom_value": True}
            style = gr.Dropdown([], label=LABELS["style"], elem_id="style", info=text, **options)
            wildcards = gr.Checkbox(label=LABELS["wildcards"], elem_id="wildcards")
            self.kept = ui.html_block(_NONE, elem_id="words-kept")
            with gr.Row(visible=False, elem_classes="dd-tool-row") as self.row:
                self.file = ui.id_dropdown(label="Files that are kept", elem_id="words-file")
                self.delete = ui.button("Delete this file", "words-delete", variant="stop")
            self.upload = gr.File(
                label="styles.csv, which replaces the one before, or files of wildcards (.txt)",
                file_count="multiple", file_types=[".csv", ".txt"], height=150,
                elem_id="words-upload",
            )  # fmt: skip
        self.fields = {"style": style, "wildcards": wildcards}


def connect(context: Context, tab: WordsView) -> None:
    """Connect the upload, and the deletion of what was uploaded."""

    def now() -> list[Any]:
        parts = refresh(context.workspace)
        file = gr.update(**parts["words_file"][0], value=None)
        return [ui.filled(parts["style"]), parts["words"], ui.filled(parts["words_row"]), file]

    def upload(files: list[str] | None) -> list[Any]:
        if not files:
            return [gr.skip()] * (1 + len(outputs))
        keep_words(context.workspace, [Path(file) for file in files])
        return [None, *now()]

    def delete(name: str) -> list[Any]:
        delete_words(context.workspace, name)
        return now()

    outputs = [tab.fields["style"], tab.kept, tab.row, tab.file]
    ui.on(tab.upload.upload, upload, [tab.upload], [tab.upload, *outputs], show="minimal")
    question = "Delete this file? There is no copy of it in the app."
    ui.on(tab.delete.click, delete, [tab.file], outputs, confirm=question)


def keep_words(workspace: Workspace, files: Sequence[Path]) -> list[RemotePromptFile]:
    """Keep files of styles and of wildcards, all of them or none.

    Args:
        workspace: The runs folder.
        files: Of styles if they end in ``.csv``, of wildcards, which keep their names, in ``.txt``.

    Returns:
        What is kept, as `list_words` gives it.

    Raises:
        UserError: If one cannot be read, holds nothing, or has a name that no prompt can have; or
            there would be too many.
    """
    kept = dict[Path, str]()
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
        kept[workspace.styles if is_styles else workspace.wildcards / f"{file.stem}.txt"] = text
    if len({*_files(workspace), *kept}) > MOST_FILES:
        raise UserError(f"at most {MOST_FILES} files of styles and wildcards are kept; delete some")
    for path, text in kept.items():
        save_text(path, text)
    return [_described(workspace, path) for path in kept]


def delete_words(workspace: Workspace, name: object) -> None:
    """Delete a file of styles or of wildcards.

    Raises:
        MissingError: If it is not the name of one, as `list_words` gives them.
    """
    paths = {_described(workspace, path).name: path for path in _files(workspace)}
    if str(name) not in paths:
        raise MissingError("this file no longer exists; choose another one")
    paths[str(name)].unlink(missing_ok=True)


def list_words(workspace: Workspace) -> list[RemotePromptFile]:
    """List the files of styles and wildcards, the styles first."""
    return [_described(workspace, path) for path in _files(workspace)]


def _files(workspace: Workspace) -> list[Path]:
    """The file of styles, if there is one, and those of wildcards that a prompt can name."""
    found = (path for path in workspace.wildcards.rglob("*.txt") if not path.is_dir())
    texts = sorted(path for path in found if WILD.fullmatch(_wildcard(workspace, path)))
    return [workspace.styles, *texts] if workspace.styles.is_file() else texts


def _wildcard(workspace: Workspace, path: Path) -> str:
    return f"__{path.relative_to(workspace.wildcards).with_suffix('').as_posix()}__"


def _described(workspace: Workspace, path: Path) -> RemotePromptFile:
    if path != workspace.styles:
        name = path.relative_to(workspace.wildcards).as_posix()
        return RemotePromptFile(name, (_wildcard(workspace, path),))
    try:
        return RemotePromptFile(path.name, _style_names(path, path.stat().st_mtime_ns))
    except ConfigError as error:
        return RemotePromptFile(path.name, (), str(error).replace(str(path), path.name))


@functools.lru_cache(maxsize=8)
def _style_names(file: Path, written: int) -> tuple[str, ...]:
    return tuple(filter(None, styles_in(file)))


def refresh(workspace: Workspace) -> dict[str, Any]:
    """Return the timer's update: the styles to choose from, and the files that are kept."""
    files = list_words(workspace)
    wrong = html.notes((file.problem for file in files), "bad")
    own = workspace.styles.name
    styles = [name for file in files if file.name == own for name in file.names]
    wild = [name for file in files if file.name != own for name in file.names]
    lines = [counted(len(styles), "style")] if styles else []
    lines += [f"wildcards {listing(wild, 8)}"] if wild else []
    said = html.quiet(f"{'; '.join(lines)}. They are in {workspace.root.name}.") if lines else _NONE
    return {
        "style": ui.changing(choices=[(name, name) for name in styles]),
        "words": wrong + said,
        "words_row": ui.changing(visible=bool(files)),
        "words_file": ui.changing(choices=[(file.name, file.name) for file in files]),
    }
