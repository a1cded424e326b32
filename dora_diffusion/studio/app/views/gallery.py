"""List of all generated images, loaded page by page on scrolling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dora_diffusion.config.wording import counted
from dora_diffusion.sampling.images import parse_parameters
from dora_diffusion.studio.app import html
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.views import ui
from dora_diffusion.studio.jobs.image_store import PAGE, ImageStore

MOST_PAGES = 50
SCRIPT = (Path(__file__).parents[1] / "gallery.js").read_text(encoding="utf-8")
_EMPTY = html.empty(
    "No images yet",
    "Choose a run and press Generate images. Side by side shows one seed without and with it.",
)


class GalleryView:
    """The list of images."""

    def __init__(self, context: Context) -> None:
        def list_page(query: Any) -> dict[str, Any]:
            return page_of(context.images, query)

        text = "Newest first, from earlier visits too. All are in runs/images."
        ui.html_block(html.heading("", "All images", text))
        self.list = ui.html_block(
            _EMPTY, elem_id="history", js_on_load=SCRIPT, server_functions=[list_page]
        )


def refresh(images: ImageStore) -> dict[str, Any]:
    """Return the timer's update. A new stamp makes the script request the list again."""
    count = len(images.entries())
    text = html.pieces.count(counted(count, "image"), images.stamp)
    return {"history": text if count else _EMPTY}


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
        query: The browser's request: ``from``, index of the first image; and ``count``, 0 for
            `PAGE`.

    Returns:
        ``cards`` as HTML, their ``count``, and the ``total`` of images.
    """
    entries = images.entries()
    listed = entries[asked_for(query)]
    cards = []
    for entry in listed:
        prompt = parse_parameters(images.text(entry))["Prompt"] or entry.name
        cards.append(html.image_card(images.thumbnail(entry), "show", entry.name, prompt))
    return {"cards": "".join(cards), "count": len(listed), "total": len(entries)}
