"""Distance that a run has moved its model, and what happens to one that has moved nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from dora_diffusion.cli.main import main
from dora_diffusion.config import TrainConfig
from dora_diffusion.config.families import FAMILIES
from dora_diffusion.data.crops import CropRecord
from dora_diffusion.data.sampler import generator_for
from dora_diffusion.models.configuration import empty_module, released_folder
from dora_diffusion.models.load import load_components
from dora_diffusion.models.text import encode_prompts, time_ids
from dora_diffusion.training.events import EffectMeasured, SubjectLeft, TrainingEnded
from dora_diffusion.training.inputs.subject import subjects_of
from dora_diffusion.training.metrics import MetricsLog, TrainingError
from dora_diffusion.training.pack import train_pack
from dora_diffusion.training.processes import make_accelerator
from dora_diffusion.training.recipe import assemble, train
from dora_diffusion.training.results.effect import Effect, Probe
from dora_diffusion.training.results.record import has_learned_nothing
from tests.training.helpers import make_config

pytestmark = pytest.mark.usefixtures("measured_effect")

# What a run takes whose steps are far below what float32 can tell.
TINY = 1e-12


def effect_of(config: TrainConfig) -> Effect:
    told: list[Any] = []
    train(config, told.append)
    (found,) = (event.effect for event in told if isinstance(event, EffectMeasured))
    recorded = json.loads((Path(config.output_dir) / "run.json").read_text("utf-8"))
    assert recorded["effect"] == found.figures
    return found


def dense(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, m: torch.Tensor):
    """DoRA as the paper has it, in float64: m V / |V|, V = W + BA."""
    direction = weight.double() + up.double() @ down.double()
    return m.double()[:, None] * direction / direction.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_effect_is_that_of_a_dense_model(family, request, photos, tmp_path):
    """A plain UNet, its weights computed from the file by hand, at the same inputs."""
    model = request.getfixturevalue(f"{family}_folder")
    config = make_config(model, photos, tmp_path / "out", targets=["cross-attention"])
    effect = effect_of(config)
    components = load_components(str(model))
    side, factor = components.default_resolution, components.vae_factor
    size = min(16, side // factor)
    shape = (3, components.denoiser.config.in_channels, size, size)
    noise = torch.randn(shape, generator=generator_for("effect", shape))
    distinct = sorted({path.read_text("utf-8").strip() for path in photos.glob("*.txt")})
    hidden = encode_prompts(components, [distinct[k * len(distinct) // 3] for k in range(3)])
    ids = time_ids(components.family, [CropRecord((side, side), (0, 0), (side, side))] * 3)

    def predict() -> torch.Tensor:
        with torch.no_grad():
            return components.denoiser(
                noise, torch.tensor([166, 500, 833]), hidden.encoder_hidden_states,
                added_cond_kwargs=hidden.added_cond_kwargs(ids),
            ).sample  # fmt: skip

    before = predict()
    parts = load_file(Path(config.output_dir) / "pytorch_lora_weights.safetensors")
    ending = ".lora_A.weight"
    for name in (key.removesuffix(ending) for key in parts if key.endswith(ending)):
        layer = components.denoiser.get_submodule(name.removeprefix("unet."))
        own = (f"{name}.lora_{p}" for p in ("A.weight", "B.weight", "magnitude_vector.weight"))
        layer.weight.data = dense(layer.weight, *(parts[k] for k in own)).float()
    moved = float((predict() - before).norm() / before.norm())
    assert moved > 1e-3
    assert effect.prediction == pytest.approx(moved, rel=1e-4)
    assert effect.figures == {"prediction": effect.prediction, "unet": effect.prediction}
    card = " ".join((tmp_path / "out" / "README.md").read_text("utf-8").split())
    assert f"Training moved the UNet's predictions at fixed inputs by {100 * moved:.2g}%." in card


def test_half_precision_measures_what_float32_does(sd1_folder, photos, tmp_path):
    """Within the difference of what was learned; in bf16 itself, rounding moves a prediction."""
    found = [
        effect_of(
            make_config(
                sd1_folder, photos, tmp_path / name, mixed_precision=name, train_text_encoder=True,
                max_train_steps=1, learning_rate=1e-5, text_encoder_lr=1e-5,
            )
        ).figures
        for name in ("no", "bf16")
    ]  # fmt: skip
    assert found[0].keys() == found[1].keys() == {"prediction", "unet", "text_encoders"}
    assert found[1] == {name: pytest.approx(value, rel=0.02) for name, value in found[0].items()}
    assert found[0]["prediction"] < 1e-3


PARTS = ("unet", "text_encoder", "words")


@pytest.mark.parametrize("moved", PARTS)
def test_each_part_is_measured_apart(moved, sd1_folder, photos, tmp_path):
    """Of what is moved by hand, the others' figures stay 0."""
    for path in photos.glob("*.txt"):
        path.write_text(f"a zwq mug, {path.stem}", encoding="utf-8")
    config = make_config(
        sd1_folder, photos, tmp_path / "out", train_text_encoder=True, token="zwq",
        train_text_encoder_ti=True, targets=["cross-attention"], instance_prompt="a zwq mug",
    )  # fmt: skip
    session = assemble(config, subjects_of(config), make_accelerator(config))
    probe = Probe(session.components, session.weights, session.dataset.captions)
    probe.begin()
    noise = torch.Generator().manual_seed(1)
    state, words = torch.get_rng_state(), session.weights.words.parameters()
    with torch.no_grad():
        for name, parameter in session.weights.parameters().items():
            if moved == "words" if name in words else name.startswith(f"{moved}."):
                parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=0.1)
    found = probe.measure()
    expected = {"unet": "unet", "text_encoder": "text_encoders", "words": "words"}[moved]
    figures = {name: found.figures[name] for name in ("unet", "text_encoders", "words")}
    assert figures.pop(expected) > 1e-4
    assert figures == dict.fromkeys(figures, pytest.approx(0, abs=1e-6))
    assert found.prediction > 1e-4
    assert torch.equal(torch.get_rng_state(), state), "training would draw otherwise"


