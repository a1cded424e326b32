"""Tensors to layers: old names, Tucker cores, and no damage gets through."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from dora_diffusion.adapters.state import LiveWeights
from dora_diffusion.cli.main import main
from dora_diffusion.export import convert_adapter, inspect_adapter
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterFormatError,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.formats.checkpoint.models import PipelineFolder
from dora_diffusion.numerics.merging import merge_tensor
from dora_diffusion.numerics.weights import LayerWeights, Strengths
from tests.formats.adapter.helpers import (
    BLOCK,
    ODD,
    MakeAdapter,
    SameLayers,
    kohya_linear,
    read_or_refused,
    saved,
)
from tests.properties import at_least, fresh


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
    path = fresh(tmp_path_factory.getbasetemp() / "fuzzed.safetensors")
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
    path = fresh(tmp_path_factory.getbasetemp() / "strange.safetensors")
    whole = {
        f"unet.{BLOCK}.attn1.to_q.lora_A.weight": torch.ones(2, 8),
        f"unet.{BLOCK}.attn1.to_q.lora_B.weight": torch.ones(8, 2),
    }
    save_file((whole if good else {}) | tensors, path, {"format": "pt", **fields})
    read_or_refused(path, with_model)


@pytest.mark.parametrize(
    ("changes", "fields", "reason"),
    [
        ({"lora_down.weight": torch.ones(2, 8, dtype=torch.int64)}, {}, "is int64, not float"),
        ({"dora_scale": torch.ones(6, 1, dtype=torch.bool)}, {}, "is bool, not float"),
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


def test_text_encoder_keys_without_prefixes(
    tmp_path: Path, sdxl_folder: Path, random_adapter: MakeAdapter, assert_same_layers: SameLayers
) -> None:
    """The widths of the base tell the two encoders apart."""
    for component in ("text_encoder", "text_encoder_2"):
        layers = random_adapter(sdxl_folder, components=[component], every=2)
        layers.pop("text_encoder_2.text_projection", None)
        good = load_file(write_adapter(tmp_path / "a", AdapterFile(layers)))
        bare = {key.partition(".")[2]: tensor for key, tensor in good.items()}
        shorter = {key.removeprefix("text_model."): tensor for key, tensor in bare.items()}
        for broken in (bare, shorter):
            path = saved(tmp_path, broken)
            report = convert_adapter(
                path, tmp_path / "c", "diffusers", base=sdxl_folder, overwrite=True
            )
            assert_same_layers(read_adapter(report.path).layers, layers, tolerance=1e-5)
            assert report.notes[0].endswith(
                "text-encoder keys lack their component, which was added"
            )
            *_, told = report.notes
            assert report.notes[1] == "it does not store its alpha; alpha = rank is assumed"
            assert told.startswith("by their widths") == (component == "text_encoder_2")
            assert len(report.notes) == (2 if component == "text_encoder" else 3)
    path = saved(tmp_path, {f"text_encoder_2.{key}": t for key, t in shorter.items()})
    report = convert_adapter(path, tmp_path / "d", "diffusers", base=sdxl_folder)
    assert report.notes == (
        f"{len(shorter)} text-encoder keys lack `text_model.`, which was added",
        "it does not store its alpha; alpha = rank is assumed",
    )


@pytest.mark.parametrize("key_format", ["kohya", "diffusers"])
def test_joined_projections_are_split_exactly(
    tmp_path: Path, sd1_folder: Path, key_format: str, random_layer: Callable[..., LayerWeights]
) -> None:
    """Merging the parts gives the rows of the joined merge."""
    generator = torch.Generator().manual_seed(0)
    joined = {
        f"unet.{BLOCK}.attn1.to_qkv": ("to_q", "to_k", "to_v"),
        f"unet.{BLOCK}.attn2.to_kv": ("to_k", "to_v"),
        "text_encoder.text_model.encoder.layers.1.self_attn.in_proj": (
            "q_proj", "k_proj", "v_proj",
        ),
    }  # fmt: skip
    tensors, expected = {}, {}
    with PipelineFolder.open(sd1_folder) as pipeline:
        shapes = PipelineFolder(sd1_folder)
        for name, leaves in joined.items():
            parts = [f"{name.rpartition('.')[0]}.{leaf}" for leaf in leaves]
            weights = [pipeline[f"{part}.weight"] for part in parts]
            weight = torch.cat(weights)
            layer = random_layer(weight, generator)
            merged = merge_tensor(weight, [(layer, Strengths())]).chunk(len(parts))
            expected |= {part: (w, m) for part, w, m in zip(parts, weights, merged, strict=True)}
            assert layer.magnitude is not None
            if key_format == "kohya":
                prefix = name.replace("text_encoder.", "lora_te_").replace("unet.", "lora_unet_")
                prefix = prefix.replace(".", "_")
                tensors |= {
                    f"{prefix}.lora_down.weight": layer.down,
                    f"{prefix}.lora_up.weight": layer.up,
                    f"{prefix}.alpha": torch.tensor(layer.alpha),
                    f"{prefix}.dora_scale": layer.magnitude[:, None],
                }
            else:
                tensors |= {
                    f"{name}.lora_A.weight": layer.down,
                    f"{name}.lora_B.weight": layer.scale * layer.up,
                    f"{name}.lora_magnitude_vector.weight": layer.magnitude,
                }
    path = saved(tmp_path, tensors)
    for adapter in (read_adapter(path), read_adapter(path, shapes)):
        said = tuple(note for note in adapter.notes if note not in adapter.assumptions)
        assert said == ("3 joined attention projections were split into their parts",)
        assert bool(adapter.assumptions) == (key_format == "diffusers")
        assert adapter.layers.keys() == expected.keys()
        for part, (weight, merged) in expected.items():
            result = merge_tensor(weight, [(adapter.layers[part], Strengths())])
            torch.testing.assert_close(result, merged, rtol=0, atol=1e-6, msg=part)


def test_joined_projections_cannot_be_split_on_the_input_axis(tmp_path: Path) -> None:
    prefix = f"lora_unet_{BLOCK}.attn1.to_qkv".replace(".", "_")
    tensors = {
        f"{prefix}.lora_down.weight": torch.randn(2, 8),
        f"{prefix}.lora_up.weight": torch.randn(24, 2),
        f"{prefix}.dora_scale": torch.rand(1, 8),
    }
    with pytest.raises(AdapterFormatError, match="cannot be split on the input axis"):
        read_adapter(saved(tmp_path, tensors))


def test_the_first_dora_of_ai_toolkit(tmp_path: Path) -> None:
    """Magnitudes per input, and factors that are not modules."""
    prefix = f"lora_unet_{BLOCK}.attn1.to_q".replace(".", "_")
    tensors = {
        f"{prefix}.lora_down": torch.randn(2, 8),
        f"{prefix}.lora_up": torch.randn(8, 2),
        f"{prefix}.alpha": torch.tensor(2.0),
        f"{prefix}.magnitude": torch.rand(1, 8),
    }
    (layer,) = read_adapter(saved(tmp_path, tensors)).layers.values()
    assert (layer.norm_axis, layer.scale) == ("input", 1.0)
    name = f"unet.{BLOCK}.attn1.to_q"
    tensors = {
        f"{name}.lora_A.weight": torch.randn(2, 8),
        f"{name}.lora_B.weight": torch.randn(8, 2),
        f"{name}.magnitude": torch.rand(8),
    }
    (layer,) = read_adapter(saved(tmp_path, tensors)).layers.values()
    assert layer.norm_axis == "output"
    assert layer.magnitude is not None
    assert torch.equal(layer.magnitude, tensors[f"{name}.magnitude"])


def ai_toolkit_forward(
    x: Tensor, weight: Tensor, tensors: dict[str, Tensor], scale: float
) -> Tensor:
    """Output of its module, by its source: base + scaled LoRA + correction of the unscaled one.

    ai-toolkit, `toolkit/models/DoRA.py` and `toolkit/network_mixins.py`.
    """
    product = tensors["lora_up.weight"] @ tensors["lora_down.weight"]
    changed = weight + product
    correction = tensors["magnitude"] / changed.norm(dim=1) - 1
    return x @ weight.T + scale * (x @ product.T) + correction * (x @ changed.T)


@pytest.mark.parametrize("alpha", [None, 4.0, 1.0])
def test_the_dora_of_ai_toolkit_is_one_where_alpha_is_the_rank(
    tmp_path: Path, alpha: float | None
) -> None:
    """With another alpha its module computes another formula, which is refused."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 8, generator=generator)
    parts = {
        "lora_down.weight": torch.randn(4, 8, generator=generator),
        "lora_up.weight": 0.2 * torch.randn(12, 4, generator=generator),
        "magnitude": weight.norm(dim=1) * (1 + 0.1 * torch.rand(12, generator=generator)),
    }
    prefix = f"lora_unet_{BLOCK}.attn1.to_q".replace(".", "_")
    tensors = {f"{prefix}.{part}": tensor for part, tensor in parts.items()}
    path, x = saved(tmp_path, tensors), torch.randn(5, 8, generator=generator)
    layer = read_adapter(path).layers[f"unet.{BLOCK}.attn1.to_q"]
    expected = ai_toolkit_forward(x, weight, parts, (alpha or 4.0) / 4)
    ours = (
        x @ merge_tensor(weight, [(dataclasses.replace(layer, alpha=alpha or 4.0), Strengths())]).T
    )
    if alpha == 1.0:
        assert (ours - expected).norm() > 0.05 * (expected - x @ weight.T).norm()
        with pytest.raises(AdapterFormatError, match=r"alpha / rank \(1 / 4\) outside"):
            read_adapter(path, alpha=alpha)
        saved(tmp_path, {**tensors, f"{prefix}.alpha": torch.tensor(alpha)})
        with pytest.raises(AdapterFormatError, match=r"alpha / rank \(1 / 4\) outside"):
            read_adapter(path)
        return
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    adapter = read_adapter(path, alpha=alpha)
    assert [n for n in adapter.notes if "only if alpha equals the rank" in n] == list(
        adapter.assumptions
    )
    assert len(adapter.assumptions) == (alpha is None)


