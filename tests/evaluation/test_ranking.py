"""Adapters that are asked for the same few images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from dora_diffusion.data.images import open_photo
from dora_diffusion.data.photos import Photo, list_photos, read_photos
from dora_diffusion.evaluation import photos, ranking
from dora_diffusion.evaluation.denoising import NUM_SEEDS, HeldOutImages
from dora_diffusion.evaluation.photos import PhotoSubject
from dora_diffusion.evaluation.ranking import (
    EvaluationPrompts,
    RankedCheckpoint,
    ask_photos,
    rank,
)
from dora_diffusion.sampling.load import load_adapted
from dora_diffusion.sampling.settings import SamplingSettings
from dora_diffusion.toy.judges import ask_toy
from tests.evaluation.helpers import Brightness


@pytest.fixture(scope="module")
def adapters(sd1_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of a tiny model: one that does nothing, and one that does much."""
    from dora_diffusion import AdapterConfig, inject_adapters, save_adapter
    from dora_diffusion.adapters.inject import adapter_parameters

    found = {}
    for name, scale in (("checkpoint-1", 0.0), ("checkpoint-2", 0.5)):
        components, _ = load_adapted(sd1_folder)
        inject_adapters(components.denoiser, AdapterConfig(targets=("attention",), rank=2))
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in adapter_parameters(components.denoiser):
                parameter.add_(scale * torch.randn_like(parameter))
        folder = tmp_path_factory.mktemp(name)
        found[name] = save_adapter(components.denoiser, folder / "a.safetensors")
    return found


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Brightness in place of a network."""
    monkeypatch.setattr(ranking, "open_metric_model", lambda name: Brightness())


SETTINGS = SamplingSettings(steps=2, guidance_scale=1.0, width=32, height=32)


@pytest.fixture
def refs(tmp_path: Path) -> list[Photo]:
    """One photo."""
    (tmp_path / "refs").mkdir()
    Image.effect_noise((64, 64), 70).convert("RGB").save(tmp_path / "refs" / "1.png")
    return read_photos(list_photos(tmp_path / "refs"), "a photo of a sks dog")


def dog(photos: list[Photo]) -> PhotoSubject:
    return PhotoSubject("refs", "sks dog", "dog", photos)


def ranked(
    base: Path, adapters: dict[str, Path], questions: EvaluationPrompts, folder: Path, show: Any
) -> tuple[list[RankedCheckpoint], list[str]]:
    return rank(load_adapted(base)[0], adapters, questions, folder, show)


def test_images_are_counted_and_shown_in_strips(
    sd1_folder: Path, adapters: dict[str, Path], refs: list[Photo], tmp_path: Path
) -> None:
    questions = ask_photos([dog(refs)], SETTINGS, ["sks dog"])
    done: list[tuple[int, int]] = []
    rows, _ = ranked(sd1_folder, adapters, questions, tmp_path / "c", lambda *at: done.append(at))
    assert [row.name for row in rows] == ["base", "checkpoint-1", "checkpoint-2"]
    assert done[-1] == (33, 33)
    assert sorted(at for at, _ in done) == [at for at, _ in done]
    for row in rows:
        for path in row.images:
            with Image.open(path) as image:
                assert image.height == 160


def test_a_checkpoint_that_gives_nan_is_left_out_with_the_reason(
    sd1_folder: Path,
    adapters: dict[str, Path],
    refs: list[Photo],
    tmp_path: Path,
) -> None:
    with safe_open(adapters["checkpoint-2"], "pt") as file:
        tensors = {name: torch.full_like(file.get_tensor(name), 3e38) for name in file.keys()}  # noqa: SIM118
        save_file(tensors, tmp_path / "b.safetensors", file.metadata())
    found = {"checkpoint-1": adapters["checkpoint-1"], "checkpoint-2": tmp_path / "b.safetensors"}
    questions = ask_photos([dog(refs)], SETTINGS, ["sks dog"])
    rows, notes = ranked(sd1_folder, found, questions, tmp_path / "c", lambda *_: None)
    assert [row.name for row in rows] == ["base", "checkpoint-1"]
    (note,) = notes[len(questions.notes) :]
    assert note.startswith("checkpoint-2 was skipped: the image of seed ")


def test_a_metric_model_measures_likeness_and_drift(
    sd1_folder: Path,
    adapters: dict[str, Path],
    refs: list[Photo],
    tmp_path: Path,
) -> None:
    questions = ask_photos([dog(refs)], SETTINGS, ["sks dog"])
    assert "brightness" in questions.notes[1]
    assert "training photos" in questions.notes[0]
    assert questions.similar_to == "training photos"
    (base, first, second), _ = ranked(
        sd1_folder, adapters, questions, tmp_path / "c", lambda *at: None
    )
    # The same figures by hand, from the images that the base makes of the same questions.
    from dora_diffusion.sampling.generate import generate_images

    components, _ = load_adapted(sd1_folder)
    asked = [one.prompt for one in photos.photo_requests("sks dog", "dog", [0], photos.PROMPTS[:5])
             if one.group == "subject"]  # fmt: skip
    assert [one.prompt for one in questions.requests[:5]] == asked
    answers = generate_images(components, asked, [0] * 5, SETTINGS)
    model = Brightness()
    photo = Image.open(refs[0].path)
    alike = (model.image_features(answers) @ model.image_features([photo]).T).mean()
    assert base.similarity == pytest.approx(float(alike), abs=1e-3)
    assert len(second.similarities) == 5
    assert sum(second.similarities) / 5 == pytest.approx(second.similarity)
    assert first.similarities == pytest.approx(base.similarities, abs=1e-3)
    assert (base.drift, first.drift) == (pytest.approx(0, abs=1e-5),) * 2
    assert second.drift > first.drift


def test_each_of_several_subjects_is_asked_for_and_compared_with_its_own_photos(
    tmp_path: Path,
) -> None:
    subjects = []
    for color, trigger in (("red", "sks dog"), ("blue", "zwx cat"), ("lime", "mvt car")):
        (tmp_path / color).mkdir()
        Image.new("RGB", (64, 64), color).save(tmp_path / color / "1.png")
        photos_of = read_photos(list_photos(tmp_path / color), f"a photo of a {trigger}")
        subjects.append(PhotoSubject(color, trigger, trigger.split()[1], photos_of))
    questions = ask_photos(subjects, SETTINGS, ["zwx cat"])
    assert questions.triggers == ("sks dog", "zwx cat", "mvt car")
    assert questions.similar_to == "held-out photos in red, lime and training photos"
    assert [photo.path.parent.name for photo in questions.held_out] == ["red", "lime"]
    prompts = [request.prompt for request in questions.requests]
    for place, subject in enumerate(subjects):
        own = prompts[5 * place : 5 * place + 5]
        assert all(subject.trigger in prompt for prompt in own)
    groups = [request.group for request in questions.requests]
    assert groups == ["subject"] * 15 + ["others"] * 6
    # Of the things that should stay, none is of a subject's class.
    assert not [p for p in prompts[15:] for word in ("dog", "cat", "car") if word in p.split()]

    def images(*colors: str) -> list[Image.Image]:
        return [Image.new("RGB", (8, 8), color) for color in colors]

    base = images(*["gray"] * 15, *["white"] * 6)
    shown = images(*["red"] * 5, *["blue"] * 4, "red", *["blue"] * 5, *["white"] * 6)
    values = questions.judge(shown, base)
    (similarities,) = values["subject_similarity@brightness"]
    alike = Brightness().image_features(images("red", "blue", "lime"))
    wrong = [float(alike[1] @ alike[0]), float(alike[1] @ alike[2])]
    expected = [1.0] * 5 + [1.0] * 4 + [wrong[0]] + [wrong[1]] * 5
    assert similarities == pytest.approx(expected, abs=1e-3)
    assert values["others_change@brightness"][0] == pytest.approx([0] * 6, abs=1e-6)
    changed = questions.judge(images(*["gray"] * 15, *["red"] * 6), base)
    assert min(changed["others_change@brightness"][0]) > 0.1


def test_a_sample_is_judged_against_its_truth() -> None:
    questions = ask_toy("bolt_mug", "sks mug", SETTINGS)
    prompts = [request.prompt for request in questions.requests]
    assert [request.group for request in questions.requests] == ["subject"] * 5 + ["others"] * 6
    assert all("sks mug" in prompt for prompt in prompts[:5])
    assert not any("sks" in prompt for prompt in prompts[5:])
    from dora_diffusion.toy.benchmark_subjects import find_subject
    from dora_diffusion.toy.judges import toy_requests, true_images

    def truth(name: str) -> list[Any]:
        requests = toy_requests(find_subject(name), "sks mug", [0], ("subject", "others"))
        groups = [[one for one in requests if one.group == g] for g in ("subject", "others")]
        return true_images(groups[0][:5] + groups[1][:6], 64)

    right, wrong = truth("bolt_mug"), truth("heart_teapot")
    values = questions.judge(right, right)
    (similarities,), (drift,) = values["subject_similarity"], values["others_change"]
    assert len(similarities) == 5
    assert sum(similarities) / 5 == pytest.approx(0.95, abs=0.05)
    assert drift == pytest.approx([0] * 6, abs=1e-5)
    (similarities,) = questions.judge(wrong, right)["subject_similarity"]
    assert sum(similarities) / 5 < 0.3


def test_photos_that_were_kept_out_are_denoised_too_and_not_said_to_be_trained_on(
    sd1_folder: Path, adapters: dict[str, Path], refs: list[Photo], tmp_path: Path
) -> None:
    questions = ask_photos([dog(refs)], SETTINGS)
    assert not [note for note in questions.notes if "training photos" in note]
    assert questions.similar_to == "held-out photos in refs"
    two = {"checkpoint-2": adapters["checkpoint-2"]}
    rows, _ = ranked(sd1_folder, two, questions, tmp_path / "c", lambda *_: None)
    for row, adapter in zip(rows, (None, adapters["checkpoint-2"]), strict=True):
        components, _ = load_adapted(sd1_folder, adapter)
        image = HeldOutImages(components, [open_photo(refs[0].path)], ["a photo of a sks dog"])
        taken = [image.losses([[seed]]) for seed in range(NUM_SEEDS)]
        assert row.loss == pytest.approx(np.mean(taken), abs=1e-6)
    assert rows[0].loss != rows[1].loss
