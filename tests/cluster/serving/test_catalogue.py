"""Names of adapters: what lies in folders, found again as it changes, and never a path."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from dora_diffusion.cluster.serving.catalogue import MOST_MISSING, RESCAN, Catalogue
from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter
from dora_diffusion.formats.layouts.layout import AdapterFormatError
from tests.cluster.serving.helpers import serving_log


@pytest.fixture
def folder(tmp_path, random_layer):
    import torch

    layers = {"unet.conv_in": random_layer(torch.ones(8, 4, 3, 3), torch.Generator())}
    made = tmp_path / "adapters"
    for path in ("dog.safetensors", "cat run/pytorch_lora_weights.safetensors"):
        adapter = AdapterFile(layers, AdapterMetadata("sd1", trigger=f"sks {path[:3]}"))
        (made / path).parent.mkdir(parents=True, exist_ok=True)
        write_adapter(made / path, adapter)
    (made / "photos").mkdir()
    (made / "notes.txt").write_text("dog", encoding="utf-8")
    (tmp_path / "secret.safetensors").write_bytes((made / "dog.safetensors").read_bytes())
    return made


def test_files_and_runs_are_found_by_name(folder):
    catalogue = Catalogue([folder])
    assert sorted(catalogue.scan()) == ["cat run", "dog"]
    assert catalogue.find("dog") == folder / "dog.safetensors"
    assert catalogue.find("cat run") == folder / "cat run"
    assert [catalogue.metadata(catalogue.find(name)).trigger for name in ("dog", "cat run")] == [
        "sks dog", "sks cat",
    ]  # fmt: skip
    assert list(Catalogue([folder / "cat run"]).scan()) == ["cat run"]
    assert list(Catalogue([folder / "dog.safetensors"]).scan()) == ["dog"]


@pytest.mark.parametrize(
    "name",
    ["../secret", "..", ".", "", "dog.safetensors", "cat run/pytorch_lora_weights", "dog\0", "~",
     "../adapters/dog", "/etc/passwd", "notes", "photos"],
)  # fmt: skip
def test_what_is_no_name_is_not_looked_for_on_the_disk(folder, name):
    assert Catalogue([folder]).find(name) is None


def test_a_folder_is_looked_through_again_but_not_for_every_wrong_name(folder, monkeypatch):
    now, scans = [100.0], []
    catalogue = Catalogue([folder], clock=lambda: now[0])
    scan = catalogue.scan
    monkeypatch.setattr(catalogue, "scan", lambda: scans.append(now[0]) or scan())
    # Somebody asks for it as soon as it is there.
    shutil.copy(folder / "dog.safetensors", folder / "wolf.safetensors")
    assert catalogue.find("wolf") == folder / "wolf.safetensors"
    (folder / "wolf.safetensors").unlink()
    assert [catalogue.find("wolf") for _ in range(3)] == [None] * 3
    assert len(scans) == 2
    shutil.copy(folder / "dog.safetensors", folder / "wolf.safetensors")
    assert catalogue.find("wolf") is None
    now[0] += RESCAN
    assert catalogue.find("wolf") == folder / "wolf.safetensors"
    del scans[:]
    assert {catalogue.find(f"wrong {number}") for number in range(100)} == {None}
    assert len(scans) == MOST_MISSING
    assert catalogue.find("dog") == folder / "dog.safetensors"


def test_a_file_that_was_written_since_is_read_again(folder):
    catalogue = Catalogue([folder])
    assert catalogue.metadata(catalogue.find("dog")).trigger == "sks dog"
    (folder / "dog.safetensors").write_bytes(b"no tensors")
    with pytest.raises(AdapterFormatError):
        catalogue.metadata(catalogue.find("dog"))


def test_the_first_of_two_of_one_name_is_served_and_the_other_is_named(folder, caplog):
    other, dog = folder / "other", folder / "dog.safetensors"
    other.mkdir()
    catalogue = Catalogue([folder, other])
    shutil.copy(dog, other / "dog.safetensors")
    assert catalogue.scan()["dog"] == catalogue.scan()["dog"] == dog
    told = f"{other / 'dog.safetensors'} is not served: there is another dog in {folder}; rename"
    assert [told in line for line in serving_log(caplog)] == [True]
    assert catalogue.twins == {other / "dog.safetensors": ("dog", dog)}
    # A start does not refuse them, and takes the first folder's.
    assert Catalogue([other, folder]).find("dog") == other / "dog.safetensors"
    caplog.clear()
    dog.unlink()
    assert catalogue.find("dog") == other / "dog.safetensors"
    assert not catalogue.twins
    assert serving_log(caplog) == [
        f"adapter 'dog' is {other / 'dog.safetensors'} now; it was {dog}"
    ]


@pytest.mark.parametrize("locked", ["cat run", "photos", "dog.safetensors"])
def test_what_cannot_be_read_is_named_and_hides_nothing(folder, locked, monkeypatch):
    """As root everything can be read: the system's answer is put in its place."""
    access = os.access
    monkeypatch.setattr(os, "access", lambda p, m: access(p, m) and Path(p).name != locked)
    catalogue = Catalogue([folder])
    assert {"cat run", "dog"} <= set(catalogue.scan())
    file = catalogue.find(Path(locked).stem)
    with pytest.raises(PermissionError, match=f"Permission denied: .*{locked}"):
        catalogue.metadata(file)
    other = "dog" if locked != "dog.safetensors" else "cat run"
    assert catalogue.metadata(catalogue.find(other)).trigger == f"sks {other[:3]}"
    with pytest.raises(PermissionError, match=f"Permission denied: .*{locked}"):
        Catalogue([folder / locked])


def test_a_folder_that_goes_away_takes_only_its_own_along(folder, tmp_path):
    catalogue = Catalogue([folder, tmp_path / "secret.safetensors"])
    shutil.rmtree(folder)
    catalogue.scan()
    assert catalogue.find("secret") == tmp_path / "secret.safetensors"
    assert catalogue.find("dog") is None