def test_a_run_that_moved_nothing_is_not_done(tiny_run, tmp_path, photos, capsys):
    config = tiny_run(learning_rate=TINY, mixed_precision="bf16")
    told: list[Any] = []
    cause = r"^nothing was learned: training moved .* by [\d.e-]+%, within rounding. .* has no "
    with pytest.raises(TrainingError, match=rf"{cause}effect. Raise learning_rate \(1e-12\) or m"):
        train(config, told.append)
    assert not any(isinstance(event, TrainingEnded) for event in told)
    assert has_learned_nothing(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "\nTraining moved the UNet's predictions at fixed inputs by " in card
    flags = ["--config", str(tmp_path / "out" / "config.yaml"), "--overwrite_output_dir"]
    assert main(["train", *flags]) == 1
    out, err = capsys.readouterr()
    assert "done:" not in out
    assert err.strip().splitlines()[-1].startswith("error: nothing was learned: ")


def test_gradients_of_0_are_named(tiny_run, monkeypatch):
    """With a decay, which moves the factor that is not 0."""
    place = "dora_diffusion.training.terms.denoising_loss"
    monkeypatch.setattr(place, lambda prediction, *_: 0 * prediction.flatten(1).sum(dim=1))
    with pytest.raises(TrainingError, match="All gradients were 0: check the masks"):
        train(tiny_run(adam_weight_decay=0.5, learning_rate=0.1))


def test_steps_that_fp16_skipped_are_known(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, lambda record: None, skips=9)
    found = [log.largest_norm]
    for step, norm in enumerate((torch.inf, 2.0, torch.inf, 1.0), start=1):
        log.add({"step": step, "loss": 1.0, "grad_norm": torch.tensor(norm)})
        log.flush()
        found.append(log.largest_norm)
    assert found == [None, torch.inf, 2.0, 2.0, 2.0]


def test_a_start_that_is_not_moved_is_nothing_whatever_it_does_to_the_base(tiny_run, tmp_path):
    first = tiny_run(output_dir=str(tmp_path / "first"), learning_rate=1e-2)
    assert effect_of(first).prediction > 1e-2
    again = tiny_run(init_adapter=str(tmp_path / "first"), learning_rate=TINY)
    with pytest.raises(TrainingError, match="nothing was learned") as error:
        train(again)
    written = tmp_path / "out" / "pytorch_lora_weights.safetensors"
    has = f"{written} was written but equals init_adapter first, from which it started. Raise "
    assert has in str(error.value)
    with pytest.raises(TrainingError, match=r"was written but has no effect\. Raise "):
        train(replace(again, init_adapter=None, overwrite_output_dir=True))
    moved = replace(again, learning_rate=1e-3, overwrite_output_dir=True)
    assert 1e-3 < effect_of(moved).prediction < 0.1


def test_a_resumed_run_has_the_effect_of_the_whole_one(tiny_run, tmp_path):
    """In another precision that of its weights in it, from the first step on."""
    shared = {"max_train_steps": 3, "train_text_encoder": True, "learning_rate": 1e-3}
    whole = effect_of(tiny_run(output_dir=str(tmp_path / "whole"), **shared))
    half = tiny_run(**{**shared, "max_train_steps": 2}, checkpointing_steps=2)
    train(half)
    shutil.copytree(half.output_dir, tmp_path / "bf16")
    resumed = replace(half, max_train_steps=3, resume_from_checkpoint="latest")
    assert effect_of(resumed) == whole
    half_precision = {"mixed_precision": "bf16", "output_dir": str(tmp_path / "bf16")}
    found = effect_of(replace(resumed, **half_precision))
    # Magnitudes of float32 weights, on weights that are rounded, are no longer their norms.
    near = {name: pytest.approx(v, rel=0.02, abs=2e-3) for name, v in whole.figures.items()}
    assert found.figures == near


def test_a_model_that_is_trained_itself_is_measured(tiny_run, tmp_path):
    config = tiny_run(method="full", learning_rate=1e-4, save_precision="float32")
    effect = effect_of(config)
    base = UNet2DConditionModel.from_pretrained(
        config.pretrained_model_name_or_path, subfolder="unet"
    )
    own = UNet2DConditionModel.from_pretrained(tmp_path / "out" / "model", subfolder="unet")
    assert any(
        not torch.equal(a, b) for a, b in zip(base.parameters(), own.parameters(), strict=True)
    )
    assert effect.prediction > 1e-4
    with pytest.raises(TrainingError, match="nothing was learned"):
        train(replace(config, learning_rate=TINY, overwrite_output_dir=True))


def test_a_subject_that_moved_nothing_leaves_its_pack(tiny_run, tmp_path):
    configs = {
        name: tiny_run(output_dir=str(tmp_path / name), learning_rate=rate, max_train_steps=2)
        for name, rate in (("moved", 1e-3), ("still", TINY))
    }
    told: list[tuple[str, Any]] = []
    made = train_pack(configs, lambda name, event: told.append((name, event)))
    assert list(made.results) == ["moved"]
    assert "nothing was learned" in str(made.failures["still"])
    assert [name for name, event in told if isinstance(event, TrainingEnded)] == ["moved"]
    assert [name for name, event in told if isinstance(event, SubjectLeft)] == ["still"]
    again = {name: replace(c, resume_from_checkpoint="latest") for name, c in configs.items()}
    made = train_pack(again)
    assert list(made.results) == ["moved"], "neither is it done when the pack is resumed"
    assert "has learned nothing" in str(made.failures["still"])


def test_the_words_of_an_effect():
    assert str(Effect(0.0321, 0.03, 0.0005, 0.2)) == (
        "training moved the UNet's predictions at fixed inputs by 3.2% (UNet alone 3%, text "
        "encoders' outputs 0.05%, words' 20%)"
    )
    limits = [Effect(value, 0.0).is_nothing for value in (0.0, 9e-7, 1.1e-6, torch.nan)]
    assert limits == [True, True, False, True]


@pytest.mark.slow
def test_a_measurement_of_sdxl_has_3_percent_of_the_operations_of_a_step():
    """Of a frozen UNet's forward and backward pass at 1024 pixels."""
    folder = released_folder(FAMILIES["sdxl"], "epsilon") / "unet"
    unet = empty_module(folder, "UNet2DConditionModel").to_empty(device="meta")
    unet.requires_grad_(False)

    def operations(size: int, batch: int, trains: bool) -> int:
        added = {
            "text_embeds": torch.empty(batch, 1280, device="meta"),
            "time_ids": torch.empty(batch, 6, device="meta"),
        }
        with FlopCounterMode(display=False) as counter:
            noisy = torch.empty(batch, 4, size, size, device="meta", requires_grad=trains)
            hidden = torch.empty(batch, 77, 2048, device="meta")
            steps = torch.empty(batch, device="meta")
            made = unet(noisy, steps, hidden, added_cond_kwargs=added).sample
            if trains:
                made.sum().backward()
        return counter.get_total_flops()

    assert operations(16, 3, False) / operations(128, 1, True) == pytest.approx(0.031, abs=0.001)
