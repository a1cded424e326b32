"""Number of modules and functions that a walk through the package enters; it stays short."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from dora_diffusion.cli import main as cli
from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter

GOLDEN = Path(__file__).parent / "formats" / "golden" / "0.1.0"


def modules_entered(walk: Callable[[], Any]) -> tuple[set[str], set[str]]:
    """The modules of the package in which a function is called, and these functions.

    Functions that a module calls while it is imported do not count. Threads that are started in
    the walk do.
    """
    modules: set[str] = set()
    functions: set[str] = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        name, code = frame.f_globals.get("__name__", ""), frame.f_code
        if event == "call" and name.startswith("dora_diffusion.") and code.co_name[0] != "<":
            modules.add(name)
            functions.add(f"{name}.{code.co_name}")

    walk()  # all imports, and what is made once and kept
    gc.collect()  # What earlier tests have left would end, and be entered, in this walk.
    sys.setprofile(note)
    threading.setprofile(note)
    try:
        walk()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return modules, functions


def walk_of(*words: str | Path) -> tuple[set[str], set[str]]:
    """The walk of a command, from its words on."""
    return modules_entered(lambda: cli.main([str(word) for word in words]))


@pytest.mark.parametrize(
    "name", ["kohya-dora-output.safetensors", "diffusers-dora-ranks.safetensors", "peft-lora"]
)
def test_inspect(name: str) -> None:
    modules, _ = walk_of("inspect", GOLDEN / name)
    assert len(modules) <= 34


def test_export_into_one_file(tmp_path: Path, sd1_folder: Path, random_adapter: Any) -> None:
    layers = random_adapter(sd1_folder, every=9)
    adapter = write_adapter(tmp_path / "a", AdapterFile(layers, AdapterMetadata("sd1")))
    modules, _ = walk_of(
        "export", "--base", sd1_folder, "--adapter", adapter, "--overwrite",
        "--output", tmp_path / "m.safetensors",
    )  # fmt: skip
    assert len(modules) <= 51
