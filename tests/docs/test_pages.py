"""Names in README, CONTRIBUTING and the pages of the site are those of the code."""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import json
import pkgutil
import re
import shlex
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from dora_diffusion.cli.main import build_parser
from dora_diffusion.config import TrainConfig, settings, with_features
from dora_diffusion.config.features.outside import features_of_command
from dora_diffusion.config.file import SEGMENTS
from dora_diffusion.config.flag_map import DIFFUSERS_FLAGS
from dora_diffusion.config.images import OPTIONS
from dora_diffusion.config.train import settings_by_name
from dora_diffusion.formats.layouts import CONVERSIONS, PROGRAMS, TARGETS
from lab.__main__ import build_parser as laboratory
from tests.every import every
from tools import site
from tools.pages import DOCS, PAGES, ROOT, Page

PACKAGE = ROOT / "dora_diffusion"
PARSERS = site.parsers() | site.parsers_of(laboratory())

# Of pip, uv, venv, accelerate, docker.
FLAGS_OF_OTHERS = {
    "--help", "--extra-index-url", "--index-url", "--multi_gpu", "--num_processes",
    "--use_fsdp", "--fsdp_version", "--use_deepspeed", "--fsdp_offload_params",
    "--fsdp_reshard_after_forward", "--fsdp_activation_checkpointing", "--head", "--generate",
    "--torch-backend", "--gpus", "--rm", "--build-arg", "--no-healthcheck", "--tag", "--user",
    "--system-site-packages",
}  # fmt: skip
# Pages whose tables begin with the names of other programs.
OF_OTHERS = re.compile(r"howto/(coming-from|from-)")
# Names of other programs, and of their files.
WORDS_OF_OTHERS = {
    "clip_l_out", "color_aug", "create_lycoris", "create_lycoris_from_weights",
    "face_crop_aug_range", "linear_dim", "lora_te_text_model", "static_graph", "weight_adapter",
}  # fmt: skip


def each_page(check: Callable[[Page], None]) -> Callable[[], None]:
    """Make one test of a check of every page, which names all pages that fail."""

    def test() -> None:
        with every() as case:
            for page in PAGES:
                with case(page.name):
                    check(page)

    test.__doc__ = check.__doc__
    return test


def own_command(words: list[str]) -> list[str] | None:
    """Arguments that a command gives our own parser; None for other programs."""
    words = list(itertools.dropwhile(lambda word: re.match(r"\w+=", word), words))
    scripts = {"train_dreambooth_dora.py": "train", "app.py": "app"}
    for package in ("dora_diffusion", "lab"):
        if package in words[:9] and "-m" in words:
            return words[words.index(package) + 1 :]
    for place, word in enumerate(words):
        if command := scripts.get(Path(word).name):
            return [command, *words[place + 1 :]]
    return words[1:] if words[:1] == ["dora-diffusion"] else None


def without_redirections(words: list[str]) -> list[str]:
    """A command's words without where its output goes."""
    kept: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        if not re.fullmatch("[<>&]+", word) and not re.fullmatch("[<>&]+", before):
            kept.append(word)
    return kept


@each_page
def test_commands_parse(page: Page) -> None:
    for words in page.commands:
        command = own_command(without_redirections(words))
        if command and command[0] not in ("--version", "--help"):
            assert command[0] in PARSERS, shlex.join(words)
            if not {"--help", "--help-all"} & {*command}:
                error = io.StringIO()
                try:
                    with contextlib.redirect_stderr(error), features_of_command(command):
                        has_own = "--feature" in command
                        parsers = site.parsers_of(build_parser()) if has_own else PARSERS
                        parsers[command[0]].parse_args(command[1:])
                except SystemExit:
                    pytest.fail(f"{shlex.join(words)}: {error.getvalue()}")


CONVERT = re.compile(r"\bconvert ((?:\S+ ){0,2})--to ([\w-]+)([^`'\"|\n]*)")


