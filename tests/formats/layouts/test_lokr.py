"""LoKr files of LyCORIS, ComfyUI and PEFT, against the formulas and modules of these programs."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from dora_diffusion.export import inspect_adapter
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.formats.checkpoint.models import PipelineFolder
from dora_diffusion.formats.layouts.layout import AdapterFormatError
from dora_diffusion.numerics.merging import merge_tensor
from dora_diffusion.numerics.weights import LayerWeights, Strengths
from tests.formats.adapter.helpers import Held
from tests.formats.layouts.lokr_files import changed, delta, error, lokr, save

TO_Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV, SHORTCUT = "unet.mid_block.resnets.0.conv1", "unet.up_blocks.1.resnets.0.conv_shortcut"
FLAT = {name: "lora_unet_" + name[5:].replace(".", "_") for name in (TO_Q, CONV, SHORTCUT)}
SHAPES = {TO_Q: (24, 36), CONV: (24, 20, 3, 3), SHORTCUT: (24, 36, 1, 1)}
WEIGHTS = {
    name: torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for name, shape in SHAPES.items()
}
BASE = Held({f"{name}.weight": weight for name, weight in WEIGHTS.items()})
TOLERANCE = 1e-5


def merged(weight: Tensor, layer: LayerWeights) -> Tensor:
    return merge_tensor(weight, [(layer, Strengths())])


def combinations() -> list[Any]:
    """Each kind of layer with each kind of factors, alpha or none, and each axis."""
    kinds = itertools.product(
        SHAPES, ("whole", "low"), ("whole", "low", "tucker"), (3.0, None), (None, "output", "input")
    )
    return [kind for kind in kinds if kind[2] != "tucker" or kind[0] == CONV]


@pytest.mark.parametrize(("name", "w1", "w2", "alpha", "axis"), combinations())
def test_a_layer_is_that_of_comfyui(
    tmp_path: Path, name: str, w1: str, w2: str, alpha: float | None, axis: str | None
) -> None:
    """On the output axis with the norm of W + delta, as it was trained."""
    weight = WEIGHTS[name]
    tensors = lokr(weight, w1, w2, alpha=alpha, axis=axis)
    path = save(tmp_path / "lokr.safetensors", {FLAT[name]: tensors})
    expected = changed(weight, tensors)
    assert error(weight, expected) > 0.1
    for base in (BASE, None):
        layer = read_adapter(path, base).layers[name]
        assert layer.rank <= min(weight.flatten(1).shape)
        assert layer.norm_axis == (axis or layer.norm_axis)
        assert layer.stored_shape == weight.shape or layer.stored_shape == weight.shape[:2]
        assert error(merged(weight.view(layer.weight_shape), layer).view_as(weight), expected) < (
            TOLERANCE
        )
    assert (error(changed(weight, tensors, by_base=True), expected) < TOLERANCE) == (
        axis != "output"
    )


def test_products_stay_low_rank(tmp_path: Path) -> None:
    """Ranks multiply; a whole factor has that of its smaller side."""
    weight = WEIGHTS[TO_Q]  # Factors (4, 6) and (6, 6).
    ranks = {("low", "low"): 2, ("whole", "low"): 8, ("low", "whole"): 6, ("whole", "whole"): 24}
    for (w1, w2), rank in ranks.items():
        path = save(tmp_path / "lokr.safetensors", {FLAT[TO_Q]: lokr(weight, w1, w2)})
        assert read_adapter(path).layers[TO_Q].rank == rank
    wide = {"lokr_w1_a": torch.ones(4, 9), "lokr_w1_b": torch.ones(9, 6)}
    low = lokr(weight, w2="low")
    del low["lokr_w1"]
    assert read_adapter(save(path, {FLAT[TO_Q]: low | wide})).layers[TO_Q].rank == 4 * 2


# Settings of LyCORIS: every way in which it factorizes and scales a layer.
LYCORIS = [
    {}, {"alpha": 4.0}, {"full_matrix": True}, {"decompose_both": True, "lora_dim": 1},
    {"factor": 4}, {"use_tucker": True}, {"use_tucker": True, "weight_decompose": True},
    {"weight_decompose": True, "factor": 2}, {"weight_decompose": True, "wd_on_out": False},
    {"rs_lora": True}, {"unbalanced_factorization": True},
]  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("settings", LYCORIS, ids=str)
def test_a_layer_is_that_of_lycoris(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    """Against the module that LyCORIS trains, by its forward pass.

    Its `get_merged_weight` multiplies by the scale twice.
    """
    from lycoris.modules.lokr import LokrModule

    out, into, *kernel = SHAPES[name]
    is_linear = not kernel
    module = nn.Linear(into, out) if is_linear else nn.Conv2d(into, out, tuple(kernel))
    trained = LokrModule(FLAT[name], module, **{"lora_dim": 2, "alpha": 1.0, **settings})
    with torch.no_grad():
        for key, parameter in trained.named_parameters():
            if "dora_scale" in key:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            else:
                parameter.normal_()
    path = save(tmp_path / "lokr.safetensors", {FLAT[name]: trained.custom_state_dict()})
    weight = module.weight.detach()
    adapted = merged(weight, read_adapter(path, Held({f"{name}.weight": weight})).layers[name])
    inputs = torch.randn(2, into) if is_linear else torch.randn(2, into, 5, 5)
    apply = F.linear if is_linear else F.conv2d
    with torch.no_grad():
        expected, ours = trained(inputs).double(), apply(inputs, adapted, module.bias)
        assert error(module(inputs), expected) > 0.1
    assert error(ours, expected) < TOLERANCE


def peft_folder(folder: Path, model: nn.Module, **settings: Any) -> tuple[Path, dict[str, Tensor]]:
    """A random LoKr that PEFT wrote for a component, and its merged weights."""
    from peft import LoKrConfig, get_peft_model

    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoKrConfig(**settings, init_weights=False))
    wrapped.save_pretrained(folder)
    return folder, wrapped.merge_and_unload().state_dict()


@pytest.mark.parametrize(
    ("component", "settings"),
    [
        ("unet", {"r": 4, "alpha": 6, "target_modules": ["to_q", "to_k", "conv1", "proj_in"]}),
        ("unet", {
            "r": 2, "alpha": 5, "decompose_both": True, "use_effective_conv2d": True,
            "target_modules": ["to_q", "conv1", "conv_shortcut", "ff.net.2"],
            "rank_pattern": {"to_q": 1}, "alpha_pattern": {"conv1": 3},
        }),
        ("unet", {"r": 64, "alpha": 16, "target_modules": ["to_v", "conv2"],
                  "rank_pattern": {"conv2": 80}}),
        ("text_encoder", {"r": 2, "alpha": 3, "target_modules": ["q_proj", "fc1"]}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("adapter_name", ["", ".default"])
def test_a_folder_of_peft_is_merged_as_by_peft(
    tmp_path: Path, shallow: Any, component: str, settings: dict[str, Any], adapter_name: str
) -> None:
    """Also with whole factors, which PEFT alone scales by alpha / r (the third)."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    kind = UNet2DConditionModel if component == "unet" else CLIPTextModel
    model = kind.from_pretrained(shallow("sd1") / component)
    folder, expected = peft_folder(tmp_path / component, model, **settings)
    file = folder / "adapter_model.safetensors"
    save_file({key + adapter_name: tensor for key, tensor in load_file(file).items()}, file)
    with PipelineFolder.open(shallow("sd1")) as base:
        layers = read_adapter(folder, base).layers
        assert {name.rpartition(".")[2] for name in layers} >= {"to_v", "conv2"} or len(layers) > 5
        for name, layer in layers.items():
            path = name.partition(".")[2]
            stored = expected.get(f"{path}.weight")
            if stored is None:
                stored = expected[f"{path.removeprefix('text_model.')}.weight"]
            weight = base[f"{name}.weight"]
            assert error(weight, stored.double()) > 1e-3, name
            assert error(merged(weight, layer), stored.double()) < TOLERANCE, name
    report = inspect_adapter(folder)
    assert report.tools["PEFT"] == "exact"
    assert report.method == "LoKr, read as LoRA"


