"""Comparing checkpoints: fixed-seed images and their measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from dora_diffusion.evaluation import metric_models, photos
from dora_diffusion.generate import SamplingSettings, load_adapted
from dora_diffusion.jobs.compare import compare, comparing, start_comparison
from dora_diffusion.jobs.comparison import (
    COMPARISON,
)
from dora_diffusion.jobs.errors import RequestError
from dora_diffusion.jobs.questions import ask_photos
from dora_diffusion.jobs.snapshot import snapshot
from dora_diffusion.jobs.workspace import Workspace, read_json
from tests.jobs.helpers import (
    ended_run,
)


def test_a_comparison_is_a_job_and_needs_checkpoints(workspace: Workspace) -> None:
    empty = ended_run(workspace, (), 3)
    with pytest.raises(RequestError, match="no checkpoint yet"):
        start_comparison(workspace, empty)
    job = ended_run(workspace, (50,), 60)
    start_comparison(workspace, job)
    waiting = comparing(snapshot(workspace.root), job.id)
    assert waiting is not None
    assert (waiting.state, waiting.request.checkpoints) == ("waiting", ["checkpoint-50"])
    assert comparing(snapshot(workspace.root), empty.id) is None


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
    assert [row.name for row in rows] == ["base", "checkpoint-1", "checkpoint-2"]
    assert [row.similarity for row in rows] == [None] * 3
    drift = [row.drift for row in rows]
    assert drift[0] == 0.0
    assert drift[1] == pytest.approx(0, abs=1e-3)  # an adapter that does nothing
    assert drift[2] > 0.01
    assert done[-1] == (33, 33)
    assert sorted(at for at, _ in done) == [at for at, _ in done]
    for row in rows:
        for path in row.images:
            with Image.open(path) as image:
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
    assert [row.name for row in rows] == ["base", "checkpoint-1"]
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
    assert questions.prompts[:5] == asked
    pictures = generate_images(components, asked, questions.seeds[:5], SETTINGS)
    model = Brightness()
    alike = (model.image_features(pictures) @ model.image_features([Image.open(refs[0])]).T).mean()
    assert base.similarity == pytest.approx(float(alike), abs=1e-3)
    assert len(second.similarities) == 5
    assert sum(second.similarities) / 5 == pytest.approx(second.similarity)
    assert first.similarities == pytest.approx(base.similarities, abs=1e-3)
    assert (base.drift, first.drift) == (pytest.approx(0, abs=1e-5),) * 2
    assert second.drift > first.drift
