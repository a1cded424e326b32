"""Models that are offloaded while images are made, on CPU tensors that say they are on a GPU."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dora_diffusion.adapters.layers import adapted_layers
from dora_diffusion.adapters.state import load_adapter_state
from dora_diffusion.config.base import BaseModel
from dora_diffusion.models import offload
from dora_diffusion.models.components import Components
from dora_diffusion.models.load import load_components
from dora_diffusion.sampling.generate import generate_images
from dora_diffusion.sampling.load import load_adapted
from dora_diffusion.sampling.settings import SamplingSettings
from tests.apple import DEVICE, AppleGPU
from tests.z_image import write_z_image

HOST = torch.device("cpu")
SETTINGS = SamplingSettings(2, 4.0, "ddim", 32, 32)


def images(components: Components, **options: object) -> np.ndarray:
    made = generate_images(components, "a photo of a sks dog", [1, 2, 3], SETTINGS, **options)
    return np.stack([np.asarray(image) for image in made])


def places(components: Components) -> dict[str, set[torch.device]]:
    return {
        name: {t.device for t in (*module.parameters(), *module.buffers())}
        for name, module in components.modules().items()
    }


@pytest.mark.parametrize("quantize", [pytest.param("none", marks=pytest.mark.slow), "nf4"])
def test_an_offloaded_model_makes_the_same_images_and_goes_home(
    gpu: AppleGPU, sdxl_folder: Path, random_adapter, quantize: str
) -> None:
    """In batches of two, with adapters on the UNet and both text encoders."""
    made, on_device = {}, []
    base = BaseModel(sdxl_folder, quantize=quantize, quantize_convolutions=True)
    for choice in ("none", "model"):
        components, _ = load_adapted(base, offload=choice)
        load_adapter_state(components.adaptable(), random_adapter(sdxl_folder, every=5))
        before = places(components)

        def look(done: int, total: int, components: Components = components) -> None:
            places_now = places(components)
            on_device.append({name for name, at in places_now.items() if at == {DEVICE}})

        made[choice] = images(components, batch_size=2, on_step=look)
        assert places(components) == before
        assert all(vars(m).get("forward") is None for m in components.modules().values())
        for model in components.adaptable().values():
            assert all(layer.route is None for _, layer in adapted_layers(model))
    assert set().union(*before.values()) == {HOST}
    assert components.device.type == DEVICE.type
    assert np.array_equal(made["model"], made["none"])
    count = len(on_device) // 2
    assert on_device[:count] == [set(components.modules())] * count
    assert on_device[count:] == [{"unet"}] * count


@pytest.mark.parametrize("family", ["sd1", "z-image"])
def test_a_denoiser_makes_room_for_a_large_text_encoder(
    gpu: AppleGPU, family: str, sd1_folder: Path, tmp_path: Path
) -> None:
    folder = sd1_folder if family == "sd1" else write_z_image(tmp_path / "z")
    components = load_components(folder)
    with offload.in_turns(components, DEVICE, nullcontext):
        for module in (components.denoiser, *components.text_encoders):
            module._hf_hook.pre_forward(module)
        now = places(components)
        assert now["text_encoder"] == {DEVICE}
        assert now[components.family.denoiser] == {DEVICE if family == "sd1" else HOST}


def test_modules_go_home_after_an_error_too(gpu: AppleGPU, sd1_folder: Path) -> None:
    components, _ = load_adapted(sd1_folder, offload="model")
    before = places(components)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        images(components, on_step=stop)
    assert places(components) == before
    assert "forward" not in vars(components.denoiser)


def test_a_scope_is_open_while_its_module_is_there(
    gpu: AppleGPU, sd1_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    components, _ = load_adapted(sd1_folder, offload="model")
    names = {module: name for name, module in components.modules().items()}
    said: list[str] = []

    class Scope(nullcontext):
        def __init__(self, module: nn.Module) -> None:
            self.module = module

        def __enter__(self) -> None:
            said.append(f"{names[self.module]} comes")
            assert next(self.module.parameters()).device == DEVICE

        def __exit__(self, *error: object) -> None:
            said.append(f"{names[self.module]} leaves")
            assert next(self.module.parameters()).device == DEVICE

    monkeypatch.setattr("dora_diffusion.sampling.generate.norm_scope", Scope)
    images(components)
    assert said == [
        "text_encoder comes", "text_encoder leaves", "unet comes", "unet leaves", "vae comes",
        "vae leaves",
    ]  # fmt: skip


def test_what_trains_stays_and_tensors_keep_their_identity(gpu: AppleGPU) -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)).to(DEVICE)
    module[0].requires_grad_(False)
    module[2].requires_grad_(False)
    parameters = list(module.parameters())
    values = [p.detach().cpu().clone() for p in parameters]
    with offload.on_device(HOST, module):
        assert module[0].weight.device == HOST == module[2].running_mean.device
        assert module[1].weight.device == DEVICE
    assert {p.device for p in module.parameters()} == {DEVICE}
    assert all(new is old for new, old in zip(module.parameters(), parameters, strict=True))
    assert all(torch.equal(p.cpu(), v) for p, v in zip(parameters, values, strict=True))


def test_no_effect_is_said_where_it_was_asked_for(sd1_folder: Path) -> None:
    with pytest.warns(
        UserWarning, match="offload model has no effect because CPU shares the memory"
    ):
        components, _ = load_adapted(sd1_folder, offload="model")
    assert components.offload_to is None
    assert components.device == HOST
