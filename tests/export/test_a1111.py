"""Other programs' detection of whole models, and the YAML by which A1111 builds one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from dora_diffusion.config.families import FAMILIES
from dora_diffusion.export.programs import (
    a1111_config,
    kind_of,
    schedule_notes,
)
from dora_diffusion.formats.files.stream import TensorSpec
from dora_diffusion.formats.layouts import MODEL_VERDICTS
from dora_diffusion.models.configuration import released_config
from tests.families import UNETS

V, EPSILON = "v_prediction", "epsilon"
TOLD = {*((family, V) for family in UNETS), ("sd2", EPSILON)}
DOCS = Path(__file__).resolve().parents[2] / "docs"


def model(
    family: str, prediction: str, *, zero: bool = False, one: bool = True, width: int = 320
) -> Any:
    """The part of a stored model that the functions read."""
    settings = {"prediction_type": prediction, "rescale_betas_zero_snr": zero}
    spec = TensorSpec(torch.float16, (width, 4, 3, 3))
    return SimpleNamespace(
        family=FAMILIES[family], is_single_file=one, specs={"unet.conv_in.weight": spec},
        schedule=lambda: {name: value for name, value in settings.items() if value},
    )  # fmt: skip


def parsed(family: str, prediction: str) -> Any:
    return yaml.safe_load(a1111_config(model(family, prediction)))["model"]["params"]


def test_a_yaml_is_written_where_a1111_does_not_know_by_itself() -> None:
    told = {
        (family, prediction)
        for family in FAMILIES for prediction in (V, EPSILON, "")
        if a1111_config(model(family, prediction))
    }  # fmt: skip
    assert told == TOLD
    assert not any(a1111_config(model(family, V, width=32)) for family in FAMILIES)


@pytest.mark.parametrize(("family", "prediction"), sorted(TOLD))
def test_the_yaml_is_of_the_released_shape(family: str, prediction: str) -> None:
    """Against Diffusers' configurations of the released models, which say it in other words."""
    params, config = parsed(family, prediction), released_config(FAMILIES[family], prediction)
    unet, wanted = params.get("unet_config") or params["network_config"], config["unet"]
    unet = unet["params"]
    widths = [unet["model_channels"] * factor for factor in unet["channel_mult"]]
    assert widths == list(wanted["block_out_channels"])
    assert unet["context_dim"] == wanted["cross_attention_dim"]
    assert (unet["in_channels"], unet["out_channels"]) == (
        wanted["in_channels"], wanted["out_channels"],
    )  # fmt: skip
    assert unet["num_res_blocks"] == wanted["layers_per_block"]
    assert unet.get("use_linear_in_transformer", False) == wanted.get(
        "use_linear_projection", False
    )
    # Diffusers' attention_head_dim is a number of heads.
    heads = wanted["attention_head_dim"]
    heads = heads if isinstance(heads, list) else [heads] * len(widths)
    sizes = [width // count for width, count in zip(widths, heads, strict=True)]
    assert set(sizes) == {unet["num_head_channels"]} if "num_head_channels" in unet else (
        set(heads) == {unet["num_heads"]}
    )  # fmt: skip
    levels = [2**i for i, kind in enumerate(wanted["down_block_types"]) if "Attn" in kind]
    assert sorted(unet["attention_resolutions"]) == levels
    depths = wanted.get("transformer_layers_per_block", 1)
    assert unet["transformer_depth"] == depths
    assert params["scale_factor"] == config["vae"]["scaling_factor"]
    vae = params["first_stage_config"]["params"]["ddconfig"]
    assert [vae["ch"] * m for m in vae["ch_mult"]] == list(config["vae"]["block_out_channels"])
    if "linear_start" in params:
        betas = (params["linear_start"], params["linear_end"])
        assert betas == (config["scheduler"]["beta_start"], config["scheduler"]["beta_end"])
    else:
        ids = [e for e in params["conditioner_config"]["params"]["emb_models"]
               if "ConcatTimestep" in e["target"]]  # fmt: skip
        assert [e["params"]["outdim"] for e in ids] == [wanted["addition_time_embed_dim"]] * 3
        assert unet["adm_in_channels"] == wanted["projection_class_embeddings_input_dim"]


# Arguments without a default of the constructors that the YAML names, in Stability's repositories.
REQUIRED = {
    "ldm.models.diffusion.ddpm.LatentDiffusion":
        "unet_config first_stage_config cond_stage_config",
    "ldm.models.diffusion.ddpm.LatentInpaintDiffusion":
        "unet_config first_stage_config cond_stage_config finetune_keys",
    "ldm.modules.diffusionmodules.openaimodel.UNetModel":
        "image_size in_channels model_channels out_channels num_res_blocks attention_resolutions",
    "ldm.models.autoencoder.AutoencoderKL": "ddconfig lossconfig embed_dim",
    "sgm.models.diffusion.DiffusionEngine":
        "network_config denoiser_config first_stage_config conditioner_config",
    "sgm.modules.diffusionmodules.denoiser.DiscreteDenoiser":
        "num_idx weighting_config scaling_config discretization_config",
    "sgm.modules.diffusionmodules.openaimodel.UNetModel":
        "in_channels model_channels out_channels num_res_blocks attention_resolutions",
    "sgm.modules.GeneralConditioner": "emb_models",
    "sgm.modules.encoders.modules.ConcatTimestepEmbedderND": "outdim",
    "sgm.models.autoencoder.AutoencoderKLInferenceWrapper": "ddconfig lossconfig embed_dim",
}  # fmt: skip
# Constructors all of whose arguments have defaults.
OPTIONAL = {
    "torch.nn.Identity", "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
    "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
    "sgm.modules.encoders.modules.FrozenCLIPEmbedder",
    "sgm.modules.encoders.modules.FrozenOpenCLIPEmbedder2",
    "sgm.modules.diffusionmodules.discretizer.LegacyDDPMDiscretization",
}  # fmt: skip
VAE = "double_z: true, z_channels: 4, resolution: 256, in_channels: 3, out_ch: 3, ch: 128, " \
      "ch_mult: [1, 2, 4, 4], num_res_blocks: 2, attn_resolutions: [], dropout: 0.0"  # fmt: skip
LDM = "image_size: 32, out_channels: 4, model_channels: 320, attention_resolutions: [4, 2, 1], " \
      "num_res_blocks: 2, channel_mult: [1, 2, 4, 4], use_spatial_transformer: true, " \
      "transformer_depth: 1, legacy: false"  # fmt: skip
# The UNet of v1-inference.yaml, v2-inference.yaml and sd_xl_base.yaml; inpainting: 9 channels.
UNETS = {
    "sd1": LDM + ", num_heads: 8, context_dim: 768",
    "sd2": LDM + ", num_head_channels: 64, use_linear_in_transformer: true, context_dim: 1024",
    "sdxl": "adm_in_channels: 2816, num_classes: sequential, out_channels: 4, "
            "model_channels: 320, attention_resolutions: [4, 2], num_res_blocks: 2, "
            "channel_mult: [1, 2, 4], num_head_channels: 64, use_spatial_transformer: true, "
            "use_linear_in_transformer: true, transformer_depth: [1, 2, 10], context_dim: 2048, "
            "spatial_transformer_attn_type: softmax-xformers, legacy: false",
}  # fmt: skip


def constructors(config: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every class that a configuration names, and its arguments."""
    if isinstance(config, dict) and "target" in config:
        yield config["target"], config.get("params") or {}
    values = config.values() if isinstance(config, dict) else config
    for value in values if isinstance(config, dict | list) else ():
        yield from constructors(value)


@pytest.mark.parametrize(("family", "prediction"), sorted(TOLD))
def test_a1111_can_build_the_model_of_the_yaml(family: str, prediction: str) -> None:
    """Key by key against Stability's configurations and the constructors of their classes."""
    built = list(constructors(yaml.safe_load(a1111_config(model(family, prediction)))))
    lacking = {
        target: [name for name in REQUIRED[target].split() if name not in params]
        for target, params in built if target in REQUIRED
    }  # fmt: skip
    assert not any(lacking.values()), lacking
    others = {target for target, _ in built} - REQUIRED.keys() - OPTIONAL
    assert all(re.search(r"denoiser_(weighting|scaling)\.(V|Eps)(W|S)", name) for name in others)
    (unet,) = [params for target, params in built if target.endswith(".UNetModel")]
    channels = 9 if "inpainting" in family else 4
    wanted = yaml.safe_load("{" + UNETS[family.split("-")[0]] + "}") | {"in_channels": channels}
    assert {key: unet.get(key) for key in wanted} == wanted
    assert unet.keys() - wanted.keys() == {"use_checkpoint"}
    (vae,) = [params for target, params in built if ".AutoencoderKL" in target]
    assert (vae["ddconfig"], vae["embed_dim"]) == (yaml.safe_load("{" + VAE + "}"), 4)


@pytest.mark.parametrize("family", UNETS)
def test_the_yaml_says_what_the_model_predicts(family: str) -> None:
    """By the rules of A1111 and Forge: an attribute of the class, or the name of a scaling."""
    for prediction in (V, EPSILON) if family == "sd2" else (V,):
        params = parsed(family, prediction)
        scaling = params.get("denoiser_config", {}).get("params", {}).get("scaling_config", {})
        is_v = params.get("parameterization") == "v" or scaling.get("target", "").endswith(
            ".VScaling"
        )
        assert is_v == (prediction == V)
    assert "&id" not in a1111_config(model(family, V))


def test_kinds_of_models() -> None:
    kinds = {
        (family, prediction): kind_of(model(family, prediction))
        for family in UNETS for prediction in (V, EPSILON, "")
    }  # fmt: skip
    for (family, prediction), kind in kinds.items():
        name = "SD2" if family == "sd2" else "SDXL" if "xl" in family else "SD1"
        if prediction == V:
            assert kind == f"{name} file, v-prediction"
        elif name == "SD2":
            assert kind == ("SD2 file, epsilon" if prediction else "")
        else:
            assert kind == "SD1 or SDXL file, epsilon"
    assert kind_of(model("sdxl", V, one=False)) == "folder"
    assert kind_of(model("sdxl", V, width=32)) == "file of another shape"
    assert kind_of(model("sd1", V, one=False, width=32)) == "folder of another shape"
    assert {*filter(None, kinds.values())} < MODEL_VERDICTS.keys()


def test_zero_terminal_snr_is_told_where_it_must_be() -> None:
    assert schedule_notes(model("sdxl", V)) == schedule_notes(model("sdxl", V, one=False)) == []
    (xl,), (sd1,) = (schedule_notes(model(f, V, zero=True)) for f in ("sdxl", "sd1"))
    assert "Noise schedule for sampling" in xl
    assert "zsnr" not in xl
    assert "in ComfyUI switch on zsnr" in sd1
