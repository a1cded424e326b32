"""Held-out photos: which they are, their loss, what is kept by it, and when a run stops."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dora_diffusion.cli.console.training import training_summary
from dora_diffusion.config import TrainConfig
from dora_diffusion.data.images import PhotoError
from dora_diffusion.data.photos import list_photos
from dora_diffusion.evaluation import photos as evaluation
from dora_diffusion.evaluation.denoising import NUM_SEEDS, HeldOutImages
from dora_diffusion.evaluation.photos import evaluate_photos, read_subject
from dora_diffusion.formats.adapter.inspect import report_on
from dora_diffusion.models import offload
from dora_diffusion.sampling.load import load_adapted
from dora_diffusion.sampling.settings import SamplingSettings
from dora_diffusion.training.events import TrainingStarted, Validated
from dora_diffusion.training.features import validation
from dora_diffusion.training.features.held_out import divide
from dora_diffusion.training.features.validation import Validation, read_held_out
from dora_diffusion.training.inputs import base
from dora_diffusion.training.inputs.plan import plan_run
from dora_diffusion.training.inputs.subject import subjects_of
from dora_diffusion.training.processes import make_accelerator
from dora_diffusion.training.recipe import assemble, train
from tests.refusal import refused
from tests.training.helpers import (
    assert_same_adapter,
    losses,
    make_config,
    names,
    same,
    small_samples,
)  # fmt: skip

MOVING = {"lora_dropout": 0.3, "caption_dropout": 0.5, "random_flip": True, "center_crop": False}


# ---- which photos


def names_of(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


@pytest.mark.parametrize(("split", "count"), [(0.2, 1), (0.01, 1), (0.5, 2), (0.9, 4), (3.0, 3)])
def test_a_split_is_a_share_or_a_number(photos: Path, split: float, count: int) -> None:
    config = TrainConfig(instance_data_dir=str(photos), validation_split=split)
    kept, held_out = divide(config)
    assert len(held_out) == count
    assert sorted(kept + held_out) == list_photos(photos)


def test_a_split_is_of_content_and_seed(photos: Path, tmp_path: Path) -> None:
    """Other names and another order hold out the same photos; copies stay on one side."""
    settings: dict[str, Any] = {"validation_split": 2.0, "seed": 4}
    _, held_out = divide(TrainConfig(instance_data_dir=str(photos), **settings))
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for number, path in enumerate(reversed(list_photos(photos))):
        for copy in range(2):
            shutil.copy(path, renamed / f"{number}-{copy}.jpg")
    _, again = divide(TrainConfig(instance_data_dir=str(renamed), **settings))
    assert sorted({path.read_bytes() for path in again}) == sorted(p.read_bytes() for p in held_out)
    assert len(again) == 4
    drawn = {
        tuple(names_of(divide(TrainConfig(
            instance_data_dir=str(photos), validation_split=2.0, seed=seed))[1]))
        for seed in range(8)
    }  # fmt: skip
    assert len(drawn) > 2


def test_what_leaves_nothing_to_train_on_or_is_trained_on_is_refused(
    photos: Path, tmp_path: Path
) -> None:
    config = TrainConfig(instance_data_dir=str(photos), validation_split=5.0)
    with refused("validation_split", "holds out 5 of 5 photos"):
        divide(config)
    first, second = list_photos(photos)[:2]
    (tmp_path / "out").mkdir()
    shutil.copy(first, tmp_path / "out" / first.name)
    shutil.copy(second, tmp_path / "out" / "other.jpg")
    apart = TrainConfig(instance_data_dir=str(photos), validation_data_dir=str(tmp_path / "out"))
    with refused("validation_data_dir", f"{first.name}, other.jpg (as {second.name})"):
        divide(apart)
    with refused("validation_split", "both select held-out photos"):
        replace(apart, validation_split=0.2)
    with refused("validation_split", "1.5; give a share below 1"):
        TrainConfig(validation_split=1.5)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(PhotoError, match="out: the photo folder does not exist"):
        divide(apart)


# ---- the loss


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Five photos; those that are held out of them, and those that are left."""
    root = tmp_path_factory.mktemp("photos")
    found = {"all": Path(shutil.copytree(small_samples() / "bolt_mug", root / "all"))}
    config = TrainConfig(instance_data_dir=str(found["all"]), validation_split=2.0, seed=3)
    for name, paths in zip(("kept", "held_out"), divide(config), strict=True):
        found[name] = root / name
        found[name].mkdir()
        for path in paths:
            for file in (path, path.with_suffix(".txt")):
                shutil.copy(file, found[name] / file.name)
    return found


