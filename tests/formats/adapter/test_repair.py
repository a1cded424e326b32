"""What other programs break is repaired, and said."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_diffusion.adapters.merge import Strengths, merge_tensor
from dora_diffusion.cli.main import main
from dora_diffusion.export import convert_adapter, inspect_adapter
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterFormatError,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.formats.checkpoint.folder import PipelineFolder
from dora_diffusion.numerics.weights import LayerWeights
from tests.formats.adapter.helpers import (
    BLOCK,
    MakeAdapter,
    SameLayers,
    kohya,
    saved,
)


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
            assert report.notes[1] == "it does not say its alpha; alpha = rank is assumed"
            assert told.startswith("by their widths") == (component == "text_encoder_2")
            assert len(report.notes) == (2 if component == "text_encoder" else 3)
    path = saved(tmp_path, {f"text_encoder_2.{key}": t for key, t in shorter.items()})
    report = convert_adapter(path, tmp_path / "d", "diffusers", base=sdxl_folder)
    assert report.notes == (
        f"{len(shorter)} text-encoder keys lack `text_model.`, which was added",
        "it does not say its alpha; alpha = rank is assumed",
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
    """Magnitudes per input, and factors that are no modules."""
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
    """What its module returns, by its source: base + scaled LoRA + correction of the unscaled one.

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
    assert [n for n in adapter.notes if "only where alpha equals the rank" in n] == list(
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
    capsys.readouterr()
    # ComfyUI takes full differences, which hold it.
    for target in ("kohya", "diffusers", "lora"):
        output = str(tmp_path / target)
        assert main(["convert", str(path), output, "--to", target, *base]) == 1
        error = capsys.readouterr().err
        assert "outside of the norm" in error
        assert "export merges it exactly, and convert --to dense" in error
    adapter = read_adapter(path, alpha=1.0, sums=True)
    with pytest.raises(AdapterFormatError, match="kohya format cannot hold a DoRA with a LoRA"):
        write_adapter(tmp_path / "k", adapter, "kohya")


def test_the_command_says_what_it_repaired(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    layers = random_adapter(sd1_folder, every=9)
    flat = {
        k: t.flatten() if k.endswith("dora_scale") else t
        for k, t in kohya(tmp_path, layers).items()
    }
    command = ["convert", str(saved(tmp_path, flat)), str(tmp_path / "c"), "--to", "kohya"]
    assert main([*command, "--family", "sd1"]) == 1
    assert "Give the base model" in capsys.readouterr().err
    assert main([*command, "--base", str(sd1_folder)]) == 0
    assert "note: " in capsys.readouterr().out


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


def test_the_magnitudes_of_ai_toolkit_are_read(tmp_path: Path) -> None:
    prefix = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file(
        {
            f"{prefix}.lora_down.weight": torch.randn(2, 8),
            f"{prefix}.lora_up.weight": torch.randn(8, 2),
            f"{prefix}.magnitude": torch.rand(8),
        },
        tmp_path / "a.safetensors",
    )
    (layer,) = read_adapter(tmp_path / "a.safetensors").layers.values()
    assert (layer.norm_axis, layer.scale) == ("output", 1.0)
    assert layer.magnitude is not None
    stored = load_file(tmp_path / "a.safetensors")[f"{prefix}.magnitude"]
    assert torch.equal(layer.magnitude, stored)
    notes = inspect_adapter(tmp_path / "a.safetensors").notes
    assert any(note.endswith("alpha = rank is assumed") for note in notes)
