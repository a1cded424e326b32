"""Set-up by Accelerate: precision, patience, and processes that agree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from dora_diffusion.config import TrainConfig
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.models.offload import send
from dora_diffusion.training.processes import SharedFlags, make_accelerator
from dora_diffusion.training.recipe import train
from dora_diffusion.training.results.checkpoint import CheckpointSaver
from dora_diffusion.training.results.files import RunFiles
from tests.nvidia import nvidia_gpu
from tests.training.helpers import accelerator_of_fp16, losses, make_config, names
from tests.training.pairs import agreeing, assert_agree
from tests.waiting import WAIT_SECONDS

_RUN = """
import json
import sys
from dora_diffusion.config import TrainConfig
from dora_diffusion.training.recipe import train
train(TrainConfig.from_dict(json.load(open(sys.argv[1]))))
"""
# At step 3 of the second process alone, something goes wrong.
_PHOTO = """
import os
from dora_diffusion.training.batch import Batches
real = Batches.__next__
def fails(self):
    if self.process_index == 1 and self.index == 2:
        raise OSError("the photo is gone")
    return real(self)
Batches.__next__ = fails
"""


def launch(config: TrainConfig, tmp_path: Path, before: str = "", fails: str = "") -> None:
    """Run a configuration in two processes, which ends well, or with a line of its errors."""
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps(config.to_dict()), encoding="utf-8")
    script = tmp_path / "run.py"
    script.write_text(before + _RUN, encoding="utf-8")
    command = ["-m", "accelerate.commands.launch", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    # With ACCELERATE_USE_CPU, the launcher for several GPUs starts CPU processes.
    command += ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    done = subprocess.run(
        [sys.executable, *command, str(script), str(settings)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        timeout=WAIT_SECONDS,
        encoding="utf-8",
    )
    assert (done.returncode != 0) == bool(fails), done.stderr[-3000:]
    assert fails in done.stderr, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param({"ema_decay": 0.5}, id="dora"),
        pytest.param({"init": "pissa"}, id="pissa"),
        pytest.param({"lr_pattern": {"mid_block.*": 2e-3}}, id="rates"),
        pytest.param(
            {"parametrization": "adalora", "rank": 4, "allocation_interval": 1}, id="adalora"
        ),
        pytest.param({"quantize": "nf4", "quantize_convolutions": True}, id="quantised"),
        # A class image's caption has no new word: one process of two may have none in a batch.
        pytest.param(
            {"token": "<s1>", "instance_prompt": "a photo of a <s1> teapot", "embedding_lr": 1e-2,
             "train_text_encoder_ti": True, "train_text_encoder": False, "caption_dropout": 0.5},
            id="words",
        ),
    ],
)  # fmt: skip
def test_two_processes_of_a_launcher_agree_with_one(sd1_folder, tmp_path, variant):
    one, two = agreeing(sd1_folder, tmp_path, variant)
    train(one)
    launch(two, tmp_path)
    assert_agree(Path(one.output_dir), Path(two.output_dir), variant.get("token", ""))


@pytest.mark.slow
def test_a_photo_that_is_gone_in_one_process_ends_both_with_what_there_is(tiny_run, tmp_path):
    config = tiny_run(max_train_steps=9, checkpointing_steps=100, checkpoints_total_limit=1)
    launch(config, tmp_path, _PHOTO, "checkpoint-2 was saved first")
    output = tmp_path / "out"
    assert names(output) == ["checkpoint-2"]
    state = torch.load(output / "checkpoint-2" / "training_state.pt", weights_only=True)
    assert (state["step"], state["sampler"]["position"]) == (2, 4)
    assert all(torch.isfinite(value).all() for value in state["parameters"].values())
    assert state["interim"]


def test_processes_wait_as_long_as_class_images_take(sd1_folder, photos, tmp_path):
    accelerator = make_accelerator(make_config(sd1_folder, photos, tmp_path / "out"))
    assert accelerator.init_handler.timeout.total_seconds() > 3600


@pytest.mark.parametrize(
    "settings",
    [{"max_grad_norm": 1.0},
     {"max_grad_norm": 0.0, "quantize": "nf4", "quantize_convolutions": True}],
)  # fmt: skip
def test_float16_with_its_gradient_scaler_stays_near_float32(
    settings, sd1_folder, photos, tmp_path, monkeypatch
):
    exact = make_config(sd1_folder, photos, tmp_path / "fp32", **settings)
    train(exact)
    accelerator = accelerator_of_fp16(exact)
    monkeypatch.setattr("dora_diffusion.training.recipe.make_accelerator", lambda _: accelerator)
    train(replace(exact, mixed_precision="fp16", output_dir=str(tmp_path / "fp16")))
    for step, loss in losses(tmp_path / "fp32").items():
        assert losses(tmp_path / "fp16")[step] == pytest.approx(loss, rel=0.01)
    norms, expected = (losses(tmp_path / name, "grad_norm") for name in ("fp16", "fp32"))
    assert norms[1] == pytest.approx(expected[1], rel=0.05)
    assert accelerator.scaler.get_scale() > 1, (
        "no step was skipped until nothing was left of the scale"
    )
    halves, wholes = (read_adapter(tmp_path / name).layers for name in ("fp16", "fp32"))
    assert {layer.up.dtype for layer in halves.values()} == {torch.float32}
    moved = torch.cat([layer.up.flatten() for layer in halves.values()])
    expected = torch.cat([layer.up.flatten() for layer in wholes.values()])
    assert torch.nn.functional.cosine_similarity(moved, expected, dim=0) > 0.9


def test_bfloat16_stays_near_float32(sd1_folder, photos, tmp_path):
    exact = make_config(sd1_folder, photos, tmp_path / "fp32")
    train(exact)
    train(replace(exact, mixed_precision="bf16", output_dir=str(tmp_path / "bf16")))
    for step, loss in losses(tmp_path / "fp32").items():
        assert losses(tmp_path / "bf16")[step] == pytest.approx(loss, rel=0.03)
    assert {t.up.dtype for t in read_adapter(tmp_path / "bf16").layers.values()} == {torch.float32}


@pytest.mark.parametrize(("method", "is_on"), [("dora", False), ("lora", False), ("full", True)])
@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_autocast_is_where_the_model_itself_trains_in_float32(
    method, precision, is_on, sd1_folder, photos, tmp_path
):
    """A frozen model is in the precision already; its adapters cast for themselves."""
    config = make_config(sd1_folder, photos, tmp_path, method=method, mixed_precision=precision)
    accelerator = make_accelerator(config)

    class Asks(torch.nn.Module):
        def forward(self):
            return torch.is_autocast_enabled("cpu")

    with accelerator.autocast():
        inside = Asks()()
    # What several processes call.
    assert inside == accelerator.prepare_model(Asks())() == (is_on and precision == "bf16")


class Two:
    """One of two processes; what the other one sends is in ``theirs``, step by step."""

    num_processes = 2

    def __init__(self, device: str, *theirs: list[float]) -> None:
        self.device, self.theirs, self.ours = torch.device(device), iter(theirs), []

    def reduce(self, flags: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        self.ours.append(flags)
        return flags + send(torch.tensor(next(self.theirs)), self.device)


def test_what_one_process_asks_for_all_of_them_do_a_step_later():
    two = Two("cpu", [0, 1], [0, 0], [0, 0], [0, 0], [0, 0])
    any_set = SharedFlags(two)
    asked = [(False, False), (True, True), (True, True), (True, True), (True, False)]
    found = [any_set(*flags) for flags in asked]
    assert found == [
        [False, False],
        [False, True],
        # What was answered just now is not asked for once more: it would be answered twice.
        [True, False],
        [False, True],
        [True, False],
    ]
    assert [sent.tolist() for sent in two.ours] == [[0, 0], [1, 0], [0, 1], [1, 0], [0, 0]]


def test_one_process_is_answered_at_once():
    assert SharedFlags(SimpleNamespace(num_processes=1))(True, False) == [True, False]


def test_no_step_waits_for_what_another_process_asks():
    with nvidia_gpu() as gpu:
        two = Two("cuda:0", *[[0, step == 1] for step in range(4)])
        any_set, found = SharedFlags(two), []
        for _ in range(4):
            found.append(any_set(False, False)[1])
            torch.ones(3, device=gpu.device).mul_(2)  # A step.
        assert found == [False, False, True, False]
        assert not gpu.waits


def test_only_the_process_that_saves_says_when_that_is_overdue(
    sd1_folder, photos, tmp_path, monkeypatch
):
    """The clocks of the others start again with nothing: they would ask at every step."""
    saved = []
    monkeypatch.setattr(Accelerator, "is_main_process", property(lambda _: False))
    monkeypatch.setattr(CheckpointSaver, "is_overdue", lambda _: True)
    monkeypatch.setattr(RunFiles, "checkpoint", lambda *args, **kwargs: saved.append(kwargs))
    (tmp_path / "out").mkdir()
    train(make_config(sd1_folder, photos, tmp_path / "out", max_train_steps=3))
    assert [kwargs for kwargs in saved if kwargs] == []
