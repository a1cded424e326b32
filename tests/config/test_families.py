"""The families, and what tells them apart."""

from __future__ import annotations

import pytest

from dora_diffusion.config.families import (
    FAMILIES,
    TEXT_ENCODERS,
    UnsupportedModelError,
    detect_family,
    guess_family,
)
from dora_diffusion.formats.adapter.metadata import parse_metadata


def test_what_tells_families_apart_differs() -> None:
    families = list(FAMILIES.values())
    for fact in ("title", "released_id", "architecture", "version_mark", "architecture_mark"):
        assert len({getattr(family, fact) for family in families}) == len(families), fact
    families = [family for family in families if not family.image_arguments]
    assert len({family.kohya_base_version for family in families}) == len(families)
    for has_unet in (True, False):
        widths = [family.prompt_width for family in families if family.has_unet == has_unet]
        assert len(set(widths)) == len(widths)
    # Sizes of one transformer are told apart by the width of their text states.
    transformers = {family.code: family for family in families if not family.has_unet}
    kinds = [family for family in families if family.has_unet] + [*transformers.values()]
    assert len({family.checkpoint_key for family in kinds}) == len(kinds)
    prefixes = {e.checkpoint_prefix for family in families for e in family.text_encoders}
    assert len(prefixes) == sum(len(family.text_encoders) for family in families)
    for family in families:
        assert set(family.text_encoder_names) <= set(TEXT_ENCODERS)
        assert family.text_encoder("vae") is None


@pytest.mark.parametrize(
    ("fields", "family"),
    [
        ({"ss_base_model_version": "sd_v1"}, "sd1"),
        ({"ss_base_model_version": "sd_v2_v", "ss_v2": "True"}, "sd2"),
        ({"ss_base_model_version": "sd_v1", "ss_v2": "True"}, "sd2"),
        ({"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"}, "sdxl"),
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, "sd1"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "sd2"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "sdxl"),
        ({"modelspec.architecture": "stable-diffusion-v1-inpainting/lora"}, "sd1-inpainting"),
        (
            {"modelspec.architecture": "stable-diffusion-xl-v1-base-inpainting/lora"},
            "sdxl-inpainting",
        ),
        ({"ss_base_model_version": "flux1"}, ""),
        ({}, ""),
    ],
)
def test_a_kohya_file_tells_its_family(fields: dict[str, str], family: str) -> None:
    assert parse_metadata(fields).family == family


def test_shapes_tell_a_family() -> None:
    to_k = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    for width, family in ((768, "sd1"), (1024, "sd2"), (2048, "sdxl"), (32, "")):
        assert guess_family({to_k: (320, width)}) == family
    assert guess_family({to_k: (320, 768), f"{to_k}2.attn2.to_v": (320, 1024)}) == ""
    assert guess_family({"text_encoder_2.text_projection": (8, 8)}) == "sdxl"
    assert guess_family({"unet.conv_in": (320, 4, 3, 3)}) == ""


def index(*text_encoders: str) -> dict[str, list[str]]:
    """A pipeline's ``model_index.json`` with these text encoders."""
    parts = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
    parts |= dict(zip(TEXT_ENCODERS, text_encoders, strict=False))
    return {name: ["library", kind] for name, kind in parts.items() if kind}


CLIP, PROJECTED = "CLIPTextModel", "CLIPTextModelWithProjection"
SIZES = {"addition_embed_type": "text_time"}


@pytest.mark.parametrize(
    ("text_encoders", "unet", "family"),
    [
        ((CLIP,), {}, "sd1"),
        ((CLIP,), {"use_linear_projection": True}, "sd2"),
        ((CLIP, PROJECTED), SIZES | {"use_linear_projection": True}, "sdxl"),
        ((CLIP, PROJECTED), SIZES, "sdxl"),
        ((CLIP,), {"in_channels": 4}, "sd1"),
        ((CLIP,), {"in_channels": 9}, "sd1-inpainting"),
        ((CLIP, PROJECTED), SIZES | {"in_channels": 9}, "sdxl-inpainting"),
        # What the autoencoder says of these is asked when the model is loaded.
        ((CLIP,), {"in_channels": 16}, "sd1"),
        ((CLIP,), {"in_channels": 9, "use_linear_projection": True}, "sd2"),
    ],
)
def test_a_pipeline_tells_its_family(
    text_encoders: tuple[str, ...], unet: dict[str, object], family: str
) -> None:
    assert detect_family(index(*text_encoders), unet) is FAMILIES[family]


@pytest.mark.parametrize(
    ("text_encoders", "unet"),
    [
        (("", PROJECTED), SIZES),  # the SDXL refiner
        (("", CLIP), {}),
        ((CLIP,), SIZES),
        ((CLIP, PROJECTED), {}),
        ((PROJECTED, PROJECTED), SIZES),
        ((), {}),
    ],
)
def test_another_kind_of_pipeline_is_refused(
    text_encoders: tuple[str, ...], unet: dict[str, object]
) -> None:
    with pytest.raises(UnsupportedModelError, match="is not supported; use a base model of Stable"):
        detect_family(index(*text_encoders), unet)
