"""The adapters that a run trains: on which components, and with which settings."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounterWithBackend

from dora_diffusion.adapters.inject import adapter_parameters, inject_adapters
from dora_diffusion.adapters.scope import norm_scope
from dora_diffusion.adapters.state import load_adapter, save_adapter
from dora_diffusion.config import AdapterConfig, ConfigError, TrainConfig, without_effect
from dora_diffusion.export import convert_adapter
from dora_diffusion.export.fitting import FitSettings
from dora_diffusion.formats.adapter.file import AdapterFormatError, AdapterMetadata, read_adapter
from dora_diffusion.models.load import load_components
from dora_diffusion.training.inputs.plan import plan_run
from dora_diffusion.training.processes import make_accelerator
from dora_diffusion.training.recipe import assemble, train
from dora_diffusion.training.trainable.adapters import inject_trained
from tests.formats.layouts.lokr_files import lokr, save
from tests.refusal import refused
from tests.training.helpers import (
    SAMPLES,
    assert_same_adapter,
    compile_without_compiler,
    losses,
    make_config,
    warnings_of,
)


def test_a_lokr_is_converted_before_a_run_starts_from_it(tiny_run, sd1_folder, tmp_path):
    """Refused before the model is loaded, with what to do; and that works."""
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    path = save(tmp_path / "lokr.safetensors", {name: lokr(torch.ones(64, 64), size=0.1)})
    command = (
        "convert it first with 'dora-diffusion convert ADAPTER OUTPUT --to lora --rank RANK --base "
        "MODEL'"
    )
    with refused("init_adapter", f"{path} is a LoKr, whose factors are not trained", command):
        train(tiny_run(init_adapter=str(path)))
    for target in ("lora", "smaller-rank"):
        fit, output = FitSettings(rank=4), tmp_path / target
        start = convert_adapter(path, output, target, fit, base=sd1_folder).path
        train(tiny_run(init_adapter=str(start), targets=["attention"], rank=4, max_train_steps=1,
                       output_dir=str(tmp_path / f"{target}-run")))  # fmt: skip


def test_a_conv_rank_without_conv_layers_is_said(config):
    said = warnings_of(replace(config, targets=["attention"]))
    assert said == ["conv_rank has no effect because targets name no Conv2d layer"]
    said = warnings_of(replace(config, targets=["attention"], conv_rank=4, conv_alpha=2.0,
                           overwrite_output_dir=True))  # fmt: skip
    assert said == ["conv_alpha has no effect because targets name no Conv2d layer"]


@pytest.mark.slow
def test_a_compiled_run_follows_the_other_in_few_graphs(
    sd1_folder, shaped_photos, tmp_path, monkeypatch
):
    # Without a C++ compiler, and the cheapest kind of block.
    counter = CompileCounterWithBackend("aot_eager")
    compile_without_compiler(monkeypatch, counter, fullgraph=True)
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


def test_a_machine_that_cannot_compile_is_refused_before_class_images_are_made(config, monkeypatch):
    def refuse(device):
        raise ConfigError("compile does not work", "compile")

    monkeypatch.setattr("dora_diffusion.training.features.compile.require_compiler", refuse)
    monkeypatch.setattr("dora_diffusion.training.recipe.open_data", None)
    with refused("compile"):
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


TARGETS = {"unet": ("cross-attention",), "text_encoder": ("text-encoder-attention",)}


@pytest.fixture(scope="module")
def other(sd1_folder, tmp_path_factory):
    """A DoRA of UNet and text encoder that has moved, alpha 1.5 at rank 2, in kohya's format."""
    folder, components = tmp_path_factory.mktemp("other"), load_components(sd1_folder).adaptable()
    generator = torch.Generator().manual_seed(1)
    for name, targets in TARGETS.items():
        inject_adapters(components[name], AdapterConfig(targets, rank=2, alpha=1.5))
        for parameter in adapter_parameters(components[name]):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    metadata = AdapterMetadata(family="sd1")
    return save_adapter(components, folder / "other.safetensors", "kohya", metadata=metadata)


def predictions(components):
    """Outputs of text encoder and UNet."""
    ids, latents = torch.arange(77)[None] % 50, torch.linspace(-1, 1, 256).view(1, 4, 8, 8)
    latents = latents.to(components.denoiser.dtype)
    with torch.no_grad(), norm_scope(*components.adaptable().values()), components.eval_mode():
        states = components.text_encoders[0](ids).last_hidden_state
        return states, components.denoiser(latents, torch.tensor([30]), states).sample


def opened(config):
    return assemble(plan_run(config), make_accelerator(config))


@pytest.mark.parametrize("rank", [2, 5])
@pytest.mark.parametrize("key_format", ["kohya", "diffusers", "peft"])
def test_a_run_starts_from_what_load_adapter_loads(
    tiny_run, sd1_folder, other, tmp_path, rank, key_format
):
    source = other
    if key_format != "kohya":
        source = convert_adapter(other, tmp_path / "converted", key_format).path
    loaded = load_components(sd1_folder)
    load_adapter(loaded.adaptable(), source)
    config = tiny_run(init_adapter=str(source), rank=rank, train_text_encoder=True)
    session = opened(config)
    tolerance = {"rtol": 0, "atol": 0}
    if rank != 2:  # Sums of other lengths, whose rounding depends on what was drawn.
        tolerance = {"rtol": 1e-6, "atol": 1e-8}
        for model in (session.components, loaded):
            for part in model.adaptable().values():
                part.double()
    for found, expected in zip(predictions(session.components), predictions(loaded), strict=True):
        torch.testing.assert_close(found, expected, **tolerance)
    assert session.weights.origin["init_adapter"] == source.name


