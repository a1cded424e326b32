"""Programs that compute a file as it was trained, shown with the program or its formula."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_diffusion.export import inspect_adapter
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.formats.files.stream import TensorSpec
from dora_diffusion.formats.layouts import COLUMNS, CONVERSIONS, PROGRAMS, VERDICTS
from dora_diffusion.formats.layouts.layout import layout_named, some_layers
from dora_diffusion.formats.layouts.other import OTHER
from dora_diffusion.formats.names.kohya import name_resolver
from dora_diffusion.numerics.weights import LayerWeights
from tests.formats.adapter.helpers import (
    BLOCK,
    TABLE_HOLDS,
)
from tests.formats.layouts.helpers import module_at

DOCS = Path(__file__).resolve().parents[3] / "docs"


SHAPES = {
    f"unet.{BLOCK}.attn1.to_q": (320, 320),
    f"unet.{BLOCK}.ff.net.2": (320, 1280),
    "unet.mid_block.attentions.0.proj_in": (320, 320, 1, 1),
    "unet.mid_block.resnets.0.conv1": (320, 320, 3, 3),
    "unet.down_blocks.0.downsamplers.0.conv": (320, 160, 3, 3),
    "unet.conv_out": (4, 320, 3, 3),
}


Formula = Callable[[Tensor, dict[str, Tensor]], Tensor]


def norms(weight: Tensor, axis: str) -> Tensor:
    """Per output (out, 1, ...) or per input (1, in, ...)."""
    dims = (1, 2, 3) if axis == "output" else (0, 2, 3)
    return weight.square().sum(dims[: weight.ndim - 1], keepdim=True).sqrt()


def parts(weight: Tensor, file: dict[str, Tensor]) -> tuple[Tensor, float, Tensor | None]:
    """``B A`` in the weight's shape, alpha / rank, and the magnitudes."""
    up, down = file["lora_up.weight"].double(), file["lora_down.weight"].double()
    product = (up.flatten(1) @ down.flatten(1)).view_as(weight)
    scale = file["dora_scale"].double() if "dora_scale" in file else None
    return product, file["alpha"].item() / down.shape[0], scale


def comfyui(weight: Tensor, file: dict[str, Tensor]) -> Tensor:
    if "diff" in file:
        return weight + file["diff"].double()
    product, scale, magnitude = parts(weight, file)
    changed = weight + scale * product
    if magnitude is None:
        return changed
    on_output = magnitude.shape[0] == weight.shape[0]
    norm = norms(weight, "output") if on_output else norms(changed, "input")
    return changed * magnitude / (norm + torch.finfo(torch.float32).eps)


def a1111(weight: Tensor, file: dict[str, Tensor], scale_inside: bool = True) -> Tensor:
    if "diff" in file:
        return weight + file["diff"].double()
    product, scale, magnitude = parts(weight, file)
    change = product * scale if scale_inside else product
    if magnitude is not None:
        merged = weight + change
        change = merged * (magnitude / norms(merged, "input")) - weight
    return weight + (change if scale_inside else change * scale)


def a1111_older(weight: Tensor, file: dict[str, Tensor]) -> Tensor:
    return a1111(weight, file, scale_inside=False)


def plain_lora(weight: Tensor, file: dict[str, Tensor]) -> Tensor:
    """sd-scripts' merge and diffusers' loading of kohya files: the magnitudes are left out."""
    product, scale, _ = parts(weight, file)
    return weight + scale * product


def meant(weight: Tensor, layer: LayerWeights) -> Tensor:
    """The paper's formula, dense and in float64."""
    product = (layer.up.double().flatten(1) @ layer.down.double().flatten(1)).view_as(weight)
    changed = weight + layer.scale * product
    if layer.magnitude is None:
        return changed
    lead = (-1, 1) if layer.norm_axis == "output" else (1, -1)
    magnitude = layer.magnitude.double().view(*lead, *[1] * (weight.ndim - 2))
    return changed * magnitude / norms(changed, layer.norm_axis)


