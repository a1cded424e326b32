"""Styles and wildcards for prompts, uploaded once and stored in the runs folder."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import gradio as gr

from dora_diffusion.config.wording import counted, listing
from dora_diffusion.studio.app import html
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.views import ui
from dora_diffusion.studio.app.views.request import FORM
from dora_diffusion.studio.jobs.deletions import prompt_file_question
from dora_diffusion.studio.jobs.inputs import (
    delete_prompt_file,
    keep_prompt_files,
    list_prompt_files,
)
from dora_diffusion.studio.jobs.store import Workspace

_NONE = html.empty(
    "No styles or wildcards yet",
    "Upload a styles.csv in A1111's format, or .txt files with an alternative on each line: write "
    "__colours__ in a prompt to draw from colours.txt.",
)


class WordsView:
    """Fields of styles and wildcards; ``fields`` are the fields of a request, by name."""

    def __init__(self) -> None:
        with gr.Accordion("Styles and wildcards", open=False):
            text = "In their order: a style's text takes the prompt at its {prompt}, or follows it."
            # Accept a name from the browser's draft until the timer sends the list.
            options: dict[str, Any] = {"multiselect": True, "allow_custom_value": True}
            style = gr.Dropdown(
                [], label=FORM["style"].label, elem_id="style", info=text, **options
            )
            wildcards = gr.Checkbox(label=FORM["wildcards"].label, elem_id="wildcards")
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
    """Connect the upload and the deletion of files."""

    def now() -> list[Any]:
        updates = refresh(context.workspace)
        file = gr.update(**updates["words_file"][0], value=None)
        row = ui.filled(updates["words_row"])
        return [ui.filled(updates["style"]), updates["words"], row, file]

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
    workspace: Workspace, selected_file: str | None = None, styles_now: list[str] | None = None
) -> dict[str, Any]:
    """Return the timer's update: the choice of styles, and the stored files."""
    files = list_prompt_files(workspace)
    problems = html.notes((file.problem for file in files), "bad")
    styles_file = workspace.styles.name
    styles = [name for file in files if file.name == styles_file for name in file.names]
    wild = [name for file in files if file.name != styles_file for name in file.names]
    lines = [counted(len(styles), "style")] if styles else []
    lines += [f"wildcards {listing(wild, 8)}"] if wild else []
    text = html.quiet(f"{'; '.join(lines)}. They are in {workspace.root.name}.") if lines else _NONE
    return {
        "style": ui.choosing([(name, name) for name in styles], styles_now),
        "words": problems + text,
        "words_row": ui.changing(visible=bool(files)),
        "words_file": ui.choosing([(file.name, file.name) for file in files], selected_file),
    }
