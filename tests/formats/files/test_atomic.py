"""Files that are there completely or not at all, where another program has them open."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_diffusion import system
from dora_diffusion.formats.files.atomic import save_text


def test_a_file_that_is_in_use_is_unchanged_and_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Windows refuses it, after some patience; a program may have it mapped into memory."""
    path = save_text(tmp_path / "model.txt", "old")

    def in_use(source: Path, target: Path) -> None:
        error = PermissionError(13, "used by another process", str(source), None, str(target))
        error.winerror = 32  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(system.os, "replace", in_use)
    monkeypatch.setattr(system.time, "sleep", lambda _: None)
    with pytest.raises(
        PermissionError, match=r"model\.txt is open in another program, which must close it first"
    ):
        save_text(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["model.txt"]
    monkeypatch.undo()
    assert save_text(path, "new").read_text(encoding="utf-8") == "new"


def test_a_folder_that_may_not_be_written_to_is_another_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(source: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied", str(source), None, str(target))

    monkeypatch.setattr(system.os, "replace", denied)
    with pytest.raises(PermissionError, match="Permission denied") as refused:
        save_text(tmp_path / "a.txt", "x")
    assert refused.value.filename == str(tmp_path / "a.txt")