@pytest.fixture(scope="module")
def run(
    sd1_folder: Path, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainConfig, list[Any]]:
    """A run with all that is drawn, which holds out two photos. Settings and events."""
    events: list[Any] = []
    config = make_config(
        sd1_folder, folders["all"], tmp_path_factory.mktemp("run") / "out",
        validation_split=2.0, max_train_steps=2, gradient_accumulation_steps=2,
        with_prior_preservation=True, **MOVING,
    )  # fmt: skip
    train(config, events.append)
    return config, events


def test_training_is_not_moved_by_it(run, folders, tmp_path) -> None:
    config, _ = run
    alone = replace(
        config,
        instance_data_dir=str(folders["kept"]),
        validation_split=0.0,
        output_dir=str(tmp_path / "alone"),
    )
    train(alone)
    assert_same_adapter(config.output_dir, alone.output_dir)


def test_it_is_what_evaluate_measures(run, folders, sd1_folder, monkeypatch) -> None:
    """Of the written file loaded anew, and of the base."""
    config, _ = run
    monkeypatch.setattr(
        evaluation, "sample", lambda c, requests, *a: [Image.new("RGB", (8, 8))] * len(requests)
    )
    components, metadata = load_adapted(sd1_folder, config.output_dir)
    subject = read_subject(folders["held_out"], "sks mug", "mug")
    found = evaluate_photos(components, subject, range(NUM_SEEDS), SamplingSettings())
    taken = losses(config.output_dir, "validation_loss")
    assert list(taken) == [0, 2]
    for step, column in ((0, "base"), (2, "adapted")):
        interval = found.interval(column, "denoising_loss")
        assert taken[step] == pytest.approx(interval.mean, abs=1e-6)
    assert taken[2] != taken[0]
    assert float(metadata.extra["validation_loss"]) == pytest.approx(taken[2], rel=1e-5)


@pytest.mark.parametrize("is_dry", [False, True], ids=["run", "dry run"])
def test_held_out_captions_without_the_token_are_refused_by_folder(
    sd1_folder, folders, tmp_path, monkeypatch, is_dry
) -> None:
    """Before the model is loaded; without captions, the photos there have the subject's prompt."""
    monkeypatch.setattr(base, "load_components", lambda *a, **k: 1 / 0)
    other = Path(shutil.copytree(folders["held_out"], tmp_path / "other"))
    for caption in other.glob("*.txt"):
        caption.write_text("a mug on sand", encoding="utf-8")
    config = make_config(
        sd1_folder, folders["kept"], tmp_path / "out", validation_data_dir=str(other)
    )
    run = training_summary if is_dry else train
    with refused("validation_data_dir", "the token 'sks'", str(other), "'a mug on sand'"):
        run(config)
    first, *others = other.glob("*.txt")
    first.unlink()
    with pytest.warns(UserWarning, match="is missing from 1 of 2 captions: 'a mug on sand'"):
        training_summary(config)
    for caption in others:
        caption.unlink()
    photos = read_held_out(subjects_of(config)[0], list_photos(other))
    assert {photo.caption for photo in photos} == {"a photo of a sks mug"}
    if not is_dry:
        with pytest.raises(ZeroDivisionError):
            train(config)


def test_it_is_told(run, folders) -> None:
    config, events = run
    (started,) = (e for e in events if isinstance(e, TrainingStarted))
    assert list(started.held_out) == names_of(list_photos(folders["held_out"]))
    assert started.photos == 3
    told = {e.step: (e.loss, e.best_step) for e in events if isinstance(e, Validated)}
    taken = losses(config.output_dir, "validation_loss")
    assert told == {0: (taken[0], None), 2: (taken[2], 2)}
    card = (Path(config.output_dir) / "README.md").read_text(encoding="utf-8")
    assert f"The validation loss, on held-out photos, is {taken[2]:.6g} at step 2.\n" in card


VARIANTS = {
    "text encoders": (
        "sdxl",
        {"train_text_encoder": True, "cache_latents": False, "ema_decay": 0.9},
    ),
    "full": ("sd1", {"method": "full", "learning_rate": 1e-4, "targets": ["full"]}),
    "bf16": ("sd1", {"mixed_precision": "bf16", "gradient_checkpointing": True}),
    "inpainting": ("sd1_inpainting", {"parametrization": "vera", "vera_rank": 4}),
    "v-prediction": ("sd2", {"method": "lora", "aspect_ratio_buckets": True, "resolution": 64}),
}


