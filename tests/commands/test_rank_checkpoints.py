"""``dora-diffusion rank-checkpoints``: fixed-seed images and their measures."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from dora_diffusion.cli import main
from dora_diffusion.commands.rank_checkpoints import EvaluationPrompts, ask_photos, ask_toy, rank
from dora_diffusion.evaluation import metric_models, photos
from dora_diffusion.generate import SamplingSettings, load_adapted
from dora_diffusion.jobs.checkpoints import COMPARISON, RankedCheckpoint
from dora_diffusion.jobs.workspace import read_json


@pytest.fixture(scope="module")
def adapters(sd1_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of a tiny model: one that does nothing, and one that does much."""
    from dora_diffusion import AdapterConfig, inject_adapters, save_adapter
    from dora_diffusion.adapters.inject import adapter_parameters

    found = {}
    for name, scale in (("checkpoint-1", 0.0), ("checkpoint-2", 0.5)):
        components, _ = load_adapted(sd1_folder)
        inject_adapters(components.unet, AdapterConfig(targets=("attention",), rank=2))
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in adapter_parameters(components.unet):
                parameter.add_(scale * torch.randn_like(parameter))
        folder = tmp_path_factory.mktemp(name)
        found[name] = save_adapter(components.unet, folder / "a.safetensors")
    return found


