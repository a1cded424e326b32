"""``dora-diffusion generate``: what it refuses before a model is loaded, and what it writes."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from PIL import Image

from dora_diffusion.cli import main
from dora_diffusion.config import AdapterConfig
from dora_diffusion.generate import BrokenImageError, SamplingSettings, generate_images
from dora_diffusion.models.load import load_components


@pytest.fixture
def generate(sd1_folder, tmp_path, capsys):
    """Run the command with changes; returns (exit code, its error line)."""

    def run(**changes):
        settings = {
            "base": sd1_folder,
            "prompt": "a dog",
            "output": tmp_path / "image.png",
            "steps": 1,
            "seed": 3,
            **changes,
        }
        flags = []
        for name, value in settings.items():
            if value is True:
                flags.append(f"--{name}")
            elif value is not None:
                # With "=", so that a negative number is not taken for a flag.
                flags.append(f"--{name}={value}")
        code = main(["generate", *flags])
        lines = capsys.readouterr().err.splitlines()
        return code, next((line for line in lines if line.startswith("error: ")), "")

    return run


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("strength", "nan", "strength is nan; it must be a finite number"),
        ("strength", "-inf", "strength is -inf; it must be a finite number"),
        ("direction_strength", "inf", "direction_strength is inf"),
        ("magnitude_strength", "nan", "magnitude_strength is nan"),
        ("guidance_scale", "nan", "guidance_scale is nan"),
        ("guidance_scale", "-1", "guidance_scale is -1.0; it must be 0 or more"),
        ("guidance_scale", "inf", "guidance_scale is inf"),
        ("steps", "0", "steps is 0; it must be at least 1"),
        ("width", "0", "width is 0"),
        ("height", "-8", "height is -8"),
        ("num_images", "0", "num_images is 0"),
        ("batch_size", "-1", "batch_size is -1"),
        ("seed", "-1", "seed is -1; it must be between 0 and"),
        ("seed", str(2**63), "seed is 9223372036854775808"),
    ],
)
def test_numbers_are_checked_before_a_model_is_loaded(
    name, value, message, generate, tmp_path, monkeypatch
):
    monkeypatch.setattr("dora_diffusion.generate.load_components", lambda *a, **k: 1 / 0)
    code, error = generate(**{name: value})
    assert code == 1
    assert message in error
    assert not (tmp_path / "image.png").exists()


def test_the_last_of_several_seeds_must_be_one_too(generate):
    assert generate(seed=2**63 - 2, num_images=3)[0] == 1


def test_images_are_not_replaced_unasked(generate, tmp_path):
    (tmp_path / "image.png").write_text("mine")
    code, error = generate()
    assert code == 1
    assert "image.png exists; choose another --output, or replace it with --overwrite" in error
    assert (tmp_path / "image.png").read_text() == "mine"
    assert generate(overwrite=True) == (0, "")
    with Image.open(tmp_path / "image.png") as image:
        assert image.size == (64, 64)


def test_of_several_images_none_is_replaced(generate, tmp_path):
    (tmp_path / "image-4.png").write_text("mine")
    code, error = generate(num_images=2)
    assert code == 1
    assert "image-4.png exists" in error
    assert not (tmp_path / "image-3.png").exists()


def test_a_strength_that_breaks_the_numbers_is_an_error_and_no_black_image(
    generate, sd1_folder, tmp_path
):
    from dora_diffusion.adapters.files import save_adapter
    from dora_diffusion.adapters.inject import adapter_parameters, inject_adapters

    components = load_components(sd1_folder)
    inject_adapters(components.unet, AdapterConfig(targets=("attention",), rank=2))
    with torch.no_grad():
        for parameter in adapter_parameters(components.unet):
            parameter.add_(0.1)
    adapter = save_adapter({"unet": components.unet}, tmp_path / "adapter")
    code, error = generate(adapter=adapter, strength="1e38")
    assert code == 1
    assert "the image of seed 3 is not finite" in error
    assert not (tmp_path / "image.png").exists()


def test_a_black_image_is_refused_only_where_that_is_asked(sd1_folder, monkeypatch):
    components = load_components(sd1_folder)
    settings = SamplingSettings(steps=1)
    decode = type(components.vae).decode

    def black(self, *args, **kwargs):
        (pixels,) = decode(self, *args, **kwargs)
        return (torch.full_like(pixels, -2.0),)

    monkeypatch.setattr(type(components.vae), "decode", black)
    (image,) = generate_images(components, "a dog", [3], settings)
    assert image.getextrema() == ((0, 0),) * 3
    with pytest.raises(BrokenImageError, match="the image of seed 4 is black all over"):
        generate_images(components, "a dog", [4], settings, require_finite=True)


def test_a_long_prompt_is_said_once_and_in_our_words(sd1_folder, caplog, capsys):
    components = load_components(sd1_folder)
    for name in ("diffusers", "transformers"):
        logging.getLogger(name).propagate = True
    prompt = "a dog " + "on the red backpack " * 30
    settings = SamplingSettings(steps=1, negative_prompt="zebra " * 30)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in (1, 2):
            generate_images(components, prompt, [seed], settings)
    told = [str(warning.message) for warning in caught if "tokens" in str(warning.message)]
    assert len(told) == 2, "the prompt, and the negative one"
    assert not caplog.records
    assert "truncated" not in capsys.readouterr().err
