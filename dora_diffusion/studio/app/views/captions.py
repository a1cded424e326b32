"""Editor for the captions of all photos: typing, find and replace, and tags."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from dora_diffusion.config.wording import counted
from dora_diffusion.data.captions import CaptionEdit, CaptionRules, read_caption
from dora_diffusion.studio.app import html
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.views import ui
from dora_diffusion.studio.jobs import subjects, uploads
from dora_diffusion.studio.jobs.store import UserError

_ROW_SIDE = 192
_MOST_TAGS = 60
_SCRIPT = (Path(__file__).parents[1] / "captions.js").read_text(encoding="utf-8")


# Handlers run one at a time, so that the last text is written last and buttons see typed text.
_IN_TURN: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "captions"}


class CaptionsView:
    """Fields of the captions."""

    def __init__(self) -> None:
        # Buttons that change all captions, with their fields by the names of `CaptionEdit`.
        self.edits: list[tuple[Any, dict[str, Any]]] = []
        with gr.Column(visible=False, elem_id="captions") as self.box:
            text = (
                "Describe the subject's surroundings, with the token: a photo of a sks mug on the "
                "grass. Saved as you type. Enter, Tab and the arrow keys move to the next photo; "
                "Shift and Enter starts a new line. Empty: the instance prompt."
            )
            ui.html_block(html.heading("", "Captions", text))
            self._add_tools()
            self.masks = gr.Checkbox(True, label="Masks over the photos", elem_id="show-masks")
            self.rows = ui.html_block(elem_id="caption-rows", js_on_load=_SCRIPT)
            self.message = ui.html_block(elem_id="captions-said")
            # The captions that the server has written, which the page need not send again.
            self.written = gr.JSON(visible=False)
            with gr.Accordion("Captions of all photos at once", open=False):
                self._add_texts()

    def _add_button(self, label: str, name: str = "", **fields: Any) -> None:
        button = ui.button(label, name or None, min_width=120)
        self.edits.append((button, fields))

    def _add_tools(self) -> None:
        with gr.Row(elem_classes="dd-tool-row"):
            find = _caption("Find", "caption-find", min_width=140)
            replace = _caption("Replace by", "caption-replace", min_width=140)
            self._add_button("Replace in all captions", find=find, replace=replace)
        with gr.Row(elem_classes="dd-tool-row"):
            self.tag = _caption("Tag", "caption-tag", min_width=140)
            self._add_button("Put first", "tag-first", first_tag=self.tag)
            self._add_button("Append", "tag-append", add_tag=self.tag)
            self._add_button("Remove from all", "tag-remove", remove_tag=self.tag)
            self.undo = ui.button("Undo the last change of all", "caption-undo", min_width=240)
        self.tags = ui.html_block(elem_id="caption-tags", js_on_load=ui.CLICKS)

    def _add_texts(self) -> None:
        about = "Empty removes all captions."
        text = _caption("Caption of every photo", "caption-all", info=about)
        self._add_button("Write it for all photos", text=text)
        about = "In front of every caption that does not begin with it, such as a photo of."
        prefix = _caption("Prefix", "caption-prefix", info=about)
        self._add_button("Put it in front of all captions", prefix=prefix)
        self.model = _caption(
            "Captioning model", "caption-model",
            placeholder="Salesforce/blip-image-captioning-base",
            info="A folder or hub id: an image-to-text model of Transformers (BLIP, GIT, LLaVA "
            "...) or a WD tagger. It captions the photos that have none, with token and class.",
        )  # fmt: skip
        self.automatic = ui.button("Write missing captions with the model")


def _caption(label: str, name: str, **options: Any) -> Any:
    return ui.line(label, name, max_length=subjects.CAPTION_LIMIT, **options)


def connect(context: Context, tab: CaptionsView, pick: Any) -> None:
    """Connect the fields; ``pick`` is the field with the subject's id."""
    workspace = context.workspace

    def change(*names: str) -> Callable[..., list[Any]]:
        """Return the handler of a button that changes the captions of all photos."""

        def run(subject_id: str | None, *values: str) -> list[Any]:
            texts = (value or "" for value in values)
            edit = CaptionEdit(**dict(zip(names, texts, strict=True)))
            subject = subjects.read_subject(workspace, subject_id)
            if not edit:
                raise UserError("write what to change first")
            new = {name: edit(caption) for name, caption in subjects.captions_of(subject).items()}
            return done(subject, subjects.write_captions(workspace, subject.id, new))

        return run

    def undo(subject_id: str | None) -> list[Any]:
        subject = subjects.read_subject(workspace, subject_id)
        return done(subject, subjects.undo_captions(workspace, subject.id))

    def done(subject: subjects.StoredSubject, count: int) -> list[Any]:
        text = f"{counted(count, 'caption')} changed" if count else "No caption changed"
        return [*shown(subject), html.note(text, "good" if count else "info")]

    def tag(event: gr.EventData) -> str:
        return ui.clicked(event)[1][: subjects.CAPTION_LIMIT]

    _connect_rows(context, tab, pick)
    in_turn = {**_IN_TURN, "js": "(...values) => window.ddCaptionsSaved(...values)"}
    outputs = [tab.tags, tab.rows, tab.message]
    for button, fields in tab.edits:
        inputs = [pick, *fields.values()]
        ui.on(button.click, change(*fields), inputs, outputs, show="minimal", **in_turn)
    ui.on(tab.undo.click, undo, [pick], outputs, show="minimal", **in_turn)
    ui.on(tab.tags.click, tag, None, [tab.tag])
    ui.on(tab.masks.change, None, [tab.masks], None, js="studio.showMasks")


