"""All images that were made: searched, and listed as they are scrolled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from dora_diffusion.config.wording import counted
from dora_diffusion.sampling.images import parse_parameters
from dora_diffusion.studio.app import html
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.settings import sentence
from dora_diffusion.studio.app.views import ui
from dora_diffusion.studio.jobs.image_store import PAGE, ImageStore, Search
from dora_diffusion.studio.jobs.snapshot import Job
from dora_diffusion.studio.jobs.store import UserError

MOST_PAGES = 50
SCRIPT = (Path(__file__).parents[1] / "gallery.js").read_text(encoding="utf-8")
_EMPTY = html.empty(
    "No images yet",
    "Choose a run and press Generate images. Side by side shows one seed without and with it.",
)


class GalleryView:
    """The fields of the search, by the names of `Search`, and the list."""

    def __init__(self, context: Context) -> None:
        def list_page(asked: Any) -> dict[str, Any]:
            return page_of(context.images, asked)

        text = "Newest first, from earlier visits too. All are in runs/images."
        ui.html_block(html.heading("", "All images", text))
        with gr.Accordion("Search", open=False):
            hint = "snow mug"
            self.words = ui.line("Words of the prompt", "find-words", placeholder=hint)
            self.run = ui.id_dropdown(label="Made with", elem_id="find-run")
            with gr.Row():
                options: dict[str, Any] = {"min_width": 110, "max_length": 10}
                since = ui.line("From", "find-since", placeholder="2026-11-01", **options)
                until = ui.line("To", "find-until", placeholder="2026-11-30", **options)
            marked = gr.Checkbox(label="Favourites only", elem_id="find-favourites")
        self.fields = {
            "words": self.words, "run": self.run, "since": since, "until": until,
            "only_favourites": marked,
        }  # fmt: skip
        self.list = ui.html_block(
            _EMPTY, elem_id="history", js_on_load=SCRIPT, server_functions=[list_page]
        )


def connect(tab: GalleryView) -> None:
    """Connect the fields: the page itself asks for what is searched."""
    fields = list(tab.fields.values())
    names = ", ".join(tab.fields)
    ui.on([field.change for field in fields], None, fields, None,
          js=f"({names}) => studio.look({{{names}}})")  # fmt: skip


def refresh(images: ImageStore, jobs: Sequence[Job], run: str | None = None) -> dict[str, Any]:
    """Return the timer's update: a new page is asked for when the stamp is another."""
    runs = [("any", ""), *((job.label, job.id) for job in jobs if job.stands)]
    count = len(images.entries())
    text = f"<p class='dd-quiet' data-stamp='{images.stamp}'>{counted(count, 'image')}</p>"
    return {"history": text if count else _EMPTY, "find_run": ui.choosing(runs, run)}


def asked_for(asked: object) -> slice:
    """The part of a list that a browser asks for, see `page_of`."""
    asked = asked if isinstance(asked, dict) else {}
    numbers = (asked.get("from"), asked.get("count"))
    start, count = (n if type(n) is int and n > 0 else 0 for n in numbers)
    return slice(start, start + min(count or PAGE, MOST_PAGES * PAGE))


def page_of(images: ImageStore, asked: object) -> dict[str, Any]:
    """A page of cards.

    Args:
        images: The images.
        asked: Of the browser: ``search``, by the names of `Search`; ``from`` which image on; and
            ``count``, 0 for a page of `PAGE`.

    Returns:
        ``cards`` as HTML, their ``count``, and the ``total`` that is found.
    """
    asked = asked if isinstance(asked, dict) else {}
    given = asked.get("search")
    given = given if isinstance(given, dict) else {}
    texts = {
        name: str(given.get(name) or "").strip() for name in ("words", "run", "since", "until")
    }
    try:
        search = Search(**texts, only_favourites=given.get("only_favourites") is True)
    except UserError as error:
        return {"cards": html.note(sentence(str(error)), "bad"), "count": 0, "total": 0}
    found = images.search(search)
    marked = images.favourites()
    cards, part = [], asked_for(asked)
    listed = found[part]
    if found and search != Search() and not part.start:
        text = f"{len(found):,} of {counted(len(images.entries()), 'image')}"
        cards.append(f"<p class='dd-quiet dd-found'>{text}</p>")
    for entry in listed:
        prompt = parse_parameters(images.text(entry))["Prompt"] or entry.name
        star = "★ " if entry.name in marked else ""
        small = images.thumbnail(entry)
        cards.append(html.image_card(small, "show", entry.name, star + prompt))
    if not found and images.entries():
        cards = [html.empty("Nothing found", "Search for other words, or empty a field.")]
    return {"cards": "".join(cards), "count": len(listed), "total": len(found)}
