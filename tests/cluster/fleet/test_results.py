"""Files that a worker fetches from a URL: the subject's own, and nothing beside its folder."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import fsspec
import pytest

from dora_diffusion.cluster.fleet.results import FleetResults
from dora_diffusion.config import ConfigError

CONTENT = {"config.yaml": b"rank: 4\n", "samples/step-000002.png": b"png", "metrics.jsonl": b"{}\n"}


@pytest.fixture
def results(monkeypatch, tmp_path):
    """A fleet behind a URL, with a folder of its own on this machine."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield FleetResults("memory://fetched")
    fsspec.filesystem("memory").rm("/fetched", recursive=True)


def files_in(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_subject_is_fetched_as_it_was_kept_by_every_python(results, monkeypatch):
    """`tarfile` of Python 3.10.0 to 3.10.11 and 3.11.0 to 3.11.3 has no filter."""

    def extract(self, path=".", members=None, *, numeric_owner=False):
        raise AssertionError("it writes whatever a tar names")

    monkeypatch.setattr(tarfile.TarFile, "extractall", extract)
    folder = results.folder("mug")
    everything = {**CONTENT, "checkpoint-2/training_state.pt": b"state"}
    for name, content in everything.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    results.keep("mug", folder)
    (folder / "left over").write_bytes(b"")
    FleetResults("memory://fetched").fetch("mug")
    assert files_in(folder) == everything


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../outside", tarfile.REGTYPE), ("samples/../../outside", tarfile.REGTYPE),
        ("ABSOLUTE", tarfile.REGTYPE), ("../outside", tarfile.DIRTYPE),
        ("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("pipe", tarfile.FIFOTYPE),
        ("device", tarfile.CHRTYPE),
    ],
)  # fmt: skip
def test_what_no_fleet_writes_is_refused(results, tmp_path, name, kind):
    member = tarfile.TarInfo(str(tmp_path / "outside") if name == "ABSOLUTE" else name)
    member.type, member.linkname = kind, str(tmp_path / "secret")
    (tmp_path / "secret").write_text("a token", encoding="utf-8")
    packed = io.BytesIO()
    with tarfile.TarFile(fileobj=packed, mode="w") as tar:
        tar.addfile(member, io.BytesIO())
    fsspec.filesystem("memory").pipe("/fetched/mug/state.tar", packed.getvalue())
    with pytest.raises(ConfigError, match="which no fleet writes"):
        results.fetch("mug")
    assert not (tmp_path / "outside").exists()
    assert not Path(results.folder("mug"), member.name).is_symlink()
