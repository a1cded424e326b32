"""``dora-diffusion prepare``: its table, its files, and that they are trained on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image, ImageDraw

from dora_diffusion.cli import main as cli
from dora_diffusion.formats.adapter.file import read_adapter


@pytest.fixture
def folder(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three small photos without captions; the current folder is above theirs."""
    small = tmp_path / "mug"
    small.mkdir()
    for path in sorted(photos.glob("*.jpg"))[:3]:
        with Image.open(path) as image:
            image.resize((96, 80)).save(small / path.name)
    monkeypatch.chdir(tmp_path)
    return small


@pytest.fixture
def rembg(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that finds an ellipse in the middle of every photo."""
    module = ModuleType("rembg")

    def remove(image: Image.Image, *, session: str, only_mask: bool) -> Image.Image:
        mask = Image.new("L", image.size)
        ImageDraw.Draw(mask).ellipse((20, 10, image.width - 21, image.height - 11), fill=255)
        return mask

    module.new_session, module.remove = str, remove
    monkeypatch.setitem(sys.modules, "rembg", module)


def prepare(*flags: object) -> int:
    return cli.main(["prepare", *map(str, flags), "--resolution", "64"])


def test_a_look_prints_a_table_and_writes_a_contact_sheet_alone(folder, capsys):
    assert prepare("mug") == 0
    text = capsys.readouterr().out
    assert "| 01.jpg | 96 x 80 | 83%    | 64 x 64, 83% |" in text
    assert "contact sheet: mug-sheet.jpg" in text
    assert "written: nothing" in text
    assert sorted(path.name for path in folder.iterdir()) == ["01.jpg", "02.jpg", "03.jpg"]
    with Image.open(folder.parent / "mug-sheet.jpg") as sheet:
        assert (sheet.format, sheet.width) == ("JPEG", 3 * 160 + 2 * 2)
    assert prepare("mug") == 0  # the sheet is replaced


def test_what_it_writes_is_trained_on_with_its_masks(folder, rembg, capsys):
    flags = ["--masks", "rembg", "--background", "random", "--token", "sks", "--class_word", "mug"]
    assert prepare("mug", "--output", "set", *flags) == 0
    assert "written: 3 photos, 3 masks, 3 captions, 3 copies" in capsys.readouterr().out
    train = {
        "pretrained_model_name_or_path": "embedded:tiny-sd",
        "instance_data_dir": "set",
        "instance_prompt": "a photo of a sks mug",
        "output_dir": "run",
        "max_train_steps": 2,
        "num_validation_images": 0,
        "rank": 2,
    }
    words = [word for name, value in train.items() for word in (f"--{name}", str(value))]
    assert cli.main(["train", *words, "--masked_loss"]) == 0
    err = capsys.readouterr().err
    assert "without a mask" not in err
    assert "token" not in err
    [record] = json.loads((folder.parent / "run" / "photos.json").read_text("utf-8")).values()
    assert len(record) == 6
    layers = read_adapter(folder.parent / "run").layers
    assert all(np.isfinite(layer.up.float().numpy()).all() for layer in layers.values())


def test_several_subjects_have_a_folder_each_and_their_imbalance_is_said(folder, rembg, capsys):
    other = folder.parent / "cup"
    other.mkdir()
    (other / "a.jpg").write_bytes((folder / "01.jpg").read_bytes())
    assert prepare("mug", "cup", "--output", "set", "--masks", "rembg", "--json") == 0
    captured = capsys.readouterr()
    known = json.loads(captured.out)
    assert set(known) == {"mug", "cup"}
    photo = known["mug"]["photos"][1]
    assert (photo["name"], photo["size"], photo["caption"]) == ("02.jpg", [96, 80], None)
    area = np.pi / 4 * (96 - 40) * (80 - 20) / (96 * 80)
    assert photo["mask"]["area"] == pytest.approx(area, rel=0.03)
    assert photo["mask"]["agreement"] == 1
    assert (folder.parent / "set" / "cup" / "a.mask.png").is_file()
    assert "3 photos of mug and 1 of cup" in captured.err
    assert "3.0 times as often" in captured.err


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--masks", "rembg"], "captions, masks and copies need either --output FOLDER or"),
        (["--output", "x", "--in_place"], "captions, masks and copies need either --output"),
        (["--in_place", "--background", "random"], "copies need an output folder other than the"),
        (["--output", "mug", "--background", "random"], "copies need an output folder other than"),
        (["--caption", "a mug"], "captions, masks and copies need either --output FOLDER or"),
        (["--find", "mug"], "captions, masks and copies need either --output FOLDER or"),
        (["--caption_prefix", "sks"], "captions, masks and copies need either --output FOLDER or"),
        (
            ["--in_place", "--caption", "", "--caption_model", "x"],
            "caption and caption_model both write captions; give one",
        ),
        (["--sheets", "mug"], "a contact sheet among photos would be trained on; give another"),
        (["--output", "x", "--caption_model", "./gone"], "./gone does not exist; give a model's"),
        (["--similarity_model", "./gone"], "./gone does not exist; give a folder of a CLIP"),
        (["mug"], "two folders of photos have the same name; give each subject another name"),
        (["gone"], "/gone: the photo folder does not exist; give a folder of photos"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_and_nothing_is_written(
    flags, line, folder, last_line
):
    before = sorted(folder.parent.rglob("*"))
    assert prepare("mug", *flags) == 1
    said = last_line()
    assert said.startswith("error: ")
    assert line in said
    assert sorted(folder.parent.rglob("*")) == before
