"""``dora-diffusion evaluate`` from a two-step adapter to table, JSON and sheet."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from dora_diffusion.cli.main import main
from dora_diffusion.data.photos import list_photos
from dora_diffusion.evaluation.measures import MEASURES
from dora_diffusion.evaluation.report import SCHEMA
from dora_diffusion.models import metric_models
from dora_diffusion.models.metric_models import LITE
from tests.evaluation.helpers import Brightness

ROOT = Path(__file__).parents[3]
FILE = "pytorch_lora_weights.safetensors"
FAST = ["--steps", "1", "--guidance_scale", "1"]


@pytest.fixture(scope="module")
def base(sd1_folder: Path) -> str:
    return str(sd1_folder)


@pytest.fixture(scope="module")
def adapter(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("evaluate") / "adapter"
    flags = [
        "--config", str(ROOT / "samples" / "bolt_mug" / "config.yaml"),
        "--pretrained_model_name_or_path", base,
        "--instance_data_dir", str(ROOT / "samples" / "bolt_mug"),
        "--max_train_steps", "2", "--lr_scheduler", "constant", "--lr_warmup_steps", "0",
        "--learning_rate", "1e-2", "--train_batch_size", "1", "--num_validation_images", "0",
        "--output_dir", str(output),
    ]  # fmt: skip
    assert main(["train", *flags]) == 0
    return output


@pytest.fixture(scope="module")
def drawn(base: str, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Output of an evaluation of a drawn subject, and the folder of its results."""
    output = tmp_path_factory.mktemp("drawn")
    flags = ["--base", base, "--subject", "bolt_mug", "--num_seeds", "1", "--output", str(output)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["evaluate", str(adapter), *flags, *FAST]) == 0
    return printed.getvalue(), output


def test_a_subject_of_the_toy_world(drawn) -> None:
    printed, output = drawn
    assert "| subject similarity" in printed
    assert str(output / "images.png") in printed
    report = json.loads((output / "scores.json").read_text(encoding="utf-8"))
    assert report["schema"] == SCHEMA
    assert (report["base"], report["adapter"], report["trigger"]) == ("sd1", "adapter", "sks mug")
    assert report["sampling"] == {"steps": 1, "guidance_scale": 1.0, "scheduler": None}
    assert set(report["measures"]) <= set(MEASURES)
    assert {"subject_similarity", "background", "side", "others_kind", "denoising_loss"} <= set(
        report["measures"]
    )
    loss = report["measures"]["denoising_loss"]
    assert loss["base"]["mean"] != loss["adapted"]["mean"]
    assert report["measures"]["subject_similarity"]["truth"]["mean"] > 0.85
    assert printed.splitlines()[0] in (output / "scores.md").read_text(encoding="utf-8")
    with Image.open(output / "images.png") as image:
        assert image.width > 1000


