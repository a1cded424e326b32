"""Modules, functions and lines of the package that each command enters, with its defaults.

    python benchmarks/walks.py
    python benchmarks/walks.py --only inspect export --list    # with the names of the modules

A command runs twice on the embedded model, and the second run counts: all is imported then, and
what is made once is there. Each module, function and line counts once, those of threads too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import threading
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from common import markdown, save

import dora_diffusion
from dora_diffusion.cli.main import main as command

PACKAGE = Path(dora_diffusion.__file__).parent
BASE, PROMPT = "embedded:tiny-sd", "a photo of a sks mug"


class Entered:
    """Functions and lines of the package that run while it traces."""

    def __init__(self) -> None:
        self.functions: set[CodeType] = set()
        self.lines: set[tuple[str, int]] = set()
        self._top = f"{PACKAGE}/"

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        """Note a call; lines are followed in the package alone."""
        code = frame.f_code
        if not code.co_filename.startswith(self._top):
            return None
        if event == "line":
            self.lines.add((code.co_filename, frame.f_lineno))
        elif event == "call" and code.co_name[0] != "<":
            self.functions.add(code)
        return self

    @property
    def modules(self) -> list[str]:
        """Paths from the package, of functions."""
        files = {Path(code.co_filename) for code in self.functions}
        return sorted(file.relative_to(PACKAGE).as_posix() for file in files)


def commands(folder: Path) -> dict[str, list[str]]:
    """Words of each command; what is trained first is what the others read."""
    photos, adapter = PACKAGE.parent / "samples" / "bolt_mug", str(folder / "train")
    return {
        "train": [
            "--pretrained_model_name_or_path", BASE, "--instance_data_dir", str(photos),
            "--instance_prompt", PROMPT, "--max_train_steps", "3", "--output_dir", adapter,
            "--overwrite_output_dir",
        ],
        "generate": [
            "--base", BASE, "--adapter", adapter, "--prompt", PROMPT,
            "--output", str(folder / "image.png"), "--overwrite",
        ],
        "convert": [adapter, str(folder / "kohya.safetensors"), "--to", "kohya", "--overwrite"],
        "export": [
            "--base", BASE, "--adapter", adapter, "--output", str(folder / "merged.safetensors"),
            "--overwrite",
        ],
        "inspect": [adapter],
    }  # fmt: skip


def walk(words: list[str]) -> Entered:
    """The second run of a command."""
    entered = Entered()
    for trace in (None, entered):
        threading.settrace(trace)  # type: ignore[arg-type]
        sys.settrace(trace)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                code = command(words)
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
        if code:
            sys.exit(code)
    return entered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", help="some of the commands")
    parser.add_argument("--list", action="store_true", help="print the names of the modules")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    figures: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, words in commands(Path(folder)).items():
            if args.only and name not in ("train", *args.only):
                continue
            entered = walk([name, *words])
            figures[name] = {
                "modules": len(entered.modules),
                "functions": len(entered.functions),
                "lines": len(entered.lines),
            }
            if args.list:
                print(f"{name}: {', '.join(entered.modules)}\n")
    rows = [[name, *counts.values()] for name, counts in figures.items()]
    print(markdown(["command", "modules", "functions", "lines"], rows))
    save(args.output, figures)


if __name__ == "__main__":
    main()
