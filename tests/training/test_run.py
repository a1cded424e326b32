"""Models that a session opens, and those that it offloads."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch._dynamo.testing import CompileCounterWithBackend

from dora_diffusion.cli import main as cli
from dora_diffusion.config import TrainConfig, read_config_file
from dora_diffusion.data.crops import Buckets
from dora_diffusion.export.convert import convert_adapter
from dora_diffusion.export.files import open_model
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.models import offload
from dora_diffusion.models.load import BaseCache, load_components
from dora_diffusion.models.precision import PRECISION_DTYPES
from dora_diffusion.training import conditioner, recipe
from dora_diffusion.training.events import (
    CachingProgress,
    SamplingProgress,
    StepDone,
    TrainingStarted,
)
from dora_diffusion.training.inputs import dataset
from dora_diffusion.training.inputs.plan import plan_run
from dora_diffusion.training.processes import make_accelerator
from dora_diffusion.training.recipe import assemble, train
from dora_diffusion.training.run import Run
from tests.apple import DEVICE, AppleGPU
from tests.refusal import refused
from tests.training.helpers import (
    assert_same_adapter,
    compile_without_compiler,
    losses,
    make_config,
    warnings_of,
)


@pytest.mark.parametrize(
    ("run", "entries", "trained", "resolved"),
    [
        (None, (32, 40), (32, 40), 40), (None, (32, None), (32, 64), 64),
        (32, (None, 40), (32, 40), 32),
        (None, (None, None), (64,), 64),
    ],
)  # fmt: skip
def test_the_resolution_that_is_trained_is_told_written_and_inspected(
    tiny_run, photos, tmp_path, capsys, run, entries, trained, resolved
):
    """Of a run and its entries; its own file gives the same run again."""
    listed = [{"instance_data_dir": str(photos), "resolution": side} for side in entries]
    listed = [{name: value for name, value in entry.items() if value} for entry in listed]
    config = tiny_run(dataset_config=listed, resolution=run, max_train_steps=1)
    events: list[Any] = []
    train(config, events.append)
    (started,) = (event for event in events if isinstance(event, TrainingStarted))
    assert started.resolutions == trained
    out = tmp_path / "out"
    assert read_adapter(out).metadata.resolutions == trained
    shown = ", ".join(map(str, trained)) + " px"
    capsys.readouterr()
    assert cli.main(["inspect", str(out)]) == 0
    assert re.search(rf"^resolution +{shown}$", capsys.readouterr().out, re.MULTILINE)
    assert f" at {shown} for 1 steps" in (out / "README.md").read_text("utf-8")
    kohya = convert_adapter(out, tmp_path / "kohya.safetensors", "kohya").path
    with safe_open(kohya, "pt") as file:
        assert file.metadata()["modelspec.resolution"] == f"{trained[-1]}x{trained[-1]}"
    assert read_adapter(kohya).metadata.resolutions == trained
    saved = TrainConfig.from_dict(read_config_file(out / "config.yaml"))
    assert saved.resolution == resolved
    for each in (config, saved):
        session = assemble(plan_run(each), make_accelerator(each))
        assert {side for size in session.dataset.groups for side in size} == {*trained}
        assert session.resolutions == trained


def test_bucket_steps_that_the_model_cannot_halve_are_refused(tiny_run):
    config = tiny_run(aspect_ratio_buckets=True, resolution=128, bucket_reso_steps=24)
    with refused("bucket_reso_steps", "24; ", "needs a multiple of 16"):
        assemble(plan_run(config), make_accelerator(config))
    config = replace(config, bucket_reso_steps=128, min_bucket_reso=128, max_bucket_reso=200)
    session = assemble(plan_run(config), make_accelerator(config))
    (subject,) = session.dataset.subjects
    assert subject.draws.buckets == Buckets(128, 128, 128, 200)


BEFORE = {
    "all that adds to a model": {
        "train_text_encoder": True, "train_text_encoder_ti": True, "new_words": ["<s1>"],
        "gradient_checkpointing": True, "lora_dropout": 0.5, "num_validation_images": 1,
    },
    "full": {"method": "full"},
    "pissa": {"init": "pissa"},
    "adalora": {"parametrization": "adalora", "optimizer": "adamw", "max_train_steps": 6},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "family", "precision"),
    [
        ("all that adds to a model", "sd1", "no"),
        ("all that adds to a model", "sdxl", "bf16"),
        ("full", "sd1", "no"),
        ("pissa", "sd2", "no"),
        ("adalora", "sdxl", "no"),
    ],
)
def test_a_run_on_a_base_that_is_kept_is_that_of_a_cold_start(
    before, family, precision, photos, tmp_path, request
):
    """Whatever was trained on it before: adapters, words and modes are not in the weights."""
    model, cache = request.getfixturevalue(f"{family}_folder"), BaseCache()
    common = {"max_train_steps": 2, "targets": ["cross-attention"], "mixed_precision": precision}
    plain = make_config(model, photos, tmp_path / "cold", **common)
    train(plain)
    for caption in sorted(photos.glob("*.txt"))[:1]:
        words = caption.read_text(encoding="utf-8")
        caption.write_text(f"{words.strip()} <s1>", encoding="utf-8")
    train(make_config(model, photos, tmp_path / "before", **common | BEFORE[before]), load=cache)
    caption.write_text(words, encoding="utf-8")
    kept = cache._base
    train(replace(plain, output_dir=str(tmp_path / "warm")), load=cache)
    assert (cache._base is kept) == (before != "full")  # which trains weights of its own
    assert_same_adapter(tmp_path / "warm", tmp_path / "cold")
    assert losses(tmp_path / "warm") == losses(tmp_path / "cold")
    read = load_components(model, dtype=PRECISION_DTYPES[precision])
    assert cache._base.identity() == read.identity()
    assert len(cache._base.tokenizers[0]) == len(read.tokenizers[0])


def test_a_single_file_checkpoint_trains_offline(sd1_folder, photos, tmp_path):
    from dora_diffusion.export import export_checkpoint

    first = make_config(sd1_folder, photos, tmp_path / "first", max_train_steps=1)
    train(first)
    single = tmp_path / "single.safetensors"
    export_checkpoint(str(sd1_folder), tmp_path / "first", single, strength=0.0)
    config = replace(
        first,
        pretrained_model_name_or_path=str(single),
        model_config=str(sd1_folder),
        output_dir=str(tmp_path / "second"),
    )
    train(config)
    assert losses(tmp_path / "second") == pytest.approx(losses(tmp_path / "first"), rel=1e-5)


@pytest.fixture
def offloaded_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU, as if it had memory of its own: all that is done ahead, without moving a thing."""
    monkeypatch.setattr(offload, "has_own_memory", lambda kind: True)


