"""Adapter files: what is written is read back, and other libraries compute the same from it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor, nn

from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterFormatError,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.formats.checkpoint.folder import PipelineFolder
from dora_diffusion.formats.files import stream as safetensors_stream
from dora_diffusion.formats.files.atomic import DiskFullError
from dora_diffusion.merge import Strengths, merge_tensor
from dora_diffusion.numerics.weights import LayerWeights, NormAxis

MakeAdapter = Callable[..., dict[str, LayerWeights]]
FACTS = AdapterMetadata(
    family="sdxl",
    base_model="some/model-xl",
    trigger="a photo of sks dog",
    resolution=1024,
    extra={"prediction_type": "epsilon", "steps": "500"},
)
Q_PROJ = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def merged(folder: Path, layers: dict[str, LayerWeights], name: str) -> Tensor:
    with PipelineFolder.open(folder) as pipeline:
        return merge_tensor(pipeline[f"{name}.weight"], [(layers[name], Strengths())])


def module_at(pipeline: Any, name: str) -> nn.Module:
    """The live module behind a canonical name."""
    component, _, path = name.partition(".")
    model = getattr(pipeline, component)
    if component != "unet" and not hasattr(model, "text_model"):
        path = path.removeprefix("text_model.")
    module: nn.Module = model.get_submodule(path)
    return module


def assert_close_to_merge(
    weight: Tensor, folder: Path, layers: dict[str, LayerWeights], name: str
) -> None:
    """Equal to our merge within 1e-6 of its largest entry, and different from the base."""
    expected = merged(folder, layers, name)
    size = expected.abs().max().item()
    assert (weight - expected).abs().max().item() <= 1e-6 * size, name
    with PipelineFolder.open(folder) as pipeline:
        assert (weight - pipeline[f"{name}.weight"]).abs().max().item() > 1e-3 * size, name


def load_pipeline(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize("target", ["diffusers", "kohya", "peft"])
@pytest.mark.parametrize("axis", ["output", "input", None])
def test_round_trip(
    tmp_path: Path,
    sdxl_folder: Path,
    target: str,
    axis: NormAxis | None,
    random_adapter: MakeAdapter,
    assert_same_layers: Callable[..., None],
) -> None:
    """Reading gives the same effective layers and facts; writing again gives the same bytes."""
    layers = random_adapter(sdxl_folder, axis=axis, mixed_ranks=True, every=3)
    adapter = AdapterFile(layers, FACTS)
    if axis == "input" and target != "kohya":
        with pytest.raises(AdapterFormatError, match=r"input axis.*kohya format"):
            write_adapter(tmp_path / "a", adapter, target)
        return
    first = write_adapter(tmp_path / "a", adapter, target)
    shapes = PipelineFolder(sdxl_folder).module_shapes()
    for read in (read_adapter(tmp_path / "a"), read_adapter(first, shapes)):
        assert_same_layers(read.layers, layers)
        assert {n: layer.rank for n, layer in read.layers.items()} == {
            n: layer.rank for n, layer in layers.items()
        }
        assert read.metadata.family == "sdxl"
        assert read.metadata.trigger == FACTS.trigger
        assert read.metadata.resolution == 1024
        assert read.metadata.base_model == "some/model-xl"
        assert read.metadata.extra["steps"] == "500"
    write_adapter(tmp_path / "b", read_adapter(first), target)
    again = {p.relative_to(tmp_path / "b"): p for p in (tmp_path / "b").rglob("*") if p.is_file()}
    assert again
    for relative, file in again.items():
        assert file.read_bytes() == (tmp_path / "a" / relative).read_bytes(), relative


@pytest.mark.parametrize("target", ["diffusers", "kohya", "peft"])
def test_conversion_chain_keeps_the_effect(
    tmp_path: Path,
    sdxl_folder: Path,
    target: str,
    random_adapter: MakeAdapter,
    assert_same_layers: Callable[..., None],
) -> None:
    layers = random_adapter(sdxl_folder, mixed_ranks=True, every=5)
    adapter = AdapterFile(layers, FACTS)
    for index, step in enumerate(["kohya", "diffusers", "peft", target]):
        write_adapter(tmp_path / str(index), adapter, step)
        adapter = read_adapter(tmp_path / str(index))
    assert_same_layers(adapter.layers, layers, tolerance=1e-5)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_diffusers_loads_the_exact_weights(
    tmp_path: Path, family: str, request: pytest.FixtureRequest, random_adapter: MakeAdapter
) -> None:
    """UNet and text encoders, all kinds of layers: fused weights equal our merge.

    The loaders only warn about keys they drop, so the values are compared.
    """
    folder = request.getfixturevalue(f"{family}_folder")
    layers = random_adapter(folder, mixed_ranks=family != "sd1", every=2)
    file = write_adapter(tmp_path, AdapterFile(layers, AdapterMetadata(family=family)))
    assert file.name == "pytorch_lora_weights.safetensors"
    pipeline = load_pipeline(folder)
    pipeline.load_lora_weights(tmp_path)
    components = sorted({name.split(".")[0] for name in layers})
    pipeline.fuse_lora(components=components)
    pipeline.unload_lora_weights()
    for name in layers:
        weight = module_at(pipeline, name).weight
        assert_close_to_merge(weight, folder, layers, name)


def test_diffusers_loads_plain_lora(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    layers = random_adapter(sd1_folder, axis=None, every=4)
    write_adapter(tmp_path, AdapterFile(layers))
    pipeline = load_pipeline(sd1_folder)
    pipeline.load_lora_weights(tmp_path)
    pipeline.fuse_lora(components=["unet", "text_encoder"])
    pipeline.unload_lora_weights()
    for name in layers:
        assert_close_to_merge(module_at(pipeline, name).weight, sd1_folder, layers, name)


def test_a_bare_magnitude_key_is_lost_by_diffusers(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    """Why text-encoder magnitudes are spelled `.lora_magnitude_vector.weight`.

    If this fails, diffusers reads both spellings and the note in docs/formats.md is out of date.
    """
    layers = random_adapter(sd1_folder, components=["text_encoder"])
    file = write_adapter(tmp_path / "a", AdapterFile(layers))
    bare = {
        key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): tensor
        for key, tensor in load_file(file).items()
    }
    save_file(bare, tmp_path / "bare.safetensors")
    pipeline = load_pipeline(sd1_folder)
    pipeline.load_lora_weights(tmp_path / "bare.safetensors")
    pipeline.fuse_lora(components=["text_encoder"])
    pipeline.unload_lora_weights()
    weight = module_at(pipeline, Q_PROJ).weight
    expected = merged(sd1_folder, layers, Q_PROJ)
    assert (weight - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("component", ["unet", "text_encoder", "text_encoder_2"])
def test_peft_merges_the_folder_exactly(
    tmp_path: Path, sdxl_folder: Path, component: str, random_adapter: MakeAdapter
) -> None:
    from peft import PeftModel

    layers = random_adapter(sdxl_folder, components=[component], mixed_ranks=True, every=2)
    facts = AdapterMetadata(base_model="/home/someone/models/private")
    folder = write_adapter(tmp_path, AdapterFile(layers, facts), "peft")
    model = getattr(load_pipeline(sdxl_folder), component)
    flat = not hasattr(model, "text_model")
    peft_model = PeftModel.from_pretrained(model, folder / component).merge_and_unload()
    for name in layers:
        path = name.partition(".")[2]
        path = path.removeprefix("text_model.") if flat else path
        weight = peft_model.get_submodule(path).weight
        assert_close_to_merge(weight, sdxl_folder, layers, name)
    text = (folder / component / "adapter_config.json").read_text()
    assert "someone" not in text
    assert '"private"' in text


def test_a_peft_folder_made_by_peft_is_read(tmp_path: Path, sd1_folder: Path) -> None:
    """rsLoRA, alpha and rank patterns as PEFT itself writes them."""
    from peft import LoraConfig, get_peft_model

    unet = load_pipeline(sd1_folder).unet
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_dora=True,
        use_rslora=True,
        target_modules=["to_q", "to_k", "conv1"],
        rank_pattern={"to_k": 3},
        alpha_pattern={"mid_block.*conv1": 5},
        init_lora_weights=False,
    )
    model = get_peft_model(unet, config)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.1
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path, PipelineFolder(sd1_folder).module_shapes())
    fused = model.merge_and_unload()
    assert len(adapter.layers) > 20
    for name in adapter.layers:
        weight = fused.get_submodule(name.removeprefix("unet.")).weight
        assert_close_to_merge(weight, sd1_folder, adapter.layers, name)


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
    shapes = PipelineFolder(sd1_folder).module_shapes()
    layers = read_adapter(tmp_path / "with", shapes).layers
    assert {layer.scale for n, layer in layers.items() if n.startswith("unet")} == {2.0}
    assert {layer.scale for n, layer in layers.items() if n.startswith("text")} == {0.5}
    layers = read_adapter(tmp_path / "without", shapes).layers
    assert {layer.scale for layer in layers.values()} == {1.0}


@contextlib.contextmanager
def lycoris_axis(axis: NormAxis) -> Iterator[None]:
    """LyCORIS rebuilds modules from files with its default axis; set that for a while."""
    from lycoris.modules.locon import LoConModule

    original = LoConModule.__init__

    def with_axis(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "wd_on_out": axis == "output"})

    LoConModule.__init__ = with_axis
    try:
        yield
    finally:
        LoConModule.__init__ = original


@pytest.mark.parametrize("axis", ["output", "input", None])
def test_lycoris_merges_the_kohya_file_exactly(
    tmp_path: Path, sd1_folder: Path, axis: NormAxis | None, random_adapter: MakeAdapter
) -> None:
    """LyCORIS 3.2 and later: `wd_on_out` for the output axis, without it for the input axis."""
    from lycoris.wrapper import LycorisNetwork, create_lycoris_from_weights

    layers = random_adapter(sd1_folder, axis=axis, mixed_ranks=True, every=2)
    file = write_adapter(
        tmp_path / "a.safetensors", AdapterFile(layers, AdapterMetadata(family="sd1")), "kohya"
    )
    pipeline = load_pipeline(sd1_folder)
    for prefix, component in (("lora_unet", "unet"), ("lora_te_text_model", "text_encoder")):
        LycorisNetwork.LORA_PREFIX = prefix
        try:
            with lycoris_axis(axis or "output"):
                model = getattr(pipeline, component)
                network, _ = create_lycoris_from_weights(1.0, str(file), model)
            network.merge_to(1.0)
        finally:
            LycorisNetwork.LORA_PREFIX = "lycoris"
    for name in layers:
        assert_close_to_merge(module_at(pipeline, name).weight, sd1_folder, layers, name)


def test_lycoris_untold_of_the_input_axis(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    """An error, not a wrong picture. If this fails, docs/formats.md is out of date."""
    from lycoris.wrapper import LycorisNetwork, create_lycoris_from_weights

    layers = random_adapter(sd1_folder, axis="input", every=9, components=["unet"])
    file = write_adapter(
        tmp_path / "a.safetensors", AdapterFile(layers, AdapterMetadata(family="sd1")), "kohya"
    )
    LycorisNetwork.LORA_PREFIX = "lora_unet"
    try:
        with pytest.raises(RuntimeError, match="broadcast shape"):
            create_lycoris_from_weights(1.0, str(file), load_pipeline(sd1_folder).unet)
    finally:
        LycorisNetwork.LORA_PREFIX = "lycoris"


def test_kohya_shapes_and_metadata(
    tmp_path: Path, sdxl_folder: Path, random_adapter: MakeAdapter
) -> None:
    layers = random_adapter(sdxl_folder)
    path = write_adapter(tmp_path / "my dog.safetensors", AdapterFile(layers, FACTS), "kohya")
    tensors = load_file(path)
    scales = {key: tuple(t.shape) for key, t in tensors.items() if key.endswith("dora_scale")}
    assert scales["lora_unet_out_2.dora_scale"] == (4, 1, 1, 1)
    assert scales["lora_te1_text_model_encoder_layers_0_self_attn_v_proj.dora_scale"] == (32, 1)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["ss_v2"] == "False"
    assert metadata["ss_network_dim"] == "4"
    assert metadata["ss_network_alpha"] == "3"
    assert json.loads(metadata["ss_network_args"])["dora_wd"] == "True"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["modelspec.title"] == "my dog"
    assert metadata["modelspec.trigger_phrase"] == FACTS.trigger
    assert metadata["modelspec.resolution"] == "1024x1024"
    assert all(isinstance(value, str) and value for value in metadata.values())
    assert not any(str(tmp_path) in value for value in metadata.values())


def test_a_kohya_file_needs_its_family(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    layers = random_adapter(sd1_folder, every=9)
    with pytest.raises(AdapterFormatError, match="family is unknown"):
        write_adapter(tmp_path, AdapterFile(layers), "kohya")


def kohya_linear(
    scale_shape: tuple[int, ...] | None, out: int = 6, into: int = 8
) -> dict[str, Tensor]:
    prefix = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{prefix}.lora_down.weight": torch.randn(2, into),
        f"{prefix}.lora_up.weight": torch.randn(out, 2),
        f"{prefix}.alpha": torch.tensor(2.0**0.5),
    }
    if scale_shape is not None:
        tensors[f"{prefix}.dora_scale"] = torch.rand(scale_shape)
    return tensors


@pytest.mark.parametrize(
    ("shape", "size", "axis"),
    [((6, 1), (6, 8), "output"), ((1, 8), (6, 8), "input"), ((8, 1), (8, 8), "output"),
     ((1, 8), (8, 8), "input")],
)  # fmt: skip
def test_the_axis_is_told_by_shape_and_rank(
    tmp_path: Path, shape: tuple[int, ...], size: tuple[int, int], axis: str
) -> None:
    save_file(kohya_linear(shape, *size), tmp_path / "a.safetensors")
    (layer,) = read_adapter(tmp_path / "a.safetensors").layers.values()
    assert layer.norm_axis == axis
    assert layer.alpha == pytest.approx(2**0.5)  # rsLoRA: alpha 1 * sqrt(rank 2)


@pytest.mark.parametrize("shape", [(8,), (6, 8), (1, 1)])
def test_a_magnitude_without_an_axis_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    save_file(kohya_linear(shape), tmp_path / "a.safetensors")
    reason = "flat" if len(shape) == 1 else "fits neither axis"
    with pytest.raises(AdapterFormatError, match=rf"a\.safetensors: unet\..*{reason}"):
        read_adapter(tmp_path / "a.safetensors")


def test_tucker_convolutions_are_folded(tmp_path: Path) -> None:
    prefix = "lora_unet_conv_in"
    up, mid, down = torch.randn(5, 3, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(3, 4, 1, 1)
    save_file(
        {f"{prefix}.lora_up.weight": up, f"{prefix}.lora_mid.weight": mid,
         f"{prefix}.lora_down.weight": down, f"{prefix}.alpha": torch.tensor(3.0)},
        tmp_path / "a.safetensors",
    )  # fmt: skip
    (layer,) = read_adapter(tmp_path / "a.safetensors").layers.values()
    x = torch.randn(1, 4, 6, 6)
    conv = nn.functional.conv2d
    expected = conv(conv(conv(x, down), mid), up)
    torch.testing.assert_close(conv(conv(x, layer.down), layer.up), expected, atol=1e-4, rtol=0)


def test_old_diffusers_spellings_are_read(tmp_path: Path) -> None:
    block = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor"
    text = "text_encoder.text_model.encoder.layers.0"
    tensors = {
        f"{block}.to_out_lora.down.weight": torch.randn(2, 8),
        f"{block}.to_out_lora.up.weight": torch.randn(8, 2),
        f"{text}.self_attn.k_proj.lora_linear_layer.down.weight": torch.randn(2, 8),
        f"{text}.self_attn.k_proj.lora_linear_layer.up.weight": torch.randn(8, 2),
    }
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    layers = read_adapter(tmp_path).layers
    assert set(layers) == {
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
        f"{text}.self_attn.k_proj",
    }
    assert all(layer.scale == 1.0 for layer in layers.values())


def test_fp16_factors_keep_float32_magnitudes(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    layers = random_adapter(sd1_folder, every=9)
    for target in ("diffusers", "kohya"):
        adapter = AdapterFile(layers, AdapterMetadata(family="sd1"))
        file = write_adapter(tmp_path / target, adapter, target, dtype=torch.float16)
        for key, tensor in load_file(file).items():
            wide = "magnitude" in key or "dora_scale" in key or "alpha" in key
            assert tensor.dtype == (torch.float32 if wide else torch.float16), key


def test_lora_and_dora_do_not_mix_in_peft_formats(
    tmp_path: Path,
    random_layer: Callable[..., LayerWeights],
    assert_same_layers: Callable[..., None],
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 8, generator=generator)
    layers = {
        "unet.mid_block.attentions.0.proj_in": random_layer(weight, generator),
        "unet.mid_block.attentions.0.proj_out": random_layer(weight, generator, axis=None),
    }
    for target in ("diffusers", "peft"):
        with pytest.raises(AdapterFormatError, match="LoRA and DoRA layers in one component"):
            write_adapter(tmp_path, AdapterFile(layers), target)
    path = write_adapter(tmp_path, AdapterFile(layers, AdapterMetadata(family="sd1")), "kohya")
    assert_same_layers(read_adapter(path).layers, layers)


def test_another_models_adapter_is_refused(tmp_path: Path, sd1_folder: Path) -> None:
    save_file(kohya_linear(None), tmp_path / "a.safetensors")
    shapes = PipelineFolder(sd1_folder).module_shapes()
    with pytest.raises(AdapterFormatError, match=r"another model: unet\.mid_block.*\(6, 8\) on"):
        read_adapter(tmp_path / "a.safetensors", shapes)
    with pytest.raises(AdapterFormatError, match="belong to no known module"):
        read_adapter(tmp_path / "a.safetensors", {"unet.conv_in": (4, 4, 3, 3)})


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = kohya_linear((6, 1))
    broken = {key: value * float("nan") for key, value in tensors.items()}
    save_file(broken, path)
    with pytest.raises(AdapterFormatError, match="not finite"):
        read_adapter(path)
    save_file({k: v for k, v in tensors.items() if "lora_up" not in k}, path)
    with pytest.raises(AdapterFormatError, match="lacks its up factor"):
        read_adapter(path)
    save_file({}, path)
    with pytest.raises(AdapterFormatError, match="no tensors"):
        read_adapter(path)
    path.write_bytes(b"not a tensor file")
    with pytest.raises(AdapterFormatError, match="not a safetensors file"):
        read_adapter(path)


def test_folders_are_searched(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no adapter at"):
        read_adapter(tmp_path / "nothing")
    with pytest.raises(AdapterFormatError, match="no adapter file"):
        read_adapter(tmp_path)
    save_file(kohya_linear(None), tmp_path / "one.safetensors")
    assert len(read_adapter(tmp_path).layers) == 1
    save_file(kohya_linear(None), tmp_path / "two.safetensors")
    with pytest.raises(AdapterFormatError, match=r"one\.safetensors, two\.safetensors"):
        read_adapter(tmp_path)


def test_a_full_disk_leaves_the_old_adapter(
    tmp_path: Path, sd1_folder: Path, monkeypatch: pytest.MonkeyPatch, random_adapter: MakeAdapter
) -> None:
    adapter = AdapterFile(random_adapter(sd1_folder, every=9))
    path = write_adapter(tmp_path, adapter)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(safetensors_stream, "_write_one", full)
    with pytest.raises(DiskFullError, match="the disk is full"):
        write_adapter(tmp_path, adapter)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
