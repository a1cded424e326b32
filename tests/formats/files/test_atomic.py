"""Files that are there completely or not at all, where another program has them open."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dora_diffusion import system
from dora_diffusion.formats.files.atomic import require_writable, save_text
from tests.waiting import Clock


def test_a_file_that_is_in_use_is_unchanged_and_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Callable[..., Clock]
) -> None:
    """As Windows refuses it, after some patience; a program may have it mapped into memory."""
    path = save_text(tmp_path / "model.txt", "old")

    def in_use(source: Path, target: Path) -> None:
        error = PermissionError(13, "used by another process", str(source), None, str(target))
        error.winerror = 32  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(system.os, "replace", in_use)
    clock(system)
    with pytest.raises(
        PermissionError, match=r"model\.txt is open in another program, which must close it first"
    ):
        save_text(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["model.txt"]
    monkeypatch.undo()
    assert save_text(path, "new").read_text(encoding="utf-8") == "new"


@pytest.mark.parametrize("is_folder", [False, True])
def test_what_can_be_written_is_known_before_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_folder: bool
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "lost").symlink_to("gone")
    require_writable(tmp_path / "new" / "folder" / "out", is_folder=is_folder)
    monkeypatch.chdir(tmp_path)
    require_writable(Path("out"), is_folder=is_folder)
    for name in ("file", "lost"):
        with pytest.raises(NotADirectoryError, match="is not a folder") as refused:
            require_writable(tmp_path / name / "a" / "b", is_folder=is_folder)
        assert refused.value.filename == str(tmp_path / name)
    wrong = tmp_path / "file" if is_folder else tmp_path
    with pytest.raises(OSError, match="is not a folder" if is_folder else "is a folder; give"):
        require_writable(wrong, is_folder=is_folder)

    def denied(dir: Path) -> None:
        raise PermissionError(13, "Permission denied", f"{dir}/tmp123")

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)
    with pytest.raises(PermissionError, match="nothing can be written there") as refused:
        require_writable(tmp_path / "new" / "out", is_folder=is_folder)
    assert refused.value.filename == str(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "lost"]


def test_a_folder_that_may_not_be_written_to_is_another_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(source: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied", str(source), None, str(target))

    monkeypatch.setattr(system.os, "replace", denied)
    with pytest.raises(PermissionError, match="Permission denied") as refused:
        save_text(tmp_path / "a.txt", "x")
    assert refused.value.filename == str(tmp_path / "a.txt")
