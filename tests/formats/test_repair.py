"""Files of other programs and broken files: read as they were meant, and explained."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_diffusion.adapters.state import adapter_state
from dora_diffusion.cli import main
from dora_diffusion.export import convert_adapter
from dora_diffusion.families import FAMILIES
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterFormatError,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.formats.checkpoint.folder import PipelineFolder
from dora_diffusion.generate import load_adapted
from dora_diffusion.merge import Strengths, merge_tensor
from dora_diffusion.numerics.dora import weight_norm
from dora_diffusion.numerics.weights import LayerWeights

MakeAdapter = Callable[..., dict[str, LayerWeights]]
SameLayers = Callable[..., None]
BLOCK = "mid_block.attentions.0.transformer_blocks.0"


def kohya(folder: Path, layers: dict[str, LayerWeights], family: str = "sd1") -> dict[str, Tensor]:
    """The tensors of a good kohya file, to be broken."""
    path = folder / "good.safetensors"
    return load_file(write_adapter(path, AdapterFile(layers, AdapterMetadata(family)), "kohya"))


def saved(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    path = folder / "broken.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def slightly_moved(folder: Path, layers: dict[str, LayerWeights]) -> dict[str, LayerWeights]:
    """The layers with magnitudes 1% from the base's norms, as training leaves them."""
    generator = torch.Generator().manual_seed(3)
    moved = {}
    with PipelineFolder.open(folder) as pipeline:
        for name, layer in layers.items():
            norm = weight_norm(pipeline[f"{name}.weight"], layer.norm_axis)
            norm = norm * (1 + 0.01 * torch.randn(norm.shape, generator=generator))
            moved[name] = dataclasses.replace(layer, magnitude=norm)
    return moved


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("axis", ["output", "input"])
def test_flat_magnitudes_are_placed_by_the_base(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter, assert_same_layers: SameLayers,
    axis: str, square: bool,
) -> None:  # fmt: skip
    """By the shapes of those that are not square, or by the norms if there is none."""
    layers = slightly_moved(sd1_folder, random_adapter(sd1_folder, axis=axis, every=3))
    if square:
        layers = {n: one for n, one in layers.items() if len(set(one.weight_shape[:2])) == 1}
    tensors = kohya(tmp_path, layers)
    flat = {k: t.flatten() if k.endswith("dora_scale") else t for k, t in tensors.items()}
    path = saved(tmp_path, flat)
    with pytest.raises(AdapterFormatError, match=r"its dora_scale is flat.*Give the base model"):
        convert_adapter(path, tmp_path / "c", "kohya", family="sd1")
    report = convert_adapter(path, tmp_path / "c", "kohya", base=sd1_folder)
    assert_same_layers(read_adapter(report.path).layers, layers, tolerance=1e-5)
    assert report.notes == (
        f"{len(layers)} magnitudes were flat: put on the {axis} axis, as the base tells",
    )


def test_magnitudes_of_no_axis_are_refused_even_with_a_base(
    tmp_path: Path, sd1_folder: Path
) -> None:
    prefix = f"lora_unet_{BLOCK}.attn1.to_q".replace(".", "_")
    tensors = {
        f"{prefix}.lora_down.weight": torch.randn(2, 64),
        f"{prefix}.lora_up.weight": torch.randn(64, 2),
        f"{prefix}.alpha": torch.tensor(2.0),
        f"{prefix}.dora_scale": 100 * torch.rand(64),
    }
    with pytest.raises(AdapterFormatError, match="do not tell either"):
        convert_adapter(saved(tmp_path, tensors), tmp_path / "c", "kohya", base=sd1_folder)


def test_convolutions_in_pefts_shape(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter, assert_same_layers: SameLayers
) -> None:
    """(1, out, 1, 1): told by the ones that are not square, for those that are, too."""
    layers = random_adapter(sd1_folder, every=2, components=["unet"])
    layers = slightly_moved(sd1_folder, layers)
    convs = {name for name, layer in layers.items() if layer.down.ndim == 4}
    square = {n for n in convs if layers[n].weight_shape[0] == layers[n].weight_shape[1]}
    assert 3 < len(square) < len(convs) - 3
    tensors = kohya(tmp_path, layers)

    def peft_shaped(keys: list[str]) -> dict[str, Tensor]:
        return {
            k: t.transpose(0, 1) if k in keys and t.ndim == 4 else t for k, t in tensors.items()
        }

    scales = [key for key in tensors if key.endswith("dora_scale")]
    report = convert_adapter(
        saved(tmp_path, peft_shaped(scales)), tmp_path / "c", "kohya", base=sd1_folder
    )
    assert_same_layers(read_adapter(report.path).layers, layers)
    assert report.notes == (
        f"{len(convs)} magnitudes were in PEFT's shape (1, out, 1, 1): put on the output axis",
    )
    # With square convolutions alone, only the base can tell.
    names = ["lora_unet_" + n.removeprefix("unet.").replace(".", "_") for n in square]
    path = saved(tmp_path, peft_shaped([f"{name}.dora_scale" for name in names]))
    with pytest.raises(AdapterFormatError, match="of the same shape on both axes"):
        read_adapter(path)
    report = convert_adapter(path, tmp_path / "d", "kohya", base=sd1_folder)
    assert_same_layers(read_adapter(report.path).layers, layers)
    assert f"{len(square)} magnitudes were of a shape that fits both axes" in report.notes[0]


