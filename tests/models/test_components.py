"""The modules of a model as one frozen value."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dora_diffusion.models.load import load_components


def test_no_part_is_replaced_in_place(sd1_folder) -> None:
    components = load_components(sd1_folder)
    with pytest.raises(dataclasses.FrozenInstanceError):
        components.vae = components.denoiser


def test_parts_that_do_not_belong_together_are_refused_when_one_is_replaced(sd1_folder) -> None:
    components = load_components(sd1_folder)
    other = torch.nn.Module()
    other.config = type("Config", (), {"latent_channels": 16})
    with pytest.raises(ValueError, match="the UNet has 4 input channels but the VAE has 16"):
        dataclasses.replace(components, vae=other)


def test_evaluation_mode_ends_with_the_block_for_each_module_as_it_was(sd1_folder) -> None:
    components = load_components(sd1_folder)
    components.denoiser.train()

    def fail_inside():
        with components.eval_mode():
            assert not any(module.training for module in components.modules().values())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    modes = {name: module.training for name, module in components.modules().items()}
    assert modes == {"unet": True, "text_encoder": False, "vae": False}


def test_modules_are_moved_in_place(sd1_folder) -> None:
    components = load_components(sd1_folder)
    unet = components.denoiser
    assert components.to("meta") is components
    assert components.denoiser is unet
    devices = {p.device.type for m in components.modules().values() for p in m.parameters()}
    assert devices == {"meta"}
    assert components.device == torch.device("meta")
