"""Readings of a whole model by other programs, and the YAML by which A1111 reads it rightly.

Which program asks what was seen when it was run, or read in its source: docs/measurements.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

from dora_diffusion.config.families import Family
from dora_diffusion.formats.checkpoint.schedule import EPSILON, PREDICTION, ZERO_SNR, V
from dora_diffusion.formats.checkpoint.weights import StoredModel
from dora_diffusion.formats.layouts.compatibility import EXACT

PROGRAMS = ("diffusers", "ComfyUI", "Forge", "A1111", "InvokeAI")
WIDTH = 320
"""Channels of the first level of the released models' UNets: web UIs load no other."""
A1111_HEAD = "# Written by dora_diffusion: A1111 builds the model of the same name by it.\n"

_TOLD = (
    "exact if told so: from_single_file(FILE, config=FOLDER), the folder of a model of this shape "
    "and prediction type; or load the exported folder"
)
_NODE = "exact if told so: by the node ModelSamplingDiscrete"
_BESIDE = "exact with its YAML: keep the file of the same name beside the model"
_AS_NOISE = "wrong: it takes one file for a noise model; give it the exported folder"
_ONE_FILE = "convert: it loads one file, --output NAME.safetensors"
_OTHER_SHAPE = "no: it loads models of the released shapes, and this is none"

# What a model is -> verdict per program, in their order.
VERDICTS: Mapping[str, Mapping[str, str]] = {
    kind: dict(zip(PROGRAMS, row, strict=True))
    for kind, row in {
        "SD1 or SDXL file, epsilon": [EXACT] * 5,
        "SDXL file, v-prediction": [_TOLD, EXACT, EXACT, _BESIDE, _AS_NOISE],
        "SD1 file, v-prediction": [_TOLD, _NODE, _BESIDE, _BESIDE, _AS_NOISE],
        "SD2 file, epsilon": [_TOLD, _NODE, "-", _BESIDE, EXACT],
        "SD2 file, v-prediction": [_TOLD, _NODE, _BESIDE, _BESIDE, EXACT],
        "folder": [EXACT, _ONE_FILE, _ONE_FILE, _ONE_FILE, EXACT],
        "file of another shape": [_TOLD, *[_OTHER_SHAPE] * 4],
        "folder of another shape": [EXACT, *[_OTHER_SHAPE] * 4],
    }.items()
}


def kind_of(model: StoredModel) -> str:
    """Return a model's kind, a key of `VERDICTS`; empty where nobody says what it predicts."""
    prediction = model.schedule().get(PREDICTION, "")
    what = "file" if model.is_single_file else "folder"
    if not has_released_shape(model):
        return f"{what} of another shape"
    if not model.is_single_file:
        return what
    if model.family.has_two_predictions:
        return f"SD2 file, {'v-prediction' if prediction == V else EPSILON}" if prediction else ""
    if prediction != V:
        return "SD1 or SDXL file, epsilon"
    return f"{'SDXL' if model.family.marks_v_prediction else 'SD1'} file, v-prediction"


def has_released_shape(model: StoredModel) -> bool:
    """Return whether its UNet is as wide as the released ones."""
    return model.specs["unet.conv_in.weight"].shape[0] == WIDTH


def schedule_notes(model: StoredModel) -> list[str]:
    """Return notes for programs on a noise schedule that ends in pure noise."""
    is_one = model.is_single_file and has_released_shape(model)
    if not is_one or not model.schedule().get(ZERO_SNR):
        return []
    marked = model.family.marks_v_prediction
    comfyui = "" if marked else "; in ComfyUI switch on zsnr in that node"
    return [
        "zero terminal SNR: in A1111 choose it under Settings, Sampler parameters, Noise schedule "
        f"for sampling{comfyui}"
    ]


def a1111_config(model: StoredModel) -> str:
    """The YAML beside a model's single file that A1111 builds it by; empty where it needs none.

    Without one, A1111 takes Stable Diffusion 1 and XL for noise models, and guesses which of its
    releases a Stable Diffusion 2 is from what its UNet answers.
    """
    family, prediction = model.family, model.schedule().get(PREDICTION, "")
    is_told = prediction == V or (bool(prediction) and family.has_two_predictions)
    if not is_told or not has_released_shape(model):
        return ""
    config = (_sgm if family.has_time_ids else _ldm)(family, "v" if prediction == V else "eps")
    plain = json.loads(json.dumps({"model": config}))  # each part its own: no YAML aliases
    return A1111_HEAD + yaml.safe_dump(plain, sort_keys=False)


