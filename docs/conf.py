"""Build of the site: `make docs`.

Sphinx with Furo and MyST, because they are maintained, build without a network and fail on every
warning, and because Sphinx reads docstrings. Material for MkDocs is in
maintenance since November 2025; Zensical, its successor, is young.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

sys.path.insert(0, str(Path(__file__).parents[1]))

import dora_diffusion
from tools import search, site

project = "DoRA Diffusion"
author = copyright = "the DoRA Diffusion authors"
version = release = dora_diffusion.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist"]
# Anchors of headings, as GitHub makes them: one link works in both.
myst_heading_anchors = 4

html_theme = "furo"
html_title = "DoRA Diffusion"
html_copy_source = False
html_show_sphinx = False
html_static_path = ["_static"]
templates_path = ["_templates"]
# Sphinx's own search, whose pages compete as wholes, is off.
html_additional_pages = {"search": "search.html"}
smartquotes = False  # It would make dashes of the flags in headings.

# Docstrings have single backticks around names, as Markdown has.
default_role = "code"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 80
nitpicky = True
# Undocumented classes, and documented ones that a module imports by name. The build warns about
# unused entries.
LEFT_OUT = [
    "AdaptedLayerReport", "AdapterRef", "Factors", "Graph",
    "Image", "LayerAdapter", "LayerWeights", "MergeStrengths",
    "NoiseSchedule", "NormRoute", "Path", "Photo",
    "Preprocessing", "Preset", "Route", "RowShard", "ScheduleInfo", "Site", "Strengths",
    "SubjectRecord", "Values", "WorkQueue", "Workers",
]  # fmt: skip
# Also types of other libraries, since a build without a network has no indexes of them, and types
# that autodoc splits at a comma.
nitpick_ignore_regex = [
    ("py:class", rf"(dora_diffusion(\.\w+)*\.)?({'|'.join(LEFT_OUT)})"),
    ("py:class", r"(collections\.abc|dataclasses|numpy|os|pathlib|torch|PIL)(\.\w+)+"),
    ("py:class", r"(collections\.abc\.Mapping|dict|tuple)\[(int|str)"),
]
napoleon_use_rtype = False
napoleon_use_ivar = True
exclude_patterns = ["_build"]

# Documents at the top of the repository, and the pages that include them.
INCLUDED = {
    "README.md": "index",
    "CONTRIBUTING.md": "contributing/contributing",
    "CHANGELOG.md": "reference/changelog",
}


def complete(app: Sphinx, document: str, source: list[str]) -> None:
    """Put the Python interface in; link the pages that include documents at the top.

    Links to the laboratory become the paths of its files.
    """
    folder = Path(document).parent

    def page(link: re.Match[str]) -> str:
        path = os.path.relpath(INCLUDED[link[1]], folder)
        return f"]({Path(path).as_posix()}.md"

    text = _LABORATORY.sub(_to_laboratory, site.expanded(source[0]))
    source[0] = re.sub(rf"\]\((?:\.\./)+({'|'.join(INCLUDED)})", page, text)


# A page of the laboratory is not a page of the site.
_LABORATORY = re.compile(r"(\(?)\[([^\[\]]+)\]\((?:\.\./)+(lab/[^)#\s]+)[^)\s]*\)")


def _to_laboratory(link: re.Match[str]) -> str:
    before, text, path = link.groups()
    return f"({text}, `{path}`" if before else f"{text} (`{path}`)"


def open_to_all(
    app: Sphinx, page: str, template: str, context: dict[str, Any], tree: object
) -> None:
    """Make wide code and tables scroll by keyboard, and state the level of headings in the list.

    Also replace Sphinx's definition list for the parameters of a long signature.
    """
    if "body" in context:
        context["body"] = re.sub(r"<dl>\n(?:<dd>.*</dd>\n)+</dl>", _as_lines, context["body"])
    for name, old, new in (
        ("body", "<pre>", '<pre tabindex="0">'),
        ("body", '<div class="table-wrapper', '<div tabindex="0" class="table-wrapper'),
        ("body", 'role="heading"', 'role="heading" aria-level="2"'),
        ("furo_navigation_tree", 'role="heading"', 'role="heading" aria-level="2"'),
    ):
        if name in context:
            context[name] = context[name].replace(old, new)


def _as_lines(signature: re.Match[str]) -> str:
    text = re.sub("<(/?)d[ld]>", r"<\1div>", signature[0])
    return text.replace("\n<div>", '\n<div style="margin-left: 2rem">')


missing: set[str] = set()


def note_missing(app: Sphinx, env: object, node: Any, text: nodes.Node) -> None:
    """Record a reference that the build cannot resolve."""
    missing.add(node["reftarget"].rpartition(".")[2])


def warn_of_needless(app: Sphinx, error: Exception | None) -> None:
    """Warn about unused entries of `LEFT_OUT` after a build of all pages."""
    for name in sorted({*LEFT_OUT} - missing if error is None else ()):
        logging.getLogger(__name__).warning("LEFT_OUT: nothing refers to %s", name)


def without_search(app: Sphinx) -> None:
    """Leave out the search of Sphinx, in place of which `_templates/search.html` is."""
    app.builder.search = False


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", without_search)
    app.connect("build-finished", search.write_index)
    app.connect("missing-reference", note_missing)
    app.connect("build-finished", warn_of_needless)
    app.connect("html-page-context", open_to_all, priority=900)  # after the theme
    app.connect("source-read", complete)