def test_a_resumed_run_needs_no_file_that_it_started_from(tiny_run, other, tmp_path):
    start = Path(shutil.copy(other, tmp_path / "start.safetensors"))
    whole = tiny_run(
        init_adapter=str(start), rank=3, train_text_encoder=True, max_train_steps=2,
        checkpointing_steps=1, output_dir=str(tmp_path / "whole"), learning_rate=1e-3,
    )  # fmt: skip
    train(whole)
    parted = replace(whole, output_dir=str(tmp_path / "parted"), max_train_steps=1)
    train(parted)
    # Another file under its name is said, and none is fine: the checkpoint has all of it.
    tensors = {name: 2 * tensor for name, tensor in load_file(start).items()}
    save_file(tensors, start)
    resumed = replace(parted, max_train_steps=2, resume_from_checkpoint="latest")
    (said,) = [line for line in warnings_of(resumed) if "init_adapter" in line]
    assert said.startswith(f"init_adapter {start} has changed since the run started from it; check")
    assert_same_adapter(tmp_path / "whole", tmp_path / "parted")
    start.unlink()
    assert "init_adapter" not in str(warnings_of(replace(resumed, max_train_steps=3)))
    adapter = read_adapter(tmp_path / "parted")
    facts = adapter.metadata.extra
    assert facts["trained_alpha"] == "2.25"  # 1.5 at rank 2, here at rank 3
    assert facts == read_adapter(tmp_path / "whole").metadata.extra | {"training_steps": "3"}
    assert facts["init_adapter"] == "start.safetensors"
    digest = facts["init_adapter_sha256"]
    card = (tmp_path / "parted" / "README.md").read_text(encoding="utf-8")
    assert f", started from `start.safetensors` (SHA-256 {digest[:12]}) on `" in card
    with refused("resume_from_checkpoint", "init_adapter ("):
        train(replace(resumed, init_adapter=str(other), max_train_steps=4))


REFUSED = {
    "text encoder": ({"train_text_encoder": False},
                     "layers of text_encoder"),
    "rank": ({"rank": 1}, "the unet: it has rank 2, more than rank 1"),
    "targets": ({"targets": ["*.attn2.to_q"]}, "leave out 12 layers"),
    "method": ({"method": "lora"}, "the unet: it is a DoRA"),
    "nothing": ({"init_adapter": "/nowhere/x"}, "no adapter at /nowhere/x"),
    "hub": ({"init_adapter": "some/lora"}, "HF_HUB_OFFLINE"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_an_adapter_that_the_run_cannot_start_from_is_refused_before_the_photos_are_read(
    tiny_run, other, name, monkeypatch
):
    changes, message = REFUSED[name]
    monkeypatch.setattr("dora_diffusion.training.inputs.resolve.open_dataset", None)
    config = tiny_run(**{"init_adapter": str(other), "train_text_encoder": True, **changes})
    with refused("init_adapter", message):
        opened(config)


def test_an_adapter_of_another_family_is_refused_in_one_line(tiny_run, sdxl_folder, other):
    config = tiny_run(init_adapter=str(other), train_text_encoder=True, resolution=64)
    message = r"was made for .* \(sd1\), the base is .* \(sdxl\): use it with a base model of its"
    with pytest.raises(AdapterFormatError, match=message):
        opened(replace(config, pretrained_model_name_or_path=str(sdxl_folder)))


def test_an_adapter_in_the_folder_that_is_written_is_refused(tiny_run, other, tmp_path):
    (tmp_path / "out").mkdir()
    shutil.copy(other, tmp_path / "out")
    config = tiny_run(init_adapter=str(tmp_path / "out"), overwrite_output_dir=True)
    with refused("init_adapter", "are the same folder"):
        train(config)
    assert read_adapter(tmp_path / "out").layers


def test_full_fine_tuning_says_that_it_starts_from_no_adapter(other):
    config = TrainConfig(method="full", init_adapter=str(other), init="pissa")
    assert without_effect(config)["init_adapter"].endswith("because method is full")


@pytest.mark.slow
def test_every_layer_of_a_larger_rank_learns_in_all_of_it(tmp_path):
    """On the embedded model, rank 8 into 16: the update of each layer has rank above 8."""
    first = make_config(
        "embedded:tiny-sd", SAMPLES / "bolt_mug", tmp_path / "first", resolution=64, rank=8,
        conv_rank=8, max_train_steps=20,
    )  # fmt: skip
    train(first)
    second = replace(
        first, output_dir=str(tmp_path / "second"), init_adapter=first.output_dir, rank=16,
        conv_rank=16, max_train_steps=100,
    )  # fmt: skip
    train(second)
    ranks = {}
    for folder in ("first", "second"):
        for name, layer in read_adapter(tmp_path / folder).layers.items():
            update = layer.up.double().flatten(1) @ layer.down.double().flatten(1)
            ranks.setdefault(name, []).append(int(torch.linalg.matrix_rank(update, rtol=1e-5)))
    assert {before for before, _ in ranks.values()} == {8}
    assert min(after for _, after in ranks.values()) > 8, ranks
