"""Main path of each command with its defaults: modules, functions and lines of the package.

    python benchmarks/walks.py
    python benchmarks/walks.py --only inspect export --list    # with the names of the modules
    python benchmarks/walks.py --page                          # writes the page on architecture

A command runs twice on the embedded model, and the second run counts: everything is imported then,
and cached values are there. Each module, function and line counts once, those of threads too.

Of `train` it also counts the modules that are imported and never entered, the lines of modules
that belong to features which are off, and a steady step: from the record of one step to the next.
To compare with former code, run it there: `PYTHONPATH=FORMER python benchmarks/walks.py`.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import fnmatch
import io
import json
import re
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from common import markdown, save

import dora_diffusion
from dora_diffusion.cli.main import main as command
from dora_diffusion.training import events

PACKAGE = Path(dora_diffusion.__file__).parent
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "contributing" / "architecture.md"
BASE, PROMPT = "embedded:tiny-sd", "a photo of a sks mug"

OFF = (
    "adapters/compiled.py", "adapters/parametrizations.py", "data/prepare.py", "data/sheets.py",
    "evaluation/*", "export/hub.py", "models/words.py",
    "numerics/projections.py", "numerics/quantised.py",
    "training/features/*", "training/inputs/cache.py", "training/inputs/prior.py",
    "training/pack*.py", "training/results/resume.py", "training/trainable/words.py",
)  # fmt: skip
"""Modules of features that a default training has off."""
STEP = ("step.py", "batch.py", "prediction.py", "terms.py", "conditioner.py")
"""Modules of a step and its loss, under training/."""


class Entered:
    """Functions and lines of the package that run while it traces."""

    def __init__(self) -> None:
        self.functions: dict[CodeType, None] = {}  # In the order in which they were entered.
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
            self.functions[code] = None
        return self

    @property
    def modules(self) -> list[str]:
        """Paths from the package, of functions."""
        files = dict.fromkeys(Path(code.co_filename) for code in self.functions)
        return [file.relative_to(PACKAGE).as_posix() for file in files]

    def lines_by_module(self) -> Counter[str]:
        """Number of lines that ran, by module."""
        return Counter(Path(file).relative_to(PACKAGE).as_posix() for file, _ in self.lines)


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


def never_entered(entered: Entered, words: list[str]) -> list[str]:
    """Modules of the package that a process imports for a command, and never enters."""
    code = (
        "import json, sys; from dora_diffusion.cli.main import main; main(sys.argv[1:]); "
        "print('\\n' + json.dumps([m.__file__ for n, m in sys.modules.items() "
        "if n.startswith('dora_diffusion') and getattr(m, '__file__', None)]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    imported = {Path(file) for file in json.loads(run.stdout.strip().splitlines()[-1])}
    files = {file.relative_to(PACKAGE).as_posix() for file in imported if file.stat().st_size > 200}
    return sorted(files - set(entered.modules))


def steady_step(folder: Path) -> Entered:
    """Trace a run from the record of its third step to that of the fourth."""
    entered = Entered()

    def note(event: object) -> None:
        if isinstance(event, events.StepDone):
            sys.settrace(entered if event.step == 3 else None)
            frame = sys._getframe()
            while event.step == 3 and frame.f_back is not None:
                frame = frame.f_back
                frame.f_trace = entered(frame, "call", None)

    config = dora_diffusion.TrainConfig(
        pretrained_model_name_or_path=BASE,
        instance_data_dir=str(ROOT / "samples" / "bolt_mug"),
        instance_prompt=PROMPT,
        max_train_steps=5,
        num_validation_images=0,
        output_dir=str(folder / "steps"),
    )
    dora_diffusion.train(config, note)
    return entered


def conditions(path: Path) -> int:
    """Number of conditions in a module: ``if``, conditional expressions, filters."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    count = sum(isinstance(node, ast.If | ast.IfExp) for node in ast.walk(tree))
    return count + sum(
        len(node.ifs) for node in ast.walk(tree) if isinstance(node, ast.comprehension)
    )


def training_figures(train: Entered, words: list[str], folder: Path) -> dict[str, int]:
    """Counts of a default training beside those of its main path."""
    step = steady_step(folder)
    lines, files = step.lines_by_module(), [PACKAGE / "training" / name for name in STEP]
    off = {
        m: n for m, n in train.lines_by_module().items() if any(fnmatch.fnmatch(m, o) for o in OFF)
    }
    unused = never_entered(train, words)
    return {
        "modules imported and never entered": len(unused),
        "lines run of features that are off": sum(off.values()),
        "steady step: lines of training": sum(
            count for module, count in lines.items() if module.startswith("training/")
        ),
        "steady step: lines of all rooms": sum(lines.values()),
        "steady step: functions": len(step.functions),
        "conditions in step and loss": sum(conditions(file) for file in files if file.is_file()),
    }


def main_path(train: Entered) -> str:
    """Table of the modules of a default training: rooms, and modules with position and lines."""
    lines, rows = train.lines_by_module(), dict[str, list[str]]()
    for position, module in enumerate(train.modules, 1):
        text = f"{position}. `{module}` {lines[module]}"
        rows.setdefault(module.partition("/")[0], []).append(text)
    return markdown(["room", "modules"], [[r, ", ".join(m)] for r, m in rows.items()])


def write_page(train: Entered) -> None:
    """Write the main path into the page on architecture."""
    source = PAGE.read_text(encoding="utf-8")
    part = re.compile(r"(<!-- main path -->\n).*?(<!-- end -->)", re.DOTALL)
    page = part.sub(lambda m: f"{m[1]}\n{main_path(train)}\n\n{m[2]}", source, count=1)
    PAGE.write_text(page, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", help="some of the commands")
    parser.add_argument("--list", action="store_true", help="print the names of the modules")
    parser.add_argument("--page", action="store_true", help="write the page on architecture")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    figures: dict[str, dict[str, int]] = {}
    everything = Entered()
    with tempfile.TemporaryDirectory() as folder:
        for name, words in commands(Path(folder)).items():
            if args.only and name not in ("train", *args.only):
                continue
            entered = walk([name, *words])
            everything.functions |= entered.functions
            everything.lines |= entered.lines
            figures[name] = {
                "modules": len(entered.modules),
                "functions": len(entered.functions),
                "lines": len(entered.lines),
            }
            if args.list:
                print(f"{name}: {', '.join(entered.modules)}\n")
            if name == "train":
                beside = training_figures(entered, [name, *words], Path(folder))
                if args.page:
                    write_page(entered)
        figures["all"] = {
            "modules": len(everything.modules),
            "functions": len(everything.functions),
            "lines": len(everything.lines),
        }
    rows = [[name, *counts.values()] for name, counts in figures.items()]
    print(markdown(["command", "modules", "functions", "lines"], rows), "\n")
    print(markdown(["of a default training", "count"], [[*row] for row in beside.items()]))
    save(args.output, {**figures, "training": beside})


if __name__ == "__main__":
    main()