@pytest.mark.parametrize("name", [
    "text encoders", "full", "inpainting",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("bf16", "v-prediction")),
])  # fmt: skip
def test_it_is_that_of_what_is_written(name, folders, tmp_path, request, monkeypatch) -> None:
    monkeypatch.setattr(validation, "NUM_SEEDS", 1)
    family, settings = VARIANTS[name]
    base = request.getfixturevalue(f"{family}_folder")
    config = make_config(
        base, folders["all"], tmp_path / "out",
        **{"validation_split": 1.0, "max_train_steps": 1, "targets": ["cross-attention"]}
        | settings,
    )  # fmt: skip
    train(config)
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    adapter = config.output_dir if config.trains_adapters else None
    model = base if config.trains_adapters else tmp_path / "out" / "model"
    components, _ = load_adapted(model, adapter, dtype=dtype)
    (path,) = divide(config)[1]
    caption = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
    with Image.open(path) as image:
        by_seed = HeldOutImages(components, [image.convert("RGB")], [caption]).losses_by_seed([0])
    taken = losses(tmp_path / "out", "validation_loss")
    assert taken[1] == pytest.approx(by_seed[0][0], abs=1e-6)
    assert taken[1] != taken[0]


def test_it_is_the_same_offloaded_and_in_any_number_of_processes(
    sd1_folder, folders, tmp_path, monkeypatch
) -> None:
    """Each of three processes measures a share of two photos; what they add up is the whole."""
    monkeypatch.setattr(validation, "NUM_SEEDS", 1)
    config = make_config(sd1_folder, folders["all"], tmp_path / "out", validation_split=2.0)
    accelerator = make_accelerator(config)
    session = assemble(plan_run(config), accelerator)
    alone = session.validation.measure(0)

    monkeypatch.setattr(offload, "has_own_memory", lambda kind: True)
    offloaded = assemble(plan_run(config), accelerator)
    assert offloaded.components.offload_to is not None
    assert offloaded.validation.measure(0) == alone

    shares: list[torch.Tensor] = []

    class Process:
        is_main_process, num_processes, device = False, 3, torch.device("cpu")

        def __init__(self, index: int) -> None:
            self.process_index = index

        def reduce(self, values: torch.Tensor, reduction: str) -> torch.Tensor:
            shares.append(values)
            return torch.stack(shares).sum(0)

    paths = divide(config)[1]
    for index in range(3):
        one = Validation(
            [(session.subjects[0], paths)], session.config, session.components, Process(index)
        )
        found = one.measure(0)
    assert [bool(share.any()) for share in shares] == [True, True, False]
    assert found == alone


