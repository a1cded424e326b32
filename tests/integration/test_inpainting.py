"""Inpainting models: trained, sampled, exported and loaded in Diffusers' inpainting pipelines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from dora_diffusion import export_checkpoint, generate_images, load_components, train
from dora_diffusion.config import TrainConfig
from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.families import FAMILIES
from dora_diffusion.data.crops import CropRecord
from dora_diffusion.data.dataset import SampleBatch
from dora_diffusion.data.sampler import generator_for
from dora_diffusion.evaluation.denoising import HeldOutImages
from dora_diffusion.export import convert_adapter, verify_checkpoint
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.models.components import Components
from dora_diffusion.models.latents import encode_inputs
from dora_diffusion.numerics.weights import LayerWeights
from dora_diffusion.sampling.load import load_adapted
from dora_diffusion.sampling.settings import SamplingSettings
from dora_diffusion.training.batch import draw_batch
from tests.refusal import refused
from tests.training.helpers import (
    losses_by,
    make_config,
    noise,
    open_run,
    terms_of,
    warnings_of,
)

KINDS = ("sd1", "sdxl")
PIPELINES = {
    "sd1": diffusers.StableDiffusionInpaintPipeline,
    "sdxl": diffusers.StableDiffusionXLInpaintPipeline,
}
PROMPT, SEED = "a photo of a sks mug", 7
SETTINGS = SamplingSettings(steps=3, guidance_scale=4.0, width=64, height=64)


@pytest.fixture(scope="module", params=KINDS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, family: str) -> Path:
    return Path(request.getfixturevalue(f"{family}_inpainting_folder"))


def painting() -> dict[str, Image.Image]:
    """An image of 64 pixels, and a mask that is white in a part of it."""
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 8, 56, 40))
    return {"image": noise((64, 64), 1), "mask_image": mask}


def difference(image: Image.Image, other: Image.Image) -> int:
    """Largest difference in levels of 255."""
    pair = (np.asarray(each, dtype=np.int16) for each in (image, other))
    return int(np.abs(np.subtract(*pair)).max())


@torch.no_grad()
def prediction(components: Any) -> Tensor:
    """Prediction of a loaded model, or a pipeline, from nine channels of noise."""
    generator = torch.Generator().manual_seed(3)
    unet = getattr(components, "denoiser", None) or components.unet
    config = unet.config
    states = torch.randn(1, 77, config.cross_attention_dim, generator=generator)
    added = {"text_embeds": torch.randn(1, 48, generator=generator), "time_ids": torch.ones(1, 6)}
    predicted: Tensor = unet(
        torch.randn(1, 9, 8, 8, generator=generator), torch.tensor([300]), states,
        added_cond_kwargs=added if config.addition_embed_type else None,
    ).sample  # fmt: skip
    return predicted


@pytest.fixture(scope="module")
def trained(
    folder: Path, small_photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainConfig, Path]:
    """A short run on all attention, convolutions and the convolution that reads nine channels.

    Nothing is written into its folder.
    """
    output = tmp_path_factory.mktemp("inpainting") / "out"
    config = make_config(
        folder, small_photos, output, resolution=64, targets=["attention+conv", "conv_in"],
        text_encoder_targets=["text-encoder"], train_text_encoder=True, learning_rate=2e-2,
        text_encoder_lr=2e-2, max_train_steps=3,
    )  # fmt: skip
    return config, train(config).adapter


def test_a_result_is_the_same_merged_and_in_diffusers(
    family: str, folder: Path, trained: tuple[TrainConfig, Path], tmp_path: Path
) -> None:
    config, adapter = trained
    attached, metadata = load_adapted(folder, adapter)
    assert metadata.family == attached.family.name == f"{family}-inpainting"
    assert read_adapter(adapter).layers["unet.conv_in"].down.shape[1] == 9
    expected = prediction(attached)
    [image] = generate_images(attached, PROMPT, [SEED], replace(SETTINGS, **painting()))
    base = load_components(folder)
    assert (prediction(base) - expected).abs().max() > 1e-2 * expected.abs().max()
    whole = export_checkpoint(folder, adapter, tmp_path / "merged")
    single = export_checkpoint(folder, adapter, tmp_path / "merged.safetensors")
    for merged in (load_components(whole), load_components(BaseModel(single, model_config=folder))):
        assert merged.family is base.family
        torch.testing.assert_close(prediction(merged), expected, rtol=0, atol=1e-5)
        [found] = generate_images(merged, PROMPT, [SEED], replace(SETTINGS, **painting()))
        assert difference(found, image) <= 1
    assert verify_checkpoint(single, folder, adapter).ok

    pipeline = PIPELINES[family].from_pretrained(folder)
    pipeline.load_lora_weights(adapter.parent, weight_name=adapter.name)
    torch.testing.assert_close(prediction(pipeline), expected, rtol=0, atol=1e-5)
    pipeline.set_progress_bar_config(disable=True)
    [theirs] = pipeline(
        PROMPT, **painting(), num_inference_steps=3, guidance_scale=4.0, width=64, height=64,
        generator=torch.Generator().manual_seed(SEED),
    ).images  # fmt: skip
    assert difference(theirs, image) <= 1
    for path in (whole, single):
        load = PIPELINES[family].from_pretrained if path == whole else None
        options = {} if load else {"config": str(folder), "local_files_only": True}
        loaded = (load or PIPELINES[family].from_single_file)(str(path), **options)
        torch.testing.assert_close(prediction(loaded), expected, rtol=0, atol=1e-5)
    card = (Path(config.output_dir) / "README.md").read_text(encoding="utf-8")
    assert "AutoPipelineForInpainting.from_pretrained(" in card
    assert 'mask_image=load_image("my_mask_image.png")).images[0]' in card
    assert "--image my_image.png --mask_image my_mask_image.png --output image.png" in card


def test_a_result_is_converted_and_goes_to_its_text_to_image_kin(
    family: str, folder: Path, trained: tuple[TrainConfig, Path], tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    _, adapter = trained
    kohya = convert_adapter(adapter, tmp_path / "kohya.safetensors", "kohya", base=folder).path
    expected = load_adapted(folder, adapter)[0]
    torch.testing.assert_close(
        prediction(load_adapted(folder, kohya)[0]), prediction(expected), rtol=0, atol=1e-5
    )
    assert read_adapter(kohya).metadata.family == f"{family}-inpainting"
    kin = request.getfixturevalue(f"{family}_folder")
    with pytest.raises(ValueError, match=r"this adapter was made for .* Inpainting"):
        load_adapted(kin, adapter)
    file = read_adapter(adapter)
    del file.layers["unet.conv_in"]
    fits = write_adapter(tmp_path / "fits.safetensors", file)
    assert load_adapted(kin, fits)[0].family.name == family


def test_a_single_file_becomes_a_folder_of_its_kind(family: str, folder: Path, tmp_path: Path):
    nothing = LayerWeights(torch.zeros(1, 9, 3, 3), torch.zeros(32, 1, 1, 1))
    adapter = AdapterFile({"unet.conv_in": nothing}, AdapterMetadata())
    path = write_adapter(tmp_path / "nothing.safetensors", adapter, "diffusers")
    single = export_checkpoint(folder, path, tmp_path / "single.safetensors")
    with safe_open(single, framework="pt") as file:
        architecture = file.metadata()["modelspec.architecture"]
    assert architecture == FAMILIES[f"{family}-inpainting"].architecture
    again = export_checkpoint(BaseModel(single, model_config=folder), path, tmp_path / "folder")
    expected = load_components(folder)
    for found in (load_components(BaseModel(single, model_config=folder)), load_components(again)):
        assert found.family is expected.family
        state = found.denoiser.state_dict()
        assert all(torch.equal(state[k], v) for k, v in expected.denoiser.state_dict().items())


def by_hand(pipeline: Any, family: str, pixels: Tensor, mask: Tensor, caption: str) -> Tensor:
    """The loss of one photo by Diffusers' modules and its pipeline's own masked latents."""
    generator = generator_for("draw", 5, 2, 0, False)
    schedule = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
    with torch.no_grad():
        posterior = pipeline.vae.encode(pixels).latent_dist
        latents = posterior.sample(generator) * pipeline.vae.config.scaling_factor
        timestep = torch.randint(1000, (), generator=generator)
        drawn = torch.randn(latents.shape[1:], generator=generator)[None]
        height, width = pixels.shape[2:]
        hole, masked = pipeline.prepare_mask_latents(
            mask, pixels * (mask < 0.5), 1, height, width, torch.float32, "cpu", generator, False
        )
        noisy = schedule.add_noise(latents, drawn, timestep[None])
        encoded = pipeline.encode_prompt(caption, "cpu", 1, False) if family == "sd1" else (
            pipeline.encode_prompt(caption, device="cpu", do_classifier_free_guidance=False)
        )  # fmt: skip
        added = None
        if family == "sdxl":
            ids = torch.tensor([[80, 96, 3, 5, height, width]])
            added = {"text_embeds": encoded[2], "time_ids": ids}
        read = torch.cat([noisy, hole, masked], dim=1)
        predicted = pipeline.unet(read, timestep, encoded[0], added_cond_kwargs=added).sample
    return (predicted - drawn).square().mean()


def test_a_step_is_the_documented_concatenation(family: str, folder: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(1, 3, 64, 48, generator=generator) * 2 - 1
    whole, part = torch.ones(1, 1, 64, 48), torch.zeros(1, 1, 64, 48)
    part[..., 9:43, 5:30] = 1  # No border falls on the latents' grid.
    components, pipeline = load_components(folder), PIPELINES[family].from_pretrained(folder)
    terms, vae, kind = terms_of(components), components.vae, components.family
    crop = CropRecord((80, 96), (3, 5), (64, 48))
    for hole, values in ((part, {0, 1}), (whole, {1})):
        # A plane that is not given is the whole image.
        given = pixels if hole is whole else torch.cat([pixels, hole], dim=1)
        expected = by_hand(pipeline, family, pixels, hole, PROMPT)
        with torch.no_grad():
            cached = {"moments": encode_inputs(vae, kind, given)}
            for content in (cached, {"pixels": given}):
                samples = SampleBatch(["photo"], [PROMPT], [crop], torch.tensor([False]), **content)
                config = TrainConfig(seed=5, noise_offset=0.0)
                batch = draw_batch(components, components.process, samples, config, 2)
                loss, _ = losses_by(components, terms, batch)
                torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
                assert batch.inputs.condition is not None
                assert set(batch.inputs.condition[:, 0].unique().tolist()) == values


def masked(folder: Path, vertical: int = 0) -> None:
    """A mask beside each photo but the first: white right of a quarter of its width."""
    for path in sorted(folder.glob("*.jpg"))[1:]:
        with Image.open(path) as image:
            mask = Image.new("L", image.size)
            mask.paste(255, (image.width // 4, vertical, *image.size))
        mask.save(path.with_suffix(".mask.png"))


@pytest.mark.filterwarnings("ignore:1 image of 5 without a mask")
def test_masks_of_the_subject_go_with_the_crop_and_the_flip(
    sd1_inpainting_folder: Path, photos: Path, tmp_path: Path
) -> None:
    masked(photos)
    settings = {"inpainting_mask": "subject", "random_flip": True, "center_crop": False}
    cached = open_run(sd1_inpainting_folder, photos, tmp_path / "a", **settings)
    plain = open_run(sd1_inpainting_folder, photos, tmp_path / "b", **settings, cache_latents=False)
    dataset = plain.dataset
    # The same places: a cache draws among eight.
    draws = (each.dataset.subjects[0].draws for each in (plain, cached))
    object.__setattr__(next(draws), "crop_variants", next(draws).crop_variants)
    vae, flips = plain.components.vae, set()
    for index, photo in enumerate(dataset.photos):
        sample, other = dataset[index], cached.dataset[index]
        assert sample.mask is None, "the loss is not masked"
        assert sample.crop == other.crop
        pixels, hole = sample.pixels[:3], sample.pixels[3]
        flips.add(sample.crop.flipped)
        if photo.mask_path is not None:
            # Crops are 64 of 64 pixels, or were drawn along one side.
            bright = hole.mean(dim=0)
            width = sample.crop.resized_size[1]
            edge = width // 4 - (0 if sample.crop.flipped else sample.crop.crop_top_left[1])
            side = bright.flip(0) if sample.crop.flipped else bright
            offset = width - 64 - sample.crop.crop_top_left[1] if sample.crop.flipped else 0
            expected = (torch.arange(64) >= edge - offset).float()
            assert (side - expected).abs().sum() <= 1
        with torch.no_grad():
            wanted = vae.encode((pixels * (1 - hole))[None]).latent_dist.parameters[0]
            image = vae.encode(pixels[None]).latent_dist.parameters[0]
        torch.testing.assert_close(other.moments[:8], image, rtol=0, atol=1e-5)
        assert torch.equal(other.moments[8], hole[::8, ::8])
        torch.testing.assert_close(other.moments[9:], wanted, rtol=0, atol=1e-5)
    assert flips == {True, False}


def test_masks_that_nothing_reads_are_said(
    sd1_folder: Path, sd1_inpainting_folder: Path, photos: Path, tmp_path: Path
) -> None:
    base = make_config(sd1_folder, photos, tmp_path / "a", max_train_steps=1)
    said = " ".join(warnings_of(replace(base, inpainting_mask="random")))
    assert "inpainting_mask has no effect because" in said
    assert "is not an inpainting model" in said
    masked(photos)
    inpainting = replace(base, pretrained_model_name_or_path=str(sd1_inpainting_folder))
    for mask, unused in (("subject", False), (None, True)):
        output = str(tmp_path / str(mask))
        said = " ".join(warnings_of(replace(inpainting, inpainting_mask=mask, output_dir=output)))
        assert ("4 mask files (NAME.mask.png) next to the images have no effect" in said) == unused
        assert "inpainting_mask has" not in said


def test_an_inpainting_model_paints_by_a_mask(sd1_inpainting_folder: Path) -> None:
    components = load_components(sd1_inpainting_folder)
    settings = replace(SETTINGS, **painting() | {"mask_image": None})
    with refused("image", "is an inpainting model"):
        generate_images(components, PROMPT, [1], settings)


def test_the_command_asks_for_image_and_mask(
    sd1_inpainting_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dora_diffusion.cli.main import main

    for name, image in painting().items():
        image.save(tmp_path / f"{name}.png")
    flags = ["generate", "--base", str(sd1_inpainting_folder), "--prompt", PROMPT, "--seed", "7"]
    flags += ["--output", str(tmp_path / "out.png"), "--width", "64", "--height", "64"]
    flags += ["--steps", "3", "--guidance_scale", "4"]
    assert main(flags) == 1
    assert "is an inpainting model: give --image, and --mask_image" in capsys.readouterr().err
    paths = {name: str(tmp_path / f"{name}.png") for name in painting()}
    assert main([*flags, "--image", paths["image"], "--mask", paths["mask_image"]]) == 0
    components = load_components(sd1_inpainting_folder)
    [expected] = generate_images(components, PROMPT, [7], replace(SETTINGS, **painting()))
    assert difference(Image.open(tmp_path / "out.png"), expected) == 0


def test_held_out_losses_are_those_of_the_whole_image(sd1_inpainting_folder: Path) -> None:
    """As if the model made the image from nothing, whatever the image shows."""
    components = load_components(sd1_inpainting_folder)
    held_out = HeldOutImages(components, [noise((64, 64), 1)], [PROMPT])
    [[loss]] = held_out.losses([[3]], batch_size=4)
    read: list[Tensor] = []
    components.denoiser.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    again = HeldOutImages(components, [noise((64, 64), 1)], [PROMPT]).losses([[3]])[0]
    assert again == pytest.approx([loss])
    with torch.no_grad():
        grey = components.vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mode() * 0.18215
    assert bool((read[0][:, 4] == 1).all())
    torch.testing.assert_close(read[0][:, 5:], grey.expand(10, -1, -1, -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("no", marks=pytest.mark.slow)])
def test_full_fine_tuning_writes_an_inpainting_model(
    sd1_inpainting_folder: Path, photos: Path, tmp_path: Path, precision: str
) -> None:
    config = make_config(
        sd1_inpainting_folder, photos, tmp_path / "out", method="full", learning_rate=1e-5,
        mixed_precision=precision, max_train_steps=1, checkpointing_steps=1,
    )  # fmt: skip
    train(config)
    model: Components = load_components(tmp_path / "out" / "model")
    assert model.family.name == "sd1-inpainting"
    index = json.loads((tmp_path / "out" / "model" / "model_index.json").read_text("utf-8"))
    assert index["_class_name"] == "StableDiffusionInpaintPipeline"
