"""The adapters that a run trains: on which components, and with which settings."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend

from dora_diffusion.adapters.compiled import compile_blocks
from dora_diffusion.adapters.state import adapter_state
from dora_diffusion.config import ConfigError
from dora_diffusion.models.load import load_components
from dora_diffusion.training.adapters import inject_trained
from dora_diffusion.training.loop import train
from tests.training.helpers import assert_same_adapter, losses, make_config, warnings_of


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


@pytest.mark.slow
def test_a_compiled_run_follows_the_other_in_few_graphs(
    sd1_folder, shaped_photos, tmp_path, monkeypatch
):
    # Without a C++ compiler, and the cheapest kind of block.
    counter = CompileCounterWithBackend("aot_eager")
    backend = partial(compile_blocks, backend=counter, fullgraph=True)
    monkeypatch.setattr("dora_diffusion.training.adapters.compile_blocks", backend)
    monkeypatch.setattr("dora_diffusion.training.session.require_compiler", lambda device: None)
    monkeypatch.setattr("dora_diffusion.adapters.compiled.BLOCKS", ("BasicTransformerBlock",))
    torch._dynamo.reset()
    plain = make_config(
        sd1_folder, shaped_photos, tmp_path / "out", aspect_ratio_buckets=True, resolution=64,
        targets=["cross-attention"], gradient_checkpointing=True, num_validation_images=1,
        max_train_steps=6,
    )  # fmt: skip
    train(plain)
    compiled = replace(plain, output_dir=str(tmp_path / "compiled"), compile=True)
    train(compiled)
    expected, found = (losses(tmp_path / name) for name in ("out", "compiled"))
    assert len(expected) == 6
    assert found == pytest.approx(expected, rel=1e-5)
    name = "pytorch_lora_weights.safetensors"
    files = [load_file(tmp_path / folder / name) for folder in ("out", "compiled")]
    assert files[0].keys() == files[1].keys()
    # Two widths, each of one size first, of any then, and of a single position apart; samples
    # compile nothing.
    assert 2 <= counter.frame_count <= 6


def test_a_machine_that_cannot_compile_is_refused_before_the_model_is_loaded(config, monkeypatch):
    def refuse(device):
        raise ConfigError("compile does not work", "compile")

    monkeypatch.setattr("dora_diffusion.training.session.require_compiler", refuse)
    monkeypatch.setattr("dora_diffusion.training.session.load_components", None)
    with pytest.raises(ConfigError, match="compile does not work"):
        train(replace(config, compile=True))


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
