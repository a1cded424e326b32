"""Names that no report shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_diffusion.console import anonymous
from dora_diffusion.console.anonymous import without_names


@pytest.fixture(autouse=True)
def ann(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ann's home, which is a link, on a machine of hers."""
    (tmp_path / "disk" / "smith-ann").mkdir(parents=True)
    home = tmp_path / "ann smith"
    home.symlink_to(tmp_path / "disk" / "smith-ann")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("LOGNAME", "ann")
    monkeypatch.setattr(anonymous.platform, "node", lambda: "anns-tower")
    return home


def test_the_home_folder_is_a_tilde_however_it_is_written(ann: Path) -> None:
    text = f"no {ann}/runs/a.png or '{ann.resolve()}', {ann}"
    assert without_names(text) == "no ~/runs/a.png or '~', ~"
    for other in (f"{ann}e/x", f"{ann}.old"):
        assert without_names(other).endswith(other[-4:])
        assert "~" not in without_names(other)


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/data/ann/cache", "/data/NAME/cache"),
        (r"D:\ann\cache", r"D:\NAME\cache"),
        ("'/data/ann', and", "'/data/NAME', and"),
        ("/net/anns-tower/data", "/net/NAME/data"),
        ("/data/anna/ann.safetensors", "/data/anna/ann.safetensors"),
        ("ann says that ann/b is a model", "ann says that ann/b is a model"),
    ],
)
def test_names_are_taken_out_of_paths_and_of_nothing_else(path: str, shown: str) -> None:
    assert without_names(path) == shown


def test_a_home_that_is_the_root_and_a_user_that_has_no_name_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setenv("HOME", "/")
    monkeypatch.setattr(anonymous.getpass, "getuser", nobody)
    assert without_names("/usr/lib and /data/ann") == "/usr/lib and /data/ann"
