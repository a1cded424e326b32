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
from dora_diffusion.formats.files.atomic import atomic_file
from dora_diffusion.studio.app import html
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.views import ui
from dora_diffusion.studio.app.views.request import LABELS
from dora_diffusion.studio.jobs.store import UserError, Workspace
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
            self.upload = gr.File(
                label="styles.csv, which replaces the one before, or files of wildcards (.txt)",
                file_count="multiple", file_types=[".csv", ".txt"], height=150,
                elem_id="words-upload",
            )  # fmt: skip
        self.fields = {"style": style, "wildcards": wildcards}


def connect(context: Context, tab: WordsView) -> None:
    """Connect the upload."""

    def upload(files: list[str] | None) -> list[Any]:
        if not files:
            return [gr.skip()] * 3
        keep_words(context.workspace, [Path(file) for file in files])
        parts = refresh(context.workspace)
        return [None, ui.filled(parts["style"]), parts["words"]]

    filled = [tab.upload, tab.fields["style"], tab.kept]
    ui.on(tab.upload.upload, upload, [tab.upload], filled, show="minimal")


def keep_words(workspace: Workspace, files: Sequence[Path]) -> None:
    """Keep files of styles and of wildcards, all of them or none.

    Args:
        workspace: The runs folder.
        files: Of styles if they end in ``.csv``, else of wildcards, which keep their names.

    Raises:
        UserError: If one cannot be read, holds nothing, or has a name that no prompt can have; or
            there would be too many.
    """
    kept = dict[Path, str]()
    for file in files:
        try:
            text, is_styles = read_text(file, "the file"), file.suffix.lower() == ".csv"
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
        raise UserError(f"at most {MOST_FILES} files of wildcards are kept; delete some")
    for path, text in kept.items():
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _files(workspace: Workspace) -> list[Path]:
    return sorted(workspace.wildcards.rglob("*.txt"))


@functools.lru_cache(maxsize=8)
def _style_names(file: Path, written: int) -> list[str]:
    return [*filter(None, styles_in(file))]


def refresh(workspace: Workspace) -> dict[str, Any]:
    """Return the timer's update: the styles to choose from, and what is kept."""
    names, wrong = list[str](), ""
    if workspace.styles.exists():
        try:
            names = _style_names(workspace.styles, workspace.styles.stat().st_mtime_ns)
        except ConfigError as error:
            wrong = html.note(str(error), "bad")
    files = [f.relative_to(workspace.wildcards).with_suffix("") for f in _files(workspace)]
    lines = [counted(len(names), "style")] if names else []
    lines += [f"wildcards {listing((f'__{f.as_posix()}__' for f in files), 8)}"] if files else []
    said = html.quiet(f"{'; '.join(lines)}. They are in {workspace.root.name}.") if lines else _NONE
    return {"style": ui.changing(choices=[(name, name) for name in names]), "words": wrong + said}