FC1 = "text_model.encoder.layers.0.mlp.fc1"
NAMES = {
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q": TO_Q,
    "lycoris_mid_block_attentions_0_transformer_blocks_0_attn1_to_q": TO_Q,
    "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q": TO_Q,
    TO_Q: TO_Q,
    "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q": TO_Q,
    "lora_te_text_model_encoder_layers_0_mlp_fc1": f"text_encoder.{FC1}",
    "lora_te2_text_model_encoder_layers_0_mlp_fc1": f"text_encoder_2.{FC1}",
    "lora_unet_layers_1_attention_out": "transformer.layers.1.attention.to_out.0",
    "lycoris_layers_1_attention_to_out_0": "transformer.layers.1.attention.to_out.0",
    "diffusion_model.layers.1.attention.out": "transformer.layers.1.attention.to_out.0",
    "transformer.layers.1.feed_forward.w2": "transformer.layers.1.feed_forward.w2",
    "transformer.transformer_blocks.0.attn.to_q": "transformer.transformer_blocks.0.attn.to_q",
}


@pytest.mark.parametrize("stored", NAMES)
def test_names_are_those_of_every_program(tmp_path: Path, stored: str) -> None:
    file = lokr(WEIGHTS[TO_Q], "low", "low", axis="output")
    path = save(tmp_path / "lokr.safetensors", {stored: file})
    assert read_adapter(path).layers.keys() == {NAMES[stored]}


