"""A page of sections, as Markdown beside its images, or as one HTML file."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dora_diffusion.config.wording import aligned

Row = list[str]
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
  color-scheme: light dark; background: Canvas; color: CanvasText }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 13px }
th, td { border-bottom: 1px solid #8886; padding: .25rem .6rem; text-align: left; white-space: nowrap }
img { max-width: 100%; height: auto; background: white }
figure { display: inline-block; margin: 0 1rem 1rem 0; max-width: 22rem; vertical-align: top }
"""  # noqa: E501


@dataclass(frozen=True)
class LinkedImage:
    """An image that is not in the page's file.

    Attributes:
        caption: What it shows.
        source: Its address, from the page.
    """

    caption: str
    source: str


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: Its heading.
        text: What it says, a paragraph.
        table: Rows, the first a head.
        image: A file beside the page.
        images: Images beside the page; HTML alone shows them.
    """

    title: str
    text: str = ""
    table: Sequence[Row] = ()
    image: Path | None = None
    images: Sequence[LinkedImage] = ()


def as_markdown(title: str, sections: Sequence[Section]) -> str:
    """The page as Markdown; images lie beside it."""
    parts = [f"# {title}"]
    for section in sections:
        parts.append(f"## {section.title}")
        parts += [section.text] if section.text else []
        parts += [aligned(section.table)] if section.table else []
        parts += [f"![{section.title}]({section.image.name})"] if section.image else []
    return "\n\n".join(parts) + "\n"


def as_html(title: str, sections: Sequence[Section]) -> str:
    """The page as one file, images in it."""
    body = "".join(_section(section) for section in sections)
    name = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{name}</title>\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<style>{_STYLE}</style>\n<h1>{name}</h1>\n{body}</html>\n"
    )


def _section(section: Section) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    if section.text:
        parts.append(f"<p>{html.escape(section.text).replace('`', '')}</p>")
    if section.table:
        head, *rows = section.table
        cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        lines = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell).replace('`', '')}</td>" for cell in row)
            + "</tr>\n"
            for row in rows
        )  # fmt: skip
        parts.append(f"<table>\n<tr>{cells}</tr>\n{lines}</table>")
    if section.image:
        content = base64.b64encode(section.image.read_bytes()).decode()
        alt = html.escape(section.title)
        parts.append(f'<img alt="{alt}" src="data:image/png;base64,{content}">')
    for linked in section.images:
        caption, source = html.escape(linked.caption), html.escape(linked.source)
        parts.append(
            f'<figure><img loading="lazy" alt="{caption}" src="{source}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return "\n".join(parts) + "\n"