def test_a_square_input_axis_is_still_the_input_axis(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    layers = random_adapter(sd1_folder, axis="input", components=["unet"])
    read = read_adapter(saved(tmp_path, kohya(tmp_path, layers)))
    assert {layer.norm_axis for layer in read.layers.values()} == {"input"}
    assert read.notes == ()


def test_a_lost_alpha_is_given_back(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter, assert_same_layers: SameLayers
) -> None:
    layers = random_adapter(sd1_folder, every=5)  # rank 4, alpha 3
    tensors = {k: t for k, t in kohya(tmp_path, layers).items() if not k.endswith(".alpha")}
    path = saved(tmp_path, tensors)
    plain = convert_adapter(path, tmp_path / "a", "kohya", base=sd1_folder)
    assert plain.notes == ("it does not say its alpha; alpha = rank is assumed",)
    given = convert_adapter(path, tmp_path / "b", "kohya", base=sd1_folder, alpha=3.0)
    assert_same_layers(read_adapter(given.path).layers, layers)
    path = saved(tmp_path, tensors, {"ss_network_dim": "4", "ss_network_alpha": "3.0"})
    found = convert_adapter(path, tmp_path / "c", "kohya", base=sd1_folder)
    assert_same_layers(read_adapter(found.path).layers, layers)
    assert found.notes == ("its layers do not say their alpha; alpha 3 of its training was taken",)
    good = load_file(tmp_path / "good.safetensors")
    with pytest.raises(AdapterFormatError, match="says that its alpha is 3; it was not lost"):
        read_adapter(saved(tmp_path, good), alpha=2.0)


@pytest.mark.parametrize("target", ["diffusers", "kohya", "peft"])
def test_an_alpha_that_was_not_lost_is_not_replaced(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter, target: str
) -> None:
    """Our own files hold or record it, also where the scale is multiplied in."""
    layers = random_adapter(sd1_folder, every=9)
    path = write_adapter(tmp_path / "a", AdapterFile(layers, AdapterMetadata("sd1")), target)
    with pytest.raises(AdapterFormatError, match="its alpha was not lost"):
        convert_adapter(path, tmp_path / "b", "kohya", alpha=2.0)
    assert not (tmp_path / "b").exists()


def test_the_alpha_in_diffusers_metadata_is_not_replaced(tmp_path: Path) -> None:
    tensors = {
        "unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3),
        "unet.conv_in.lora_B.weight": torch.ones(8, 2, 1, 1),
    }
    config = json.dumps({"unet.r": 2, "unet.lora_alpha": 6})
    path = saved(tmp_path, tensors, {"lora_adapter_metadata": config})
    assert read_adapter(path).layers["unet.conv_in"].scale == 3.0
    with pytest.raises(AdapterFormatError, match="its alpha was not lost"):
        read_adapter(path, alpha=2.0)


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


@pytest.mark.parametrize("spelling", ["kohya", "diffusers"])
def test_joined_projections_are_split_exactly(
    tmp_path: Path, sd1_folder: Path, spelling: str, random_layer: Callable[..., LayerWeights]
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
        shapes = pipeline.module_shapes()
        for name, leaves in joined.items():
            parts = [f"{name.rpartition('.')[0]}.{leaf}" for leaf in leaves]
            weights = [pipeline[f"{part}.weight"] for part in parts]
            weight = torch.cat(weights)
            layer = random_layer(weight, generator)
            merged = merge_tensor(weight, [(layer, Strengths())]).chunk(len(parts))
            expected |= {part: (w, m) for part, w, m in zip(parts, weights, merged, strict=True)}
            assert layer.magnitude is not None
            if spelling == "kohya":
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
        assert bool(adapter.assumptions) == (spelling == "diffusers")
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


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_onetrainer_spellings(
    tmp_path: Path, family: str, request: pytest.FixtureRequest, random_adapter: MakeAdapter,
    assert_same_layers: SameLayers,
) -> None:  # fmt: skip
    """Its older files are kohya's with diffusers' block names; the newer ones have dots.

    OMI's are of January 2025; COMFY and ORIGINAL, with PEFT's names of the factors, of 2026.

    Magnitudes run along the inputs, (1, in) and (1, in, 1, 1), unless it is told otherwise.
    """
    from dora_diffusion.formats.names.sgm_blocks import released_layout, to_sgm

    folder = request.getfixturevalue(f"{family}_folder")
    layers = random_adapter(folder, axis="input", every=3)
    shapes = PipelineFolder(folder).module_shapes()
    layout = released_layout(FAMILIES[family])
    prefixes = {
        "older": {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
        "newer": {"unet": "unet", "text_encoder": "clip_l", "text_encoder_2": "clip_g"},
        "inside": {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
        "comfy": {
            "unet": "diffusion_model",
            "text_encoder": "text_encoders.clip_l.transformer",
            "text_encoder_2": "text_encoders.clip_g.transformer",
        },
        "original": {"unet": "", "text_encoder": "clip_l", "text_encoder_2": "clip_g"},
    }
    for spelling, names in prefixes.items():
        tensors = {}
        for name, layer in layers.items():
            component, _, path = name.partition(".")
            assert layer.magnitude is not None
            if spelling in ("newer", "comfy", "original") and component == "unet":
                path = str(to_sgm(path, layout))
            joint = "_" if spelling == "older" else "."
            key = (names[component] + joint + path.replace(".", joint)).removeprefix(".")
            ones = [1] * (layer.down.ndim - 2)
            down, up = ("A", "B") if spelling in ("comfy", "original") else ("down", "up")
            tensors |= {
                f"{key}.lora_{down}.weight": layer.down,
                f"{key}.lora_{up}.weight": layer.up,
                f"{key}.alpha": torch.tensor(layer.alpha),
                f"{key}.dora_scale": layer.magnitude.view(1, -1, *ones),
            }
        file = saved(tmp_path, tensors)
        for adapter in (read_adapter(file), read_adapter(file, shapes)):
            assert_same_layers(adapter.layers, layers)
            assert adapter.notes == ()
    path = saved(tmp_path, {**tensors, "bundle_emb.sks.vector": torch.ones(1, 8)})
    with pytest.raises(AdapterFormatError, match="embeddings bundled with the adapter"):
        read_adapter(path)


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
    for target in ("kohya", "diffusers", "comfyui", "lora"):
        output = str(tmp_path / target)
        assert main(["convert", str(path), output, "--to", target, *base]) == 1
        error = capsys.readouterr().err
        assert "outside of the norm" in error
        assert "export merges it exactly, and convert --to dense" in error
    adapter = read_adapter(path, alpha=1.0, sums=True)
    with pytest.raises(AdapterFormatError, match="kohya format cannot hold a DoRA with a LoRA"):
        write_adapter(tmp_path / "k", adapter, "kohya")


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
    said = "it does not say its alpha; alpha = rank is assumed"
    assert read_adapter(path).assumptions == (said,)
    assert main(["inspect", str(path)]) == 0
    assert said in " ".join(capsys.readouterr().out.split())
    merged = tmp_path / "m.safetensors"
    common = ["--base", base, "--adapter", str(path)]
    assert main(["export", *common, "--output", str(merged)]) == 0
    assert f"warning: broken.safetensors: {said}" in capsys.readouterr().err
    assert main(["verify", str(merged), *common]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"proven, as far as this is right: broken.safetensors: {said}"
    )
    picture = ["--prompt", "x", "--output", str(tmp_path / "x.png"), "--steps", "1"]
    size = ["--width", "64", "--height", "64"]
    assert main(["generate", *common, *picture, *size]) == 0
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
    assert capsys.readouterr().out.splitlines()[-1] == "proven"
    assert main(["verify", str(merged), *common, "--alpha", "3"]) == 1
    with PipelineFolder.open(sd1_folder) as pipeline:
        name = next(iter(unet))
        wanted = merge_tensor(pipeline[f"{name}.weight"], [(unet[name], Strengths())])
        open_file = load_file(given)
        assert any(t.shape == wanted.shape and torch.equal(t, wanted) for t in open_file.values())


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
