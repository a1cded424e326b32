"""Files of styles and wildcards: what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_diffusion.studio.jobs import inputs
from dora_diffusion.studio.jobs.inputs import keep_prompt_files, list_prompt_files
from dora_diffusion.studio.jobs.store import UserError, Workspace

STYLES = "name,prompt,negative_prompt\nink,{prompt} in ink,photo\n"
REFUSED = [
    ("styles.csv", b"ink,an ink drawing,\n", "styles.csv must begin with the line name,"),
    ("styles.csv", b"name,prompt\n", "styles.csv is empty; write a style"),
    ("styles.csv", b"name,prompt\nink," + b"x" * 2**18, "styles.csv, line 2: field larger than"),
    ("styles.csv", b"\x89PNG", "styles.csv is not UTF-8 text"),
    ("styles.csv", bytes([65]) * (2**24 + 1), "larger than 16 MiB"),
    ("c.txt", b"# red\n \n", "c.txt is empty; write"),
    ("c.txt", b"", "c.txt is empty; write"),
    ("c.txt", b"\xff\xfe", "c.txt is not UTF-8 text"),
    ("c.txt", b"red\0", "c.txt is not UTF-8 text"),
    ("c.jpg", b"red", r"c.jpg is neither a file of styles \(.csv\) nor one of wildcards"),
    ("c", b"red", "c is neither a file of styles"),
    ("_.txt", b"red", "_.txt cannot be named in a prompt"),
    ("..txt", b"red", "cannot be named in a prompt"),
    ("a|b.txt", b"red", "cannot be named in a prompt"),
    ("a\x1b[31m.txt", b"red", r"a.\[31m.txt cannot be named"),
]


@pytest.mark.parametrize(("name", "content", "message"), REFUSED)
def test_what_no_prompt_can_use_is_refused_and_nothing_is_lost(
    workspace: Workspace, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    workspace.styles.write_text(STYLES, encoding="utf-8")
    (workspace.wildcards / "c.txt").write_text("green", encoding="utf-8")
    (tmp_path / "good.txt").write_text("red", encoding="utf-8")
    try:
        (tmp_path / name).write_bytes(content)
    except OSError:
        pytest.skip("no file can be called so on this system")
    with pytest.raises(UserError, match=message) as error:
        keep_prompt_files(workspace, [tmp_path / "good.txt", tmp_path / name])
    assert str(tmp_path) not in str(error.value)
    assert workspace.styles.read_text(encoding="utf-8") == STYLES
    kept = {path.name: path.read_text(encoding="utf-8") for path in workspace.wildcards.iterdir()}
    assert kept == {"c.txt": "green"}


def test_files_of_wildcards_have_a_limit(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "MOST_PROMPT_FILES", 1)
    files = [tmp_path / name for name in ("a.txt", "b.txt")]
    for file in files:
        file.write_text("red", encoding="utf-8")
    with pytest.raises(UserError, match="at most 1 files of styles and wildcards are kept"):
        keep_prompt_files(workspace, files)
    keep_prompt_files(workspace, files[:1])
    keep_prompt_files(workspace, files[:1])
    assert [file.name for file in list_prompt_files(workspace)] == ["a.txt"]
