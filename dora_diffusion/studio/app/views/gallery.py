"""Search and list of all generated images, loaded page by page on scrolling."""

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
    """Fields of the search, by the names of `Search`, and the list."""

    def __init__(self, context: Context) -> None:
        def list_page(query: Any) -> dict[str, Any]:
            return page_of(context.images, query)

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
    """Connect the fields: the page's script requests the results."""
    fields = list(tab.fields.values())
    names = ", ".join(tab.fields)
    ui.on([field.change for field in fields], None, fields, None,
          js=f"({names}) => studio.look({{{names}}})")  # fmt: skip


def refresh(images: ImageStore, jobs: Sequence[Job], run: str | None = None) -> dict[str, Any]:
    """Return the timer's update. A new stamp makes the script request the list again."""
    runs = [("any", ""), *((job.label, job.id) for job in jobs if job.stands)]
    count = len(images.entries())
    text = html.pieces.count(counted(count, "image"), images.stamp)
    return {"history": text if count else _EMPTY, "find_run": ui.choosing(runs, run)}


def asked_for(query: object) -> slice:
    """Return the slice of a list that a browser requests, see `page_of`."""
    query = query if isinstance(query, dict) else {}
    numbers = (query.get("from"), query.get("count"))
    start, count = (n if type(n) is int and n > 0 else 0 for n in numbers)
    return slice(start, start + min(count or PAGE, MOST_PAGES * PAGE))


def page_of(images: ImageStore, query: object) -> dict[str, Any]:
    """Return a page of cards.

    Args:
        images: The images.
        query: The browser's request: ``search``, fields by the names of `Search`; ``from``, index
            of the first image; and ``count``, 0 for `PAGE`.

    Returns:
        ``cards`` as HTML, their ``count``, and the ``total`` of matching images.
    """
    query = query if isinstance(query, dict) else {}
    fields = query.get("search")
    fields = fields if isinstance(fields, dict) else {}
    texts = {
        name: str(fields.get(name) or "").strip() for name in ("words", "run", "since", "until")
    }
    try:
        search = Search(**texts, only_favourites=fields.get("only_favourites") is True)
    except UserError as error:
        return {"cards": html.note(sentence(str(error)), "bad"), "count": 0, "total": 0}
    matches = images.search(search)
    marked = images.favourites()
    cards, page = [], asked_for(query)
    listed = matches[page]
    if matches and search != Search() and not page.start:
        text = f"{len(matches):,} of {counted(len(images.entries()), 'image')}"
        cards.append(html.pieces.found(text))
    for entry in listed:
        prompt = parse_parameters(images.text(entry))["Prompt"] or entry.name
        star = "★ " if entry.name in marked else ""
        small = images.thumbnail(entry)
        cards.append(html.image_card(small, "show", entry.name, star + prompt))
    if not matches and images.entries():
        cards = [html.empty("Nothing found", "Search for other words, or empty a field.")]
    return {"cards": "".join(cards), "count": len(listed), "total": len(matches)}