class Held(dict[str, Tensor]):
    """A base model in memory."""

    family = None

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return {name: TensorSpec.of(tensor) for name, tensor in self.items()}


def base_weights() -> dict[str, Tensor]:
    """Random weights, rounded to float32, with rows and columns of different norms."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in SHAPES.items():
        weight = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        for dim in (0, 1):
            size = [1] * len(shape)
            size[dim] = shape[dim]
            weight *= 1 + 0.2 * torch.randn(size, generator=generator)
        weights[name] = weight
    return weights


def adapter(axis: str | None) -> AdapterFile:
    """The low-rank part is a tenth of each weight; the magnitudes have moved by 2%."""
    generator = torch.Generator().manual_seed(1)
    layers = {}
    for name, weight in base_weights().items():
        out, into, *kernel = weight.shape
        down = torch.randn(8, into, *kernel, generator=generator)
        up = torch.randn(out, 8, *[1] * len(kernel), generator=generator)
        up *= 0.1 * weight.norm() / (0.5 * (up.flatten(1) @ down.flatten(1)).norm())
        magnitude = None
        if axis:
            magnitude = norms(weight, axis).flatten()
            magnitude = magnitude * (1 + 0.02 * torch.randn(magnitude.shape, generator=generator))
        layers[name] = LayerWeights(
            down, up, magnitude, 4.0, "input" if axis == "input" else "output"
        )
    return AdapterFile(layers, AdapterMetadata("sd1"))


def files(folder: Path, axis: str | None, target: str) -> dict[str, dict[str, Tensor]]:
    """Tensors of a written file by canonical name, without the name in their keys."""
    path = write_adapter(
        folder / f"{axis}-{target}.safetensors", adapter(axis), target,
        base=Held({f"{name}.weight": weight for name, weight in base_weights().items()}),
    )  # fmt: skip
    tensors = load_file(path)
    prefixes = {name: "lora_unet_" + name[5:].replace(".", "_") + "." for name in SHAPES}
    return {
        name: {k.removeprefix(p): v for k, v in tensors.items() if k.startswith(p)}
        for name, p in prefixes.items()
    }


def errors(folder: Path, axis: str | None, target: str, formula: Formula) -> list[float]:
    """Per layer, the difference from what is meant, relative to the change of the weight."""
    weights, layers = base_weights(), adapter(axis).layers
    found = []
    for name, file in files(folder, axis, target).items():
        weight = weights[name].double()
        wanted = meant(weight, layers[name])
        found.append(((formula(weight, file) - wanted).norm() / (wanted - weight).norm()).item())
    return found


# The magnitudes are float32, and so are the written factors: 1e-6 of the weight.
EXACT = 2e-5


@pytest.mark.parametrize(
    ("axis", "target", "formula"),
    [
        ("output", "comfyui", comfyui),
        ("input", "comfyui", comfyui),
        ("input", "kohya", comfyui),
        ("input", "kohya", a1111),
        ("input", "kohya", a1111_older),
        ("output", "dense", comfyui),
        ("input", "dense", comfyui),
        ("output", "dense", a1111),
        ("input", "dense", a1111_older),
        (None, "kohya", comfyui),
        (None, "kohya", a1111),
        (None, "kohya", a1111_older),
        (None, "kohya", plain_lora),
    ],
)
def test_exact_targets(tmp_path: Path, axis: str | None, target: str, formula: Formula) -> None:
    assert max(errors(tmp_path, axis, target, formula)) < EXACT


@pytest.mark.parametrize(
    ("axis", "target", "formula", "least"),
    [
        ("output", "kohya", comfyui, 0.03),
        ("output", "kohya", a1111, 0.9),
        ("output", "kohya", a1111_older, 0.9),
        ("output", "comfyui", a1111, 0.9),
        ("output", "kohya", plain_lora, 0.1),
        ("input", "kohya", plain_lora, 0.1),
    ],
)
def test_wrong_uses(tmp_path: Path, axis: str, target: str, formula: Formula, least: float) -> None:
    """The reason for targets: each of these loads without an error."""
    assert min(errors(tmp_path, axis, target, formula)) > least


def figures(folder: Path) -> dict[str, str]:
    """The measured figures of lab/measurements/programs.md, by the words before them."""

    def median(axis: str, target: str, formula: Formula) -> str:
        return f"{torch.tensor(errors(folder, axis, target, formula)).median().item():.0%}"

    name = "unet.conv_out"
    weight = base_weights()[name].double()
    file = files(folder, "output", "kohya")[name]
    growth = (
        a1111(weight, file).norm() / meant(weight, adapter("output").layers[name]).norm()
    ).item()
    return {
        "ComfyUI and Forge, kohya file on the output axis": median("output", "kohya", comfyui),
        "A1111, kohya file on the output axis": median("output", "kohya", a1111),
        "A1111, the last convolution becomes larger": f"{growth:.1f} times",
        "sd-scripts and diffusers, kohya file on the output axis": median(
            "output", "kohya", plain_lora
        ),
        "A1111, comfyui file": median("output", "comfyui", a1111),
    }


def test_the_figures_in_the_docs_are_measured(tmp_path: Path) -> None:
    text = (DOCS.parent / "lab" / "measurements" / "programs.md").read_text(encoding="utf-8")
    for words, figure in figures(tmp_path).items():
        print(f"| {words} | {figure} |")
        assert f"| {words} | {figure} |" in text, (words, figure)


def test_every_conversion_is_in_the_docs() -> None:
    formats = (DOCS / "reference" / "formats.md").read_text(encoding="utf-8")
    for target in CONVERSIONS:
        assert f"`{target}`" in formats, target


def test_the_table_of_programs_in_the_readme_is_that_of_the_code() -> None:
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| `--to` \|.*\n(?:\|.*\n)+", readme, re.MULTILINE)
    rows = [line.strip("|").replace("`", "").split("|") for line in table.split("\n")[2:-1]]
    place = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    assert {name: cells[0] for name, cells in place.items()} == {
        name: program.place for name, program in PROGRAMS.items()
    }
    for name, program in PROGRAMS.items():
        costs = place[name][1]
        assert ("for one base model" in costs) == (program.output_axis in ("comfyui", "dense"))
        assert ("large" in costs) == (program.output_axis == "dense")
        assert ("approximation" in costs) == (program.output_axis == "lora")


def judged(name: str, axis: str) -> dict[str, str]:
    return layout_named(name).judge({}, axis, ())


def test_kinds_of_files() -> None:
    assert all(tuple(row) == COLUMNS for row in VERDICTS.values())
    assert not any("{" in verdict for row in VERDICTS.values() for verdict in row.values())
    assert judged("kohya", "output") == VERDICTS["kohya DoRA, output axis"]
    assert judged("comfyui", "output") == VERDICTS["comfyui"]
    assert judged("peft", "") == VERDICTS["peft LoRA"]
    assert judged("kohya", "mixed") == {}
    for others in (judged("peft", "input"), judged("vera", "output"), OTHER.judge({}, "", ())):
        assert all(verdict.startswith("convert") for verdict in others.values())


TO_K = "unet.down_blocks.2.attentions.0.transformer_blocks.0.attn2.to_k"


K_PROJ = "text_encoder.text_model.encoder.layers.0.self_attn.k_proj"


FACTORS = (".lora_A.weight", ".lora_B.weight")


FLAT = "lora_unet_" + TO_K.removeprefix("unet.").replace(".", "_")


KOHYA = (".lora_down.weight", ".lora_up.weight")


TRAINED = {"ss_network_dim": "4", "ss_network_alpha": "1"}


# module, its name in the file, names of the factors, shape of a magnitude by its key, alpha in the
# file, metadata, and whether `inspect` calls it exact in diffusers.
KEY_FORMATS = {
    "diffusers": (TO_K, TO_K, FACTORS, {}, None, {}, True),
    "dora": (TO_K, TO_K, FACTORS, {".lora_magnitude_vector.weight": (-1,)}, None, {}, True),
    "bare in the unet": (TO_K, TO_K, FACTORS, {".lora_magnitude_vector": (-1,)}, None, {}, True),
    "text encoder": (K_PROJ, K_PROJ, FACTORS, {".lora_magnitude_vector.weight": (-1,)}, None, {},
                     True),
    "bare in the text encoder": (K_PROJ, K_PROJ, FACTORS, {".lora_magnitude_vector": (-1,)}, None,
                                 {}, False),
    "early": (TO_K, TO_K, (".lora.down.weight", ".lora.up.weight"), {}, None, {}, True),
    "processor": (TO_K, TO_K.replace(".to_k", ".processor.to_k"),
                  ("_lora.down.weight", "_lora.up.weight"), {}, None, {}, True),
    "early text encoder": (K_PROJ, K_PROJ, (".lora_linear_layer.down.weight",
                           ".lora_linear_layer.up.weight"), {}, None, {}, True),
    "PEFT's name inside": (TO_K, TO_K, (".lora_A.default.weight", ".lora_B.default.weight"), {},
                           None, {}, False),
    "no component": (TO_K, TO_K.removeprefix("unet."), FACTORS, {}, None, {}, False),
    "alpha": (TO_K, TO_K, FACTORS, {}, 2.0, {}, False),
    "dotted kohya": (TO_K, TO_K, KOHYA, {}, 2.0, {}, False),
    "dora_scale": (TO_K, TO_K, FACTORS, {".dora_scale": (-1, 1)}, None, {}, False),
    "dora_scale on the input axis": (TO_K, TO_K, KOHYA, {".dora_scale": (1, -1)}, 2.0, {}, False),
    "kohya": (TO_K, FLAT, KOHYA, {}, 2.0, TRAINED, True),
    "kohya's alpha in the metadata": (TO_K, FLAT, KOHYA, {}, None, TRAINED, False),
}  # fmt: skip


@pytest.fixture(scope="module")
def diffusers_pipeline(sd1_folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(sd1_folder, local_files_only=True)


@TABLE_HOLDS
@pytest.mark.parametrize("key_format", KEY_FORMATS)
def test_what_is_called_exact_is_exact_in_diffusers(
    tmp_path: Path, diffusers_pipeline: Any, key_format: str
) -> None:
    """And what is not is either refused there, or computed otherwise."""
    module, key, (down_key, up_key), magnitudes, alpha, metadata, is_exact = KEY_FORMATS[key_format]
    component, _, path = module.partition(".")
    model = getattr(diffusers_pipeline, component)
    if component == "text_encoder" and not hasattr(model, "text_model"):
        path = path.removeprefix("text_model.")
    parameter = model.get_submodule(path).weight
    weight = parameter.detach().clone()
    generator = torch.Generator().manual_seed(0)
    down = 0.1 * torch.randn(4, weight.shape[1], generator=generator)
    up = 0.1 * torch.randn(weight.shape[0], 4, generator=generator)
    tensors = {key + down_key: down, key + up_key: up}
    axis, magnitude = "output", None
    for magnitude_key, shape in magnitudes.items():
        axis = "input" if shape == (1, -1) else "output"
        magnitude = 1.2 * norms(weight, axis).flatten()
        tensors[key + magnitude_key] = magnitude.view(shape)
    if alpha:
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    file = tmp_path / "a.safetensors"
    save_file(tensors, file, metadata)
    verdicts = inspect_adapter(file).tools
    assert (verdicts["diffusers"] == "exact") == is_exact
    if not is_exact:
        assert all(verdict.startswith("convert") for verdict in verdicts.values())
    alpha = alpha or (1.0 if metadata else 4.0)
    wanted = meant(weight.double(), LayerWeights(down, up, magnitude, alpha, axis))
    try:
        diffusers_pipeline.load_lora_weights(file.parent, weight_name=file.name)
        diffusers_pipeline.fuse_lora(components=[component])
        fused = parameter.detach().double()
    except (ValueError, IndexError, RuntimeError):
        fused = torch.full_like(wanted, torch.nan)
    finally:
        diffusers_pipeline.unload_lora_weights()
        model.get_submodule(path).weight.data.copy_(weight)
    error = (fused - wanted).norm() / (wanted - weight).norm()
    assert (error < EXACT).item() == is_exact


BLOCKS = "unet.down_blocks.2.attentions.0.transformer_blocks.0"


NAMED = {
    "PEFT": ("{}.lora_A.weight", "{}.lora_B.weight"),
    "old": ("{}.lora.down.weight", "{}.lora.up.weight"),
    "processor": ("{0}.processor.{1}_lora.down.weight", "{0}.processor.{1}_lora.up.weight"),
}


# How each of three layers names its factors, and how many of them diffusers leaves unchanged.
MIXTURES = {
    ("PEFT", "PEFT", "PEFT"): 0,
    ("old", "old", "processor"): 0,
    ("PEFT", "old", "old"): 2,
    ("PEFT", "PEFT", "processor"): 1,
    ("PEFT", "processor", "PEFT"): 0,
    ("old", "PEFT", "PEFT"): 0,
}


@pytest.mark.parametrize("names", MIXTURES)
def test_layers_that_diffusers_leaves_unchanged_are_named(
    tmp_path: Path, diffusers_pipeline: Any, names: tuple[str, ...]
) -> None:
    """Of a file that mixes ways to name the factors; it depends on the first key."""
    layers = [f"{BLOCKS}.attn1.to_k", f"{BLOCKS}.attn1.to_q", f"{BLOCKS}.attn2.to_k"]
    generator = torch.Generator().manual_seed(0)
    tensors, weights = {}, {}
    for layer, way in zip(layers, names, strict=True):
        weight = diffusers_pipeline.unet.get_submodule(layer.removeprefix("unet.")).weight
        weights[layer] = (weight, weight.detach().clone())
        parent, _, leaf = layer.rpartition(".")
        for template, shape in zip(
            NAMED[way], ((4, weight.shape[1]), (weight.shape[0], 4)), strict=True
        ):
            key = template.format(*([parent, leaf] if way == "processor" else [layer]))
            tensors[key] = 0.1 * torch.randn(shape, generator=generator)
    save_file(tensors, tmp_path / "a.safetensors")
    report = inspect_adapter(tmp_path / "a.safetensors")
    diffusers_pipeline.load_lora_weights(tmp_path, weight_name="a.safetensors")
    try:
        diffusers_pipeline.fuse_lora(components=["unet"])
        unchanged = [n for n, (now, before) in weights.items() if torch.equal(now, before)]
    finally:
        diffusers_pipeline.unload_lora_weights()
        for now, before in weights.values():
            now.data.copy_(before)
    assert len(unchanged) == MIXTURES[names]
    verdict = report.tools["diffusers"]
    if not unchanged:
        is_mixed = "PEFT" in names and len(set(names)) > 1
        assert verdict.partition(":")[0] == ("convert" if is_mixed else "exact")
        return
    assert verdict.startswith(f"wrong: it leaves {len(unchanged)} layer")
    assert all(name.removeprefix("unet.") in verdict for name in unchanged)
    assert not any(
        name.removeprefix("unet.") in verdict for name in weights if name not in unchanged
    )
    assert any(f"diffusers leaves {len(unchanged)} layer" in note for note in report.notes)
    assert report.key_format == "other"


# What sd-scripts looks for no adapter in, by its source: it has Transformer2DModel, ResnetBlock2D,
# Downsample2D and Upsample2D, CLIPAttention and CLIPMLP.
OUTSIDE = {
    "sd1": {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"},
    "sdxl": {
        "conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2",
        "add_embedding.linear_1", "add_embedding.linear_2",
    },
}  # fmt: skip


@TABLE_HOLDS
@pytest.mark.parametrize("family", OUTSIDE)
def test_layers_outside_of_the_blocks(
    tmp_path: Path, family: str, request: pytest.FixtureRequest, random_adapter: Any
) -> None:
    """Diffusers 0.42 reads them from a kohya file; sd-scripts does not, and that is said."""
    import diffusers

    folder = request.getfixturevalue(f"{family}_folder")
    layers = random_adapter(folder, axis=None, components=["unet"])
    inside = {
        name: layer
        for name, layer in layers.items()
        if not name.removeprefix("unet.").startswith(tuple(OUTSIDE[family]))
    }
    assert len(layers) - len(inside) == len(OUTSIDE[family])
    facts = AdapterMetadata(family)
    path = write_adapter(tmp_path / "in.safetensors", AdapterFile(inside, facts), "kohya")
    tools = inspect_adapter(path).tools
    assert (tools["sd-scripts"], tools["diffusers"]) == ("exact", "exact")
    path = write_adapter(tmp_path / "all.safetensors", AdapterFile(layers, facts), "kohya")
    tools = inspect_adapter(path).tools
    count = len(OUTSIDE[family])
    assert tools["sd-scripts"].startswith(f"wrong: it leaves {count} layers (unet.")
    assert tools["diffusers"].startswith(f"exact: in 0.42; 0.35 leaves {count} layers")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    names = {name: name.removeprefix("unet.") for name in layers}
    before = {n: pipeline.unet.get_submodule(p).weight.detach() for n, p in names.items()}
    before = {name: weight.clone() for name, weight in before.items()}
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    pipeline.fuse_lora(components=["unet"])
    pipeline.unload_lora_weights()
    for name, layer in layers.items():
        wanted = meant(before[name].double(), layer)
        found = pipeline.unet.get_submodule(names[name]).weight.double()
        assert (found - wanted).norm() < EXACT * (wanted - before[name]).norm(), name


def has(name: str, *words: str) -> bool:
    return any(word in name for word in words)


# What other trainers write: which layers a file has, which of them have another alpha (by default
# none), and what `inspect` says of diffusers.
KOHYA_LORAS: dict[str, tuple[Callable[[str], bool], Callable[[str], bool], str]] = {
    "one alpha": (lambda n: "text_projection" not in n, lambda n: False, "exact"),
    "attention": (lambda n: "text_projection" not in n, lambda n: has(n, "attn2.to_k"), "wrong"),
    "convolutions": (lambda n: "unet" in n, lambda n: has(n, "conv", "ff."), "exact"),
    "text encoder": (
        lambda n: not has(n, "unet", "projection"), lambda n: "fc1" in n and "er." in n, "wrong",
    ),
    "by component": (
        lambda n: "text_projection" not in n, lambda n: n.startswith("text_encoder_2."), "exact",
    ),
    "no out_proj": (lambda n: has(n, "mlp", "q_proj", "to_q"), lambda n: False, "wrong"),
    "no out_proj and no mlp": (lambda n: has(n, "q_proj", "to_q"), lambda n: False, "convert"),
    "text_projection": (lambda n: "encoder_2" in n, lambda n: False, "exact"),
    "text_projection of its own rank": (
        lambda n: "encoder_2" in n, lambda n: "text_projection" in n, "convert",
    ),
    "text_projection alone": (lambda n: "text_projection" in n, lambda n: False, "convert"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sdxl_pipeline(sdxl_folder: Path) -> Any:
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(sdxl_folder, local_files_only=True)


@TABLE_HOLDS
@pytest.mark.parametrize("case", KOHYA_LORAS)
def test_kohya_loras_of_others_in_diffusers(
    tmp_path: Path, sdxl_folder: Path, sdxl_pipeline: Any, random_adapter: Any, case: str
) -> None:
    """Layers that get another one's alpha, or none, are named; a refused file is told of."""
    has_layer, is_other, short = KOHYA_LORAS[case]
    layers = random_adapter(sdxl_folder, axis=None, every=5, components=["unet"])
    layers |= random_adapter(sdxl_folder, axis=None, components=["text_encoder", "text_encoder_2"])
    layers = {name: layer for name, layer in layers.items() if has_layer(name)}
    other_rank = {n: dataclasses.replace(w, down=w.down[:3], up=w.up[:, :3], alpha=2.25)
                  for n, w in layers.items() if is_other(n) and "text_projection" in n}  # fmt: skip
    layers |= other_rank
    file = write_adapter(tmp_path / "a.safetensors", AdapterFile(layers, AdapterMetadata("sdxl")),
                         "kohya")  # fmt: skip
    tensors, names = load_file(file), name_resolver(layers)
    for key in [key for key in tensors if key.endswith(".alpha")]:
        name = names(key.removesuffix(".alpha"))
        assert name is not None
        if is_other(name) and name not in other_rank:
            tensors[key] = 2 * tensors[key]
    save_file(tensors, file, {"ss_base_model_version": "sdxl_base_v1-0"})
    read, verdict = read_adapter(file).layers, inspect_adapter(file).tools["diffusers"]
    assert verdict.partition(":")[0] == short
    if short != "exact":
        assert verdict.endswith(("convert it to kohya or diffusers", "convert it to diffusers"))
    parameters = {name: module_at(sdxl_pipeline, name).weight for name in read}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        sdxl_pipeline.load_lora_weights(tmp_path, weight_name=file.name)
        sdxl_pipeline.fuse_lora(components=sorted({name.split(".")[0] for name in read}))
    except (ValueError, RuntimeError, IndexError):
        assert short == "convert"
        return
    finally:
        wrong = []
        for name, parameter in parameters.items():
            wanted = meant(before[name].double(), read[name])
            error = (parameter.detach().double() - wanted).norm() / (wanted - before[name]).norm()
            wrong += [name] if error > EXACT else []
        sdxl_pipeline.unload_lora_weights()
        for name, parameter in parameters.items():
            parameter.data.copy_(before[name])
    assert short == ("wrong" if wrong else "exact")
    assert not wrong or f" {some_layers(wrong)} " in verdict


