"""Styles and wildcards of prompts: files that are uploaded once, and kept in the runs folder."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import gradio as gr

from dora_diffusion.config.wording import counted, listing
from dora_diffusion.studio.app import html
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.views import ui
from dora_diffusion.studio.app.views.request import LABELS
from dora_diffusion.studio.jobs.deletions import prompt_file_question
from dora_diffusion.studio.jobs.inputs import (
    delete_prompt_file,
    keep_prompt_files,
    list_prompt_files,
)
from dora_diffusion.studio.jobs.store import Workspace

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
        keep_prompt_files(context.workspace, [Path(file) for file in files])
        return [None, *now()]

    def delete(name: str) -> list[Any]:
        delete_prompt_file(context.workspace, name)
        return now()

    outputs = [tab.fields["style"], tab.kept, tab.row, tab.file]
    ui.on(tab.upload.upload, upload, [tab.upload], [tab.upload, *outputs], show="minimal")
    question = functools.partial(prompt_file_question, context.workspace)
    ui.on(tab.delete.click, delete, [tab.file], outputs, confirm=question)


def refresh(
    workspace: Workspace, file_shown: str | None = None, chosen: list[str] | None = None
) -> dict[str, Any]:
    """Return the timer's update: the styles to choose from, and the files that are kept."""
    files = list_prompt_files(workspace)
    wrong = html.notes((file.problem for file in files), "bad")
    own = workspace.styles.name
    styles = [name for file in files if file.name == own for name in file.names]
    wild = [name for file in files if file.name != own for name in file.names]
    lines = [counted(len(styles), "style")] if styles else []
    lines += [f"wildcards {listing(wild, 8)}"] if wild else []
    said = html.quiet(f"{'; '.join(lines)}. They are in {workspace.root.name}.") if lines else _NONE
    return {
        "style": ui.choosing([(name, name) for name in styles], chosen),
        "words": wrong + said,
        "words_row": ui.changing(visible=bool(files)),
        "words_file": ui.choosing([(file.name, file.name) for file in files], file_shown),
    }
