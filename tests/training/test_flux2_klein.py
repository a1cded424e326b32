"""Training of FLUX.2-klein: its loss against Diffusers' example, and its file in Diffusers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline
from torch import Tensor

from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.config.derived import without_effect
from dora_diffusion.export.checkpoint import export_checkpoint
from dora_diffusion.models.load import load_components
from dora_diffusion.models.locate import known_family
from dora_diffusion.models.text import encode_prompts
from dora_diffusion.sampling.load import load_adapted
from dora_diffusion.training.prediction import answer
from dora_diffusion.training.recipe import train
from tests.flux2_klein import write_flux2_klein
from tests.training.helpers import open_run

CAPTION = "a photo of a sks mug"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flux2_klein(tmp_path_factory.mktemp("klein") / "model")


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


@torch.no_grad()
def predicted(pipeline: Any, noisy: Tensor, shares: Tensor, captions: list[str]) -> Tensor:
    """Velocities by the pipeline's own packing of latents and positions."""
    states, text_ids = pipeline.encode_prompt(captions)
    ids = pipeline._prepare_latent_ids(noisy)
    (packed,) = pipeline.transformer(
        hidden_states=pipeline._pack_latents(noisy), timestep=shares, guidance=None,
        encoder_hidden_states=states, txt_ids=text_ids, img_ids=ids, return_dict=False,
    )  # fmt: skip
    velocity: Tensor = pipeline._unpack_latents_with_ids(packed, ids, *noisy.shape[2:])
    return velocity


def test_a_rows_loss_is_that_of_diffusers_example(
    folder: Path, small_photos: Path, tmp_path: Path
) -> None:
    """Its target is noise less latents, at sigmas without the pipeline's dynamic shift."""
    run = open_run(folder, small_photos, tmp_path / "out", train_batch_size=2)
    step = run.step
    drawn = step.questions(next(step.batches))
    batch = drawn.batch
    with step.stack.scope(), step.stack.of(0), torch.no_grad():
        answers = answer(run.components, drawn.distinct(), step.base)
        (term,), (questions,) = step.terms, drawn.questions
        rows = term.losses(batch, *(answers[question] for question in questions)).rows
    pipeline = run.components.pipeline()
    shares = (batch.inputs.timesteps + 1) / 1000
    mixed = shares.view(-1, 1, 1, 1)
    noisy = (1 - mixed) * batch.latents + mixed * batch.noise
    with step.stack.scope(), step.stack.of(0):
        velocity = predicted(pipeline, noisy, shares, list(batch.captions))
    wanted = (velocity - (batch.noise - batch.latents)).square().flatten(1).mean(1)
    torch.testing.assert_close(rows, wanted, rtol=1e-6, atol=1e-6)


def test_a_file_in_diffusers_predicts_as_the_live_model(
    config: Callable[..., TrainConfig], folder: Path, tmp_path: Path
) -> None:
    made = config("run", targets=["full"])
    file = train(made).adapter
    assert file is not None
    live, _ = load_adapted(folder, file)
    noisy, timesteps = torch.randn(1, 16, 4, 4), torch.tensor([500])
    with torch.no_grad():
        conditioning = encode_prompts(live, [CAPTION])
        wanted = live.predict(noisy, timesteps, conditioning)
        base = load_components(folder).predict(noisy, timesteps, conditioning)
        merged = load_components(export_checkpoint(folder, file, tmp_path / "merged"))
        found = merged.predict(noisy, timesteps, conditioning)
    assert float((wanted - base).abs().max()) > 1e-2
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    pipeline = Flux2KleinPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    found = predicted(pipeline, noisy, (timesteps + 1) / 1000, [CAPTION])
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


def test_all_that_it_refuses_is_said_at_once(config: Callable[..., TrainConfig]) -> None:
    names = ("zero_terminal_snr", "train_text_encoder", "train_text_encoder_ti")
    with pytest.raises(ConfigError) as info:
        train(config("out", **dict.fromkeys(names, True)))
    for name in names:
        assert str(info.value).count(f"{name} cannot be used with ") == 1


def test_the_familys_defaults_are_not_called_without_effect(
    config: Callable[..., TrainConfig], folder: Path
) -> None:
    family = known_family(str(folder))
    assert family is not None
    own = config("out", **family.defaults)
    assert without_effect(own, family=family) == {}
    for name, value in family.defaults.items():
        changed = config("out", **{**family.defaults, name: value + 1})
        assert list(without_effect(changed, family=family)) == [name]