def test_strength_stacking_and_hotswap_in_diffusers(
    tmp_path: Path, sd1_folder: Path, random_layer: Callable[..., LayerWeights]
) -> None:
    """Its scale is our direction strength; two DoRAs are not summed there; a hotswap is refused."""
    from diffusers import StableDiffusionPipeline

    from dora_diffusion.numerics.merging import merge_tensor
    from dora_diffusion.numerics.weights import Strengths

    pipeline = StableDiffusionPipeline.from_pretrained(sd1_folder, local_files_only=True)
    path = TO_K.removeprefix("unet.")
    weight = pipeline.unet.get_submodule(path).weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    layers = [random_layer(weight, generator) for _ in range(2)]
    files = [
        write_adapter(tmp_path / str(i), AdapterFile({TO_K: layer}, AdapterMetadata("sd1")))
        for i, layer in enumerate(layers)
    ]
    x = torch.randn(9, weight.shape[1], generator=generator)

    def off(*merged: tuple[LayerWeights, Strengths]) -> float:
        """Distance of diffusers' output from a merge, relative to the change of both adapters."""
        found = pipeline.unet.get_submodule(path)(x).detach()
        whole = merge_tensor(weight, [(layer, Strengths()) for layer in layers]) - weight
        wanted = x @ merge_tensor(weight, list(merged)).T
        return ((found - wanted).norm() / (x @ whole.T).norm()).item()

    one, other = layers
    pipeline.load_lora_weights(files[0].parent, weight_name=files[0].name, adapter_name="a")
    for scale in (1.0, 0.4, 0.0):
        pipeline.set_adapters(["a"], [scale])
        assert off((one, Strengths(1.0, scale, 1.0))) < 1e-5
        assert (off((one, Strengths(scale, 1.0, 1.0))) > 0.01) == (scale < 1)
    with pytest.raises(RuntimeError, match="lora_magnitude_vector"):
        pipeline.load_lora_weights(
            files[1].parent, weight_name=files[1].name, adapter_name="a", hotswap=True
        )
    pipeline.unload_lora_weights()
    for name, file in zip("ab", files, strict=True):
        pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
    pipeline.set_adapters(["a", "b"], [1.0, 1.0])
    assert off((one, Strengths()), (other, Strengths())) > 0.01
