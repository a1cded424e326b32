"""How the site is built: `make docs`.

Sphinx with Furo and MyST, because they are maintained, build without a network and fail on every
warning, and because Sphinx reads docstrings and has a search of its own. Material for MkDocs is in
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
from sphinx.search import IndexBuilder
from sphinx.util import logging

sys.path.insert(0, str(Path(__file__).parents[1]))

import dora_diffusion
from tools import site

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
html_search_scorer = str(Path(__file__).with_name("search.js"))
smartquotes = False  # It would make dashes of the flags in headings.

# Docstrings have single backticks around names, as Markdown has.
default_role = "code"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 80
nitpicky = True
# Types of other libraries, whose indexes a build without a network has not.
nitpick_ignore_regex = [
    ("py:class", r"(collections\.abc|dataclasses|numpy|pathlib|torch|PIL)(\.\w+)+"),
]
# Classes of the package that the pages leave out; what autodoc cuts in two at a comma, or names as
# a module imports it. The build warns of what is needless here.
nitpick_ignore = [
    ("py:class", name)
    for name in (
        "dora_diffusion.adapters.fresh.AdaptedLayerReport",
        "dora_diffusion.adapters.norms.factors.Site",
        "dora_diffusion.adapters.scope._Entry",
        "dora_diffusion.cli.console.environment.Package",
        "dora_diffusion.cluster.fleet.queue.WorkQueue",
        "dora_diffusion.cluster.fleet.queue.Workers",
        "dora_diffusion.cluster.fleet.records.SubjectRecord",
        "dora_diffusion.config.families.GpuMemory",
        "dora_diffusion.config.families.MemoryRow",
        "dora_diffusion.config.families.TextEncoder",
        "dora_diffusion.formats.checkpoint.schedule.NoiseSchedule",
        "dora_diffusion.lab.analysis.changes.CheckpointChange",
        "dora_diffusion.lab.study.subjects.PhotoSource",
        "dora_diffusion.lab.study.subjects.ToySource",
        "dora_diffusion.numerics.weights.LayerWeights",
        "dora_diffusion.numerics.weights.Strengths",
        "Factors",
        "Image",
        "LayerKind",
        "Path",
        "Plan",
        "RowShard",
        "Strengths",
        "Tensor",
        "Wanted",
        "collections.abc.Mapping[int",
        "collections.abc.Mapping[str",
        "dict[str",
        "tuple[int",
        "tuple[str",
    )
]
napoleon_use_rtype = False
napoleon_use_ivar = True
# Data and plots of measurements are read beside the pages, by commands.
exclude_patterns = ["_build"]

# Documents at the top of the repository, and the pages that include them.
INCLUDED = {
    "README.md": "index",
    "CONTRIBUTING.md": "contributing/contributing",
    "CHANGELOG.md": "reference/changelog",
}


def complete(app: Sphinx, document: str, source: list[str]) -> None:
    """Put the Python interface in; link the pages that include documents at the top."""
    folder = Path(document).parent

    def page(link: re.Match[str]) -> str:
        path = os.path.relpath(INCLUDED[link[1]], folder)
        return f"]({Path(path).as_posix()}.md"

    text = site.expanded(source[0])
    source[0] = re.sub(rf"\]\((?:\.\./)+({'|'.join(INCLUDED)})", page, text)


def open_to_all(
    app: Sphinx, page: str, template: str, context: dict[str, Any], tree: object
) -> None:
    """Let a keyboard scroll wide code and tables, and say how deep a heading of the list is.

    The parameters of a long signature are no list of definitions, whatever Sphinx makes of them.
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


def feed(index: IndexBuilder, page: str, file: str, title: str, tree: nodes.document) -> None:
    """Index the words of a page's first paragraph as those of its title, for `search.js`."""
    _feed(index, page, file, title, tree)
    paragraph = next(iter(tree.findall(nodes.paragraph)), None)
    for word in index.lang.split(paragraph.astext() if paragraph else ""):
        stem = index.lang.stem(word).lower()
        if index.lang.word_filter(stem):
            index._title_mapping.setdefault(stem, set()).add(page)


_feed = IndexBuilder.feed
missing: set[tuple[str, str]] = set()


def note_missing(app: Sphinx, env: object, node: Any, text: nodes.Node) -> None:
    """Remember what the build finds nowhere."""
    missing.add((f"{node['refdomain']}:{node['reftype']}", node["reftarget"]))


def warn_of_needless(app: Sphinx, error: Exception | None) -> None:
    """After a build of all pages: what `nitpick_ignore` need not have."""
    for _, name in sorted({*nitpick_ignore} - missing if error is None else ()):
        logging.getLogger(__name__).warning("nitpick_ignore: nothing refers to %s", name)


def setup(app: Sphinx) -> None:
    IndexBuilder.feed = feed
    app.connect("missing-reference", note_missing)
    app.connect("build-finished", warn_of_needless)
    app.connect("html-page-context", open_to_all, priority=900)  # after the theme
    app.connect("source-read", complete)
