"""Tensors to layers: old names, Tucker cores, and no damage gets through."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from torch import nn

from dora_diffusion.adapters.state import LiveWeights
from dora_diffusion.formats.adapter.file import AdapterFormatError, read_adapter
from dora_diffusion.formats.checkpoint.folder import PipelineFolder
from dora_diffusion.numerics.weights import LayerWeights
from tests.formats.adapter.helpers import (
    BLOCK,
    ODD,
    kohya_linear,
    read_or_refused,
)
from tests.properties import at_least


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


def test_another_models_adapter_is_refused(tmp_path: Path, sd1_folder: Path) -> None:
    save_file(kohya_linear(None), tmp_path / "a.safetensors")
    base, another = PipelineFolder(sd1_folder), nn.ModuleDict({"conv_in": nn.Conv2d(4, 4, 3)})
    with pytest.raises(AdapterFormatError, match=r"another model: unet\.mid_block.*\(6, 8\) on"):
        read_adapter(tmp_path / "a.safetensors", base)
    with pytest.raises(AdapterFormatError, match="belong to no known module"):
        read_adapter(tmp_path / "a.safetensors", LiveWeights({"unet": another}))


PREFIX = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


WHOLE = save(
    {
        f"{PREFIX}.lora_down.weight": torch.ones(2, 8),
        f"{PREFIX}.lora_up.weight": torch.ones(6, 2),
        f"{PREFIX}.alpha": torch.tensor(2.0),
        f"{PREFIX}.dora_scale": torch.ones(6, 1),
    },
    {"ss_network_dim": "2", "ss_network_alpha": "1", "dora_diffusion.rank": "2"},
)


HEADER_BYTES = 8 + int.from_bytes(WHOLE[:8], "little")


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "cut", "insert"]),
        # Most of them in the header, where they matter.
        st.one_of(st.integers(0, HEADER_BYTES), st.integers(0, len(WHOLE) - 1)),
        st.one_of(
            st.binary(min_size=1, max_size=8), st.sampled_from([b'"', b"{", b"[", b"9", b"-"])
        ),
    ),
    min_size=1,
    max_size=4,
)


def mutated(edits: list[tuple[str, int, bytes]]) -> bytes:
    data = bytearray(WHOLE)
    for kind, place, content in edits:
        end = place + (len(content) if kind != "insert" else 0)
        data[place:end] = b"" if kind == "cut" else content
    return bytes(data)


@at_least(1500)
@given(edits=EDITS)
def test_no_damage_gets_past_the_readers(
    edits: list[tuple[str, int, bytes]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Read, or refused in our own words: never an error from inside a library."""
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(mutated(edits))
    try:
        layers = read_adapter(path).layers
    except AdapterFormatError:
        return
    for layer in layers.values():
        assert isinstance(layer, LayerWeights)
        assert torch.isfinite(layer.down).all()


MODULES = ("attn1.to_q", "attn2.to_kv")


SHAPE = st.one_of(
    st.sampled_from(
        [(2, 8), (6, 2), (6, 1), (1, 8), (6,), (8,), (), (0, 8), (6, 0), (2, 8, 1, 1), (2, 8, 3)]
    ),
    st.lists(st.sampled_from([0, 1, 2, 3, 6, 8]), max_size=5).map(tuple),
)


TENSOR = st.builds(
    lambda shape, dtype: torch.ones(shape).to(dtype),
    SHAPE,
    st.sampled_from(
        [torch.float32] * 4 + [torch.float16, torch.int64, torch.bool, torch.float8_e4m3fn]
    ),
)


PARTS = (
    "lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale", "magnitude",
    "lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "lora_magnitude_vector.weight",
    "lora_embedding_A", "lora_embedding_B",
)  # fmt: skip


KEY = st.builds(
    lambda kohya, module, part: (
        f"lora_unet_{BLOCK}_{module}".replace(".", "_") if kohya else f"unet.{BLOCK}.{module}"
    )
    + f".{part}",
    st.booleans(), st.sampled_from(MODULES), st.sampled_from(PARTS),
)  # fmt: skip


FIELDS = (
    "lora_adapter_metadata", "ss_network_dim", "ss_network_alpha", "ss_tag_frequency",
    "ss_resolution", "modelspec.resolution", "dora_diffusion.rank", "dora_diffusion.norm_axis",
    "dora_diffusion.alpha", "dora_diffusion.unet_layers_per_block", "dora_diffusion.resolution",
)  # fmt: skip


@at_least(600)
@given(
    good=st.booleans(), tensors=st.dictionaries(KEY, TENSOR, max_size=4),
    fields=st.dictionaries(st.sampled_from(FIELDS), ODD, max_size=2), with_model=st.booleans(),
)  # fmt: skip
def test_no_strange_tensors_get_past_the_readers(
    good: bool, tensors: dict[str, torch.Tensor], fields: dict[str, str], with_model: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    """Any shapes, dtypes and metadata under names that are known, beside a good layer or alone."""
    path = tmp_path_factory.getbasetemp() / "strange.safetensors"
    whole = {
        f"unet.{BLOCK}.attn1.to_q.lora_A.weight": torch.ones(2, 8),
        f"unet.{BLOCK}.attn1.to_q.lora_B.weight": torch.ones(8, 2),
    }
    save_file((whole if good else {}) | tensors, path, {"format": "pt", **fields})
    read_or_refused(path, with_model)


@pytest.mark.parametrize(
    ("changes", "fields", "reason"),
    [
        ({"lora_down.weight": torch.ones(2, 8, dtype=torch.int64)}, {}, "holds int64, not float"),
        ({"dora_scale": torch.ones(6, 1, dtype=torch.bool)}, {}, "holds bool, not float"),
        ({"alpha": torch.ones(3)}, {}, r"alpha has shape \(3,\)"),
        ({"lora_down.weight": torch.ones(0, 8), "lora_up.weight": torch.ones(6, 0)}, {}, "shape"),
        ({"lora_down.weight": torch.tensor(1.0)}, {}, r"factors of shapes \(\) and"),
        ({"lora_mid.weight": torch.ones(2, 3, 3, 3)}, {}, "its core .* does not fit"),
        ({"alpha": None}, {"ss_network_dim": "2", "ss_network_alpha": "inf"}, "its alpha is inf"),
        ({"alpha": None}, {"lora_adapter_metadata": '{"unet.lora_alpha": "x"}'}, "broken alpha"),
        ({"alpha": None}, {"lora_adapter_metadata": "[]"}, "is not a JSON object"),
    ],
)  # fmt: skip
def test_wrong_kinds_of_numbers_are_named(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], fields: dict[str, str], reason: str
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(WHOLE)
    tensors = load_file(path)
    for part, tensor in changes.items():
        tensors.pop(f"{PREFIX}.{part}", None)
        tensors |= {} if tensor is None else {f"{PREFIX}.{part}": tensor}
    save_file(tensors, path, {"format": "pt", **fields})
    with pytest.raises(AdapterFormatError, match=rf"^a\.safetensors: .*{reason}"):
        read_adapter(path)


def test_the_fuzzed_file_is_good_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(WHOLE)
    (layer,) = read_adapter(path).layers.values()
    assert (layer.norm_axis, layer.alpha) == ("output", 2.0)
    assert json.loads(WHOLE[8:HEADER_BYTES])["__metadata__"]["ss_network_dim"] == "2"
