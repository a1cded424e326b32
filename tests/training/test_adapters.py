"""The adapters that a run trains: on which components, and with which settings."""

from __future__ import annotations

from dataclasses import replace

import torch

from dora_diffusion.adapters.state import adapter_state
from dora_diffusion.models.load import load_components
from dora_diffusion.training.adapters import inject_trained
from dora_diffusion.training.loop import train
from tests.training.helpers import assert_same_adapter, make_config, warnings_of


def test_a_conv_rank_without_conv_layers_is_said(config):
    said = warnings_of(replace(config, targets=["attention"]))
    assert said == ["conv_rank has no effect because targets name no Conv2d layer"]
    said = warnings_of(replace(config, targets=["attention"], conv_rank=4, conv_alpha=2.0,
                           overwrite_output_dir=True))  # fmt: skip
    assert said == ["conv_alpha has no effect because targets name no Conv2d layer"]


def test_gradient_checkpointing_trains_the_same_adapter(sd1_folder, photos, tmp_path):
    plain = make_config(
        sd1_folder, photos, tmp_path / "plain", train_batch_size=2, train_text_encoder=True
    )
    train(plain)
    train(replace(plain, output_dir=str(tmp_path / "saved"), gradient_checkpointing=True))
    assert_same_adapter(tmp_path / "plain", tmp_path / "saved", rtol=1e-4, atol=1e-6)


def test_text_encoders_carry_adapters_only_where_they_train(sdxl_folder, config):
    kinds = {}
    for trains in (False, True):
        components = load_components(sdxl_folder)
        adapters = inject_trained(components, replace(config, train_text_encoder=trains))
        kinds[trains] = set(adapters.modules)
        modes = {name: model.training for name, model in components.modules().items()}
        assert {name for name, training in modes.items() if training} == kinds[trains]
        assert adapters.report.parameters == sum(
            p.numel() for m in components.modules().values() for p in m.parameters()
            if p.requires_grad
        )  # fmt: skip
    assert kinds == {False: {"unet"}, True: {"unet", "text_encoder", "text_encoder_2"}}


def test_a_seed_draws_the_same_adapter(sd1_folder, config):
    def drawn(seed):
        adapters = inject_trained(load_components(sd1_folder), replace(config, seed=seed))
        return torch.cat(
            [layer.down.flatten() for layer in adapter_state(adapters.modules).values()]
        )

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
