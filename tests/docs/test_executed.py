"""Run each ``bash`` and ``python`` block that README and the pages of the site show.

The blocks of a page run in their order, in one shell and one folder that has nothing but copies of
``samples`` and ``examples``. A ``text`` block right below one is what it prints, errors too;
``...`` stands for anything, as doctest has it. Where that has a line that begins with ``error:``,
the block may fail. Python blocks with none of bash between them are one program.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from dora_diffusion.system import is_windows
from tests.waiting import WAIT_SECONDS
from tools.pages import PAGES, ROOT, Block, Page

SECONDS = 2 * WAIT_SECONDS
"""Seconds after which a page that has stopped moving is ended."""
MARK = "\x1e"
# Of the others, `make test` checks what they name.
QUICK = {"docs/reference/commands.md"}
# Blocks of a clone, and of a running app, which `tests/studio/app/test_api.py` runs.
ELSEWHERE = {"CONTRIBUTING.md", "remote.md"}

pytestmark = pytest.mark.skipif(is_windows(), reason="the blocks are for a POSIX shell")


@dataclass(frozen=True)
class Example:
    """A block that runs.

    Attributes:
        block: The block.
        output: What it prints; None where nothing is shown.
    """

    block: Block
    output: str | None

    @property
    def may_fail(self) -> bool:
        return re.search(r"^error: ", self.output or "", re.MULTILINE) is not None


def examples_of(page: Page) -> list[Example]:
    """The blocks that run, each with the output that is shown right below it."""
    examples = []
    end = Block("", "", 0, follows=False)
    for block, after in itertools.pairwise([*page.blocks, end]):
        if block.language in ("bash", "python"):
            shown = after.text if after.follows and after.language == "text" else None
            examples.append(Example(block, shown))
    return examples


def matches(expected: str, printed: str) -> bool:
    """Return whether a text is what is shown, where ``...`` matches anything."""
    lines = [re.sub(r".*\r", "", line).rstrip() for line in printed.strip().split("\n")]
    wanted = [line.rstrip() for line in expected.strip().splitlines()]
    parts = map(re.escape, "\n".join(wanted).split("..."))
    return re.fullmatch(".*".join(parts), "\n".join(lines), re.DOTALL) is not None


def script_of(examples: list[Example], folder: Path) -> str:
    """One shell script of all; the output of each begins with `MARK`."""
    # `make` in the documents is that of the clone, with the environment that runs the tests.
    ready = "-o .venv/.ready -o .venv/.ready-to-test"
    lines = [
        "exec 2>&1; set -e",
        f"make() {{ command make -s -C {ROOT} {ready} BIN={Path(sys.executable).parent} "
        f'DEMO_ARGS="--output {folder}/demo-output" "$@"; }}',
    ]
    program: Path | None = None
    for number, example in enumerate(examples):
        if example.block.language == "bash":
            program = None
            lines += [f"printf '{MARK}'", "set +e" if example.may_fail else "", example.block.text]
            lines.append("set -e")
            continue
        if program is None:
            program = folder.parent / f"block-{number}.py"
            lines.append(f"python {program}")
            program.write_text("", encoding="utf-8")
        with program.open("a", encoding="utf-8") as file:
            file.write(f"print({MARK!r}, end='', flush=True)\n{example.block.text}\n")
    return "\n".join(lines) + "\n"


def outputs_of(examples: list[Example], folder: Path) -> tuple[list[str], int]:
    """The output of each block, up to one that failed, and the script's exit code."""
    for name in ("samples", "examples"):
        shutil.copytree(ROOT / name, folder / name)
    script, log = folder.parent / "script", folder.parent / "log"
    script.write_text(script_of(examples, folder), encoding="utf-8")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HOME": str(folder.parent),
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "Agg",
        "COLUMNS": "100",
    }
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            ["bash", str(script)], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(SECONDS)
        finally:  # What a block left in the background ends with its page.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    # Progress bars write over themselves: their ends of lines are kept.
    return log.read_bytes().decode(errors="replace").split(MARK)[1:], code


def cases() -> list[object]:
    """The pages with something to run; those that are not quick are for `make test-docs`."""
    pages = [page for page in PAGES if page.path.name not in ELSEWHERE and examples_of(page)]
    return [
        pytest.param(page, id=page.name, marks=[] if page.name in QUICK else pytest.mark.slow)
        for page in pages
    ]


@pytest.mark.parametrize("page", cases())
def test_blocks_run_and_print_what_is_shown(
    page: Page, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    examples, folder = examples_of(page), tmp_path / "work"
    folder.mkdir()
    printed, code = outputs_of(examples, folder)
    for example, output in zip(examples, printed, strict=False):
        where = f"{page.name}:{example.block.line}"
        if example.output is not None:
            assert matches(example.output, output), f"{where} printed\n{output}"
    failed = examples[len(printed) - 1] if printed else examples[0]
    assert code == 0, f"{page.name}:{failed.block.line} ended with {code}\n{printed[-1:]}"
    assert len(printed) == len(examples)
    record_property("blocks", len(examples))


def test_blocks_of_a_page_share_their_folder_shell_and_program(tmp_path: Path) -> None:
    """And one that fails ends the page there."""
    path = ROOT / "docs" / "page.md"
    page = Page(path)
    page.__dict__["source"] = (
        "```bash\nword=sks; mkdir a; cd a\n```\n"
        "```bash\necho $word >b; ls ../samples/README.md\n```\n"
        "```text\n...README.md\n```\n```python\nword = open('b').read()\n```\nand\n"
        "```python\nprint(word)\n```\n\n```text\nsks\n```\n```console\nfalse\n```\n"
        "```bash\nfalse\n```\n```bash\ntrue\n```\n"
    )
    (tmp_path / "work").mkdir()
    examples = examples_of(page)
    printed, code = outputs_of(examples, tmp_path / "work")
    assert code == 1
    assert len(examples) == 6
    assert [text.strip() for text in printed] == ["", "../samples/README.md", "", "sks", ""]
    assert [example.output for example in examples[:4]] == [None, "...README.md\n", None, "sks\n"]