@pytest.mark.parametrize(("leaf", "parts"), [("qkv", "qkv"), ("to_kv", "kv")])
def test_joined_projections_are_split(tmp_path: Path, leaf: str, parts: str) -> None:
    block = "diffusion_model.layers.0.attention" if leaf == "qkv" else TO_Q.rpartition(".")[0]
    weight = torch.randn(24 * len(parts), 36, generator=torch.Generator().manual_seed(3))
    file = lokr(weight, axis="output")
    layers = read_adapter(save(tmp_path / "lokr.safetensors", {f"{block}.{leaf}": file})).layers
    expected = changed(weight, file).chunk(len(parts))
    for part, rows, wanted in zip(parts, weight.chunk(len(parts)), expected, strict=True):
        [layer] = [layer for name, layer in layers.items() if name.endswith(f".to_{part}")]
        assert error(merged(rows, layer), wanted) < TOLERANCE


def test_layers_of_lora_may_lie_beside(tmp_path: Path) -> None:
    """As LyCORIS writes them for small layers; a LoRA keeps its alpha, a LoKr its own."""
    lora = {"lora_down.weight": torch.randn(2, 36), "lora_up.weight": torch.randn(24, 2),
            "alpha": torch.tensor(1.0)}  # fmt: skip
    conv = lokr(WEIGHTS[CONV], "whole", "low", axis="output")
    path = save(tmp_path / "mixed.safetensors", {FLAT[TO_Q]: lora, FLAT[CONV]: conv})
    layers = read_adapter(path, BASE).layers
    expected = WEIGHTS[TO_Q] + 0.5 * lora["lora_up.weight"] @ lora["lora_down.weight"]
    assert error(merged(WEIGHTS[TO_Q], layers[TO_Q]), expected.double()) < TOLERANCE
    assert error(merged(WEIGHTS[CONV], layers[CONV]), changed(WEIGHTS[CONV], conv)) < TOLERANCE
    assert inspect_adapter(path).method == "LoKr, read as DoRA and LoRA"


def test_alpha_of_whole_factors_has_no_effect(tmp_path: Path) -> None:
    """ai-toolkit writes 9999999999; and no alpha is assumed where none is needed."""
    file = lokr(WEIGHTS[TO_Q], alpha=9999999999.0)
    path = save(tmp_path / "lokr.safetensors", {FLAT[TO_Q]: file})
    layer = read_adapter(path, BASE).layers[TO_Q]
    assert layer.scale == 1
    assert error(merged(WEIGHTS[TO_Q], layer), WEIGHTS[TO_Q] + delta(WEIGHTS[TO_Q], file)) < 1e-5
    del file["alpha"]
    assert not read_adapter(save(path, {FLAT[TO_Q]: file})).lacks_alpha
    low = lokr(WEIGHTS[TO_Q], w1="low", alpha=None)
    adapter = read_adapter(save(path, {FLAT[TO_Q]: low}))
    assert adapter.lacks_alpha
    assert adapter.layers[TO_Q].scale == 1
    assert read_adapter(path, alpha=5.0).layers[TO_Q].scale == 5