# ---- what is kept, and when a run stops


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Validation losses by step, in place of measured ones."""
    script = {0: 0.5, 1: 0.4, 2: 0.2, 3: 0.3, 4: 0.35, 5: 0.1, 6: 0.05}

    def measure(self: Validation, step: int) -> float:
        self.losses[step] = script[step]
        return script[step]

    monkeypatch.setattr(Validation, "measure", measure)
    return script


@pytest.fixture
def short(tiny_run, folders):
    def make(output: str, **changes: Any) -> TrainConfig:
        settings = {
            "instance_data_dir": str(folders["all"]), "validation_split": 1.0,
            "validation_loss_steps": 1, "max_train_steps": 6, "lora_dropout": 0.2,
            "checkpointing_steps": 3, "keep_best": True,
        }  # fmt: skip
        return tiny_run(**{**settings, "output_dir": output, **changes})

    return make


def test_a_run_writes_its_best_step_and_a_resumed_one_is_the_same(
    scripted, short, tmp_path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = {"max_train_steps": 4, "checkpoints_total_limit": 1}
    result = train(short(str(whole), **settings))
    assert (result.steps, result.result_step) == (4, 2)
    assert names(whole) == ["checkpoint-2", "checkpoint-4"]
    assert same(whole, whole / "checkpoint-2")
    assert not same(whole, whole / "checkpoint-4")
    assert report_on(result.adapter).metadata.extra["training_steps"] == "2"
    card = (whole / "README.md").read_text(encoding="utf-8")
    assert "is 0.2 at step 2, the lowest of the run." in card

    def stop(event: Any) -> None:
        if getattr(event, "step", 0) == 3 and isinstance(event, Validated):
            raise OSError("the power is gone")

    with pytest.raises(OSError, match="power"):
        train(short(str(parts), **settings), stop)
    assert names(parts) == ["checkpoint-2", "checkpoint-3"]
    result = train(short(str(parts), **settings, resume_from_checkpoint="latest"))
    assert (result.steps, result.result_step) == (4, 2)
    assert names(parts) == ["checkpoint-2", "checkpoint-4"]
    assert same(whole, parts)
    assert same(whole / "checkpoint-4", parts / "checkpoint-4")
    taken = {step: scripted[step] for step in range(5)}
    assert losses(whole, "validation_loss") == losses(parts, "validation_loss") == taken

    # With more steps it continues from where it ended, and its losses with it.
    more = {**settings, "max_train_steps": 6}
    result = train(short(str(parts), resume_from_checkpoint="latest", **more))
    assert (result.steps, result.result_step) == (6, 6)
    assert losses(parts, "validation_loss") == scripted


def test_the_best_is_kept_without_other_checkpoints_and_its_loss_is_said(
    scripted, short, tmp_path
) -> None:
    config = short(str(tmp_path / "out"), checkpointing_steps=0, max_train_steps=4)
    assert train(config).result_step == 2
    assert names(tmp_path / "out") == ["checkpoint-2"]
    scripted[0] = 0.01
    shutil.rmtree(tmp_path / "out")
    with pytest.warns(UserWarning, match=r"never below the base model's \(0.01\)"):
        train(replace(config, max_train_steps=1))


def test_losses_of_other_photos_are_dropped(scripted, short, folders, tmp_path) -> None:
    config = short(
        str(tmp_path / "out"), instance_data_dir=str(folders["kept"]), validation_split=0.0,
        validation_data_dir=str(folders["held_out"]), max_train_steps=3,
    )  # fmt: skip
    train(config)
    other = Path(shutil.copytree(folders["held_out"], tmp_path / "other"))
    list_photos(other)[0].unlink()
    longer = replace(
        config, validation_data_dir=str(other), max_train_steps=4, resume_from_checkpoint="latest"
    )
    with pytest.warns(UserWarning, match="the held-out photos or captions have changed"):
        assert train(longer).result_step == 3, "the loss is taken again where it resumes"


# ---- similarity


def test_samples_are_compared_with_the_held_out_photos(
    sd1_folder, folders, tmp_path, monkeypatch
) -> None:
    """Those of prompts with the token; the network's random numbers are not training's."""

    class Metric:
        name = "mean colour"

        def image_features(self, images: Any) -> torch.Tensor:
            pixels = [torch.tensor(list(i.resize((1, 1), 4).getpixel((0, 0)))) for i in images]
            return torch.nn.functional.normalize(torch.stack(pixels) + 1.0, dim=1)

    def open_metric_model(name: str) -> Metric:
        torch.randn(1000)
        return Metric()

    real = validation.read_photos

    def read_photos(*args: Any, **kwargs: Any) -> Any:
        torch.manual_seed(5)
        return real(*args, **kwargs)

    monkeypatch.setattr(validation, "open_metric_model", open_metric_model)
    monkeypatch.setattr(validation, "read_photos", read_photos)
    config = make_config(
        sd1_folder, folders["all"], tmp_path / "out", validation_split=2.0, num_validation_images=2,
        validation_steps=2,
    )  # fmt: skip
    session = assemble(plan_run(config), make_accelerator(config))
    drawn = torch.randn(4)
    alone = replace(config, num_validation_images=0)
    assemble(plan_run(alone), make_accelerator(alone))
    assert torch.equal(drawn, torch.randn(4))
    references = [Image.open(path).convert("RGB") for path in divide(config)[1]]
    colours = [(200, 10, 10), (10, 200, 10), (10, 10, 200)]
    shown = [Image.new("RGB", (8, 8), colour) for colour in colours]
    prompts = ["a sks mug", "SKS on grass", "a mug"]
    found = session.validation.similarity(list(zip(prompts, shown, strict=True)))
    features = Metric().image_features
    wanted = (features(shown[:2]) @ features(references).T).mean()
    assert found == pytest.approx(float(wanted))
    assert session.validation.similarity([("a mug", shown[2])]) is None
