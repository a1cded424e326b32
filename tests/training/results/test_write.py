"""The adapter file that a run leaves."""

from __future__ import annotations

import dataclasses

from PIL import Image

from dora_diffusion.cli.main import main
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.formats.adapter.metadata import stated_reading
from dora_diffusion.models.load import load_components
from dora_diffusion.sampling.generate import generate_images
from dora_diffusion.sampling.images import parse_parameters, read_parameters
from dora_diffusion.sampling.load import load_adapted
from dora_diffusion.sampling.settings import SamplingSettings
from dora_diffusion.training.recipe import train
from tests.training.helpers import find, make_config


def test_an_input_axis_adapter_is_written_in_the_kohya_form(sd1_folder, photos, tmp_path):
    result = train(make_config(sd1_folder, photos, tmp_path / "out", norm_axis="input"))
    assert result.adapter.name == "dora_kohya.safetensors"
    layers = read_adapter(tmp_path / "out").layers
    assert {layer.norm_axis for layer in layers.values()} == {"input"}


def test_the_thumbnail_shows_samples_and_no_letters(tiny_run, tmp_path):
    import base64
    import io

    from dora_diffusion.formats.adapter.file import read_adapter

    result = train(tiny_run(max_train_steps=1, num_validation_images=2))
    uri = read_adapter(result.adapter).metadata.thumbnail
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as thumbnail:
        assert thumbnail.size == (66, 32), "two images and the gap between them"


def test_how_prompts_were_read_goes_along(tiny_run, tmp_path, capsys):
    """Into the adapter, its card, its samples and inspect; and into a model that trained whole."""
    config = tiny_run(
        max_train_steps=1, num_validation_images=2, clip_skip=1, max_token_length=225, seed=5,
        instance_prompt="a red sks mug",
    )  # fmt: skip
    result = train(config)
    stated = {"clip_skip": 1, "max_token_length": 225}
    assert stated_reading(read_adapter(result.adapter).metadata.extra) == stated
    components, _ = load_adapted(config.pretrained_model_name_or_path, result.adapter)
    assert (components.clip_skip, components.max_token_length) == (1, 225)
    words = "with clip_skip 1 as Diffusers counts (Clip skip 2 in web UIs), up to 225 tokens"
    assert main(["inspect", str(result.adapter)]) == 0
    assert words in " ".join(capsys.readouterr().out.split())
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"Prompts were read {words} in chunks of 75; `generate` does so by itself." in card
    assert ", clip_skip=1).images[0]" in card
    facts = parse_parameters(read_parameters(tmp_path / "out" / "samples" / "adapted.png"))
    assert facts["Clip skip"] == "2"
    assert facts["Prompt"] == config.instance_prompt
    assert f"--prompt '{facts['Prompt']}'" in card
    base = load_components(config.pretrained_model_name_or_path).reading(1, 225)
    settings = SamplingSettings(steps=2, width=32, height=32)
    with Image.open(tmp_path / "out" / "samples" / "base.png") as sheet:
        for seed in (5, 6):
            (image,) = generate_images(base, config.instance_prompt, [seed], settings)
            # How many are sampled at once changes the order of sums on some processors.
            assert len(find(sheet, image, within=1)) == 1
    whole = dataclasses.replace(
        config, method="full", output_dir=str(tmp_path / "whole"), num_validation_images=0
    )
    train(whole)
    tuned = load_components(tmp_path / "whole" / "model")
    assert (tuned.clip_skip, tuned.max_token_length) == (1, 225)
