"""The modules of a model as one frozen value."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dora_diffusion.models.load import load_components


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
