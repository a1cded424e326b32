"""Training of Anima: its loss against the trainers' formulas, and its file in Diffusers."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CosmosTransformer3DModel
from safetensors.torch import load_file
from torch import nn

from dora_diffusion.cli.console.training import next_steps
from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.export.checkpoint import export_checkpoint
from dora_diffusion.models.load import load_components
from dora_diffusion.models.text import encode_prompts
from dora_diffusion.numerics.loss import timestep_quantile
from dora_diffusion.sampling.load import load_adapted
from dora_diffusion.training.prediction import answer
from dora_diffusion.training.recipe import train
from tests.anima import diffusers_pipeline, write_anima
from tests.training.helpers import open_run

CAPTION = "a photo of a sks mug"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_anima(tmp_path_factory.mktemp("anima") / "model")


@pytest.fixture
def config(folder: Path, small_photos: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Settings of a four-step run, with changes."""

    def make(output: str, **changes: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "pretrained_model_name_or_path": str(folder), "instance_data_dir": str(small_photos),
            "instance_prompt": CAPTION, "output_dir": str(tmp_path / output), "resolution": 64,
            "rank": 4, "max_train_steps": 4, "learning_rate": 1e-2, "seed": 3,
            "num_validation_images": 0, "checkpointing_steps": 0, "mixed_precision": "no",
            "targets": ["attention+ff"],
        }  # fmt: skip
        return TrainConfig(**{**values, **changes})

    return make


def test_a_rows_loss_is_that_of_sd_scripts_and_ai_toolkit(
    folder: Path, small_photos: Path, tmp_path: Path
) -> None:
    """Mean square of velocity and noise less latents, at shares of noise from 0 to 1."""
    run = open_run(folder, small_photos, tmp_path / "out", train_batch_size=2, mixed_precision="no")
    step = run.step
    drawn = step.questions(next(step.batches))
    batch = drawn.batch
    with step.stack.scope(), step.stack.of(0), torch.no_grad():
        answers = answer(run.components, drawn.distinct(), step.base)
        (term,), (questions,) = step.terms, drawn.questions
        rows = term.losses(batch, *(answers[question] for question in questions)).rows
    evenly = (batch.inputs.timesteps + 1) / 1000
    shares = 3 * evenly / (1 + 2 * evenly)  # The scheduler's shift.
    mixed = shares.view(-1, 1, 1, 1)
    noisy = (1 - mixed) * batch.latents + mixed * batch.noise
    states = encode_prompts(run.components, list(batch.captions)).encoder_hidden_states
    with step.stack.scope(), step.stack.of(0), torch.no_grad():
        (velocity,) = CosmosTransformer3DModel.forward(
            run.components.denoiser, nn.functional.pad(noisy, [0] * 5 + [1]).unsqueeze(2), shares,
            states, return_dict=False,
        )  # fmt: skip
    wanted = (velocity.squeeze(2) - (batch.noise - batch.latents)).square().flatten(1).mean(1)
    torch.testing.assert_close(rows, wanted, rtol=1e-5, atol=1e-6)


def test_a_mean_of_minus_log_3_gives_the_shares_of_sd_scripts_sigmoid() -> None:
    """There, shares of noise are sigmoids of normal draws; here the scheduler shifts them by 3."""
    quantiles = torch.tensor([0.01, 0.2, 0.5, 0.8, 0.99], dtype=torch.float64)
    evenly = timestep_quantile(quantiles, "logit_normal", mean=-1.0986)
    wanted = torch.distributions.Normal(0.0, 1.0).icdf(quantiles).sigmoid()
    torch.testing.assert_close(3 * evenly / (1 + 2 * evenly), wanted, rtol=0, atol=1e-5)


def test_a_file_in_diffusers_predicts_as_the_live_model(
    config: Callable[..., TrainConfig], folder: Path, tmp_path: Path
) -> None:
    file = train(config("run", targets=["full"])).adapter
    assert file is not None
    live, _ = load_adapted(folder, file)
    noisy, timesteps = torch.randn(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        conditioning = encode_prompts(live, [CAPTION])
        wanted = live.predict(noisy, timesteps, conditioning)
        base = load_components(folder).predict(noisy, timesteps, conditioning)
        exported = export_checkpoint(folder, file, tmp_path / "merged")
        merged = load_components(exported).predict(noisy, timesteps, conditioning)
    assert float((wanted - base).abs().max()) > 1e-2
    torch.testing.assert_close(merged, wanted, rtol=0, atol=2e-5)
    share = torch.tensor([3 * 0.501 / (1 + 2 * 0.501)])
    inputs = (noisy.unsqueeze(2), share, conditioning.encoder_hidden_states)
    mask = {"padding_mask": torch.zeros(1, 1, 8, 8), "return_dict": False}
    adapted, whole = diffusers_pipeline(folder), diffusers_pipeline(exported)
    adapted.load_lora_weights(file.parent, weight_name=file.name)
    for pipeline in (adapted, whole):
        with torch.no_grad():
            (found,) = pipeline.transformer(*inputs, **mask)
        torch.testing.assert_close(found.squeeze(2), wanted, rtol=0, atol=2e-5)


METHODS = [("dora", "output"), ("dora", "input"), ("full", "output")]


@pytest.mark.parametrize(("method", "axis"), METHODS)
def test_what_its_card_and_its_last_lines_say_runs(
    method: str,
    axis: str,
    config: Callable[..., TrainConfig],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    made = config("run", method=method, norm_axis=axis, learning_rate=1e-4, max_train_steps=1)
    result = train(made)
    last = next_steps(made, result.adapter or result.model or Path())[-1]
    card = (Path(made.output_dir) / "README.md").read_text("utf-8")
    base = Path(made.base_model.path)
    (tmp_path / base.name).symlink_to(base)
    monkeypatch.chdir(tmp_path)
    if axis == "input":
        assert "# then ModularPipeline.from_pretrained(" in last
        assert "ComfyUI's names" in card
        return
    assert ("ModularPipeline.from_pretrained(" in last) == (method == "full")
    (python,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    short = python.replace(', output="', ', num_inference_steps=1, height=64, width=64, output="')
    names: dict[str, Any] = {}
    exec(short, names)
    assert names["image"].size == (64, 64)


def test_all_that_it_refuses_is_said_at_once(config: Callable[..., TrainConfig]) -> None:
    names = ("zero_terminal_snr", "train_text_encoder", "train_text_encoder_ti")
    with pytest.raises(ConfigError) as info:
        train(config("out", **dict.fromkeys(names, True)))
    for name in names:
        assert str(info.value).count(f"{name} cannot be used with ") == 1


def test_a_resumed_run_ends_as_a_whole_one(config: Callable[..., TrainConfig]) -> None:
    whole = train(config("whole", checkpointing_steps=2)).adapter
    part = config("part", checkpointing_steps=2, resume_from_checkpoint="latest")
    train(replace(part, resume_from_checkpoint=None))
    shutil.rmtree(Path(part.output_dir) / "checkpoint-4")
    resumed = train(part).adapter
    assert whole is not None
    assert resumed is not None
    ours, theirs = load_file(resumed), load_file(whole)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
