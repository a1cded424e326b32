"""A model that two processes share is the model of one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from dora_diffusion.config import TrainConfig
from dora_diffusion.export.files import open_model
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.training.engine.accelerator import (
    make_accelerator,
    shards_model,
    wants_sharding,
)
from dora_diffusion.training.loop import train
from tests.refusal import refused
from tests.training.helpers import SAMPLES, losses, make_config
from tests.waiting import WAIT_SECONDS

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork")
EVERYTHING = {
    "method": "full", "max_train_steps": 2, "checkpointing_steps": 1, "train_text_encoder": True,
    "text_encoder_lr": 1e-3, "with_prior_preservation": True, "class_word": "mug",
    "gradient_accumulation_steps": 2, "validation_split": 1, "num_validation_images": 1,
    "validation_inference_steps": 1, "max_grad_norm": 0.5, "ema_decay": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def small_model(sd1_folder, tmp_path_factory) -> Path:
    """The tiny pipeline with a UNet of two levels."""
    from diffusers import UNet2DConditionModel

    folder = Path(shutil.copytree(sd1_folder, tmp_path_factory.mktemp("small") / "model"))
    shutil.rmtree(folder / "unet")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        UNet2DConditionModel(
            sample_size=8, norm_num_groups=8, layers_per_block=1, block_out_channels=(16, 24),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32, attention_head_dim=4,
        ).save_pretrained(folder / "unet")  # fmt: skip
    return folder


def settings(model: Path, output: Path, **changes: Any) -> TrainConfig:
    """Of a run in which rounding stays rounding: Adam's first steps are the gradients' signs."""
    changes = {"adam_epsilon": 1e-2, "train_batch_size": 2, **changes}
    return make_config(model, SAMPLES / "bolt_mug", output, **changes)


def shared(config: TrainConfig, output: Path, **changes: Any) -> TrainConfig:
    """The same over two processes that share the model: each has one of a batch's two photos."""
    changes = {"sharding": "fsdp", "train_batch_size": 1, "output_dir": str(output), **changes}
    return replace(config, **changes)