LOW = lokr(WEIGHTS[TO_Q], "low", "low")
ONES, CORE = torch.ones(6, 6), torch.ones(2, 2, 3, 3)
W1 = {"lokr_w1": torch.ones(4, 6)}
BAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "no w2": (W1, "needs lokr_w2, or lokr_w2_a and lokr_w2_b, and has none of them; the file is "
              "incomplete or damaged; save it again in the program that trained it"),
    "no w1_b": ({key: tensor for key, tensor in LOW.items() if key != "lokr_w1_b"},
                r"needs lokr_w1, or lokr_w1_a and lokr_w1_b, and has lokr_w1_a \(4, 1\);"),
    "two w1": ({**LOW, **W1}, "needs lokr_w1, or"),
    "core alone": ({**W1, "lokr_t2": CORE}, "needs lokr_w2"),
    "core of a whole w2": ({**W1, "lokr_w2": ONES, "lokr_t2": CORE}, "needs lokr_w2"),
    "ranks": ({**LOW, "lokr_w2_b": torch.ones(3, 6)},
              r"lokr_w2_a \(6, 2\), lokr_w2_b \(3, 6\) do not multiply"),
    "core": ({**LOW, "lokr_t2": torch.ones(2, 5, 3, 3)},
             r"lokr_t2 \(2, 5, 3, 3\) do not multiply"),
    "vector": ({**LOW, "lokr_w2_a": torch.ones(12)}, r"lokr_w2_a \(12,\).* do not multiply"),
    "number": ({**LOW, "lokr_w2_b": torch.tensor(1.0)}, r"lokr_w2_b \(\) do not multiply"),
    "4-D w1": ({"lokr_w1": torch.ones(4, 6, 1, 1), "lokr_w2": ONES}, "is not a matrix"),
    "of a LoRA": ({**LOW, "lora_up.weight": torch.ones(24, 2)}, "factors of a LoKr, and up of a"),
    "shape": ({**W1, "lokr_w2": torch.ones(6, 5)}, r"made for another model: .*\(24, 30\)"),
    "kernel": ({**W1, "lokr_w2": torch.ones(6, 54)}, r"made for another model: .*\(24, 324\)"),
    "NaN": ({**LOW, "lokr_w1_a": torch.full((4, 1), math.nan)}, "w1_a contains numbers that are"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_layer_is_named_with_the_fix(tmp_path: Path, kind: str) -> None:
    file, message = BAD[kind]
    path = save(tmp_path / "lokr.safetensors", {FLAT[TO_Q]: file})
    with pytest.raises(AdapterFormatError, match=message) as caught:
        read_adapter(path, BASE)
    assert str(caught.value).startswith("lokr.safetensors: ")
    assert TO_Q in str(caught.value) or FLAT[TO_Q] in str(caught.value)


def test_factors_of_a_damaged_file_do_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "lokr.safetensors", {FLAT[TO_Q]: lokr(WEIGHTS[TO_Q])})
    monkeypatch.setattr("dora_diffusion.formats.layouts.lokr._LARGEST", 24 * 36 - 1)
    with pytest.raises(AdapterFormatError, match=f"{TO_Q}: its factors are too large for any"):
        read_adapter(path)
    path = save(path, {FLAT[CONV]: lokr(WEIGHTS[CONV], w2="tucker")})
    monkeypatch.setattr("dora_diffusion.formats.layouts.lokr._LARGEST", 2 * 9 * 5 - 1)
    with pytest.raises(AdapterFormatError, match=f"{CONV}: .* do not multiply"):
        read_adapter(path)


def test_an_alpha_that_only_metadata_hold_is_read_by_no_other_program(tmp_path: Path) -> None:
    """ComfyUI's scale is 1 then, and the training's is used here, as for a LoRA."""
    path = save(tmp_path / "lokr.safetensors", {FLAT[TO_Q]: lokr(WEIGHTS[TO_Q], "low", "low")})
    assert inspect_adapter(path).tools["ComfyUI and Forge"].startswith("exact: ")
    tensors = {key: tensor for key, tensor in load_file(path).items() if "alpha" not in key}
    save_file(tensors, path, {"ss_network_dim": "2", "ss_network_alpha": "1"})
    assert read_adapter(path).layers[TO_Q].scale == 0.5
    assert inspect_adapter(path).tools["ComfyUI and Forge"].startswith("convert: ")


def test_the_kernel_is_that_of_the_model(tmp_path: Path) -> None:
    """By its weight, where the name would say 3x3."""
    weight = torch.randn(24, 20, 1, 5, generator=torch.Generator().manual_seed(4))
    file = lokr(weight, w2="low", axis="input")
    path = save(tmp_path / "lokr.safetensors", {FLAT[CONV]: file})
    layer = read_adapter(path, Held({f"{CONV}.weight": weight})).layers[CONV]
    assert error(merged(weight, layer), changed(weight, file)) < TOLERANCE


def test_a_broken_rank_of_peft_is_refused(tmp_path: Path, shallow: Any) -> None:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel.from_pretrained(shallow("sd1") / "unet")
    folder, _ = peft_folder(tmp_path / "unet", model, r=4, target_modules=["to_q"])
    config = folder / "adapter_config.json"
    config.write_text(config.read_text("utf-8").replace('"r": 4', '"r": 0'), "utf-8")
    with pytest.raises(AdapterFormatError, match="configuration has a broken alpha"):
        read_adapter(folder)
