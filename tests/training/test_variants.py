"""Other starts, directions and ranks: runs that stop and resume, and the files that they leave."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import cycle, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dora_diffusion.adapters.layers import adapted_layers
from dora_diffusion.adapters.state import adapter_state
from dora_diffusion.export import convert_adapter
from dora_diffusion.formats.adapter.file import read_adapter, write_adapter
from dora_diffusion.formats.files.runs import result_adapter
from dora_diffusion.models.load import load_components
from dora_diffusion.training.recipe import train
from dora_diffusion.training.results.checkpoint import hook_states, restore, state_of
from dora_diffusion.training.results.write import result_metadata
from tests.formats.layouts.helpers import (
    assert_close_to_merge,
    load_pipeline,
    module_at,
)
from tests.formats.layouts.test_kohya import lycoris_axis
from tests.refusal import refused
from tests.training.helpers import assert_same_adapter, losses, make_config, open_run

VARIANTS = {
    "pissa": {"init": "pissa"},
    "dvora": {"parametrization": "vera", "vera_rank": 8},
    "adalora": {
        "parametrization": "adalora",
        "rank": 4,
        "target_rank": 2,
        "allocation_interval": 1,
        "allocation_final": 1,
    },
}
variants = pytest.mark.parametrize("variant", VARIANTS)


@variants
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(
    sd1_folder: Path, photos: Path, tmp_path: Path, variant: str
) -> None:
    whole = make_config(
        sd1_folder, photos, tmp_path / "whole", checkpointing_steps=3, max_train_steps=6,
        train_text_encoder=True, targets=["cross-attention", "*.resnets.0.conv1"],
        with_prior_preservation=True, prior_preservation_mode="image-free",
        **{"gradient_accumulation_steps": 2, "loraplus_ratio": 4.0, "rslora": True,
           **VARIANTS[variant]},
    )  # fmt: skip
    train(whole)
    # As it was at its third step; what came later is trained again.
    shutil.copytree(tmp_path / "whole", tmp_path / "parted")
    parted = replace(whole, output_dir=str(tmp_path / "parted"))
    shutil.rmtree(tmp_path / "parted" / "checkpoint-6")
    train(replace(parted, resume_from_checkpoint="checkpoint-3"))
    assert_same_adapter(tmp_path / "whole", tmp_path / "parted")
    assert losses(tmp_path / "whole") == losses(tmp_path / "parted")


@variants
def test_a_checkpoint_holds_all_that_its_adapter_is_made_of(
    sd1_folder: Path, photos: Path, tmp_path: Path, variant: str
) -> None:
    """A start that is computed anew, elsewhere, may differ in its last bits, or in its signs."""
    settings = {"targets": ["cross-attention"], **VARIANTS[variant]}
    session = open_run(sd1_folder, photos, tmp_path / "a", **settings)
    session.step(1)
    state = state_of(session, 0, 0) | hook_states(session)
    expected = adapter_state(session.weights.modules)
    other = open_run(sd1_folder, photos, tmp_path / "b", **settings)
    with torch.no_grad():
        for _, layer in adapted_layers(other.components.denoiser):
            for tensor in (*layer.adapters.parameters(), *layer.adapters.buffers()):
                tensor.neg_()
    restore(other, state)
    for name, layer in adapter_state(other.weights.modules).items():
        for part in ("down", "up", "magnitude"):
            assert torch.equal(getattr(layer, part), getattr(expected[name], part)), name


def each_with(names: tuple[str, str]) -> Any:
    """Variants with one of two by turns, and with the other one in the slow suite."""
    quick = [*zip(VARIANTS, cycle(names), strict=False)]
    slow = [case for case in product(VARIANTS, names) if case not in quick]
    return [*quick, *(pytest.param(*case, marks=pytest.mark.slow) for case in slow)]


@pytest.mark.parametrize(("variant", "optimizer"), each_with(("adafactor", "adamw")))
def test_checkpointing_and_other_optimizers_train_it(
    sd1_folder: Path, photos: Path, tmp_path: Path, variant: str, optimizer: str
) -> None:
    plain = make_config(
        sd1_folder, photos, tmp_path / "plain", targets=["attention+conv"], optimizer=optimizer,
        max_train_steps=2, **VARIANTS[variant],
    )  # fmt: skip
    train(plain)
    train(replace(plain, output_dir=str(tmp_path / "saved"), gradient_checkpointing=True))
    assert_same_adapter(tmp_path / "plain", tmp_path / "saved", rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("variant", "axis"), each_with(("output", "input")))
def test_every_tool_reads_the_result_as_an_ordinary_adapter(
    sd1_folder: Path, photos: Path, tmp_path: Path, variant: str, axis: str
) -> None:
    """Diffusers, PEFT and LyCORIS merge what we merge; the first two know the output axis alone."""
    from lycoris.wrapper import LycorisNetwork, create_lycoris_from_weights
    from peft import PeftModel

    session = open_run(sd1_folder, photos, tmp_path, norm_axis=axis, **VARIANTS[variant])
    file = session.weights.writer()(tmp_path / "run", result_metadata(session, 1))
    adapter = read_adapter(file)
    layers, seen = adapter.layers, {}
    assert len(layers) > 30
    if axis == "output":
        pipeline = load_pipeline(sd1_folder)
        pipeline.load_lora_weights(file.parent, weight_name=file.name)
        pipeline.fuse_lora(components=["unet"])
        pipeline.unload_lora_weights()
        seen["diffusers"] = pipeline
        folder = write_adapter(tmp_path / "peft", adapter, "peft")
        model = PeftModel.from_pretrained(load_pipeline(sd1_folder).unet, folder / "unet")
        seen["peft"] = SimpleNamespace(unet=model.merge_and_unload())
    pipeline = load_pipeline(sd1_folder)
    file = write_adapter(tmp_path / "kohya.safetensors", adapter, "kohya")
    LycorisNetwork.LORA_PREFIX = "lora_unet"
    try:
        with lycoris_axis(axis):
            network, _ = create_lycoris_from_weights(1.0, str(file), pipeline.unet)
        network.merge_to(1.0)
    finally:
        LycorisNetwork.LORA_PREFIX = "lycoris"
    seen["lycoris"] = pipeline
    for loaded in seen.values():
        for name in layers:
            assert_close_to_merge(module_at(loaded, name).weight, sd1_folder, layers, name)


def test_a_fresh_pissa_has_the_leading_part_of_each_weight(
    sd1_folder: Path, photos: Path, tmp_path: Path
) -> None:
    session = open_run(sd1_folder, photos, tmp_path, targets=["attention"], init="pissa")
    base = dict(load_components(sd1_folder).denoiser.named_parameters())
    for path, layer in adapted_layers(session.components.denoiser):
        weight = base[f"{path}.weight"]
        direction = layer.adapters["default"].parametrization
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        leading = (u[:, :2] * s[:2]) @ vh[:2]
        torch.testing.assert_close(direction.start_up @ direction.start_down, leading,
                                   rtol=1e-3, atol=1e-4)  # fmt: skip


def test_a_dvora_leaves_a_compact_file_beside_an_ordinary_one(tiny_run, tmp_path):
    config = tiny_run(
        parametrization="vera", vera_rank=8, checkpointing_steps=2, train_text_encoder=True
    )
    result = train(config)
    run, checkpoint = tmp_path / "out", tmp_path / "out" / "checkpoint-2"
    assert result.adapter.name == "pytorch_lora_weights.safetensors"
    assert [file.name for file in checkpoint.glob("*.safetensors")] == ["vera.safetensors"]
    compact = read_adapter(run / "vera.safetensors")
    assert compact.metadata.extra["parametrization"] == "vera"
    ordinary = read_adapter(run).layers
    assert set(compact.layers) == set(ordinary)
    for name, layer in compact.layers.items():
        for part in ("down", "up", "magnitude"):
            assert torch.equal(getattr(layer, part), getattr(ordinary[name], part))
    trained = sum(w.rank + w.up.shape[0] + w.magnitude_size for w in ordinary.values())
    tensors = load_file(run / "vera.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == trained
    assert read_adapter(checkpoint).layers.keys() == ordinary.keys()
    convert_adapter(run / "vera.safetensors", tmp_path / "peft", "peft")
    assert read_adapter(tmp_path / "peft").layers.keys() == ordinary.keys()
    assert result_adapter(checkpoint).name == "vera.safetensors"
    assert "DVoRA (projections of rank 8" in (run / "README.md").read_text(encoding="utf-8")


def test_projections_that_are_not_drawn_as_before_are_no_checkpoint_of_the_run(
    sd1_folder: Path, photos: Path, tmp_path: Path
) -> None:
    session = open_run(sd1_folder, photos, tmp_path, targets=["attention"], parametrization="vera")
    state = state_of(session, 0, 0)
    assert set(state["projections"]) == {"unet"}
    restore(session, state)
    with refused("resume_from_checkpoint", "random projections"):
        restore(session, {**state, "projections": {"unet": "another"}})
