"""Rules on what is around the code: requirements, Makefile, version, documents, words, styles."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase

from packaging.requirements import Requirement

from tools.pages import DOCS, LAB, PAGES
from tools.rules.requirements import BY_HAND, DEVELOPERS, EXTRAS, all_extras, stated
from tools.rules.sources import PACKAGE, ROOT, Repository, Source

NOTEBOOK = "notebooks/first_subject.ipynb"
# What a message or page may name that we do not require: trackers, file systems, compilers.
OTHERS = {*BY_HAND, "s3fs", "triton", "triton-windows", "pytorch-triton-xpu"}
INSTALL = re.compile(
    r"""pip install ((?:-\S+ )*)((?:"[^"]+"|'[^']+'|[\w{][\w.{}\[\]-]*)(?: [\w.-]+)*)"""
)


def printed_commands_install_what_there_is(repository: Repository) -> Iterator[str]:
    """Of the registry, where this package need not be: an extra is named by what is in it."""
    lines = [line for field in ("dependencies", *all_extras()) for line in stated(field)]
    known = {Requirement(line).name for line in lines} - {"dora-diffusion"} | OTHERS
    for source in repository.package:
        for node, text in _printed(source):
            for match in INSTALL.finditer(text):
                command = match[2].partition(" and ")[0].partition(" on ")[0]
                words = command.translate({34: "", 39: ""}).split()
                names = {Requirement(word).name for word in words if "{" not in word}
                for name in names - known:
                    yield source.problem(node, f"pyproject.toml has no {name}, or no longer")


