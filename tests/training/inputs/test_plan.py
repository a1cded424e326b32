"""Checks of a run before its model is loaded: all problems of a stage at once, settings first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.models.load import load_empty
from dora_diffusion.training.inputs.plan import check_with_model, plan_run
from dora_diffusion.training.recipe import train

Tiny = Callable[..., TrainConfig]


def parts_of(config: TrainConfig) -> dict[str, str]:
    with pytest.raises(ConfigError) as info:
        train(config)
    assert not (Path(config.output_dir) / "config.yaml").exists()
    return {part.setting: str(part) for part in info.value.parts}


def test_problems_of_settings_come_first_and_together(
    tiny_run: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "prodigyopt", None)
    config = tiny_run(
        instance_prompt="a photo of a robot",
        instance_data_dir=str(tmp_path / "none"),
        optimizer="prodigy",
        learning_rate=1,
    )
    parts = parts_of(config)
    assert list(parts) == ["instance_prompt", "optimizer"]
    assert "does not contain the token 'sks'" in parts["instance_prompt"]
    assert "needs prodigyopt, which is not installed" in parts["optimizer"]


def test_problems_of_files_come_together(tiny_run: Tiny, tmp_path: Path) -> None:
    config = tiny_run(
        init_adapter=str(tmp_path / "none"),
        instance_data_dir=str(tmp_path / "nowhere"),
        pretrained_vae_model_name_or_path=str(tmp_path),
    )
    parts = parts_of(config)
    assert list(parts) == ["output_dir", "init_adapter", ""]  # Photos have no setting.
    # A single problem keeps its kind and its text.
    with pytest.raises(ConfigError, match=r"^init_adapter: .*none") as info:
        plan_run(replace(config, instance_data_dir=tiny_run().instance_data_dir,
                         pretrained_vae_model_name_or_path=None))  # fmt: skip
    assert info.value.parts == ()


def test_problems_with_the_model_come_together(tiny_run: Tiny) -> None:
    config = tiny_run(
        pretrained_model_name_or_path="embedded:tiny-sd", targets=["no_layer"],
        train_text_encoder_ti=True, token="mug",
        instance_prompt="a photo of a mug",
    )  # fmt: skip
    with pytest.raises(ConfigError) as info:
        check_with_model(load_empty(config.base_model), config)
    first, second = map(str, info.value.parts)
    assert first.startswith("the new word 'mug' is already a token of embedded:tiny-sd")
    assert second.startswith("targets: the pattern 'no_layer' matches no layer")
