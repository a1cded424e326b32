"""The index of the site's search, and how well it answers what people ask.

Sphinx calls `write_index` after a build: each section of each page with its words and synonyms, in
a script, since a page that is opened from a file may not read other files.

``python -m tools.search`` builds the site, asks every question of `QUESTIONS` with Node, and writes
and counts the ranks.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx.application import Sphinx

DOCS = Path(__file__).parents[1] / "docs"
QUESTIONS = DOCS.parent / "lab" / "measurements" / "search-questions.yaml"
RANKS = QUESTIONS.with_name("search-ranks.json")
_SYNONYMS = re.compile(r"<!-- search: (.*?) -->", re.DOTALL)


@dataclass(frozen=True)
class Question:
    """A question that somebody asked elsewhere.

    Attributes:
        title: Of the issue or thread, as it is.
        source: ``owner/repository#number``, or an address.
        answers: Pages that answer it, with or without an anchor.
        held_out: Whether it was looked up after the search had been finished.
    """

    title: str
    source: str
    answers: tuple[str, ...]
    held_out: bool = False


def questions() -> list[Question]:
    """All questions, in the order of their file."""
    rows = yaml.safe_load(QUESTIONS.read_text(encoding="utf-8"))
    return [Question(**{**row, "answers": tuple(row["answers"])}) for row in rows]


def rank(paths: Sequence[str], answers: Sequence[str]) -> int | None:
    """Return the place of the first result that answers, from 1."""
    for place, path in enumerate(paths, 1):
        page = path.replace(".html", "")
        if any(page == answer or page.partition("#")[0] == answer for answer in answers):
            return place
    return None


def counts(found: Mapping[str, int | None], held_out: bool) -> str:
    """State how many questions are answered: those that were held out, or the others."""
    places = [found[q.title] or math.inf for q in questions() if q.held_out == held_out]
    first, three = (sum(place <= most for place in places) for most in (1, 3))
    return f"{first} of {len(places)} by the first page, {three} by the first three."


def ranks(site: Path, asked: Sequence[Question]) -> dict[str, int | None]:
    """Return each question's rank in a site that was built, by Node."""
    found = subprocess.run(
        ["node", "-e", _ASK, *(str(site / "_static" / name) for name in SCRIPTS)],
        input=json.dumps([question.title for question in asked]),
        capture_output=True,
        text=True,
        check=True,
        encoding="utf-8",
    )
    paths = json.loads(found.stdout)
    return {q.title: rank(got, q.answers) for q, got in zip(asked, paths, strict=True)}


SCRIPTS = ("minisearch.js", "search-index.js", "search.js")
_ASK = """
const { createContext, runInContext } = require("vm");
const read = (file) => require("fs").readFileSync(file, "utf-8");
const site = createContext();
for (const file of process.argv.slice(1)) runInContext(read(file), site);
const paths = (title) => site.siteSearch(title).map(({ path }) => path);
console.log(JSON.stringify(JSON.parse(read(0)).map(paths)));
"""


def write_index(app: Sphinx, error: Exception | None) -> None:
    """Write `search-index.js` of all pages that a build has."""
    if error is None and app.builder.format == "html":
        pages = [page for name in sorted(app.env.found_docs) if (page := _page(app, name))]
        text = f"const SEARCH_PAGES = {json.dumps(pages, ensure_ascii=False)};\n"
        Path(app.outdir, "_static", "search-index.js").write_text(text, encoding="utf-8")


def _page(app: Sphinx, name: str) -> dict[str, Any] | None:
    """Title, address, synonyms and sections of a page; None if it is not to be found."""
    from docutils import nodes

    metadata = app.env.metadata[name]
    sections = list(app.env.get_doctree(name).findall(nodes.section))
    if "nosearch" in metadata or not sections:
        return None
    return {
        "path": app.builder.get_target_uri(name),
        "title": sections[0][0].astext(),
        "synonyms": str(metadata.get("search", "")),
        "sections": [
            {
                "anchor": "#" + section["ids"][0] if section is not sections[0] else "",
                "heading": section[0].astext(),
                "synonyms": _synonyms(section),
                "text": _text(section),
            }
            for section in sections
        ],
    }


def _synonyms(section: nodes.section) -> str:
    """The words of a comment right below a heading."""
    found = _SYNONYMS.match(section[1].astext()) if len(section) > 1 else None
    return found[1] if found else ""


def _text(section: nodes.section) -> str:
    """The words of a section, without those of sections in it."""
    from docutils import nodes

    kept = [n for n in section[1:] if not isinstance(n, (nodes.section, nodes.raw, nodes.comment))]
    texts = [text for node in kept for text in node.findall(nodes.TextElement)]
    parts = [text.astext() for text in texts if not isinstance(text.parent, nodes.TextElement)]
    return " ".join(" ".join(parts).split())


def main(arguments: Sequence[str] | None = None) -> None:
    """Rank every question, in a folder with a site or in one that is built."""
    parser = argparse.ArgumentParser(description="Ask the site's search what people ask.")
    parser.add_argument("--site", type=Path, help="a site that `make docs` built")
    site = parser.parse_args(arguments).site
    with tempfile.TemporaryDirectory() as folder:
        if site is None:
            site = Path(folder)
            subprocess.run([sys.executable, "-m", "sphinx", "-q", DOCS, site], check=True)
        found = ranks(site, questions())
    print(f"tuning: {counts(found, held_out=False)}\nheld out: {counts(found, held_out=True)}")
    RANKS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
