"""Steps and guidance of distilled models in everything that makes images."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from dora_diffusion.cli.main import main
from dora_diffusion.cluster.serving.engine import ApiRequest, BatchItem, Engine
from dora_diffusion.config.presets import PRESETS, preset_settings
from dora_diffusion.evaluation import photos as evaluation
from dora_diffusion.models.load import load_components
from dora_diffusion.models.locate import family_of, model_info
from dora_diffusion.sampling.images import parse_parameters, read_fields
from dora_diffusion.sampling.load import few_steps, sampling_defaults
from dora_diffusion.studio.app.settings import default_guidance
from tests.flux2_klein import write_flux2_klein
from tests.z_image import write_z_image

# Its folder, its steps, and the pipeline's value for no guidance.
MODELS: dict[str, tuple[Callable[[Path], Path], int, float]] = {
    "Z-Image-Turbo": (write_z_image, 8, 0.0),
    "any-name": (lambda folder: write_flux2_klein(folder, is_distilled=True), 4, 1.0),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A distilled model's folder, its steps, and an image of Diffusers' pipeline with them."""
    write, steps, guidance = MODELS[request.param]
    folder = write(tmp_path_factory.mktemp("models") / request.param)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    (image,) = pipeline(
        prompt="a dog", width=64, height=64, num_inference_steps=steps, guidance_scale=guidance,
        generator=torch.Generator().manual_seed(3),
    ).images  # fmt: skip
    return folder, steps, np.asarray(image, np.int16)


def difference(image: Any, expected: np.ndarray) -> int:
    with Image.open(image) as opened:
        return int(np.abs(np.asarray(opened.convert("RGB"), np.int16) - expected).max())


def test_a_base_is_not_taken_for_a_distilled_model(tmp_path: Path) -> None:
    for write in (write_z_image, write_flux2_klein):
        folder = write(tmp_path / write.__name__)
        family = family_of(str(folder))
        components = load_components(folder)
        assert few_steps(components) is None
        assert components.family == family
        assert sampling_defaults(components)["steps"] == 50
        assert family is not None
        assert not family.is_distilled


def test_an_image_has_the_models_steps_and_no_guidance(model, tmp_path, capsys) -> None:
    folder, steps, expected = model
    image = str(tmp_path / "image.png")
    assert (
        main(["generate", f"--base={folder}", "--prompt=a dog", "--seed=3", "--output", image]) == 0
    )
    fields = read_fields(Path(image))
    assert (fields["Steps"], fields["CFG scale"]) == (str(steps), "1")
    assert difference(image, expected) <= 1
    assert (
        f"for few steps (distilled): steps {steps}, guidance_scale 1.0" in capsys.readouterr().err
    )


def test_a_server_has_the_models_steps_and_no_guidance(model) -> None:
    folder, steps, expected = model
    options = {"clip_skip": None, "max_token_length": None}
    engine = Engine.load(str(folder), 2**30, options)
    (answer,) = engine.answer([BatchItem(ApiRequest(prompt="a dog"), 3, None)]).answers
    assert difference(io.BytesIO(answer.png), expected) <= 1
    with Image.open(io.BytesIO(answer.png)) as image:
        fields = parse_parameters(image.info["parameters"])
    assert (fields["Steps"], fields["CFG scale"]) == (str(steps), "1")


def test_an_evaluation_has_the_models_steps_and_no_guidance(
    model, small_photos, tmp_path, random_adapter, monkeypatch
) -> None:
    from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter

    monkeypatch.setattr(
        evaluation, "sample", lambda c, requests, *a: [Image.new("RGB", (8, 8))] * len(requests)
    )
    photo = tmp_path / "photos" / "01.jpg"
    photo.parent.mkdir()
    shutil.copy(small_photos / "01.jpg", photo)
    folder, steps, _ = model
    layers = random_adapter(folder, components=("transformer",), every=9)
    metadata = AdapterMetadata(model_info(str(folder)).family, trigger="sks dog")
    file = write_adapter(tmp_path / "adapter.safetensors", AdapterFile(layers, metadata))
    (tmp_path / "prompts.txt").write_text("{}", "utf-8")
    code = main([
        "evaluate", str(file), f"--base={folder}", f"--subject={photo.parent}", "--num_seeds=1",
        f"--prompts={tmp_path / 'prompts.txt'}", f"--output={tmp_path / 'out'}", "--overwrite",
    ])  # fmt: skip
    assert code == 0
    (report,) = (tmp_path / "out").glob("*.json")
    sampling = json.loads(report.read_text("utf-8"))["sampling"]
    assert (sampling["steps"], sampling["guidance_scale"]) == (steps, 1.0)


def test_a_training_names_the_base_and_has_samples_of_the_model(
    model, small_photos, tmp_path, capsys
) -> None:
    folder, steps, _ = model
    out = tmp_path / "run"
    code = main([
        "train", f"--pretrained_model_name_or_path={folder}", f"--instance_data_dir={small_photos}",
        "--instance_prompt=a sks dog", f"--output_dir={out}", "--max_train_steps=1", "--rank=2",
        "--num_validation_images=1", "--resolution=64", "--mixed_precision=no",
    ])  # fmt: skip
    assert code == 0
    printed = capsys.readouterr().err
    assert "was distilled to few denoising steps (distilled), which training may undo" in printed
    assert f"such as {family_of(str(folder)).released_id}" in printed
    sample = sorted((out / "samples").glob("*.png"))[0]
    fields = read_fields(sample)
    assert (fields["Steps"], fields["CFG scale"]) == (str(steps), "1")


def test_forms_and_presets_have_the_models_steps(model) -> None:
    folder, steps, _ = model
    assert default_guidance(str(folder)) == 1.0
    for preset in PRESETS:
        values = preset_settings(preset, family_of(str(folder)))
        assert values["validation_inference_steps"] == steps, preset
        assert values["validation_guidance_scale"] == 1.0, preset


def test_guidance_without_effect_is_said(tmp_path, capsys) -> None:
    """Diffusers' pipeline of a distilled FLUX.2-klein ignores guidance; Z-Image's does not."""
    folder = write_flux2_klein(tmp_path / "model", is_distilled=True)
    images = []
    for number, flags in enumerate(([], ["--guidance_scale=4", "--negative_prompt=a cat"])):
        images.append(tmp_path / f"{number}.png")
        code = main([
            "generate", f"--base={folder}", "--prompt=a dog", "--seed=3", "--steps=2", *flags,
            f"--output={images[-1]}",
        ])  # fmt: skip
        assert code == 0
    printed = capsys.readouterr().err
    for name in ("guidance_scale", "negative_prompt"):
        text = f"{name} has no effect on FLUX.2-klein: the model was distilled to work without"
        assert text in printed
    with Image.open(images[0]) as first, Image.open(images[1]) as second:
        assert first.tobytes() == second.tobytes()


def test_a_merged_model_stays_distilled(tmp_path, random_adapter) -> None:
    from dora_diffusion.export.checkpoint import export_checkpoint
    from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter

    folder = write_flux2_klein(tmp_path / "model", is_distilled=True)
    layers = random_adapter(folder, components=("transformer",), every=9)
    file = write_adapter(tmp_path / "a.safetensors", AdapterFile(layers, AdapterMetadata()))
    merged = export_checkpoint(folder, file, tmp_path / "merged")
    assert family_of(str(merged)).is_distilled