def test_the_dora_of_ai_toolkit_is_merged_with_its_alpha(
    tmp_path: Path, sd1_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exactly, into a checkpoint and into the differences for one base; refused by the rest."""
    name = f"unet.{BLOCK}.attn2.to_k"
    generator = torch.Generator().manual_seed(0)
    with PipelineFolder.open(sd1_folder) as pipeline:
        weight = pipeline[f"{name}.weight"]
    parts = {
        "lora_down.weight": torch.randn(4, weight.shape[1], generator=generator),
        "lora_up.weight": 0.05 * torch.randn(weight.shape[0], 4, generator=generator),
        "magnitude": weight.norm(dim=1) * (1 + torch.rand(weight.shape[0], generator=generator)),
    }
    prefix = "lora_unet_" + name.removeprefix("unet.").replace(".", "_")
    path = saved(tmp_path, {f"{prefix}.{part}": tensor for part, tensor in parts.items()})
    base = ["--base", str(sd1_folder), "--alpha", "1"]
    # The weight that has the module's output: its rows of the identity.
    expected = ai_toolkit_forward(torch.eye(weight.shape[1]), weight, parts, 1 / 4).T
    merged = tmp_path / "merged"
    command = [*base, "--adapter", str(path)]
    assert main(["export", *command, "--output", str(merged)]) == 0
    with PipelineFolder.open(merged) as pipeline:
        torch.testing.assert_close(pipeline[f"{name}.weight"], expected, rtol=0, atol=1e-6)
    assert main(["verify", *command, str(merged)]) == 0
    dense = tmp_path / "dense.safetensors"
    assert main(["convert", str(path), str(dense), "--to", "dense", *base]) == 0
    found = weight + load_file(dense)[f"{prefix}.diff"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    weaker = ["convert", str(path), str(dense), "--to", "dense", *base, "--strength", "0.5"]
    assert main([*weaker, "--overwrite"]) == 0
    half = load_file(dense)[f"{prefix}.diff"]
    torch.testing.assert_close(half, (expected - weight) / 2, rtol=0, atol=1e-6)
    capsys.readouterr()
    # ComfyUI takes full differences, which hold it.
    for target in ("kohya", "diffusers", "lora"):
        output = str(tmp_path / target)
        assert main(["convert", str(path), output, "--to", target, *base]) == 1
        error = capsys.readouterr().err
        assert "outside of the norm" in error
        assert "--output MERGED' merges it exactly, and 'dora-diffusion convert ADAPTER" in error
    adapter = read_adapter(path, alpha=1.0, sums=True)
    with pytest.raises(
        AdapterFormatError, match="kohya format cannot store the sum of a DoRA and a LoRA"
    ):
        write_adapter(tmp_path / "k", adapter, "kohya")


def test_the_half_renamed_file_of_diffusers_is_repaired(
    tmp_path: Path,
    sdxl_folder: Path,
    random_adapter: MakeAdapter,
    assert_same_layers: Callable[..., None],
) -> None:
    from diffusers.utils import convert_all_state_dict_to_peft, convert_state_dict_to_kohya

    layers = random_adapter(sdxl_folder, every=3)
    original = write_adapter(tmp_path / "a", AdapterFile(layers, AdapterMetadata("sdxl")))
    state = {
        key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): tensor
        for key, tensor in load_file(original).items()
    }
    broken = convert_state_dict_to_kohya(convert_all_state_dict_to_peft(state))
    assert any("to_q.lora_magnitude_vector" in key for key in broken)
    save_file(
        {key: value.contiguous() for key, value in broken.items()}, tmp_path / "b.safetensors"
    )
    report = inspect_adapter(tmp_path / "b.safetensors")
    assert any("half renamed" in note for note in report.notes)
    fixed = convert_adapter(tmp_path / "b.safetensors", tmp_path / "c", "kohya", base=sdxl_folder)
    assert_same_layers(read_adapter(fixed.path).layers, layers)
