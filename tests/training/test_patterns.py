"""Ranks, alphas and rates by layer: runs that stop and resume, packs, and the files they leave."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_diffusion.adapters.state import adapter_state
from dora_diffusion.adapters.targets import TargetError
from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.config.derived import as_yaml
from dora_diffusion.formats.adapter.file import AdapterFile, read_adapter, write_adapter
from dora_diffusion.training.metrics import TrainingError
from dora_diffusion.training.recipe import train
from dora_diffusion.training.results.write import result_metadata
from tests.formats.layouts.helpers import assert_close_to_merge, load_pipeline, module_at
from tests.refusal import refused
from tests.training.helpers import (
    assert_same_adapter,
    make_config,
    open_run,
    warnings_of,
)

PATTERNS: dict[str, Any] = {
    "rank_pattern": {"*up_blocks*": 5, "conv1": 3, "v_proj": 4},
    "alpha_pattern": {"mid_block.*": 7.0, "*attn2.to_k": 1.0},
    "lr_pattern": {"*down_blocks*": 0.0, "*up_blocks*": 3e-3},
}
MODEL = {"targets": ["cross-attention", "*.resnets.0.conv1"], "train_text_encoder": True}


def expected(path: str) -> tuple[int, float]:
    """Rank and alpha of a layer of `PATTERNS`, beside rank and alpha 2."""
    rank = 5 if "up_blocks" in path else 3 if path.endswith("conv1") else 2
    alpha = 7.0 if "mid_block" in path else 1.0 if path.endswith("attn2.to_k") else 2.0
    return (4 if path.endswith("v_proj") else rank), alpha


@pytest.fixture(scope="module")
def run(
    sd1_folder: Path, small_photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> TrainConfig:
    folder = tmp_path_factory.mktemp("patterns") / "run"
    settings = {**MODEL, **PATTERNS, "checkpointing_steps": 2, "max_train_steps": 4}
    config = make_config(sd1_folder, small_photos, folder, **settings)
    train(config)
    return config


def test_a_layer_whose_rate_is_0_stays(run: TrainConfig) -> None:
    for name, layer in read_adapter(run.output_dir).layers.items():
        assert bool(layer.up.any()) == ("down_blocks" not in name), name


@pytest.mark.parametrize("layout", ["kohya", "peft", "diffusers"])
def test_every_layout_keeps_ranks_and_alphas(
    sd1_folder: Path, photos: Path, tmp_path: Path, layout: str
) -> None:
    """Diffusers' and kohya's have one scale or alpha, as of any adapter: B makes up for it."""
    session = open_run(sd1_folder, photos, tmp_path / "run", **MODEL, **PATTERNS)
    adapter = AdapterFile(adapter_state(session.weights.modules), result_metadata(session, 1))
    file = write_adapter(
        tmp_path / ("to" if layout == "peft" else "to.safetensors"), adapter, layout
    )
    found = read_adapter(file).layers
    assert found.keys() == adapter.layers.keys()
    for name, layer in adapter.layers.items():
        rank, alpha = expected(name)
        assert (layer.rank, layer.alpha) == (rank, alpha)
        assert found[name].rank == rank, name
        assert layout != "peft" or found[name].alpha == alpha, name
        delta, wanted = (
            part.scale * part.up.flatten(1) @ part.down.flatten(1) for part in (found[name], layer)
        )
        torch.testing.assert_close(delta, wanted, rtol=1e-5, atol=1e-7)


def test_diffusers_merges_what_the_run_has(run: TrainConfig, sd1_folder: Path) -> None:
    pipeline = load_pipeline(sd1_folder)
    pipeline.load_lora_weights(run.output_dir, weight_name="pytorch_lora_weights.safetensors")
    pipeline.fuse_lora(components=["unet"])
    pipeline.unload_lora_weights()
    layers = read_adapter(run.output_dir).layers
    for name in layers:
        if name.startswith("unet.") and "down_blocks" not in name:
            assert_close_to_merge(module_at(pipeline, name).weight, sd1_folder, layers, name)


def test_rates_are_those_of_the_pattern(sd1_folder: Path, photos: Path, tmp_path: Path) -> None:
    settings = {**MODEL, "lr_pattern": PATTERNS["lr_pattern"], "loraplus_ratio": 4.0}
    session = open_run(
        sd1_folder, photos, tmp_path, learning_rate=1e-3, magnitude_lr=1e-2, **settings
    )
    rates = {group["name"]: group["lr"] for group in session.step.parameters.groups}
    up, down = "of *up_blocks*", "of *down_blocks*"
    assert {name: rate for name, rate in rates.items() if name.startswith("unet")} == {
        "unet/down": 1e-3, "unet/up": 4e-3, "unet/magnitude": 1e-2,
        f"unet/down {up}": 3e-3, f"unet/up {up}": 1.2e-2, f"unet/magnitude {up}": 1e-2,
        f"unet/down {down}": 0.0, f"unet/up {down}": 0.0, f"unet/magnitude {down}": 1e-2,
    }  # fmt: skip
    assert {name for name in rates if name.startswith("text")} == {
        "text_encoder/down", "text_encoder/up", "text_encoder/magnitude",
    }  # fmt: skip


def test_one_rate_for_some_layers_is_that_rate_for_all(
    sd1_folder: Path, photos: Path, tmp_path: Path
) -> None:
    usual = make_config(
        sd1_folder, photos, tmp_path / "usual", targets=["cross-attention"], max_grad_norm=0.0
    )
    train(usual)
    by_pattern = replace(
        usual, learning_rate=0.0, lr_pattern={"to_q": 1e-3, "*": 1e-3},
        output_dir=str(tmp_path / "pattern"),
    )  # fmt: skip
    assert not [text for text in warnings_of(by_pattern) if "learning_rate" in text]
    assert_same_adapter(tmp_path / "usual", tmp_path / "pattern")


@pytest.mark.parametrize("parametrization", ["low-rank", "adalora"])
def test_an_adapter_starts_ranks_of_its_layers(
    run: TrainConfig, tmp_path: Path, parametrization: str
) -> None:
    again = replace(run, output_dir=str(tmp_path / "again"), max_train_steps=1)
    if parametrization == "adalora":
        again = replace(again, parametrization="adalora", allocation_warmup=0, allocation_final=0)
        train(again)
        ranks = {name: layer.rank for name, layer in read_adapter(again.output_dir).layers.items()}
        assert all(rank <= expected(name)[0] for name, rank in ranks.items())
        return
    again = replace(
        again, overwrite_output_dir=True, init_adapter=run.output_dir, learning_rate=0.0,
        lr_pattern={}, text_encoder_lr=0.0,
    )  # fmt: skip
    with pytest.raises(TrainingError, match="nothing was learned"):  # It is written all the same.
        train(again)
    assert_same_adapter(run.output_dir, again.output_dir, rtol=1e-6, atol=1e-9)
    with pytest.raises(
        ConfigError, match=r"it has rank 5, more than rank 2, rank_pattern conv1 5; set"
    ):
        train(replace(again, rank_pattern={"v_proj": 4, "conv1": 5}))
    with refused("init_adapter", "rank_pattern *up_blocks* 5, more than"):
        train(replace(again, rank_pattern={**PATTERNS["rank_pattern"], "*up_blocks*": 4}))


@pytest.mark.parametrize("setting", PATTERNS)
def test_a_pattern_of_no_layer_is_refused_with_the_nearest(
    run: TrainConfig, tmp_path: Path, setting: str
) -> None:
    wrong = replace(run, output_dir=str(tmp_path), **{setting: {"*up_block.*": 1}})
    with pytest.raises(TargetError, match=rf"{setting}: '\*up_block.\*' names no .*up_blocks"):
        train(wrong)


def test_settings_are_mappings_in_yaml_and_pairs_on_a_command_line() -> None:
    config = TrainConfig.from_dict({"rank_pattern": ["*.to_k=4", "a=b=8"], "lr_pattern": "x=1e-4"})
    assert (config.rank_pattern, config.lr_pattern) == ({"*.to_k": 4, "a=b": 8}, {"x": 1e-4})
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert "rank_pattern:\n  '*.to_k': 4\n  a=b: 8\n" in as_yaml(config)
    assert TrainConfig.from_dict({"rank_pattern": {"to_k": "4"}}).rank_pattern == {"to_k": 4}


@pytest.mark.parametrize(
    ("setting", "values", "words"),
    [
        ("rank_pattern", {"rank_pattern": ["to_k"]}, "'to_k'; it must be PATTERN=VALUE, such as"),
        ("rank_pattern", {"rank_pattern": ["=4"]}, "PATTERN=VALUE"),
        ("rank_pattern", {"rank_pattern": {"to_k": 2.5}}, "2.5; it must be a whole number"),
        ("alpha_pattern", {"alpha_pattern": ["to_k=x"]}, "'x'; it must be a number"),
        ("optimizer",
         {"optimizer": "prodigy", "learning_rate": 1.0, "lr_pattern": {"to_k": 1.0}}, "one rate"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_are_refused(
    setting: str, values: dict[str, Any], words: str
) -> None:
    with refused(setting, words):
        TrainConfig.from_dict(values)