def _printed(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """Texts of a module; values that are filled in are left as ``{}``."""
    parts = set[ast.AST]()
    for node in source.nodes(ast.JoinedStr):
        parts |= {*node.values}
        texts = [getattr(part, "value", "") for part in node.values]
        yield node, "".join(text if isinstance(text, str) else "{}" for text in texts)
    yield from ((node, text) for node, text in source.strings() if node not in parts)


def extras_stand_in_one_table(repository: Repository) -> Iterator[str]:
    """All of them, and every other page leads there; commands of pages work in a clone."""
    page = "docs/start/install.md"
    for name in EXTRAS ^ {*re.findall(r"^\| `([\w-]+)` \|", repository.text(page), re.MULTILINE)}:
        yield f"{page}:1: its table and pyproject.toml differ in the extra {name}"
    for source in repository.files.values():
        if source.path.startswith(("docs/", "notebooks/", "README.md")):
            names = EXTRAS if source.path == page else DEVELOPERS
            for match in re.finditer(r"pip install[^`\n]*?\[([\w,-]+)\]", source.text):
                for name in {*match[1].split(",")} - names:
                    message = f"the extra {name}: link {page}, which has them all"
                    yield source.problem(source.line_of(match.start()), message)
            for match in re.finditer(r"pip install .*dora-diffusion", source.text):
                message = "installs from a registry; install the clone"
                yield source.problem(source.line_of(match.start()), message)


def colab_badge(address: str) -> str:
    """The notebook in Colab, which opens files of GitHub; nothing for another address."""
    path = address.removeprefix("https://github.com/")
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    link = f"https://colab.research.google.com/github/{path}/blob/HEAD/{NOTEBOOK}"
    return "" if path == address else f"[![Open in Colab]({image})]({link})"


def notebook_follows_the_address(repository: Repository) -> Iterator[str]:
    """The badge and the first cell need a public address: no other one, and none before."""
    stated = re.search(r'^Repository = "(.+?)/?"$', repository.text("pyproject.toml"), re.MULTILINE)
    address = stated[1] if stated else ""
    for name in ("README.md", NOTEBOOK):
        text, badge = repository.text(name), colab_badge(address)
        badges = re.findall(r"\[!\[[^]]*\]\([^)]*\)\]\(https://colab\.[^)]*\)", text)
        if badges != [badge] * bool(badge):
            yield f"{name}:1: its badge must be {badge or 'left out'}, as Repository says"
    if f'REPOSITORY = \\"{address}\\"' not in repository.text(NOTEBOOK):
        yield f"{NOTEBOOK}:1: REPOSITORY must be {address!r}, as in pyproject.toml"


def makefile_names_what_there_is(repository: Repository) -> Iterator[str]:
    """A file that has moved would end the command that names it."""
    source = repository.files["Makefile"]
    for match in re.finditer(r"\b(?:lab/)?tests/[\w/.]*\w", source.text):
        if not match[0].endswith("_") and not (ROOT / match[0]).exists():
            line = source.line_of(match.start())
            yield source.problem(line, f"{match[0]} is not there; name where it went")


def make_offers_what_documents_say(repository: Repository) -> Iterator[str]:
    targets = {*re.findall(r"^([a-z-]+):", repository.text("Makefile"), flags=re.MULTILINE)}
    for page in PAGES:
        words = [word for words in page.commands if words[:1] == ["make"] for word in words[1:]]
        named = {word for word in words if re.fullmatch("[a-z-]+", word)}
        for name in (named | {*re.findall(r"`make ([a-z-]+)", page.prose)}) - targets:
            yield f"{page.name}:1: the Makefile has no target {name}"


def ci_runs_what_contributing_says(repository: Repository) -> Iterator[str]:
    name, page = ".ci/run", "CONTRIBUTING.md"
    lines = re.findall(r"^(?:exec )?make (.+)$", repository.text(name), re.MULTILINE)
    runs = [word for line in lines for word in line.split() if not word.startswith("-")]
    [stated] = re.findall(r"^\$ make (.+?) +# what CI runs", repository.text(page), re.MULTILINE)
    if runs != stated.split():
        yield f"{name}:1: {page} says that CI runs `make {stated}`, and it runs {' '.join(runs)}"
    if not os.access(ROOT / name, os.X_OK):
        yield f"{name}:1: cannot be run; chmod +x"


def version_is_written_once(repository: Repository) -> Iterator[str]:
    """In the package; the citation and the newest part of the changelog agree with it."""
    home = f"{PACKAGE}/__init__.py"
    pattern = r'^__version__ = "(.+)"$'
    (version,) = re.findall(pattern, repository.text(home), re.MULTILINE)
    project = repository.text("pyproject.toml")
    reads_it = 'version = { attr = "dora_diffusion.__version__" }' in project
    if f'version = "{version}"' in project or not reads_it:
        yield f"pyproject.toml:1: read the version from {home}"
    for name, pattern in (
        ("CITATION.cff", r'^version: "?(.+?)"?$'), ("CHANGELOG.md", r"^## \[(.+?)\]"),
    ):  # fmt: skip
        found = re.findall(pattern, repository.text(name), flags=re.MULTILINE)
        if found[:1] != [version]:
            yield f"{name}:1: has version {found[:1]}; {home} has {version}"


LONGEST_PAGE = 1200
# Looked things up in, not read.
ANY_LENGTH = ("docs/reference/", "lab/measurements/", "README.md", "CONTRIBUTING.md")


def pages_are_short(repository: Repository) -> Iterator[str]:
    for page in PAGES:
        words = len(page.prose.split())
        if words >= LONGEST_PAGE and not page.name.startswith(ANY_LENGTH):
            yield f"{page.name}:1: {words} words; split it, {LONGEST_PAGE} are too many"


def pages_have_words_to_be_found_by(repository: Repository) -> Iterator[str]:
    """In their front matter, which the site's search reads; lists of pages need none."""
    for page in PAGES:
        searched = re.match(r"---\nsearch: .+\n---\n", page.source)
        if re.match(r"docs/(start|howto|understand)/(?!index)", page.name) and not searched:
            yield f"{page.name}:1: has no `search:` in a front matter; write synonyms, symptoms"


def pages_name_paths_that_exist(repository: Repository) -> Iterator[str]:
    """From the clone, or from the package; a name in capitals stands for any."""
    tops = "benchmarks|docs|dora_diffusion|lab|samples|tests|tools"
    # A run's folder has `samples` too.
    of_runs = re.compile(r"samples/(adapter|base)\b|[^.]*[A-Z]")
    for page in PAGES:
        named = {*re.findall(r"(?<![\w/.<-])(?:[a-z_]+/)+\w+\.py\b", page.source)}
        named |= {*re.findall(rf"(?<![\w/.-])(?:{tops})/[\w./-]*\w", page.source)}
        for name in named:
            is_there = (ROOT / name).exists() or (ROOT / PACKAGE / name).exists()
            if not is_there and not of_runs.match(name):
                yield f"{page.name}:1: {name} is not there; name where it went"


def contributors_find_what_pages_name(repository: Repository) -> Iterator[str]:
    """Files by name alone, and folders."""
    for page in PAGES:
        if page.name.startswith(("CONTRIBUTING.md", "docs/contributing/")):
            for code in page.inline_code:
                is_path = re.fullmatch(r"(?:[a-z_]\w*/)*[a-z_]\w*(?:\.py|/)", code)
                if is_path and not _names_a_path(repository, code):
                    yield f"{page.name}:1: {code} is not there; name where it went"


def code_names_paths_that_exist(repository: Repository) -> Iterator[str]:
    """In docstrings and messages from the package or the clone; in lists of scripts, any."""
    tops = {"tests", "tools", "benchmarks", PACKAGE}
    tops |= {path.partition("/")[0] for path in _below_package(repository)}
    mention = re.compile(rf"(?<![\w/.*{{}}<-])(?:{'|'.join(sorted(tops))})/[\w/*]*\.py\b")
    for source in repository.python(PACKAGE, "tools", "benchmarks"):
        for node, text in source.strings():
            names = {*mention.findall(text)}
            if not source.path.startswith(PACKAGE):
                names |= {*re.findall(r"\A(?:[\w*]+/)+[\w*]+\.py\Z", text)}
            for name in sorted(names):
                if not _names_a_path(repository, name):
                    yield source.problem(node, f"{name} is not there; name where it went")


def _below_package(repository: Repository) -> list[str]:
    """Paths of the package's modules in its folders."""
    paths = [path.removeprefix(f"{PACKAGE}/") for path in repository.files]
    return [path for path in paths if "/" in path and f"{PACKAGE}/{path}" in repository.files]


def _names_a_path(repository: Repository, name: str) -> bool:
    """Return whether a file or folder has this path, or ends with it; ``*`` is any text."""
    pattern = f"*/{name}*" if name.endswith("/") else f"*/{name}"
    return (ROOT / name).exists() or any(
        fnmatchcase(f"/{path}", pattern) for path in repository.files
    )


def every_page_is_linked(repository: Repository) -> Iterator[str]:
    """From another page, or by name in a table of contents."""
    linked = {path for page in PAGES for path, _ in page.links if path != page.path}
    for page in PAGES:
        for block in page.blocks:
            if block.language == "{toctree}":
                names = re.findall(r"^(?:.*<)?([\w/*-]+)>?$", block.text, re.MULTILINE)
                linked |= {path for name in names for path in page.path.parent.glob(f"{name}.md")}
    for page in PAGES:
        is_ours = page.path.is_relative_to(DOCS) or page.path.is_relative_to(LAB)
        if is_ours and page.path not in {*linked, DOCS / "index.md"}:
            yield f"{page.name}:1: no page leads here; link it"


def small_cards_have_the_counted_memory(repository: Repository) -> Iterator[str]:
    counts = repository.text("lab/measurements/gpu-memory.md").partition("## One training step")[0]
    counted = re.findall(r"\| ([\d.]*) ?\| ([\d.]+) \|$", counts, re.MULTILINE)
    page = "docs/howto/out-of-memory.md"
    pattern = r"\| ([\d.]*)(?: GiB)? ?\| ([\d.]+) GiB \|$"
    if re.findall(pattern, repository.text(page), re.MULTILINE) != counted:
        yield f"{page}:1: its table is not that of lab/measurements/gpu-memory.md; copy it"


def images_have_a_text_and_a_page(repository: Repository) -> Iterator[str]:
    shown = {path for page in PAGES for path, _ in page.links}
    for path in sorted([*(DOCS / "images").iterdir(), *(LAB / "images").iterdir()]):
        if path not in shown:
            yield f"{path.relative_to(ROOT).as_posix()}:1: no page shows it; remove it"
    for page in PAGES:
        for text in page.image_texts:
            if len(text) < 4:
                yield f"{page.name}:1: an image's text is {text!r}; say what it shows"


DIALECT = {
    r"(go|goes|going|went) on\b": "resume, continue",
    r"anew\b": "again, from scratch",
    r"spellings?\b": "key format",
    r"taken over\b": "subject leakage",
    r"how sure\b": "confidence interval",
    r"made again\b": "repeated, recomputed",
    r"knows? of\b": "knows, reads",
}
"""Words that nobody searches for -> those of the field."""


def documents_and_code_speak_the_words_of_the_field(repository: Repository) -> Iterator[str]:
    words = {pattern.replace(" ", r"\s+"): word for pattern, word in DIALECT.items()}
    any_of_them = re.compile("|".join(rf"\b{pattern}" for pattern in words))
    pages = [s for s in repository.files.values() if s.path.endswith(".md")]
    ours = (f"{PACKAGE}/", "docs/", "README.md", "CONTRIBUTING.md")
    for source in (*repository.package, *pages):
        if source.path.startswith(ours):
            text = source.text.lower()
            for match in any_of_them.finditer(text):
                instead = next(word for key, word in words.items() if re.match(key, match[0]))
                message = f"{' '.join(match[0].split())!r}: say {instead}"
                yield source.problem(source.line_of(match.start()), message)


# Words of the embedded models' captions, and this rule.
SPEAKING = (
    "tools/rules/project.py",
    "lab/pretrain/captions.py", "lab/pretrain/tokenizer.py",
)  # fmt: skip


def code_says_image(repository: Repository) -> Iterator[str]:
    for source in repository.python():
        for match in re.finditer("picture", source.text, re.IGNORECASE):
            if source.path not in SPEAKING:
                yield source.problem(source.line_of(match.start()), f"{match[0]}: say image")


def styles_have_one_scale(repository: Repository) -> Iterator[str]:
    """One scale of type, one grid of spacing, and colours that the dark scheme changes."""
    for name in ("style.css", "phone.css"):
        source = repository.files[f"{PACKAGE}/studio/app/{name}"]
        rules = re.sub(
            r"(?m)^(:root|\.dark) \{[^}]*\}", lambda block: "\n" * block[0].count("\n"), source.text
        )
        found = [
            (match.start(1), f"font-size {match[1]}rem: take one of 0.8, 0.9, 1.1, 1.4, 1.7")
            for match in re.finditer(r"font-size: ([\d.]+)rem", source.text)
            if float(match[1]) not in {0.8, 0.9, 1.1, 1.4, 1.7}
        ]
        for match in re.finditer(r"(?:padding|margin|gap|top|right)[\w-]*: ([^;}]*)", source.text):
            steps = re.findall(r"([\d.]+)rem", match[1])
            if not all((float(step) * 4).is_integer() for step in steps):
                found.append((match.start(), f"{match[0]}: take quarters of a rem"))
        for place, message in found:
            yield source.problem(source.line_of(place), message)
        for match in re.finditer(r"#[0-9a-f]{3,8}\b", rules):
            # White, or near black, is on the accent.
            if match[0] not in {"#fff", "#2a120a", "#453e37"}:
                line = rules.count("\n", 0, match.start()) + 1
                yield source.problem(line, f"{match[0]}: give it a name in :root and .dark")
