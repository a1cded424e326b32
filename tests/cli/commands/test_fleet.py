"""``dora-diffusion fleet``: a folder of folders, from the command line to the page."""

from __future__ import annotations

import json
import shutil

import pytest

from dora_diffusion.cli import main as cli
from tests.cluster.fleet.helpers import SAMPLES


@pytest.fixture
def words(sd1_folder, tmp_path):
    """Three subjects, of which one has no photos, and one a file that is not YAML."""
    folder = tmp_path / "subjects"
    shutil.copytree(SAMPLES / "bolt_mug", folder / "mug")
    for name in ("empty", "wrong"):
        (folder / name).mkdir()
    (folder / "wrong" / "subject.yaml").write_text("name: [", encoding="utf-8")
    return [
        "fleet", str(folder), "--class_word", "mug", "--output", str(tmp_path / "out"),
        "--pretrained_model_name_or_path", str(sd1_folder), "--resolution", "32", "--rank", "2",
        "--targets", "cross-attention", "--max_train_steps", "1", "--num_validation_images", "0",
    ]  # fmt: skip


def test_a_folder_of_folders_is_trained_and_what_failed_is_the_exit_code(words, tmp_path, capsys):
    assert cli.main(words) == 1
    out, err = capsys.readouterr()
    assert "failed: empty: " in err
    assert "no photos in this folder" in err
    assert "failed: wrong: " in err
    assert "subject.yaml, line 1: this is not valid YAML" in err
    assert "done: mug in " in err
    assert "1 subject done, 2 failed" in out
    assert f"page: {tmp_path / 'out' / 'index.html'}" in out
    assert (tmp_path / "out" / "mug" / "pytorch_lora_weights.safetensors").is_file()
    assert cli.main([*words, "--json"]) == 1
    out, err = capsys.readouterr()
    assert [r["status"] for r in json.loads(out)] == ["failed", "done", "failed"]
    assert "done: mug" not in err


def test_a_dry_run_lists_what_each_is_trained_on(words, tmp_path, capsys):
    assert cli.main([*words, "--dry_run"]) == 1
    out = capsys.readouterr().out
    assert "mug:\nsks mug: 5 images" in out
    assert "empty: " in out
    assert "wrong: " in out
    assert not (tmp_path / "out").exists()
