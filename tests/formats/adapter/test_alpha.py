"""Alphas that files state, lose, or record elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_diffusion.adapters.state import adapter_state
from dora_diffusion.cli.main import main
from dora_diffusion.export import convert_adapter
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterFormatError,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.formats.checkpoint.models import PipelineFolder
from dora_diffusion.numerics.merging import merge_tensor
from dora_diffusion.numerics.weights import Strengths
from dora_diffusion.sampling.load import load_adapted
from tests.formats.adapter.helpers import (
    MakeAdapter,
    SameLayers,
    kohya,
    load_pipeline,
    saved,
)


def test_the_file_that_diffusers_saves_is_read(tmp_path: Path, sd1_folder: Path) -> None:
    """With `lora_adapter_metadata`, and without it, where diffusers means alpha = rank."""
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    pipeline = load_pipeline(sd1_folder)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q"], init_lora_weights=False)
    text = LoraConfig(r=4, lora_alpha=2, target_modules=["fc1"], init_lora_weights=False)
    pipeline.unet.add_adapter(config)
    inject_adapter_in_model(text, pipeline.text_encoder)
    for folder, facts in (
        (
            "with",
            _collate_lora_metadata({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}),
        ),
        ("without", {}),
    ):
        StableDiffusionPipeline.save_lora_weights(
            tmp_path / folder,
            unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
            text_encoder_lora_layers=get_peft_model_state_dict(pipeline.text_encoder),
            **facts,
        )
    shapes = PipelineFolder(sd1_folder)
    layers = read_adapter(tmp_path / "with", shapes).layers
    assert {layer.scale for n, layer in layers.items() if n.startswith("unet")} == {2.0}
    assert {layer.scale for n, layer in layers.items() if n.startswith("text")} == {0.5}
    layers = read_adapter(tmp_path / "without", shapes).layers
    assert {layer.scale for layer in layers.values()} == {1.0}


def test_a_lost_alpha_is_given_back(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter, assert_same_layers: SameLayers
) -> None:
    layers = random_adapter(sd1_folder, every=5)  # rank 4, alpha 3
    tensors = {k: t for k, t in kohya(tmp_path, layers).items() if not k.endswith(".alpha")}
    path = saved(tmp_path, tensors)
    plain = convert_adapter(path, tmp_path / "a", "kohya", base=sd1_folder)
    assert plain.notes == ("it does not store its alpha; alpha = rank is assumed",)
    given = convert_adapter(path, tmp_path / "b", "kohya", base=sd1_folder, alpha=3.0)
    assert_same_layers(read_adapter(given.path).layers, layers)
    for wrong in (0.0, -3.0, float("inf"), float("nan")):
        with pytest.raises(AdapterFormatError, match=f"alpha is {wrong:g}; it must be"):
            convert_adapter(path, tmp_path / "wrong", "kohya", base=sd1_folder, alpha=wrong)
    path = saved(tmp_path, tensors, {"ss_network_dim": "4", "ss_network_alpha": "3.0"})
    found = convert_adapter(path, tmp_path / "c", "kohya", base=sd1_folder)
    assert_same_layers(read_adapter(found.path).layers, layers)
    assert found.notes == ("its layers do not store their alpha; alpha 3 of its training is used",)
    good = load_file(tmp_path / "good.safetensors")
    with pytest.raises(AdapterFormatError, match="states its alpha, 3; leave out"):
        read_adapter(saved(tmp_path, good), alpha=2.0)


@pytest.mark.parametrize("target", ["diffusers", "kohya", "peft"])
def test_an_alpha_that_was_not_lost_is_not_replaced(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter, target: str
) -> None:
    """Our own files hold or record it, also where the scale is multiplied in."""
    layers = random_adapter(sd1_folder, every=9)
    path = write_adapter(tmp_path / "a", AdapterFile(layers, AdapterMetadata("sd1")), target)
    with pytest.raises(AdapterFormatError, match="the file determines its alpha"):
        convert_adapter(path, tmp_path / "b", "kohya", alpha=2.0)
    assert not (tmp_path / "b").exists()


def test_an_alpha_that_is_assumed_is_said(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """By every command, also for a Diffusers file without metadata; and `--alpha` gives it."""
    layers = random_adapter(sd1_folder, every=9)  # rank 4, alpha 3
    good = load_file(write_adapter(tmp_path / "good", AdapterFile(layers), "peft") / "unet" /
                     "adapter_model.safetensors")  # fmt: skip
    tensors = {key.replace("base_model.model.", "unet."): tensor for key, tensor in good.items()}
    unet = {name: one for name, one in layers.items() if name.startswith("unet.")}
    path, base = saved(tmp_path, tensors), str(sd1_folder)
    said = "it does not store its alpha; alpha = rank is assumed"
    assert read_adapter(path).assumptions == (said,)
    assert main(["inspect", str(path)]) == 0
    assert said in " ".join(capsys.readouterr().out.split())
    merged = tmp_path / "m.safetensors"
    common = ["--base", base, "--adapter", str(path)]
    assert main(["export", *common, "--output", str(merged)]) == 0
    assert f"warning: broken.safetensors: {said}" in capsys.readouterr().err
    assert main(["verify", str(merged), *common]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"verified, assuming that this is right: broken.safetensors: {said}"
    )
    image = ["--prompt", "x", "--output", str(tmp_path / "x.png"), "--steps", "1"]
    size = ["--width", "64", "--height", "64"]
    assert main(["generate", *common, *image, *size]) == 0
    assert f"warning: broken.safetensors: {said}" in capsys.readouterr().err
    other = ["generate", *common, "--prompt", "x", "--output", str(tmp_path / "y.png"), *size]
    seed = ["--seed", "1", "--steps", "1"]
    assert main([*other, *seed, "--alpha", "3"]) == 0
    assert "alpha" not in capsys.readouterr().err
    adapted, _ = load_adapted(sd1_folder, path, alpha=3.0)
    loaded = adapter_state(adapted.adaptable())
    assert {layer.alpha for layer in loaded.values()} == {3.0}
    given = tmp_path / "given.safetensors"
    assert main(["export", *common, "--output", str(given), "--alpha", "3"]) == 0
    assert "alpha" not in capsys.readouterr().err
    assert main(["verify", str(given), *common, "--alpha", "3"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "verified"
    assert main(["verify", str(merged), *common, "--alpha", "3"]) == 1
    with PipelineFolder.open(sd1_folder) as pipeline:
        name = next(iter(unet))
        wanted = merge_tensor(pipeline[f"{name}.weight"], [(unet[name], Strengths())])
        open_file = load_file(given)
        assert any(t.shape == wanted.shape and torch.equal(t, wanted) for t in open_file.values())


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga"])
def test_adapters_of_a_changed_base_are_refused(tmp_path: Path, start: str) -> None:
    """PEFT subtracts them from the base's weights before it trains: they fit no released model."""
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", "init_lora_weights": start}), encoding="utf-8")
    with pytest.raises(AdapterFormatError, match=f"initialized by {start}, which changes"):
        read_adapter(tmp_path)
    # diffusers keeps PEFT's config in the metadata of its file.
    config = {"unet.r": 2, "unet.lora_alpha": 2, "unet.init_lora_weights": start}
    tensors = {
        "unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3),
        "unet.conv_in.lora_B.weight": torch.ones(8, 2, 1, 1),
    }
    file = tmp_path / "a.safetensors"
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(config)})
    with pytest.raises(AdapterFormatError, match=f"initialized by {start}, which changes"):
        read_adapter(file)
