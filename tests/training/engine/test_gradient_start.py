"""LoRA-One's start, against the gradients of the weights and their whole decomposition."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dora_diffusion.adapters.inject import AdapterSet
from dora_diffusion.adapters.layers import adapted_layers
from dora_diffusion.data.dataset import iterate_batches
from dora_diffusion.numerics.dora import adapted_norm
from dora_diffusion.training.engine.accelerator import make_accelerator
from dora_diffusion.training.engine.objective import losses_of, noisy_batches, predictions_of
from dora_diffusion.training.engine.step import TrainingEngine
from dora_diffusion.training.events import TrainingStarted
from dora_diffusion.training.inputs.subject import subjects_of
from dora_diffusion.training.loop import train, train_pack
from dora_diffusion.training.results.metrics import TrainingError
from dora_diffusion.training.session import Session, open_session
from tests.refusal import refused
from tests.training.helpers import (
    accelerator_of_fp16,
    assert_same_adapter,
    losses,
    make_config,
)

STARTS: dict[str, dict[str, Any]] = {
    "dora": {},
    "lora": {"use_dora": False},
    "input axis": {"norm_axis": "input"},
    "text encoders": {"train_text_encoder": True, "rslora": True, "lora_alpha": 8.0},
    "prior": {"with_prior_preservation": True},
    "checkpointing": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    "convolutions": {"targets": ["*.resnets.0.conv1", "*.proj_in"]},
}


def fresh(model: Path, photos: Path, output: Path, accelerator: Any = None, **settings: Any) -> Any:
    usual = {"init": "lora-one", "targets": ["cross-attention"], "max_train_steps": 3}
    config = make_config(model, photos, output, **{**usual, **settings})
    return open_session(config, subjects_of(config), accelerator or make_accelerator(config))


def started(session: Session) -> float:
    drift = session.start_from_gradient(AdapterSet.of(*session.weights.modules.values()))
    assert drift is not None
    return drift


def first_batches(session: Session, count: int) -> list[Any]:
    batches = iterate_batches(session.dataset, replace(session.sampler))
    source = replace(session.learner.inputs, batches=batches)
    return [source(number) for number in range(count)]


def weight_gradients(session: Session, count: int = 3) -> dict[str, Tensor]:
    """Gradients of the weights by component and path, from the loss of the base model."""
    modules = session.weights.modules
    layers = {
        f"{component}.{path}": layer
        for component, model in modules.items()
        for path, layer in adapted_layers(model)
    }
    AdapterSet.of(*modules.values()).detach()
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    for inputs in first_batches(session, count):
        own, held = noisy_batches([session.learner.objective], [inputs])
        ((subject, prior),) = losses_of(own, held, nullcontext)
        (subject + session.config.prior_loss_weight * prior).backward()
    return {name: layer.weight.grad.flatten(1) for name, layer in layers.items()}


@pytest.mark.parametrize("name", STARTS)
def test_the_start_is_the_leading_part_of_the_gradient(
    name: str, sd1_folder: Path, photos: Path, tmp_path: Path
) -> None:
    session = fresh(sd1_folder, photos, tmp_path, **{"gradient_batches": 3, **STARTS[name]})
    started(session)
    found = {}
    for component, model in session.weights.modules.items():
        for path, layer in adapted_layers(model):
            own = layer.adapters["default"].weights()
            found[f"{component}.{path}"] = own.up.flatten(1), own.down.flatten(1)
            if own.magnitude is not None:
                expected = adapted_norm(layer.dense(), own)
                torch.testing.assert_close(own.magnitude, expected, rtol=0, atol=0)
    gradients = weight_gradients(session)
    for path, (up, down) in found.items():
        s = torch.linalg.svdvals(gradients[path])[:2]
        u, found_s, vh = torch.linalg.svd(up @ down, full_matrices=False)
        torch.testing.assert_close(found_s[:2] * 128, s / s[0], rtol=0.08, atol=0)
        # Each vector's share of the gradient; all signs downhill.
        shares = -torch.diagonal(u[:, :2].mT @ gradients[path] @ vh[:2].mT)
        torch.testing.assert_close(shares, s, rtol=0.08, atol=0)
        # A and B share it equally.
        torch.testing.assert_close(up.mT @ up, down @ down.mT, rtol=1e-4, atol=1e-7)


def test_the_drift_is_what_predictions_change_by(
    sd1_folder: Path, photos: Path, tmp_path: Path
) -> None:
    session = fresh(sd1_folder, photos, tmp_path, gradient_batches=2)
    drift = started(session)
    parts = []
    for _ in range(2):
        with torch.no_grad():
            made = [
                predictions_of(noisy_batches([session.learner.objective], [inputs])[0])[0]
                for inputs in first_batches(session, 2)
            ]
        parts.append(torch.cat(made))
        AdapterSet.of(session.components.unet).detach()
    expected = torch.linalg.vector_norm(parts[0] - parts[1]) / torch.linalg.vector_norm(parts[1])
    assert drift == pytest.approx(float(expected), rel=1e-4)
    assert drift > 1e-3


def test_a_layer_that_no_loss_reaches_keeps_the_usual_start(
    sdxl_folder: Path, photos: Path, tmp_path: Path
) -> None:
    """SDXL reads the last but one hidden states of its first text encoder."""
    session = fresh(sdxl_folder, photos, tmp_path, train_text_encoder=True)
    started(session)
    ups = {
        path: layer.adapters["default"].up
        for path, layer in adapted_layers(session.components.text_encoders[0])
    }
    last = max(int(path.split("layers.")[1].split(".")[0]) for path in ups)
    for path, up in ups.items():
        assert bool(up.any()) == (f"layers.{last}." not in path), path


def test_it_costs_no_draw_of_the_run(sd1_folder: Path, photos: Path, tmp_path: Path) -> None:
    """With its effect taken away, the run is that of the usual start."""
    usual = make_config(sd1_folder, photos, tmp_path / "usual", targets=["cross-attention"])
    train(usual)
    session = fresh(sd1_folder, photos, tmp_path / "own", max_train_steps=4)
    before = {name: p.detach().clone() for name, p in session.weights.parameters().items()}
    started(session)
    with torch.no_grad():
        for name, parameter in session.weights.parameters().items():
            parameter.copy_(before[name])
    records = [session.step(number) for number in range(1, 5)]
    assert [float(r["loss"]) for r in records] == pytest.approx(
        list(losses(tmp_path / "usual").values()), rel=1e-5
    )


def test_an_overflow_of_fp16_is_tried_again_with_a_smaller_scale(
    sd1_folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = fresh(sd1_folder, photos, tmp_path / "plain", gradient_batches=1)
    started(plain)
    accelerator = accelerator_of_fp16(plain.config, scale=2.0**20)
    session = fresh(sd1_folder, photos, tmp_path / "fp16", accelerator, gradient_batches=1)
    accumulate, limit = TrainingEngine.accumulate, 2.0**18

    def overflowing(engine: TrainingEngine, batches: Any) -> None:
        accumulate(engine, batches)
        for parameter in engine.parameters():
            if accelerator.scaler.get_scale() > limit and parameter.grad is not None:
                parameter.grad.fill_(torch.inf)

    monkeypatch.setattr(TrainingEngine, "accumulate", overflowing)
    started(session)
    assert accelerator.scaler.get_scale() == limit
    expected = plain.weights.parameters()
    for name, parameter in session.weights.parameters().items():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-3, atol=1e-5)
    limit = 0.0
    with pytest.raises(TrainingError, match="the gradient of the first batches is not finite"):
        started(session)


def test_an_average_of_the_weights_begins_with_the_start(
    sd1_folder: Path, photos: Path, tmp_path: Path
) -> None:
    session = fresh(sd1_folder, photos, tmp_path, gradient_batches=1, ema_decay=0.9)
    started(session)
    found = {name: p.detach().clone() for name, p in session.weights.parameters().items()}
    assert any(bool(value.any()) for name, value in found.items() if name.endswith("up"))
    with session.learner.average.in_use():
        for name, parameter in session.weights.parameters().items():
            assert torch.equal(parameter, found[name]), name


def test_packs_start_each_from_its_own_gradient(
    sd1_folder: Path, photos: Path, tmp_path: Path
) -> None:
    settings = {"init": "lora-one", "targets": ["cross-attention"], "gradient_batches": 2}
    configs = {
        name: make_config(
            sd1_folder,
            photos,
            tmp_path / "pack" / name,
            caption_prefix=name,
            **settings,
        )
        for name in ("mug", "dog")
    }
    events = []
    train_pack(configs, lambda name, event: events.append((name, event)))
    drifts = {name: e.drift for name, e in events if isinstance(e, TrainingStarted)}
    for name, config in configs.items():
        alone = []
        train(replace(config, output_dir=str(tmp_path / name)), alone.append)
        (drift,) = (e.drift for e in alone if isinstance(e, TrainingStarted))
        assert drift == drifts[name]
        assert_same_adapter(tmp_path / name, tmp_path / "pack" / name, rtol=1e-3, atol=1e-5)
    assert drifts["mug"] != drifts["dog"]


def test_sharding_refuses_it(sd1_folder: Path, photos: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("dora_diffusion.training.engine.accelerator.has_sharding", lambda: True)
    config = make_config(sd1_folder, photos, tmp_path, init="lora-one", sharding="fsdp")
    with refused("sharding", "excludes init lora-one"):
        make_accelerator(config)