class Brightness:
    """Stands for a network: a picture's mean colour as a unit vector."""

    name, tokenizer = "brightness", None

    def image_features(self, images: Any) -> torch.Tensor:
        rows = [
            torch.tensor(list(image.convert("RGB").resize((1, 1), 4).getpixel((0, 0)))).float()
            for image in images
        ]
        return torch.nn.functional.normalize(torch.stack(rows) + 1, dim=1)


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Brightness in place of a network."""
    monkeypatch.setattr(metric_models, "open_metric_model", lambda name: Brightness())


SETTINGS = SamplingSettings(steps=2, guidance_scale=1.0, width=32, height=32)


@pytest.fixture
def refs(tmp_path: Path) -> Path:
    """A folder of one photo."""
    (tmp_path / "refs").mkdir()
    Image.effect_noise((64, 64), 70).convert("RGB").save(tmp_path / "refs" / "1.png")
    return tmp_path / "refs"


def ranked(
    base: Path, adapters: dict[str, Path], questions: EvaluationPrompts, folder: Path, show: Any
) -> tuple[list[RankedCheckpoint], list[str]]:
    return rank(load_adapted(base)[0], adapters, questions, folder, show)


def test_images_are_counted_and_shown_in_strips(
    sd1_folder: Path, adapters: dict[str, Path], refs: Path, tmp_path: Path
) -> None:
    questions = ask_photos(refs, "sks dog", "dog", SETTINGS)
    done: list[tuple[int, int]] = []
    rows, _ = ranked(sd1_folder, adapters, questions, tmp_path / "c", lambda *at: done.append(at))
    assert [(row.name, row.step) for row in rows] == [
        ("base", 0), ("checkpoint-1", 1), ("checkpoint-2", 2),
    ]  # fmt: skip
    assert done[-1] == (33, 33)
    assert sorted(at for at, _ in done) == [at for at, _ in done]
    for row in rows:
        for path in row.images:
            with Image.open(path) as image:
                assert image.height == 160


def test_a_checkpoint_that_gives_nan_is_left_out_with_the_reason(
    sd1_folder: Path,
    adapters: dict[str, Path],
    refs: Path,
    tmp_path: Path,
) -> None:
    with safe_open(adapters["checkpoint-2"], "pt") as file:
        tensors = {name: torch.full_like(file.get_tensor(name), 3e38) for name in file.keys()}  # noqa: SIM118
        save_file(tensors, tmp_path / "b.safetensors", file.metadata())
    found = {"checkpoint-1": adapters["checkpoint-1"], "checkpoint-2": tmp_path / "b.safetensors"}
    questions = ask_photos(refs, "sks dog", "dog", SETTINGS)
    rows, notes = ranked(sd1_folder, found, questions, tmp_path / "c", lambda *_: None)
    assert [row.name for row in rows] == ["base", "checkpoint-1"]
    (note,) = notes[len(questions.notes) :]
    assert note.startswith("checkpoint-2 was left out: the image of seed ")


def test_a_metric_model_measures_likeness_and_drift(
    sd1_folder: Path,
    adapters: dict[str, Path],
    refs: Path,
    tmp_path: Path,
) -> None:
    questions = ask_photos(refs, "sks dog", "dog", SETTINGS)
    assert "brightness" in questions.notes[1]
    assert "trained on" in questions.notes[0]
    assert questions.similar_to == "training photos"
    (base, first, second), _ = ranked(
        sd1_folder, adapters, questions, tmp_path / "c", lambda *at: None
    )
    # The same figures by hand, from the pictures that the base makes of the same questions.
    from dora_diffusion.generate import generate_images

    components, _ = load_adapted(sd1_folder)
    asked = [one.prompt for one in photos.photo_requests("sks dog", "dog", [0], photos.PROMPTS[:5])
             if one.group == "subject"]  # fmt: skip
    assert [one.prompt for one in questions.requests[:5]] == asked
    pictures = generate_images(components, asked, [0] * 5, SETTINGS)
    model = Brightness()
    photo = Image.open(refs / "1.png")
    alike = (model.image_features(pictures) @ model.image_features([photo]).T).mean()
    assert base.similarity == pytest.approx(float(alike), abs=1e-3)
    assert len(second.similarities) == 5
    assert sum(second.similarities) / 5 == pytest.approx(second.similarity)
    assert first.similarities == pytest.approx(base.similarities, abs=1e-3)
    assert (base.drift, first.drift) == (pytest.approx(0, abs=1e-5),) * 2
    assert second.drift > first.drift


def test_a_sample_is_judged_against_its_truth() -> None:
    questions = ask_toy("bolt_mug", "sks mug", SETTINGS)
    prompts = [request.prompt for request in questions.requests]
    assert [request.group for request in questions.requests] == ["subject"] * 5 + ["others"] * 6
    assert all("sks mug" in prompt for prompt in prompts[:5])
    assert not any("sks" in prompt for prompt in prompts[5:])
    from dora_diffusion.evaluation.toy.requests import toy_requests, true_images
    from dora_diffusion.toy.benchmark_subjects import find_subject

    def truth(name: str) -> list[Any]:
        requests = toy_requests(find_subject(name), "sks mug", [0], ("subject", "others"))
        groups = [[one for one in requests if one.group == g] for g in ("subject", "others")]
        return true_images(groups[0][:5] + groups[1][:6], 64)

    right, wrong = truth("bolt_mug"), truth("heart_teapot")
    similarities, drift = questions.judge(right, right)
    assert similarities is not None
    assert len(similarities) == 5
    assert sum(similarities) / 5 == pytest.approx(0.95, abs=0.05)
    assert drift == pytest.approx(0, abs=1e-5)
    similarities, drift = questions.judge(wrong, right)
    assert similarities is not None
    assert sum(similarities) / 5 < 0.3


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
    assert last_line().endswith("holds a ranking already; choose another --output, or --overwrite")
    for names, what in ((["checkpoint-9"], "checkpoint-9"), (["result", "x"], "x")):
        assert main([*words, "--overwrite", "--checkpoints", *names]) == 1
        assert last_line() == f"error: {run} has not {what}; it has no checkpoint"
    assert main([*words, "--overwrite", "--subject", "bolt_mug"]) == 1
    assert "is of the toy world, which" in last_line()
    assert main(["rank-checkpoints", str(tmp_path / "none")]) == 1
    assert "config.yaml" in last_line()


def test_photos_that_were_kept_out_are_not_said_to_be_trained_on(refs: Path) -> None:
    questions = ask_photos(refs, "sks dog", "dog", SETTINGS, trained_on=False)
    assert not [note for note in questions.notes if "trained on" in note]
    assert questions.similar_to == f"photos in {refs.name}"