def _target(name: str, **params: Any) -> dict[str, Any]:
    return {"target": name, "params": params} if params else {"target": name}


def _unet(package: str, family: Family, **own: Any) -> dict[str, Any]:
    return _target(
        f"{package}.modules.diffusionmodules.openaimodel.UNetModel",
        in_channels=family.in_channels(), out_channels=4, model_channels=WIDTH, num_res_blocks=2,
        use_spatial_transformer=True, context_dim=family.prompt_width, use_checkpoint=False,
        legacy=False, **own,
    )  # fmt: skip


def _vae(target: str) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3,
        "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [],
        "dropout": 0.0,
    }  # fmt: skip
    loss = _target("torch.nn.Identity")
    return _target(target, embed_dim=4, ddconfig=sizes, lossconfig=loss)


def _ldm(family: Family, parametrization: str) -> dict[str, Any]:
    """A model of Stable Diffusion 1 or 2, in the terms of their own code."""
    heads: dict[str, Any] = {"num_heads": 8}
    if family.uses_linear_projection:
        heads = {"num_head_channels": 64, "use_linear_in_transformer": True}
    unet = _unet(
        "ldm", family, attention_resolutions=[4, 2, 1], channel_mult=[1, 2, 4, 4],
        transformer_depth=1, **heads,
    )  # fmt: skip
    text = _target("ldm.modules.encoders.modules.FrozenCLIPEmbedder")
    if family.text_encoders[0].is_open_clip:
        target = "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder"
        text = _target(target, freeze=True, layer="penultimate")
    paints = family.condition_images > 0
    kind, own = "LatentDiffusion", dict[str, Any]()
    if paints:
        kind, own = "LatentInpaintDiffusion", {"finetune_keys": None}
    return _target(
        f"ldm.models.diffusion.ddpm.{kind}",
        parameterization=parametrization, linear_start=0.00085, linear_end=0.012, timesteps=1000,
        num_timesteps_cond=1, first_stage_key="jpg", cond_stage_key="txt", image_size=64,
        channels=4, cond_stage_trainable=False,
        conditioning_key="hybrid" if paints else "crossattn", scale_factor=0.18215, use_ema=False,
        unet_config=unet, first_stage_config=_vae("ldm.models.autoencoder.AutoencoderKL"),
        cond_stage_config=text, **own,
    )  # fmt: skip


def _sgm(family: Family, parametrization: str) -> dict[str, Any]:
    """A model of Stable Diffusion XL, in the terms of its own code."""
    how = {"v": "V", "eps": "Eps"}[parametrization]
    parts = "sgm.modules.diffusionmodules"
    denoiser = _target(
        f"{parts}.denoiser.DiscreteDenoiser",
        num_idx=1000,
        weighting_config=_target(f"{parts}.denoiser_weighting.{how}Weighting"),
        scaling_config=_target(f"{parts}.denoiser_scaling.{how}Scaling"),
        discretization_config=_target(f"{parts}.discretizer.LegacyDDPMDiscretization"),
    )
    unet = _unet(
        "sgm", family, adm_in_channels=2816, num_classes="sequential",
        attention_resolutions=[4, 2], channel_mult=[1, 2, 4], num_head_channels=64,
        use_linear_in_transformer=True, transformer_depth=[1, 2, 10],
        spatial_transformer_attn_type="softmax-xformers",
    )  # fmt: skip
    modules = "sgm.modules.encoders.modules"
    clip = _target(f"{modules}.FrozenCLIPEmbedder", layer="hidden", layer_idx=11)
    open_clip = _target(
        f"{modules}.FrozenOpenCLIPEmbedder2", arch="ViT-bigG-14", version="laion2b_s39b_b160k",
        freeze=True, layer="penultimate", always_return_pooled=True, legacy=False,
    )  # fmt: skip
    size = _target(f"{modules}.ConcatTimestepEmbedderND", outdim=256)
    inputs = {
        "txt": [clip, open_clip], "original_size_as_tuple": [size],
        "crop_coords_top_left": [size], "target_size_as_tuple": [size],
    }  # fmt: skip
    embedders = [
        {"is_trainable": False, "input_key": key, **embedder}
        for key, of_key in inputs.items()
        for embedder in of_key
    ]
    return _target(
        "sgm.models.diffusion.DiffusionEngine",
        scale_factor=0.13025, disable_first_stage_autocast=True, denoiser_config=denoiser,
        network_config=unet,
        conditioner_config=_target("sgm.modules.GeneralConditioner", emb_models=embedders),
        first_stage_config=_vae("sgm.models.autoencoder.AutoencoderKLInferenceWrapper"),
    )  # fmt: skip