def train_by_two(configs: list[TrainConfig], folder: Path) -> list[dict[str, Any]]:
    """Train each; what the first process and the second one tell."""
    folder.mkdir()
    plain = [config.to_dict() for config in configs]
    (folder / "configs.json").write_text(json.dumps(plain), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.two_processes", folder / "configs.json",
         folder / "told"],
        capture_output=True, text=True, encoding="utf-8", timeout=WAIT_SECONDS, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads((folder / f"told-{rank}.json").read_text("utf-8")) for rank in (0, 1)]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Trained parameters of a run or checkpoint."""
    if (folder / "model").is_dir() or (folder / "model_index.json").is_file():
        place = folder / "model" if (folder / "model").is_dir() else folder
        with open_model(str(place)) as model:
            return {n: model[n] for n in model.specs if n.startswith(("unet.", "text_encoder."))}
    return {
        f"{name}.{part}": tensor
        for name, layer in read_adapter(folder).layers.items()
        for part in ("down", "up", "magnitude")
        if (tensor := getattr(layer, part)) is not None
    }


def assert_same(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    """Losses of each step, and the result."""
    for figure in ("loss", "validation_loss", "grad_norm"):
        ours, theirs = losses(one, figure), losses(other, figure)
        shared_steps = sorted(ours.keys() & theirs.keys())
        assert shared_steps or figure == "validation_loss"
        for step in shared_steps:
            assert theirs[step] == pytest.approx(ours[step], rel=tolerance), (figure, step)
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(
            second[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda t, n=name: f"{n}: {t}"
        )


class Runs(NamedTuple):
    """Folders of the runs by name, and what two processes tell of theirs."""

    folder: Path
    told: list[dict[str, Any]]


@pytest.fixture(scope="module")
def runs(small_model, tmp_path_factory) -> Runs:
    """Full fine-tuning and a DoRA, by one process and by two."""
    folder = tmp_path_factory.mktemp("runs")
    full = settings(small_model, folder / "full-1", **EVERYTHING)
    dora = settings(small_model, folder / "dora-1", max_train_steps=2)
    train(full)
    train(dora)
    two = [shared(full, folder / "full-2"), shared(dora, folder / "dora-2")]
    return Runs(folder, train_by_two(two, folder / "two"))


@needs_fork
@pytest.mark.parametrize("name", ["full", "dora"])
def test_two_processes_that_share_a_model_train_what_one_does(name, runs):
    assert_same(runs.folder / f"{name}-1", runs.folder / f"{name}-2")


@needs_fork
def test_the_first_process_alone_tells_of_results(runs):
    assert [process["tells"] for process in runs.told] == [[True, True], [False, False]]


@needs_fork
def test_each_process_has_half_of_the_matrices(runs):
    for process in runs.told:
        for sizes in process["sizes"]:
            assert sizes["whole"] / 2 <= sizes["alive"] <= 0.51 * sizes["whole"]


@needs_fork
@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_processes(runs, small_model):
    folder = runs.folder
    full = settings(small_model, folder / "full-1", **EVERYTHING)
    for before, after in ((1, 2), (2, 1)):
        # Its newest checkpoint would be its end.
        checkpoint = folder / f"full-{before}" / "checkpoint-1"
        shutil.copytree(checkpoint, folder / f"resumed-{after}" / "checkpoint-1")
    resume = {"resume_from_checkpoint": "latest"}
    train_by_two([shared(full, folder / "resumed-2", **resume)], folder / "again")
    train(replace(full, output_dir=str(folder / "resumed-1"), **resume))
    for processes in (1, 2):
        resumed = folder / f"resumed-{processes}"
        assert list(losses(resumed)) == [2]
        assert_same(folder / "full-1", resumed)


@needs_fork
def test_the_files_are_those_of_one_process(runs):
    one, two = (
        sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        for folder in (runs.folder / "full-1", runs.folder / "full-2")
    )
    assert one == two
    assert "samples/adapted.png" in two
    states = [
        torch.load(runs.folder / name / "checkpoint-1" / "training_state.pt", weights_only=True)
        for name in ("full-1", "full-2")
    ]
    shapes = [
        [(key, index, tuple(value.shape)) for index, moments in state["optimizer"]["state"].items()
         for key, value in moments.items()]
        for state in states
    ]  # fmt: skip
    assert shapes[0] == shapes[1]


@needs_fork
def test_layers_of_which_a_process_has_some_rows_have_the_gradients_of_whole_ones(runs):
    """Outputs that two processes cannot share evenly, and a layer whose output is overwritten."""
    layers = [process["layers"] for process in runs.told]
    assert [process["rows"] for process in layers] == [[2, 3], [1, 2]]
    assert max(error for process in layers for error in process["errors"]) < 1e-6
    assert all(all(process["own"]) for process in layers)
    assert layers[0]["whole"] == [True, True]


# Against two processes with whole models, which too have one photo each at a time. In bfloat16 a
# norm that is summed in another order rounds a gain to its neighbour.
VARIANTS = {
    "input": {"norm_axis": "input", "train_text_encoder": True, "max_grad_norm": 0.0},
    "bf16": {"mixed_precision": "bf16", "gradient_accumulation_steps": 2},
    "full bf16": {"method": "full", "mixed_precision": "bf16", "full_weights": "targets"},
    "full checkpointing": {"method": "full", "gradient_checkpointing": True, "keep_best": True,
                           "checkpointing_steps": 1, "validation_split": 1},
    "adalora": {"parametrization": "adalora", "rank": 4, "allocation_interval": 1},
    "pissa": {"init": "pissa", "gradient_checkpointing": True},
    "dvora": {"parametrization": "vera", "learning_rate": 1e-2},
    "adafactor": {"optimizer": "adafactor"},
    "words": {"token": "<s1>", "instance_prompt": "a photo of a <s1> mug", "embedding_lr": 1e-2,
              "caption_prefix": "<s1> mug,",
              "train_text_encoder_ti": True, "caption_dropout": 0.5},
    "full words": {"method": "full", "token": "<s1>", "instance_prompt": "a photo of a <s1> mug",
                   "caption_prefix": "<s1> mug,", "embedding_lr": 1e-2,
                   "train_text_encoder_ti": True, "train_text_encoder": True,
                   "num_validation_images": 1,
                   "validation_inference_steps": 1},
}  # fmt: skip


@needs_fork
@pytest.mark.slow
def test_whatever_is_shared_is_trained_as_by_processes_with_whole_models(small_model, tmp_path):
    configs = []
    for name, changes in VARIANTS.items():
        one = settings(small_model, tmp_path, **{"max_train_steps": 3, **changes})
        configs += [
            shared(one, tmp_path / f"{name}-{kind}", sharding=kind) for kind in ("none", "fsdp")
        ]
    train_by_two(configs, tmp_path / "two")
    for name in VARIANTS:
        tolerance = 5e-3 if "bf16" in name else 1e-5
        assert_same(tmp_path / f"{name}-none", tmp_path / f"{name}-fsdp", tolerance)


@pytest.mark.parametrize(
    ("changes", "launched", "reason"),
    [
        ({"sharding": "none"}, {"ACCELERATE_USE_FSDP": "true"}, "leave one of them out"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "FSDP 1 is not supported; add --fsdp_version 2"),
        (
            {},
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            "--fsdp_offload_params true",
        ),
        ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported"),
        ({"sharding": "fsdp", "compile": True}, {}, "excludes compile"),
        ({"sharding": "fsdp", "tlora_min_rank": 1}, {}, "excludes tlora_min_rank"),
        ({"sharding": "fsdp", "offload": "model"}, {}, "excludes offload model"),
        (
            {"sharding": "fsdp", "method": "full", "use_8bit_adam": True},
            {},
            "excludes optimizer adamw8bit",
        ),
        (
            {"sharding": "fsdp", "method": "full", "mixed_precision": "fp16"},
            {},
            "excludes mixed_precision fp16",
        ),
    ],
)
def test_what_sharding_excludes_is_refused_in_a_line(changes, launched, reason, monkeypatch):
    for variable, value in launched.items():
        monkeypatch.setenv(variable, value)
    with refused("sharding", reason):
        wants_sharding(TrainConfig(**changes))


def test_the_launcher_asks_for_sharding_too(monkeypatch):
    assert not wants_sharding(TrainConfig())
    for variable in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(variable, "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert wants_sharding(TrainConfig())
    # Else Transformers reads no weights but in the first process.
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


def test_one_process_has_nothing_to_share(tmp_path):
    with pytest.warns(UserWarning, match="sharding fsdp has no effect because there is one"):
        accelerator = make_accelerator(
            TrainConfig(sharding="fsdp", output_dir=str(tmp_path), mixed_precision="no")
        )
    assert not shards_model(accelerator)
