"""The captions of all photos of a subject: typed one by one, changed together, or by a model."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from dora_diffusion.config.wording import counted
from dora_diffusion.data.captions import CaptionEdit, read_caption
from dora_diffusion.studio.app import html
from dora_diffusion.studio.app.context import Context, plain
from dora_diffusion.studio.app.views.fields import BUSY, QUIET, html_block, image_or_blank
from dora_diffusion.studio.jobs.subjects import (
    CAPTION_LIMIT,
    StoredSubject,
    captions_of,
    read_subject,
    save_caption,
    training_crop,
    undo_captions,
    write_captions,
)
from dora_diffusion.studio.jobs.workspace import UserError

_SCRIPT = (Path(__file__).parents[1] / "captions.js").read_text(encoding="utf-8")
_SIDE = 96
_GONE = "no longer exists"


class CaptionsView:
    """The fields of the captions."""

    def __init__(self) -> None:
        with gr.Column(visible=False, elem_id="captions") as self.box:
            text = (
                "What is around the subject, with the token: a photo of a sks mug on the grass. "
                "Kept as you type; Enter moves to the next photo. Empty: the instance prompt."
            )
            html_block(html.heading("", "Captions", text))
            self.rows = html_block(elem_id="caption-rows", js_on_load=_SCRIPT)
            self.message = html_block(elem_id="captions-said")
            # What the server has written, for the page to forget.
            self.written = gr.JSON(visible=False)
            with gr.Accordion("Captions of all photos at once", open=False):
                self._add_tools()

    def _add_tools(self) -> None:
        self.text = _line(
            "Caption of every photo", "caption-all", info="Empty removes all captions."
        )
        self.write = gr.Button("Write it for all photos", size="md")
        with gr.Row():
            self.find = _line("Find", "caption-find", min_width=140)
            self.replace = _line("Replace by", "caption-replace", min_width=140)
        self.substitute = gr.Button("Replace in all captions", size="md")
        self.prefix = _line(
            "Prefix", "caption-prefix",
            info="In front of every caption that does not begin with it, such as the token.",
        )  # fmt: skip
        self.add_prefix = gr.Button("Put it in front of all captions", size="md")
        self.undo = gr.Button("Undo the last change of all", size="md", elem_id="caption-undo")
        self.model = _line(
            "Captioning model", "caption-model",
            placeholder="Salesforce/blip-image-captioning-base",
            info="A folder or hub id: an image-to-text model of Transformers (BLIP, GIT, LLaVA "
            "...) or a WD tagger. It captions the photos that have none, with token and class.",
        )  # fmt: skip
        self.automatic = gr.Button("Write missing captions with the model", size="md")


def _line(label: str, name: str, **options: Any) -> Any:
    return gr.Textbox(label=label, max_lines=1, max_length=CAPTION_LIMIT, elem_id=name, **options)


def connect(context: Context, tab: CaptionsView, pick: Any) -> None:
    """Connect the fields; ``pick`` holds the id of the subject."""
    workspace = context.workspace

    @plain
    def save(event: gr.EventData) -> list[Any]:
        """Write what was typed, whatever photo is shown by now."""
        typed, written, problems = getattr(event, "typed", None), dict[str, str](), list[str]()
        for place, text in typed.items() if isinstance(typed, dict) else ():
            subject_id, _, photo = str(place).partition("/")
            try:
                save_caption(workspace, subject_id, photo, text)
            except UserError as error:
                if _GONE not in str(error):  # with its photo, a caption goes too
                    problems.append(f"{photo}: {error}")
                    continue
            written[place] = text
        return [html.notes(problems, "bad") or html.note("Saved", "good"), written]

    def change(make: Callable[..., CaptionEdit]) -> Callable[..., list[Any]]:
        """A button that changes the captions of all photos."""

        @plain
        def run(subject_id: str | None, *values: str) -> list[Any]:
            subject, edit = read_subject(workspace, subject_id), make(*values)
            if not edit:
                raise UserError("write what to change first")
            new = {name: edit(caption) for name, caption in captions_of(subject).items()}
            return done(subject, write_captions(workspace, subject.id, new))

        return run

    @plain
    def undo(subject_id: str | None) -> list[Any]:
        subject = read_subject(workspace, subject_id)
        return done(subject, undo_captions(workspace, subject.id))

    def done(subject: StoredSubject, count: int) -> list[Any]:
        text = f"{counted(count, 'caption')} changed" if count else "No caption changed"
        return [caption_rows(subject), html.note(text, "good" if count else "info")]

    # One after the other, and each: what was typed last is written last.
    saved = tab.rows.input(
        save, None, [tab.message, tab.written], trigger_mode="multiple", concurrency_limit=1,
        **QUIET,
    )  # fmt: skip
    saved.success(None, [tab.written], None, js="(done) => window.ddCaptionsWritten(done)", **QUIET)
    outputs = [tab.rows, tab.message]
    for button, fields, make in (
        (tab.write, [tab.text], lambda text: CaptionEdit(text=text or "")),
        (tab.substitute, [tab.find, tab.replace],
         lambda find, replace: CaptionEdit(find=find or "", replace=replace or "")),
        (tab.add_prefix, [tab.prefix], lambda prefix: CaptionEdit(prefix=prefix or "")),
    ):  # fmt: skip
        button.click(change(make), [pick, *fields], outputs, **BUSY)
    tab.undo.click(undo, [pick], outputs, **BUSY)


def caption_rows(subject: StoredSubject | None) -> str:
    """A row for each photo: its crop, and a field for its caption."""
    return "".join(_row(subject, photo) for photo in subject.photos) if subject else ""


def _row(subject: StoredSubject, photo: Path) -> str:
    caption, damage = "", ""
    try:
        caption = read_caption(photo, "", per_line=True)
    except (ValueError, OSError) as error:
        damage = html.note(f"{error}; what you write here takes its place", "warn")
    buffer = io.BytesIO()
    image_or_blank(lambda: training_crop(photo, _SIDE), "")[0].save(buffer, format="JPEG")
    source = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
    return (
        f"<label class='dd-caption'><img src='{source}' alt='{html.esc(photo.name)}'>"
        f"<textarea rows='2' maxlength='{CAPTION_LIMIT}' aria-label='Caption of "
        f"{html.esc(photo.name)}' data-photo='{html.esc(f'{subject.id}/{photo.name}')}'>"
        f"{html.esc(caption)}</textarea></label>{damage}"
    )
