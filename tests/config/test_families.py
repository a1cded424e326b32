"""The families: nothing else in the package knows them by name, and what tells them apart."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import dora_diffusion
from dora_diffusion.config import settings
from dora_diffusion.config.families import (
    COMPONENTS,
    FAMILIES,
    UnsupportedModelError,
    detect_family,
    guess_family,
)
from dora_diffusion.formats.adapter.metadata import parse_metadata

PACKAGE = Path(dora_diffusion.__file__).parent
# A family's name, or a piece of one such as the "xl" in a model's name.
NAME = re.compile(r"sd[-_]?v?[12]|xl|diffusion-v", flags=re.IGNORECASE)


def strings(node: ast.AST) -> Iterator[str]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
            yield inner.value


def known_by_name(source: str) -> list[int]:
    """Lines that name a family, or compare a string with a piece of such a name."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        is_test = isinstance(node, (ast.Compare, ast.match_case)) or (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("startswith", "endswith", "removeprefix", "removesuffix", "find")
        )
        if isinstance(node, ast.Constant) and node.value in FAMILIES:
            lines.append(node.lineno)
        elif is_test and any(NAME.search(text) for text in strings(node)):
            lines.append(getattr(node, "lineno", 0))
    return lines


@pytest.mark.parametrize(
    "source",
    [
        'family == "sd1"',
        'name in ("sd1", "sdxl")',
        'WIDTHS = {"sd2": 1024}',
        'CHOICES = ("sd1", "sd2", "sdxl")',
        'FAMILIES["sd1"]',
        'def load(family="sdxl"): ...',
        '"xl" in name',
        'name.endswith("-xl")',
        'match family:\n    case "sdxl":\n        pass',
    ],
)
def test_a_family_that_is_known_by_its_name_is_found(source: str) -> None:
    assert known_by_name(source)


def test_a_docstring_may_name_a_family() -> None:
    assert not known_by_name('def f():\n    """Of SDXL, ``"sdxl"``; sd1 too."""')


def test_no_other_module_knows_a_family_by_its_name() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in PACKAGE.rglob("*.py")
        if path != PACKAGE / "config" / "families.py"
        for line in known_by_name(path.read_text("utf-8"))
    ]
    assert not found, "ask for a fact of the family (families.py) instead of its name"


def test_what_tells_families_apart_differs() -> None:
    families = list(FAMILIES.values())
    for fact in ("title", "released_id", "architecture", "version_mark", "architecture_mark"):
        assert len({getattr(family, fact) for family in families}) == len(families), fact
    families = [family for family in families if not family.image_arguments]
    for fact in ("checkpoint_key", "prompt_width", "kohya_base_version"):
        assert len({getattr(family, fact) for family in families}) == len(families), fact
    prefixes = {e.checkpoint_prefix for family in families for e in family.text_encoders}
    assert len(prefixes) == sum(len(family.text_encoders) for family in families)
    for family in families:
        assert family.text_encoder_names == COMPONENTS[1 : 1 + len(family.text_encoders)]
        assert family.text_encoder("vae") is None


def test_the_default_number_of_steps_is_stated_as_it_is() -> None:
    usual, large = FAMILIES["sd1"].default_steps, FAMILIES["sdxl"].default_steps
    text = f"{usual}, for SDXL {large}"
    assert FAMILIES["sd2"].default_steps == usual
    [setting] = [setting for setting in settings() if setting.name == "max_train_steps"]
    assert setting.default_text == text


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
    parts |= dict(zip(COMPONENTS[1:], text_encoders, strict=False))
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