def _connect_rows(context: Context, tab: CaptionsView, pick: Any) -> None:
    """Save captions as they are typed; the page sends one request at a time."""
    workspace = context.workspace

    def save(subject_id: str | None, event: gr.EventData) -> list[Any]:
        """Save the typed captions, even if the page shows another subject by now."""
        typed, written, problems = getattr(event, "typed", None), dict[str, str](), list[str]()
        for name, text in typed.items() if isinstance(typed, dict) else ():
            of_subject, _, photo = str(name).partition("/")
            try:
                subjects.save_caption(workspace, of_subject, photo, text)
            except UserError as error:
                if "no longer exists" not in str(error):  # a deleted photo needs no caption
                    problems.append(f"{photo}: {error}")
                    continue
            written[name] = text
        try:
            tags = _tags(subjects.read_subject(workspace, subject_id))
        except UserError:
            tags = ""
        return [html.notes(problems, "bad") or html.note("Saved", "good"), written, tags]

    saved = ui.on(
        tab.rows.input, save, [pick], [tab.message, tab.written, tab.tags],
        trigger_mode="multiple", **_IN_TURN,
    )  # fmt: skip
    ui.on(saved.success, None, [tab.written], None, js="(done) => window.ddCaptionsWritten(done)")
    for ended in (saved.then, saved.failure):
        ui.on(ended, None, js="() => window.ddCaptionsAnswered()")


def shown(subject: subjects.StoredSubject | None) -> list[str]:
    """Return the tags of all captions with counts, and a row of crop and caption for each photo."""
    if subject is None:
        return ["", ""]
    return [_tags(subject), "".join(_row(subject, photo) for photo in subject.photos)]


def _tags(subject: subjects.StoredSubject) -> str:
    """Return clickable tags, most frequent first; each line of a caption counts."""
    captions = [text.replace("\n", ",") for text in subjects.captions_of(subject).values()]
    counts = CaptionRules().tag_frequency(captions)
    more = f"and {len(counts) - _MOST_TAGS} rarer ones" if len(counts) > _MOST_TAGS else ""
    if not counts:
        more = "No caption yet: type below. Tags, which commas separate, are counted here."
    return html.pieces.tags(list(counts.items())[:_MOST_TAGS], more)


def _row(subject: subjects.StoredSubject, photo: Path) -> str:
    caption, damage, mask = "", "", ""
    try:
        caption = read_caption(photo, "", per_line=True)
    except (ValueError, OSError) as error:
        damage = f"{error}; what you write here takes its place"
    crop = ui.image_or_blank("", subjects.training_crop, photo, _ROW_SIDE, masked=False)[0]
    overlay = ui.image_or_blank("", subjects.mask_overlay, photo, _ROW_SIDE)[0]
    if overlay is not None and overlay.mode == "RGBA":  # A damaged mask has another mode.
        mask = uploads.data_uri(overlay)
    images = {"crop": uploads.data_uri(crop), "mask": mask}
    name, limit = f"{subject.id}/{photo.name}", subjects.CAPTION_LIMIT
    return html.pieces.caption(
        photo.name, name, caption=caption, limit=limit, damage=damage, **images
    )
