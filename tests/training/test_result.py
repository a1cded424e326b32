"""The adapter file that a run leaves."""

from __future__ import annotations

from PIL import Image

from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.training.loop import train
from tests.training.helpers import make_config


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
