"""The record of a run's photos: digests alone, found from the run, a checkpoint or a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dora_diffusion.data.photo_record import read_photo_record, write_photo_record
from dora_diffusion.data.photos import Photo


def test_digests_alone_are_kept_and_found_from_anywhere_in_the_run(tmp_path: Path) -> None:
    photos = [Photo(Path(f"secret/{name}.jpg"), name, (8, 8), "a caption") for name in "ba"]
    file = write_photo_record(tmp_path, photos)
    assert json.loads(file.read_text(encoding="utf-8")) == {"digests": ["a", "b"]}
    inside = tmp_path / "checkpoint-1" / "adapter.safetensors"
    for path in (tmp_path, tmp_path / "adapter.safetensors", inside.parent, inside):
        assert read_photo_record(path) == {"a", "b"}


@pytest.mark.parametrize("text", [None, "no json", "[]", "{}"])
def test_without_a_readable_record_nothing_is_known(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "photos.json").write_text(text, encoding="utf-8")
    assert read_photo_record(tmp_path) is None