def test_photos_with_metric_models_as_json(
    base, adapter, tmp_path, capsys, clip_folder, dino_folder, held_out_photos
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of {} on grass\n\n{} at night\n", encoding="utf-8")
    flags = ["--base", base, "--subject", str(held_out_photos), "--num_seeds", "2", "--json"]
    flags += ["--metric_model", str(clip_folder), str(dino_folder), "--prompts", str(prompts)]
    assert main(["evaluate", str(adapter), *flags, *FAST, "--output", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert report["subject"] == "held-out"
    measures = report["measures"]
    assert {"subject_similarity@tiny-dino", "prompt_similarity@tiny-clip"} <= set(measures)
    assert measures["subject_similarity@tiny-dino"]["adapted"]["n"] == 4
    assert measures["others_change@tiny-dino"]["base"]["mean"] == pytest.approx(0, abs=1e-6)
    assert measures["others_change@tiny-dino"]["adapted"]["mean"] > 0
    assert report["notes"] == []


def test_each_of_several_subjects_is_measured_as_if_alone(
    base, adapter, drawn, tmp_path, capsys, held_out_photos, monkeypatch
) -> None:
    """Drawn ones and photographed ones, each with its own trigger words."""
    # In place of the network that measures photos by default: it takes most of the time.
    monkeypatch.setattr(metric_models, "open_metric_model", lambda name: {LITE: Brightness()}[name])
    flags = ["--base", base, "--num_seeds", "1", *FAST]
    both = ["--subject", "bolt_mug", str(held_out_photos), "--trigger", "sks mug, zwx cup"]
    command = ["evaluate", str(adapter), *both, *flags, "--output", str(tmp_path / "both")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert printed.index("sks mug:\n") < printed.index("zwx cup:\n")
    own = ["--subject", str(held_out_photos), "--trigger", "zwx cup"]
    alone = tmp_path / "alone"
    assert main(["evaluate", str(adapter), *own, *flags, "--output", str(alone)]) == 0
    for name, folder, trigger in (
        ("bolt_mug", drawn[1], "sks mug"),
        (held_out_photos.name, alone, "zwx cup"),
    ):
        expected = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        found = (tmp_path / "both" / name / "scores.json").read_text(encoding="utf-8")
        assert json.loads(found) == expected
        assert expected["trigger"] == trigger
    assert main(command) == 1
    assert "already contains an evaluation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--subject", "bolt_mug", "--trigger", "sks mug, zwx cup"],
         "the adapter has 2 subjects, sks mug, zwx cup, but --subject names 1; name one for each"),
        (["--subject", "bolt_mug", "heart_teapot"], "1 subject, sks mug, but --subject names 2"),
        (["--subject", "bolt_mug", "heart_teapot", "--trigger", "sks mug, zwx cup",
          "--class_word", "cup"], "--class_word is for one subject"),
        (["--subject", "bolt_mug", "./bolt_mug"], "have the same name"),
        (["--subject", "bolt_mug", "nowhere"], "subject nowhere is neither a folder"),
    ],
)  # fmt: skip
def test_several_subjects_have_photos_and_trigger_words_each(
    base, adapter, tmp_path, capsys, flags, text
) -> None:
    command = ["evaluate", str(adapter), "--base", base, "--output", str(tmp_path / "out")]
    assert main([*command, *flags, *FAST]) == 1
    assert text in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_photos_that_were_trained_on_are_told(
    base, adapter, tmp_path, capsys, held_out_photos
) -> None:
    """By the digests in the run's folder, whatever the photos are called; and in the results."""
    trained = sorted((ROOT / "samples" / "bolt_mug").glob("*.jpg"))
    mixed = tmp_path / "mixed"
    shutil.copytree(held_out_photos, mixed)
    new = len(list_photos(mixed))
    flags = ["--base", base, "--num_seeds", "1", *FAST, "--output", str(tmp_path / "out")]
    assert main(["evaluate", str(adapter), "--subject", str(mixed), *flags]) == 0
    assert "trained on" not in "".join(capsys.readouterr())
    assert (
        json.loads((tmp_path / "out" / "scores.json").read_text(encoding="utf-8"))["cautions"] == []
    )
    for number, photo in enumerate(trained[:2]):
        shutil.copyfile(photo, mixed / f"z{number}{photo.suffix}")
    expected = f"2 of these {new + 2} photos were trained on"
    # A checkpoint's folder, and a file, belong to the run around them.
    (adapter / "checkpoint-1").mkdir(exist_ok=True)
    for path in (
        adapter,
        adapter / FILE,
        Path(shutil.copy(adapter / FILE, adapter / "checkpoint-1")),
    ):
        command = ["evaluate", str(path), "--subject", str(mixed), *flags, "--overwrite"]
        assert main(command) == 0
        output = capsys.readouterr()
        assert f"warning: {expected}" in output.err
        assert "trained on" not in output.out, "it is said once"
        assert f"caution: {expected}" in (tmp_path / "out" / "scores.md").read_text(
            encoding="utf-8"
        )
        (caution,) = json.loads((tmp_path / "out" / "scores.json").read_text(encoding="utf-8"))[
            "cautions"
        ]
        assert caution.startswith(expected)
    for photo in mixed.iterdir():
        if not photo.name.startswith("z"):
            photo.unlink()
    assert main(["evaluate", str(adapter), "--subject", str(mixed), *flags, "--overwrite"]) == 0
    assert "warning: all of these photos were trained on" in capsys.readouterr().err


def test_the_record_of_photos_stays_in_the_runs_folder(adapter) -> None:
    """Digests alone, of all photos; neither the adapter nor what is published holds them."""
    from dora_diffusion.data.photos import read_photos
    from dora_diffusion.export.hub import _files

    folder = ROOT / "samples" / "bolt_mug"
    photos = read_photos(list_photos(folder), "")
    text = (adapter / "photos.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"digests": sorted(photo.digest for photo in photos)}
    assert not any(photo.path.name in text for photo in photos)
    raw = (adapter / FILE).read_bytes()
    assert not any(photo.digest.encode() in raw for photo in photos)
    assert "photos.json" not in _files(adapter, None, None)


def test_results_that_exist_are_kept(base, adapter, tmp_path, capsys) -> None:
    for name in ("scores.json", "scores.md", "images.png"):
        (tmp_path / name).write_text("kept", encoding="utf-8")
        flags = ["--base", base, "--subject", "bolt_mug", "--output", str(tmp_path), *FAST]
        assert main(["evaluate", str(adapter), *flags]) == 1
        assert f"{tmp_path} already contains an evaluation" in capsys.readouterr().err
        assert (tmp_path / name).read_text(encoding="utf-8") == "kept"
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--subject", "nobody"], "neither a folder of photos nor one of moon_robot"),
        (["--subject", "bolt_mug", "--metric_model", "x"], "--metric_model is for photos"),
        (["--subject", "bolt_mug", "--prompts", "nowhere"], "nowhere is not a file of prompts"),
        (["--subject", ".", "--metric_model", "./nowhere"], "./nowhere does not exist"),
    ],
)
def test_wrong_calls_end_in_one_line(
    base, adapter, tmp_path, capsys, monkeypatch, flags, text
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(adapter), "--base", base, *flags]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert text in error
