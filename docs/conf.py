"""How the site is built: `make docs`.

Sphinx with Furo and MyST, because they are maintained, build without a network and fail on every
warning, and because Sphinx reads docstrings and has a search of its own. Material for MkDocs is in
maintenance since November 2025; Zensical, its successor, is young.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from sphinx.application import Sphinx

import dora_diffusion

project = "DoRA Diffusion"
author = copyright = "the DoRA Diffusion authors"
version = release = dora_diffusion.__version__

extensions = ["myst_parser", "sphinx_copybutton"]
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist"]
# Anchors of headings, as GitHub makes them: one link works in both.
myst_heading_anchors = 4

html_theme = "furo"
html_title = "DoRA Diffusion"
html_copy_source = False
html_show_sphinx = False
nitpicky = True
# Data and plots of measurements are read beside the pages, by commands.
exclude_patterns = ["_build"]

# Documents at the top of the repository, and the pages that include them.
INCLUDED = {
    "README.md": "index",
    "CONTRIBUTING.md": "contributing/contributing",
    "CHANGELOG.md": "reference/changelog",
}


def lead_to_pages(app: Sphinx, document: str, source: list[str]) -> None:
    """A link to a document at the top leads to the page of the site that includes it."""
    folder = Path(document).parent

    def page(link: re.Match[str]) -> str:
        path = os.path.relpath(INCLUDED[link[1]], folder)
        return f"]({Path(path).as_posix()}.md"

    source[0] = re.sub(rf"\]\((?:\.\./)+({'|'.join(INCLUDED)})", page, source[0])


def setup(app: Sphinx) -> None:
    app.connect("source-read", lead_to_pages)
