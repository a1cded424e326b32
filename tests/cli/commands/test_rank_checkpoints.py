"""``dora-diffusion rank-checkpoints``: what is asked of a run, and what is written and printed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from dora_diffusion.cli.main import main
from dora_diffusion.evaluation import ranking
from dora_diffusion.formats.files.runs import COMPARISON
from dora_diffusion.studio.jobs.store import read_json
from tests.evaluation.helpers import Brightness


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Brightness in place of a network."""
    monkeypatch.setattr(ranking, "open_metric_model", lambda name: Brightness())


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A run whose images take two steps."""
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    values = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    text = yaml.safe_dump(values | {"validation_inference_steps": 2})
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    return folder


def test_a_run_is_ranked_by_its_own_settings(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], last_line: Callable[[], str]
) -> None:
    words = ["rank-checkpoints", str(run), "--output", str(tmp_path / "out")]
    assert main(words) == 0
    found = read_json(tmp_path / "out" / COMPARISON)
    assert [row["name"] for row in found["rows"]] == ["base", "result"]
    assert found["rows"][1]["drift"] > 0
    printed = capsys.readouterr().out
    similarity, drift = (found["rows"][1][name] for name in ("similarity", "drift"))
    assert re.search(rf"\| result +\| {similarity:.3f} +\| {drift:.3f} \|", printed)
    assert found["notes"][0] in printed
    assert main(words) == 1
    assert last_line().endswith(
        "already contains a ranking; choose another --output, or --overwrite"
    )
    for names, what in ((["checkpoint-9"], "checkpoint-9"), (["result", "x"], "x")):
        assert main([*words, "--overwrite", "--checkpoints", *names]) == 1
        assert last_line() == f"error: {run} does not contain {what}; it has no checkpoint"
    assert main([*words, "--overwrite", "--subject", "bolt_mug"]) == 1
    assert "is of the toy world, which" in last_line()
    assert main(["rank-checkpoints", str(tmp_path / "none")]) == 1
    assert "config.yaml" in last_line()


def test_a_run_of_several_subjects_is_ranked_by_all_of_them(
    run: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    last_line: Callable[[], str],
) -> None:
    """Entries of one subject count as one, and a style is none."""
    entries = []
    for trigger, count in (("sks mug", 2), ("zwx cup", 3), ("sks mug", 1), ("", 2)):
        folder = Path(tmp_path, f"photos-{len(entries)}")
        folder.mkdir()
        for photo in sorted(photos.glob("*.jpg"))[:count]:
            shutil.copy(photo, folder)
        token, _, word = trigger.partition(" ")
        entries.append({"instance_data_dir": str(folder), "token": token, "class_word": word,
                        "instance_prompt": f"a photo of a {trigger}"})  # fmt: skip
    values = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    for name in ("instance_data_dir", "instance_prompt", "class_word", "token"):
        values.pop(name, None)
    text = yaml.safe_dump(values | {"dataset_config": entries})
    (run / "config.yaml").write_text(text, encoding="utf-8")
    words = ["rank-checkpoints", str(run), "--output", str(tmp_path / "out")]
    assert main(words) == 0
    found = read_json(tmp_path / "out" / COMPARISON)
    assert found["triggers"] == ["sks mug", "zwx cup"]
    printed = capsys.readouterr().out
    assert re.search(r"\| checkpoint +\| sks mug +\| zwx cup +\| similarity to training", printed)
    for row in found["rows"]:
        figures = row["similarities"]
        assert len(figures) == 10
        mug, cup = sum(figures[:5]) / 5, sum(figures[5:]) / 5
        assert row["similarity"] == pytest.approx((mug + cup) / 2)
        assert re.search(rf"\| {row['name']} +\| {mug:.3f} +\| {cup:.3f} +\| {(mug + cup) / 2:.3f}",
                         printed)  # fmt: skip
    assert main([*words, "--overwrite", "--subject", str(photos)]) == 1
    assert "the run has several subjects, sks mug, zwx cup, but --subject names one" in last_line()


def test_a_run_is_ranked_by_the_photos_that_it_held_out(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    text = yaml.safe_dump(values | {"validation_split": 1.0})
    (run / "config.yaml").write_text(text, encoding="utf-8")
    assert main(["rank-checkpoints", str(run), "--output", str(tmp_path / "out")]) == 0
    found = read_json(tmp_path / "out" / COMPARISON)
    assert found["similar_to"].startswith("held-out photos")
    base, result = (row["loss"] for row in found["rows"])
    assert 0 < result != base
    assert re.search(rf"\| result .* {result:.4f} +\|", capsys.readouterr().out)