@pytest.fixture
def run(photos: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(folder: Path, output: str, **changes: Any) -> TrainConfig:
        settings = {"mixed_precision": "no", "max_train_steps": 2, "targets": ["cross-attention"]}
        return make_config(folder, photos, tmp_path / output, **{**settings, **changes})

    return make


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[[TrainConfig], dict[str, list[set[str]]]]:
    """Trains, and says which modules were on the device at each event, by its kind."""
    opened: list[Run] = []
    make = recipe.assemble

    def assemble_noted(*args: Any, **options: Any) -> Run:
        opened.append(make(*args, **options))
        return opened[-1]

    monkeypatch.setattr(recipe, "assemble", assemble_noted)

    def watch(config: TrainConfig) -> dict[str, list[set[str]]]:
        seen: dict[str, list[set[str]]] = {}

        def note(event: Any) -> None:
            if opened:
                seen.setdefault(type(event).__name__, []).append(on_gpu(opened[-1]))

        recipe.train(config, note)
        seen["end"] = [on_gpu(opened[-1])]
        return seen

    return watch


def on_gpu(session: Run) -> set[str]:
    """Modules whose frozen tensors are all on the device; none may be in between."""
    found = set()
    for name, module in session.components.modules().items():
        tensors = [*module.parameters(), *module.buffers()]
        places = {str(t.device) for t in tensors if not t.requires_grad}
        assert len(places) <= 1, (name, places)  # none: all of it trains
        assert all(t.device == DEVICE for t in tensors if t.requires_grad)
        found |= {name} if places <= {str(DEVICE)} else set()
    return found


def pixels(config: TrainConfig, name: str) -> np.ndarray:
    with Image.open(Path(config.output_dir) / "samples" / f"{name}.png") as image:
        return np.asarray(image).copy()


RUNS = {
    "class images": ("sd1", {
        "with_prior_preservation": True, "prior_preservation_mode": "images", "num_class_images": 2,
    }),
    "text encoders trained": ("sdxl", {
        "train_text_encoder": True, "targets": ["full"], "gradient_accumulation_steps": 2,
    }),
    "image-free prior, dropped and shuffled captions": ("sdxl", {
        "targets": ["attention+conv"], "with_prior_preservation": True,
        "prior_preservation_mode": "image-free", "caption_dropout": 0.4, "shuffle_tags": True,
        "random_flip": True, "train_batch_size": 2,
    }),
    "nothing cached": ("sd1", {"cache_latents": False, "lora_dropout": 0.2}),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "class images")) for name in RUNS],
)
def test_no_bit_of_a_run_depends_on_it(
    name: str, gpu: AppleGPU, run, request: pytest.FixtureRequest
) -> None:
    family, settings = RUNS[name]
    folder = request.getfixturevalue(f"{family}_folder")
    settings = settings | {"num_validation_images": 1, "validation_steps": 1}
    stays, leaves = (
        run(folder, offload, **settings, offload=offload) for offload in ("none", "model")
    )
    expected = read_adapter(recipe.train(stays).adapter).layers
    adapter = read_adapter(recipe.train(leaves).adapter).layers
    assert adapter.keys() == expected.keys()
    for key, layer in expected.items():
        for part in ("down", "up", "magnitude"):
            assert torch.equal(getattr(adapter[key], part), getattr(layer, part)), (key, part)
    for figure in ("loss", "grad_norm"):
        assert losses(leaves.output_dir, figure) == losses(stays.output_dir, figure)
    for sheet in ("step-000001", "adapted", "base"):
        assert np.array_equal(pixels(leaves, sheet), pixels(stays, sheet)), sheet