def texts() -> dict[str, str]:
    """All that people read: pages, notebooks, and the messages of the package."""
    files = [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.json"), *ROOT.glob("notebooks/*.ipynb")]
    sources = {page.name: page.source for page in PAGES}
    sources |= {file.relative_to(ROOT).as_posix(): file.read_text("utf-8") for file in files}
    return {
        name: re.sub(r"\\\n *|`(?=--)|(?<=--to)`|(?<=--base)`", "", text)
        for name, text in sources.items()
    }


def test_conversions_name_the_program_and_the_base_as_the_readme_does() -> None:
    """A format has its name only where formats are explained, or where no program asks for it."""
    found = 0
    of_one_base = {n for n, p in PROGRAMS.items() if CONVERSIONS[p.output_axis].for_one_base}
    with every() as case:
        for name, text in texts().items():
            for files, target, rest in CONVERT.findall(text):
                found += 1
                with case(f"{name}: --to {target}"):
                    if not re.search(r"howto/export\.md|/reference/", name):
                        assert target in {"PROGRAM", *TARGETS} - {"kohya"}
                    if files.count(" ") == 2 and target in {"PROGRAM", *of_one_base}:
                        assert "--base " in rest
    assert found > 15


@cache
def flags_of_scripts() -> set[str]:
    """Of benchmarks and tools, of other programs, and of lines of sample prompts."""
    flags = FLAGS_OF_OTHERS | {f"--{name}" for name in OPTIONS}
    for script in (*ROOT.glob("benchmarks/*.py"), *ROOT.glob("tools/**/*.py")):
        flags |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', script.read_text("utf-8")))
    return flags


def flags_of(command: str) -> set[str]:
    return {name for a in PARSERS[command]._actions for name in a.option_strings}


def named_commands(page: Page) -> list[str]:
    """The commands that a page shows or names, in its order; then `train`."""
    shown = [own_command(words) or [""] for words in page.commands]
    inline = [code.removeprefix("dora-diffusion ").split() or [""] for code in page.inline_code]
    names = [words[0] for words in [*shown, *inline] if words and words[0] in PARSERS]
    return list(dict.fromkeys([*names, "train"]))


@each_page
def test_flags_exist(page: Page) -> None:
    """In sentences and tables too, in a command that the page shows or names."""
    text = page.source
    known = flags_of_scripts().union(*map(flags_of, named_commands(page)))
    files = re.findall(r"--feature (\S+\.py)", text)
    known |= {f"--{name}" for name in settings_by_name(with_features(*{*files}))}
    if OF_OTHERS.search(page.name):
        text = re.sub(r"^\| [^|]*\|", "|", text, flags=re.MULTILINE)
        text = re.sub(r"\*\*Not here\*\*:.*?\n\n", "", text, flags=re.DOTALL)
        known = known | {f"--{name}" for name in DIFFUSERS_FLAGS}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text)) - known == set()


@each_page
def test_flags_of_a_command_are_its_own(page: Page) -> None:
    """In code that begins with its name, and under a heading that names it."""
    codes = [code.removeprefix("dora-diffusion ") for code in page.inline_code]
    sections = re.findall(r"^#+ [^\n`]*`([a-z-]+)`$(.*?)(?=^#|\Z)", page.prose, re.DOTALL | re.M)
    for name, text in [*(code.partition(" ")[::2] for code in codes), *sections]:
        if name in PARSERS:
            named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text))
            assert named - flags_of(name) - FLAGS_OF_OTHERS == set(), (name, text)


def default_of(name: str, page: Page, command: str | None) -> str:
    """Help text, of a command or the first of the page that has the flag."""
    command = command or next(c for c in named_commands(page) if f"--{name}" in flags_of(c))
    texts = {setting.name: setting.default_text for setting in settings()}
    if command in ("train", "fleet") and name in texts:
        return texts[name]
    [action] = [a for a in PARSERS[command]._actions if f"--{name}" in a.option_strings]
    said = re.search(r"Default: ([\w.+-]+)", action.help or "")
    return said[1].rstrip(".") if said else str(action.default)


STATED = [
    re.compile(r"`--(?P<name>[a-z_]+)` \((?:default )?(?P<value>[\d.e+-]+)(?=[ ;,)])"),
    re.compile(r"`--(?P<name>[a-z_]+)` \((?:default )?`(?P<value>[\w-]+)`\)"),
    re.compile(r"`--(?P<name>[a-z_]+) (?P<value>[^`]+)`(?: \(|, )(?:the )?default"),
    re.compile(
        r"`(?:(?P<command>[a-z]+) )?(?:--)?(?P<name>[a-z_]+)`,? (?:is )?"
        r"(?P<value>[\d.e+-]+) by default"
    ),
    re.compile(r"^\| `--(?P<name>[a-z_]+)` \| (?P<value>[\d.e+-]+)(?=[^|]*\|.*{default})", re.M),
]
"""Patterns by which pages state a default; the last is a row of a table with a `default` column."""


def stated_defaults(page: Page) -> list[dict[str, str | None]]:
    prose = re.sub(r"(?<![|\n])\n(?![|\n])", " ", page.prose)
    for table in re.findall(r"^\|[^|\n]*\| default \|.*\n(?:\|.*\n)+", prose, re.M):
        prose = prose.replace(table, table.replace("\n", "{default}\n"))
    return [{"command": None, **m.groupdict()} for form in STATED for m in form.finditer(prose)]


