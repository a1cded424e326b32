"""Masked ranks, and updates whose norm is limited: runs that stop, resume and share a model."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dora_diffusion.adapters.inject import (
    AdapterConfig,
    inject_adapters,
    layer_adapters,
)
from dora_diffusion.config import TrainConfig, without_effect
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.training.hooks.norm_limit import limit_norms
from dora_diffusion.training.hooks.rank_masks import RankMasks
from dora_diffusion.training.pack import train_pack
from dora_diffusion.training.recipe import train
from tests.adapters.helpers import Net, move
from tests.refusal import refused
from tests.training.helpers import (
    assert_same_adapter,
    hook_of,
    losses,
    make_config,
    open_run,
    warnings_of,
)

LIMITED = {"rank_dropout": 0.4, "scale_weight_norms": 2e-3, "tlora_min_rank": 1}
LAYERS = {"targets": ["cross-attention", "*.resnets.0.conv1"], "rank": 4, "conv_rank": 3}
BESIDE: dict[str, dict[str, Any]] = {
    "prior, text encoders": {
        "with_prior_preservation": True, "gradient_accumulation_steps": 2,
        "train_text_encoder": True, "max_token_length": 150, "lora_dropout": 0.2,
    },
    "pissa": {"init": "pissa", "scale_weight_norms": None},
    "adalora": {
        "parametrization": "adalora",
        "scale_weight_norms": None,
        "tlora_min_rank": None,
        "allocation_warmup": 0,
    },
    "input axis, low precision": {
        "norm_axis": "input", "train_batch_size": 2, "mixed_precision": "bf16",
    },
}  # fmt: skip


@pytest.mark.parametrize("beside", BESIDE)
def test_a_resumed_run_is_the_whole_one(
    sd1_folder: Path, photos: Path, tmp_path: Path, beside: str
) -> None:
    settings = {**LAYERS, **LIMITED, "checkpointing_steps": 2, **BESIDE[beside]}
    whole = make_config(sd1_folder, photos, tmp_path / "whole", **settings)
    train(whole)
    shutil.copytree(tmp_path / "whole", tmp_path / "parted")
    shutil.rmtree(tmp_path / "parted" / "checkpoint-4")
    parted = replace(whole, output_dir=str(tmp_path / "parted"))
    train(replace(parted, resume_from_checkpoint="latest"))
    assert_same_adapter(tmp_path / "whole", tmp_path / "parted")
    assert losses(tmp_path / "whole") == losses(tmp_path / "parted")


def test_checkpointing_recomputes_with_the_same_masks(
    sd1_folder: Path, photos: Path, tmp_path: Path
) -> None:
    settings = {**LAYERS, **LIMITED, "train_text_encoder": True, "max_train_steps": 2}
    plain = make_config(sd1_folder, photos, tmp_path / "plain", **settings)
    train(plain)
    train(replace(plain, output_dir=str(tmp_path / "saved"), gradient_checkpointing=True))
    assert_same_adapter(tmp_path / "plain", tmp_path / "saved", rtol=1e-3, atol=1e-5)


def test_members_of_a_pack_drop_what_they_would_alone(
    sd1_folder: Path, photos: Path, tmp_path: Path
) -> None:
    # Adam divides by little where gradients are small: rounding would be all.
    usual = {**LAYERS, "train_text_encoder": True, "max_train_steps": 2, "adam_epsilon": 1e-3}
    configs = {
        name: make_config(sd1_folder, photos, tmp_path / "pack" / name, **usual, **own)
        for name, own in {
            "none": {},
            "both": {**LIMITED, "with_prior_preservation": True},
            "dropout": {"rank_dropout": 0.7, "seed": 4, "rank_pattern": {"to_k": 6}},
            "timesteps": {"tlora_min_rank": 2, "rank_pattern": {"to_q": 5}, "train_batch_size": 2},
        }.items()
    }
    assert not train_pack(configs).failures
    for name, config in configs.items():
        train(replace(config, output_dir=str(tmp_path / name)))
        assert_same_adapter(tmp_path / name, tmp_path / "pack" / name, rtol=2e-3, atol=2e-5)


def test_masks_differ_by_row_batch_and_seed_and_keep_the_mean(
    sd1_folder: Path, photos: Path, tmp_path: Path
) -> None:
    settings = {"train_batch_size": 2, "with_prior_preservation": True, "train_text_encoder": True}
    session = open_run(sd1_folder, photos, tmp_path, rank_dropout=0.4, **LAYERS, **settings)
    step, batch = session.step, session.step.draw()
    drawn, _ = step.route(batch)
    again, _ = step.route(batch)
    later, active = step.route(batch._replace(batch=replace(batch.batch, index=1)))
    assert {*active} == {None}
    has_rows = hook_of(step, RankMasks)._has_rows
    layers = zip(drawn, again, later, has_rows, step.stack.adapters, strict=True)
    rows = []
    for mask, same_mask, other, by_row, (adapter,) in layers:
        assert mask.shape == (4 if by_row else 1, adapter.down.shape[0])
        assert torch.equal(mask, same_mask)
        assert {round(float(value), 4) for value in mask.unique()} <= {0.0, 1.6667}
        rows.append((mask, other) if by_row else None)
    masks, others = (torch.cat(parts, dim=1) for parts in zip(*filter(None, rows), strict=True))
    assert None in rows
    for first, second in [(0, 1), (0, 2), (1, 3)]:
        assert not torch.equal(masks[first], masks[second])
    assert not torch.equal(masks, others)
    assert float(masks.mean()) == pytest.approx(1.0, abs=0.2)


def test_a_timestep_leaves_the_first_ranks_of_the_unet_active(
    sd1_folder: Path, photos: Path, tmp_path: Path
) -> None:
    settings = {"train_batch_size": 3, "with_prior_preservation": True, "train_text_encoder": True}
    settings |= {**LAYERS, "rank": 5, "rank_pattern": {"to_k": 7}, "tlora_min_rank": 3}
    session = open_run(sd1_folder, photos, tmp_path, **settings)
    step, drawn = session.step, session.step.draw()
    masks, active = step.route(drawn)
    timesteps = 2 * drawn.batch.inputs.timesteps.tolist()  # Of the photos, then of their prior.
    assert len(timesteps) == 6
    found = set()
    has_rows = hook_of(step, RankMasks)._has_rows
    each = zip(masks, active, has_rows, step.stack.adapters, strict=True)
    for mask, chosen, by_row, (adapter,) in each:
        rank = adapter.down.shape[0]
        found.add((rank, by_row, mask is None))
        assert mask is chosen
        if mask is not None:
            counts = [math.floor(Fraction(1000 - t, 1000) * (rank - 3)) + 3 for t in timesteps]
            assert mask.tolist() == [[1.0] * n + [0.0] * (rank - n) for n in counts]
    # No layer of as few ranks, and none of a text encoder, is masked.
    assert found == {(3, True, True), (5, True, False), (7, True, False), (5, False, True)}


def test_dropout_keeps_no_rank_that_the_timestep_leaves_out(
    sd1_folder: Path, photos: Path, tmp_path: Path
) -> None:
    settings = {**LAYERS, "rank_dropout": 0.4, "tlora_min_rank": 1, "train_batch_size": 3}
    step = open_run(sd1_folder, photos, tmp_path, **settings).step
    masks, active = step.route(step.draw())
    pairs = [(mask, ranks) for mask, ranks in zip(masks, active, strict=True) if ranks is not None]
    inside = torch.cat([mask[ranks == 1] for mask, ranks in pairs])
    outside = torch.cat([mask[ranks == 0] for mask, ranks in pairs])
    assert len(outside) > 0
    assert not outside.any()
    assert {round(float(value), 4) for value in inside.unique()} == {0.0, 1.6667}


def sd_scripts_limit(down: torch.Tensor, up: torch.Tensor, scale: float, limit: float) -> float:
    """The share that sd-scripts multiplies A and B by, from the whole update."""
    if down.ndim == 4 and down.shape[2:] != (1, 1):
        update = F.conv2d(down.permute(1, 0, 2, 3), up).permute(1, 0, 2, 3)
    else:
        update = up.flatten(1) @ down.flatten(1)
    norm = (scale * update).norm().clamp(min=limit / 2)
    return float((norm.clamp(max=limit) / norm).sqrt())


@pytest.mark.parametrize("limit", [0.05, 1.0, 100.0])
@pytest.mark.parametrize("use_dora", [True, False])
def test_norms_are_limited_as_sd_scripts_does(limit: float, use_dora: bool) -> None:
    torch.manual_seed(0)
    net = Net()
    config = AdapterConfig(("full",), rank=3, alpha=5.0, conv_rank=2, use_dora=use_dora)
    inject_adapters(net, config)
    move(net)
    adapters = list(layer_adapters(net))
    before = [(a.down.clone(), a.up.clone(), a.magnitude) for a in adapters]
    magnitudes = [None if m is None else m.clone() for _, _, m in before]
    shares = [
        sd_scripts_limit(d, u, a.weights().scale, limit)
        for a, (d, u, _) in zip(adapters, before, strict=True)
    ]
    assert limit == 100.0 or min(shares) < 1
    limit_norms(adapters, limit)
    for adapter, (down, up, _), share, magnitude in zip(
        adapters, before, shares, magnitudes, strict=True
    ):
        torch.testing.assert_close(adapter.down, share * down, rtol=1e-5, atol=0)
        torch.testing.assert_close(adapter.up, share * up, rtol=1e-5, atol=0)
        assert magnitude is None or torch.equal(adapter.magnitude, magnitude)


def test_no_update_of_a_run_is_larger(sd1_folder: Path, photos: Path, tmp_path: Path) -> None:
    config = make_config(sd1_folder, photos, tmp_path, scale_weight_norms=1e-3, learning_rate=1e-2)
    train(config)
    norms = [
        float((layer.scale * layer.up.flatten(1) @ layer.down.flatten(1)).norm())
        for layer in read_adapter(tmp_path).layers.values()
    ]
    assert max(norms) == pytest.approx(1e-3, rel=1e-4)
    assert len([norm for norm in norms if norm > 0.999e-3]) > len(norms) / 2


def test_what_has_no_effect_or_cannot_be_is_said(
    sd1_folder: Path, photos: Path, tmp_path: Path
) -> None:
    config = make_config(
        sd1_folder, photos, tmp_path, max_train_steps=1, init="pissa", scale_weight_norms=1e-6
    )
    assert "scale_weight_norms has no effect because init is pissa" in warnings_of(config)
    assert any(bool(layer.up.any()) for layer in read_adapter(tmp_path).layers.values())
    for name, value in {"rank_dropout": 0.1, "tlora_min_rank": 1}.items():
        with refused(name, "and compile out"):
            TrainConfig(**{name: value}, compile=True)
    with refused("tlora_min_rank", "no layer has more than 6"):
        TrainConfig(tlora_min_rank=6, rank=4, conv_rank=2, rank_pattern={"to_k": 6})
    for other in ({"parametrization": "adalora"}, {"parametrization": "vera"}, {"method": "full"}):
        beside = TrainConfig(**other, tlora_min_rank=4)
        [reason] = without_effect(beside, {"tlora_min_rank"}).values()
        assert "tlora_min_rank has no effect because" in reason
        assert beside.least_rank is None