def test_each_module_is_on_the_device_while_it_computes(
    gpu: AppleGPU, run, watched, sd1_folder: Path
) -> None:
    config = run(sd1_folder, "out", num_validation_images=1, validation_steps=1)
    seen = watched(config)
    assert all(places == {"vae"} for places in seen[CachingProgress.__name__])
    for event in (TrainingStarted, SamplingProgress, StepDone):
        assert all(places == {"unet"} for places in seen[event.__name__]), event
    assert len(seen[StepDone.__name__]) == 2
    assert seen["end"] == [{"unet"}]


def test_encoders_that_train_or_whose_results_are_not_cached_stay(
    gpu: AppleGPU, run, watched, sd1_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = {
        "trained": ({"train_text_encoder": True}, {"unet", "text_encoder"}),
        "uncached": ({"cache_latents": False}, {"unet", "vae"}),
        "none": ({"offload": "none"}, {"unet", "vae", "text_encoder"}),
    }
    for name, (settings, expected) in cases.items():
        seen = watched(run(sd1_folder, name, max_train_steps=1, **settings))
        assert seen[StepDone.__name__] == [expected]
        assert (CachingProgress.__name__ in seen) == (name == "trained")
    monkeypatch.setattr(conditioner, "KNOWN_CAPTIONS", 1)
    with pytest.warns(UserWarning, match="text encoders stay on the device, since"):
        seen = watched(run(sd1_folder, "many", offload="model"))
    assert seen[StepDone.__name__] == [{"unet", "text_encoder"}] * 2


def test_weights_of_the_model_that_train_never_leave(
    gpu: AppleGPU, run, watched, sd1_folder: Path
) -> None:
    """`on_gpu` looks at each of them, at every event; what else the encoder has stays with them."""
    settings = {
        "method": "full", "train_text_encoder": True, "num_validation_images": 1,
        "with_prior_preservation": True, "prior_preservation_mode": "image-free",
    }  # fmt: skip
    seen = watched(run(sd1_folder, "all", **settings))
    assert not seen[StepDone.__name__][-1] & {"vae"}
    settings |= {"full_weights": "targets", "text_encoder_targets": ["text-encoder-attention"]}
    stays, leaves = (run(sd1_folder, name, **settings, offload=name) for name in ("none", "model"))
    recipe.train(stays)
    seen = watched(leaves)
    assert seen[StepDone.__name__] == [{"unet", "text_encoder"}] * 2
    assert losses(leaves.output_dir) == losses(stays.output_dir)
    stays, leaves = (Path(config.output_dir) / "model" for config in (stays, leaves))
    with open_model(stays) as expected, open_model(leaves) as found:
        assert all(torch.equal(found[name], expected[name]) for name in expected.specs)


def test_nothing_is_encoded_once_training_has_started(
    offloaded_cpu: None, run, sd1_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With crops, mirror images and captions that are drawn anew in each epoch."""
    encoded: list[str] = []
    for module, name in ((conditioner, "tokenize_prompts"), (dataset, "encode_inputs")):
        original = getattr(module, name)

        def note(*args: Any, name: str = name, original: Any = original) -> Any:
            encoded.append(name)
            return original(*args)

        monkeypatch.setattr(module, name, note)
    counts = []

    def count(event: Any) -> None:
        if isinstance(event, (TrainingStarted, StepDone)):
            counts.append(len(encoded))

    settings = {"random_flip": True, "caption_dropout": 0.5, "shuffle_tags": True}
    recipe.train(run(sd1_folder, "out", max_train_steps=25, **settings), count)
    assert len(counts) == 26
    assert counts[0] == counts[-1] >= 12
    assert {"tokenize_prompts", "encode_inputs"} == set(encoded)


def test_compiled_blocks_of_an_offloaded_model_train_the_same(
    offloaded_cpu: None, run, sd1_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples between the steps send the UNet away, and fetch it to another place in memory."""

    def move(tensor: torch.Tensor, device: torch.device) -> None:
        if not tensor.requires_grad:
            tensor.data = tensor.data.clone()

    monkeypatch.setattr(offload, "_move", move)
    counter = CompileCounterWithBackend("eager")  # without a C++ compiler
    compile_without_compiler(monkeypatch, counter, fullgraph=True)
    settings = {"num_validation_images": 1, "validation_steps": 1}
    plain = run(sd1_folder, "plain", **settings, offload="none")
    both = run(sd1_folder, "both", **settings, offload="model", compile=True)
    counts = []
    recipe.train(plain)
    recipe.train(
        both, lambda e: counts.append(counter.frame_count) if type(e) is StepDone else None
    )
    assert losses(both.output_dir) == pytest.approx(losses(plain.output_dir), rel=1e-5)
    # All in the first step: nothing is compiled in a sample, or again after one.
    assert counts == [counter.frame_count] * 2
    assert counts[0] > 0
    assert_same_adapter(plain.output_dir, both.output_dir, rtol=1e-3, atol=1e-5)


def test_it_is_said_where_it_has_no_effect(run, sd1_folder: Path) -> None:
    no_effect = "offload model has no effect because CPU shares the memory"
    asked = warnings_of(run(sd1_folder, "asked", offload="model"))
    assert any(warning.startswith(no_effect) for warning in asked)
    for silent in ("auto", "none"):
        said = warnings_of(run(sd1_folder, silent, offload=silent))
        assert not any("offload" in warning for warning in said)