@each_page
def test_defaults_are_those_of_the_code(page: Page) -> None:
    for stated in stated_defaults(page):
        known = re.split("[ ,;]", default_of(stated["name"], page, stated["command"]))[0]
        try:
            assert float(stated["value"]) == float(known), stated
        except ValueError:
            assert stated["value"] == known, stated


def test_the_fields_of_a_request_are_those_of_the_code() -> None:
    request = pytest.importorskip("dora_diffusion.cluster.serving.engine").ApiRequest
    text = (DOCS / "howto" / "serve.md").read_text("utf-8")
    (table,) = re.findall(r"^\| field \|.*\n\|.*\n((?:\|.*\n)+)", text, re.M)
    stated = {
        name: cells.split(" | ")[0].strip()
        for names, cells in re.findall(r"^\| (`.*?) \| (.*)$", table, re.M)
        for name in re.findall(r"\w+", names)
    }
    fields = request.model_fields.items()
    assert stated == {
        n: "required" if f.is_required() else json.dumps(f.default) for n, f in fields
    }


@cache
def the_code() -> str:
    """The text of package, laboratory, tools, benchmarks and samples, and of what builds them."""
    texts = []
    for top in ("dora_diffusion", "lab", "tools", "benchmarks", "samples"):
        for suffix in ("py", "yaml", "json", "css", "js", "sh"):
            texts += [path.read_text("utf-8") for path in (ROOT / top).rglob(f"*.{suffix}")]
    texts += [(ROOT / name).read_text("utf-8") for name in ("Makefile", "pyproject.toml")]
    return "\n".join([*texts, *(path.name for path in ROOT.glob("*.py"))])


@cache
def words_of_the_code() -> frozenset[str]:
    return frozenset(re.findall(r"\w+", the_code()))


@each_page
def test_names_in_code_exist(page: Page) -> None:
    """Settings and functions: words with an underscore, and names before a bracket."""
    if OF_OTHERS.search(page.name):
        return
    named = set()
    for code in page.inline_code:
        named |= set(re.findall(r"(?<![\w./<{-])([a-z]+(?:_[a-z0-9]+)+)(?![\w./>*-])", code))
        named |= set(re.findall(r"\b([a-zA-Z_]\w+)\(", code))
    assert named - words_of_the_code() - WORDS_OF_OTHERS == set()


@each_page
def test_dotted_names_exist(page: Page) -> None:
    """Of modules and what is in them; or keys of metadata, as the code has them."""
    for code in page.inline_code:
        for name in re.findall(r"(?<![\w./-])(dora_diffusion(?:\.[A-Za-z_]\w*)+)(?![\w/])", code):
            if f'"{name}"' not in the_code():
                pkgutil.resolve_name(name)


@each_page
def test_links_and_anchors_lead_somewhere(page: Page) -> None:
    pages = {other.path: other for other in PAGES}
    for path, anchor in page.links:
        assert path.exists(), path
        if anchor:
            assert anchor in pages[path].anchors, f"{path.name}#{anchor}"


def test_public_names_are_documented() -> None:
    """And each is on the page of the Python interface."""
    page = site.python_api()
    for name, home in site.public_names().items():
        value = getattr(import_module(home), name)
        assert inspect.getdoc(value), name
        assert re.search(rf"auto\w+:: dora_diffusion[\w.]*\.{name}\b", page), name


def test_every_flag_and_setting_has_a_text() -> None:
    page = f"{site.commands()}\n{site.setting_groups()}"
    for name, parser in site.parsers().items():
        for action in parser._actions:
            assert action.help, (name, action.dest)
    assert page.count("\n- **`") > len(settings()) + 100
    for setting in settings():
        assert re.search(rf"^- \*\*`--{setting.name}\b", page, re.MULTILINE)


def test_every_generated_text_is_on_one_page() -> None:
    blocks = [block.language for page in PAGES for block in page.blocks]
    names = [name.split()[1] for name in blocks if name.startswith("{generated}")]
    tables = re.compile(r"^<!-- generated: ([a-z-]+) -->$", re.MULTILINE)
    names += [name for page in PAGES for name in tables.findall(page.source)]
    assert sorted(names) == sorted(site.TEXTS)
    assert [page.name for page in PAGES if site.current(page.source) != page.source] == []


def test_the_segments_that_are_shown_are_of_settings_that_may_change() -> None:
    [block] = [b for b in Page(DOCS / "howto/resume.md").blocks if b.language == "yaml"]
    free = {setting.name for setting in settings() if setting.resume == "free"}
    for segment in yaml.safe_load(block.text)[SEGMENTS]:
        assert set(segment["settings"]) <= free
    first = yaml.safe_load(block.text)[SEGMENTS][0]["settings"]
    assert first["learning_rate"] == TrainConfig().unet_lr
