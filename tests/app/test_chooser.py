"""The checkpoint chooser: what it measures, what it suggests, and what choosing changes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from dora_diffusion.app.settings import as_yaml
from dora_diffusion.config import TrainConfig
from dora_diffusion.evaluation import metric_models, photos
from dora_diffusion.generate import SamplingSettings, load_adapted
from dora_diffusion.jobs import queue as jobs
from dora_diffusion.jobs.chooser import (
    COMPARISON,
    Comparison,
    Row,
    candidates,
    choose,
    comparing,
    comparison_folder,
    read_comparison,
    start_comparison,
)
from dora_diffusion.jobs.comparison import ask_photos, ask_toy, compare
from dora_diffusion.jobs.snapshot import Job, adapter_of, read_job, snapshot
from dora_diffusion.jobs.workspace import AppError, Workspace, read_json, write_json


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "runs").make()


def add_run(workspace: Workspace, steps: tuple[int, ...], last: int, code: int = 143) -> Job:
    """A run that ended at step ``last`` with checkpoints, as its folder would tell it."""
    config = TrainConfig(max_train_steps=last, token="sks", class_word="mug")
    job_id = jobs.create_job(workspace, "train", "sks mug", {}, lambda folder: as_yaml(config))
    folder = workspace.root / job_id
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir()
        for name in ("training_state.pt", "pytorch_lora_weights.safetensors"):
            (folder / f"checkpoint-{step}" / name).write_bytes(b"x")
    (folder / "metrics.jsonl").write_text(f'{{"step": {last}, "loss": 1, "seconds": 1}}\n')
    write_json(folder / jobs.RESULT, {"code": code})
    return reread(workspace, job_id)


def reread(workspace: Workspace, job_id: str) -> Job:
    job = read_job(workspace.root / job_id)
    assert job is not None
    return job


def test_candidates_are_the_checkpoints_and_the_result_without_a_twin(workspace: Workspace) -> None:
    stopped = add_run(workspace, (50, 100), 100)
    assert candidates(stopped) == ("checkpoint-50", "checkpoint-100")
    done = dataclasses.replace(stopped, state="done")
    assert candidates(done) == ("checkpoint-50", "result")
    assert candidates(dataclasses.replace(done, step=120))[-2:] == ("checkpoint-100", "result")


def test_of_many_checkpoints_some_are_compared_and_the_last_always(workspace: Workspace) -> None:
    job = add_run(workspace, tuple(range(10, 310, 10)), 305)
    names = candidates(job)
    assert len(names) == 8
    assert (names[0], names[-1]) == ("checkpoint-10", "checkpoint-300")


def test_what_was_chosen_stands_for_the_run(workspace: Workspace) -> None:
    job = add_run(workspace, (50, 100), 120)
    assert adapter_of(job) == job.folder / "checkpoint-100" / "pytorch_lora_weights.safetensors"
    assert choose(job, "checkpoint-50") == 50
    job = reread(workspace, job.id)
    assert (job.chosen, job.stands) == ("checkpoint-50", "checkpoint-50")
    assert adapter_of(job) == job.folder / "checkpoint-50" / "pytorch_lora_weights.safetensors"
    (job.folder / "checkpoint-50" / "pytorch_lora_weights.safetensors").unlink()
    assert reread(workspace, job.id).stands == "checkpoint-100"


@pytest.mark.parametrize(
    "name", ["checkpoint-7", "result", "base", "../other", "", None, 3, ["checkpoint-50"]]
)
def test_only_what_is_there_can_be_chosen(workspace: Workspace, name: object) -> None:
    job = add_run(workspace, (50,), 60)
    with pytest.raises(AppError, match="no longer exists"):
        choose(job, name)
    assert not (job.folder / jobs.CHOSEN).exists()


@pytest.mark.parametrize("name", ["../../etc/passwd", 5, None, {"a": 1}])
def test_a_tampered_choice_is_ignored(workspace: Workspace, name: object) -> None:
    job = add_run(workspace, (50,), 60)
    write_json(job.folder / jobs.CHOSEN, {"checkpoint": name})
    assert reread(workspace, job.id).stands == "checkpoint-50"


PICTURES = (Path("gone.png"), Path("gone-others.png"))


def row(step: int, each: tuple[float, ...], drift: float | None) -> Row:
    name = f"checkpoint-{step}" if step else "base"
    return Row(name, step, sum(each) / len(each) if each else None, drift, PICTURES, each)


def test_the_suggestion_weighs_likeness_against_drift() -> None:
    rows = (
        row(0, (0.2, 0.21, 0.19), 0.0),
        row(50, (0.5, 0.51, 0.5), 0.0),
        row(100, (0.8, 0.79, 0.81), 0.1),
        row(150, (0.9, 0.9, 0.91), 0.3),
    )
    found = Comparison(rows, (), ())
    assert (found.suggested, found.verdict) == ("checkpoint-100", "")
    assert Comparison((row(0, (), 0.0), row(50, (), 0.1)), (), ()).suggested == ""


def test_where_nothing_was_learned_nothing_is_suggested_and_it_is_said() -> None:
    base = (0.18, 0.20, 0.16, 0.22, 0.14)
    little = (0.19, 0.18, 0.20, 0.20, 0.18)  # means 0.19 and 0.18
    found = Comparison((row(0, base, 0.0), row(50, little, 0.0), row(100, base, 0.1)), (), ())
    assert found.suggested == ""
    # By hand: differences 0.01, -0.02, 0.04, -0.02, 0.04; t(4, 97.5%) = 2.776.
    differences = torch.tensor([0.01, -0.02, 0.04, -0.02, 0.04], dtype=torch.float64)
    half = 2.7764451 * float(differences.std()) / 5**0.5
    gain = found.gain(found.rows[1])
    assert gain is not None
    assert (gain.low, gain.high) == (pytest.approx(0.01 - half), pytest.approx(0.01 + half))
    assert (
        "None of these checkpoints is more like the subject than the base model: the best, step 50,"
        f" differs by +0.01 (95% confidence interval {0.01 - half:+.2f} to {0.01 + half:+.2f}, 5 im"
    ) in found.verdict
    from dora_diffusion.app.views.chooser import _cards

    job: Any = SimpleNamespace(stands="", step_of=lambda name: 50)
    page = _cards(job, dataclasses.replace(found, similar_to="training photos"), None)
    assert "None of these checkpoints" in page
    assert "suggested" not in page.lower()
    assert "similarity to training photos" in page


def test_a_comparison_is_a_job_and_needs_checkpoints(workspace: Workspace) -> None:
    empty = add_run(workspace, (), 3)
    with pytest.raises(AppError, match="no checkpoint yet"):
        start_comparison(workspace, empty)
    job = add_run(workspace, (50,), 60)
    start_comparison(workspace, job)
    waiting = comparing(snapshot(workspace.root), job.id)
    assert waiting is not None
    assert (waiting.state, waiting.facts["checkpoints"]) == ("waiting", ["checkpoint-50"])
    assert comparing(snapshot(workspace.root), empty.id) is None


def test_rows_of_lost_checkpoints_are_not_shown_and_new_ones_are_named(
    workspace: Workspace,
) -> None:
    job = add_run(workspace, (50, 100), 120)
    assert read_comparison(workspace, job) is None
    folder = comparison_folder(workspace, job.id)
    folder.mkdir(parents=True)
    rows = [
        {"name": name, "similarity": 0.5, "drift": 0.1, "pictures": [f"{name}.png"]}
        for name in ("base", "checkpoint-25", "checkpoint-50")
    ]
    write_json(folder / COMPARISON, {"rows": rows, "notes": ["n"]})
    found = read_comparison(workspace, job)
    assert found is not None
    assert [(row.name, row.step) for row in found.rows] == [("base", 0), ("checkpoint-50", 50)]
    assert found.missing == ("checkpoint-100",)


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


SETTINGS = SamplingSettings(steps=2, guidance_scale=1.0, width=32, height=32)


@pytest.fixture
def refs(tmp_path: Path) -> list[Path]:
    Image.effect_noise((64, 64), 70).convert("RGB").save(tmp_path / "1.png")
    return [tmp_path / "1.png"]


def test_without_a_metric_model_likeness_is_said_to_be_unmeasured(
    sd1_folder: Path,
    adapters: dict[str, Path],
    refs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metric_models, "lite_is_installed", lambda: False)
    questions = ask_photos(refs, "sks dog", "dog", SETTINGS)
    assert "not measured" in questions.notes[0]
    done: list[tuple[int, int]] = []
    rows = compare(
        str(sd1_folder), adapters, questions, tmp_path / "c", lambda *at: done.append(at)
    )
    assert [row["name"] for row in rows] == ["base", "checkpoint-1", "checkpoint-2"]
    assert [row["similarity"] for row in rows] == [None] * 3
    drift = [row["drift"] for row in rows]
    assert drift[0] == 0.0
    assert drift[1] == pytest.approx(0, abs=1e-3)  # an adapter that does nothing
    assert drift[2] > 0.01
    assert done[-1] == (33, 33)
    assert sorted(at for at, _ in done) == [at for at, _ in done]
    for row in rows:
        for name in row["pictures"]:
            with Image.open(tmp_path / "c" / name) as image:
                assert image.height == 160


def test_a_checkpoint_that_gives_nan_is_left_out_with_the_reason(
    sd1_folder: Path,
    adapters: dict[str, Path],
    refs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metric_models, "lite_is_installed", lambda: False)
    with safe_open(adapters["checkpoint-2"], "pt") as file:
        tensors = {name: torch.full_like(file.get_tensor(name), 3e38) for name in file.keys()}  # noqa: SIM118
        save_file(tensors, tmp_path / "b.safetensors", file.metadata())
    found = {"checkpoint-1": adapters["checkpoint-1"], "checkpoint-2": tmp_path / "b.safetensors"}
    questions = ask_photos(refs, "sks dog", "dog", SETTINGS)
    folder = tmp_path / "c"
    rows = compare(str(sd1_folder), found, questions, folder, lambda *_: None)
    assert [row["name"] for row in rows] == ["base", "checkpoint-1"]
    (note,) = read_json(folder / COMPARISON)["notes"][len(questions.notes) :]
    assert note.startswith("checkpoint-2 was left out: the image of seed ")


def test_a_metric_model_measures_likeness_and_drift(
    sd1_folder: Path,
    adapters: dict[str, Path],
    refs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Brightness:
        """Stands for a network: a picture's mean colour as a unit vector."""

        name, tokenizer = "brightness", None

        def image_features(self, images: Any) -> torch.Tensor:
            rows = [
                torch.tensor(list(image.convert("RGB").resize((1, 1), 4).getpixel((0, 0)))).float()
                for image in images
            ]
            return torch.nn.functional.normalize(torch.stack(rows) + 1, dim=1)

    monkeypatch.setattr(metric_models, "lite_is_installed", lambda: True)
    monkeypatch.setattr(metric_models, "open_metric_model", lambda name: Brightness())
    questions = ask_photos(refs, "sks dog", "dog", SETTINGS)
    assert "brightness" in questions.notes[1]
    assert "trained on" in questions.notes[0]
    assert questions.similar_to == "training photos"
    base, first, second = compare(
        str(sd1_folder), adapters, questions, tmp_path / "c", lambda *at: None
    )
    # The same figures by hand, from the pictures that the base makes of the same questions.
    from dora_diffusion.generate import generate_images

    components, _ = load_adapted(sd1_folder)
    asked = [one.prompt for one in photos.photo_requests("sks dog", "dog", [0], photos.PROMPTS[:5])
             if one.group == "subject"]  # fmt: skip
    assert questions.prompts[:5] == tuple(asked)
    pictures = generate_images(components, asked, questions.seeds[:5], SETTINGS)
    model = Brightness()
    alike = (model.image_features(pictures) @ model.image_features([Image.open(refs[0])]).T).mean()
    assert base["similarity"] == pytest.approx(float(alike), abs=1e-3)
    assert len(second["similarities"]) == 5
    assert sum(second["similarities"]) / 5 == pytest.approx(second["similarity"])
    assert first["similarities"] == pytest.approx(base["similarities"], abs=1e-3)
    assert (base["drift"], first["drift"]) == (pytest.approx(0, abs=1e-5),) * 2
    assert second["drift"] > first["drift"]


def test_a_sample_is_judged_against_its_truth() -> None:
    questions = ask_toy("bolt_mug", "sks mug", SETTINGS)
    assert (questions.subjects, len(questions.prompts)) == (5, 11)
    assert all("sks mug" in prompt for prompt in questions.prompts[:5])
    assert not any("sks" in prompt for prompt in questions.prompts[5:])
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
