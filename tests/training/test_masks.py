"""The prior outside of masks, together with what else a loss is made of."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from dora_diffusion.config import TrainConfig, without_effect
from dora_diffusion.training.features.prior import Unmasked
from dora_diffusion.training.inputs.plan import plan_run
from dora_diffusion.training.pack import train_pack
from dora_diffusion.training.processes import make_accelerator
from dora_diffusion.training.recipe import assemble, train
from dora_diffusion.training.run import Run
from dora_diffusion.training.terms import Losses
from tests.refusal import refused
from tests.training.helpers import (
    assert_same_adapter,
    losses,
    predictions_of,
    small_samples,
)
from tests.training.test_pack import THREE, alone, assert_alike, pack_of

Make = Callable[..., TrainConfig]


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    """Three photos: with a mask of the left half, with a white mask, and without a mask."""
    folder = tmp_path / "masked"
    folder.mkdir()
    for name in ("01", "02", "03"):
        for suffix in (".jpg", ".txt"):
            shutil.copy(small_samples() / "bolt_mug" / f"{name}{suffix}", folder)
    for name, whole in (("01", False), ("02", True)):
        with Image.open(folder / f"{name}.jpg") as photo:
            mask = Image.new("L", photo.size, 255 if whole else 0)
        mask.paste(255, (0, 0, mask.width // 2, mask.height))
        mask.save(folder / f"{name}.mask.png")
    return folder


@pytest.fixture
def run(tiny_run: Make, masked: Path) -> Make:
    """Settings of a run on these photos, all three in each batch."""

    def make(**settings: Any) -> TrainConfig:
        own = {"instance_data_dir": str(masked), "masked_loss": True, "train_batch_size": 3}
        return tiny_run(**{**own, "learning_rate": 1e-2, **settings})

    return make


def session_of(config: TrainConfig) -> Run:
    return assemble(plan_run(config), make_accelerator(config))


def steps_of(config: TrainConfig, count: int = 2) -> list[dict[str, float]]:
    """The loss and the gradients' norm of a run's first steps."""
    session = session_of(config)
    records = [session.step(step) for step in range(1, count + 1)]
    return [{name: float(record[name]) for name in ("loss", "grad_norm")} for record in records]


CLASS_IMAGES = {
    "with_prior_preservation": True, "prior_preservation_mode": "images", "num_class_images": 3,
    "class_data_dir": str(small_samples() / "heart_teapot"), "class_prompt": "a teapot",
}  # fmt: skip
PAIRS: dict[str, dict[str, Any]] = {
    "no weighting": {"snr_gamma": 0.0},
    "huber, image-free, text encoders, checkpointing": {
        "loss_type": "huber", "with_prior_preservation": True, "train_text_encoder": True,
        "gradient_checkpointing": True,
    },
    "v, class images, dropped captions": {
        "prediction_type": "v_prediction", "snr_gamma": 5.0, "caption_dropout": 0.5, **CLASS_IMAGES,
    },
    "full, no weighting": {"method": "full", "full_weights": "targets", "snr_gamma": 0.0},
    "bf16, image-free": {"mixed_precision": "bf16", "with_prior_preservation": True},
}  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS)
def test_at_the_first_step_nothing_is_away_from_the_base(run: Make, pair: str) -> None:
    """So its loss and its gradient are those without the prior; those of the second are not."""
    free, held = (steps_of(run(**PAIRS[pair], unmasked_prior=weight)) for weight in (0.0, 30.0))
    tolerance = 1e-2 if "bf16" in pair else 1e-5
    for figure in ("loss", "grad_norm"):
        assert held[0][figure] == pytest.approx(free[0][figure], rel=tolerance), figure
        assert held[1][figure] != pytest.approx(free[1][figure], rel=3e-5), figure


def test_recomputed_activations_and_half_precision_change_no_more_than_rounding(run: Make) -> None:
    settings = {"unmasked_prior": 1.0, "with_prior_preservation": True}
    plain = steps_of(run(**settings))
    for other, tolerance in (
        ({"gradient_checkpointing": True}, 1e-5),
        ({"mixed_precision": "bf16"}, 0.05),
    ):
        for one, two in zip(plain, steps_of(run(**settings, **other)), strict=True):
            assert two["loss"] == pytest.approx(one["loss"], rel=tolerance)


@pytest.mark.parametrize(
    "prior",
    [pytest.param({}, marks=pytest.mark.slow), {"with_prior_preservation": True}, CLASS_IMAGES],
    ids=["none", "image-free", "class images"],
)
def test_where_masks_leave_nothing_out_a_run_is_what_it_was(
    run: Make, masked: Path, tmp_path: Path, prior: dict[str, Any]
) -> None:
    """Bit for bit, as it is with a weight of 0, whatever the masks."""
    Image.new("L", Image.open(masked / "01.jpg").size, 255).save(masked / "01.mask.png")
    folders = [tmp_path / name for name in ("free", "held")]
    for folder, weight in zip(folders, (0.0, 5.0), strict=True):
        train(run(output_dir=str(folder), unmasked_prior=weight, **prior))
    assert losses(folders[0]) == losses(folders[1])
    assert_same_adapter(*folders)


@pytest.mark.parametrize("image_free", [False, True])
def test_a_step_passes_the_base_once(
    run: Make, monkeypatch: pytest.MonkeyPatch, image_free: bool
) -> None:
    """With the rows that have something left out, and those whose image-free prior is held."""
    rows: list[tuple[int, bool]] = []
    forward = UNet2DConditionModel.forward

    def counted(unet: Any, noisy: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append((len(noisy), torch.is_grad_enabled()))
        return forward(unet, noisy, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", counted)
    held = 3 if image_free else 0
    for weight, base in ((0.0, held), (1.0, held + 1)):
        rows.clear()
        steps_of(run(with_prior_preservation=image_free, unmasked_prior=weight), 1)
        assert rows == [(base, False)] * (base > 0) + [(3 + held, True)]


WORDS = {
    "train_text_encoder_ti": True, "token": "zwq", "embedding_lr": 0.1,
    "instance_prompt": "a zwq mug", "max_train_steps": 3,
}  # fmt: skip


@pytest.mark.parametrize(
    "trained",
    [{"train_text_encoder": True, "text_encoder_lr": 1e-2}, {"method": "full"}, WORDS],
    ids=["text encoders", "full", "words"],
)
def test_the_target_stays_the_untrained_model_s(
    run: Make, masked: Path, monkeypatch: pytest.MonkeyPatch, trained: dict[str, Any]
) -> None:
    """Whatever has trained by then: a model that no step has changed predicts the same."""
    for caption in masked.glob("*.txt"):
        caption.unlink()
    config = run(**{"unmasked_prior": 1.0, "instance_prompt": "a sks mug", **trained})
    seen: list[Any] = []
    real = Unmasked.losses

    def note(self: Unmasked, *given: Any) -> Losses:
        seen.append(given)
        return real(self, *given)

    monkeypatch.setattr(Unmasked, "losses", note)
    steps_of(config, 3)
    batch, model_pred, base = seen[-1]
    rows = list(batch.masked_rows)
    expected = predictions_of(session_of(config).step, batch)[rows]
    torch.testing.assert_close(base, expected, rtol=1e-4, atol=1e-5)
    away = (model_pred[rows] - expected).abs().max()
    assert away > 10 * (base - expected).abs().max()


def test_what_is_outside_stays_with_the_base(run: Make) -> None:
    """The mean square of what a run moved of the prediction there, after twenty steps."""
    moved = {}
    for weight in (0.0, 10.0):
        session = session_of(run(unmasked_prior=weight, max_train_steps=20, learning_rate=3e-3))
        for step in range(1, 21):
            session.step(step)
        batch = next(session.step.batches)
        with torch.no_grad():
            trained = predictions_of(session.step, batch)
            with session.weights.base_weights():
                base = predictions_of(session.step, batch)
        outside = 1 - batch.mask
        assert outside.sum() > 0
        moved[weight] = float(((trained - base).square() * outside).sum() / outside.sum())
    assert moved[10.0] < 0.5 * moved[0.0]


def test_subjects_of_a_pack_have_their_own_weight(
    sd1_folder: Path, masked: Path, tmp_path: Path
) -> None:
    """Held outside of masks, free there, and without masks: each adapter is that of its own run."""
    own = [{"masked_loss": True, "unmasked_prior": 2.0}, {"masked_loss": True}, {}]
    entries = [
        {**entry, "instance_data_dir": str(masked), "instance_prompt": "a sks mug", **settings}
        for entry, settings in zip(THREE, own, strict=True)
    ]
    configs = pack_of(
        sd1_folder, tmp_path / "pack", entries, max_train_steps=3, targets=["cross-attention"],
        with_prior_preservation=True,
    )  # fmt: skip
    assert not train_pack(configs).failures
    for name, config in configs.items():
        assert_alike(Path(config.output_dir), alone(configs, name), 2e-4)


def test_a_weight_without_masks_is_said_to_have_no_effect() -> None:
    said = "unmasked_prior has no effect because masked_loss is off"
    assert without_effect(TrainConfig(unmasked_prior=1.0)) == {"unmasked_prior": said}
    assert not without_effect(TrainConfig(unmasked_prior=1.0, masked_loss=True))
    entries = [{"instance_data_dir": "a"}, {"instance_data_dir": "b", "masked_loss": True}]
    assert not without_effect(TrainConfig(unmasked_prior=1.0, dataset_config=entries))
    with refused("dataset_config", "unmasked_prior is a setting of the whole run"):
        TrainConfig(dataset_config=[{"instance_data_dir": "a", "unmasked_prior": 1.0}])
