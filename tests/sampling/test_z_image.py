"""Every setting of ``generate`` on Z-Image: against Diffusers' pipelines called by hand.

A setting is in `CASES`, `WITHOUT_EFFECT`, `REFUSED` or `WITH_ADAPTER`, or in `ELSEWHERE` with the
reason.
"""

from __future__ import annotations

import copy
import functools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from dora_diffusion.cli.commands.generate import GenerateSettings
from dora_diffusion.cli.main import main
from dora_diffusion.config import ConfigError
from dora_diffusion.config.families import FAMILIES
from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter
from dora_diffusion.models.load import load_components
from dora_diffusion.sampling.generate import generate_images
from dora_diffusion.sampling.images import read_fields
from dora_diffusion.sampling.load import few_steps, load_adapted
from dora_diffusion.sampling.settings import SamplingSettings
from tests.refusal import refused
from tests.z_image import write_z_image

FAMILY = FAMILIES["z-image"]
BASE: dict[str, Any] = {"prompt": "a dog", "seed": 3, "steps": 3, "guidance_scale": 4.0}
PIPELINES = {
    "": diffusers.ZImagePipeline,
    "image": diffusers.ZImageImg2ImgPipeline,
    "mask": diffusers.ZImageInpaintPipeline,
}
PHOTO, MASK = "photo.png", "mask.png"


def photo(width: int = 64, height: int = 64) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR)


def mask() -> Image.Image:
    image = Image.new("L", (64, 64))
    image.paste(255, (8, 16, 40, 56))
    return image


def pixels(image: Image.Image | Path) -> np.ndarray:
    if isinstance(image, Path):
        with Image.open(image) as opened:
            return np.asarray(opened.convert("RGB"), np.int16)
    return np.asarray(image, np.int16)


def difference(first: Image.Image | Path, second: Image.Image | Path) -> int:
    return int(np.abs(pixels(first) - pixels(second)).max())


class Case(NamedTuple):
    """Settings of ``generate``, what the pipeline is given, its task, and what is done before."""

    settings: Mapping[str, Any]
    call: Mapping[str, Any] = {}
    task: str = ""
    change: Callable[[Any], object] = lambda pipeline: None
    seeds: tuple[int, ...] = (3,)


PLAIN = Case({})


def tiled(pipeline: Any) -> None:
    pipeline.vae.enable_tiling()
    pipeline.vae.tile_sample_min_size, pipeline.vae.tile_latent_min_size = 64, 8


OVER = {"image": photo(), "strength": 0.75}
# Diffusers' guidance is one less.
CASES: dict[str, Case] = {
    "prompt": Case({"prompt": "a red mug, on grass"}, {"prompt": "a red mug, on grass"}),
    "negative_prompt": Case({"negative_prompt": "a cat"}, {"negative_prompt": "a cat"}),
    "steps": Case({"steps": 5}, {"num_inference_steps": 5}),
    "guidance_scale": Case({"guidance_scale": 1.5}, {"guidance_scale": 0.5}),
    "guidance_scale of none": Case({"guidance_scale": 1}, {"guidance_scale": 0.0}),
    "width": Case({"width": 96}, {"width": 96, "height": 64}),
    "height": Case({"height": 32}, {"width": 64, "height": 32}),
    "seed": Case({"seed": 9}, seeds=(9,)),
    "num_images": Case({"num_images": 2, "batch_size": 1}, seeds=(3, 4)),
    "batch_size": Case({"num_images": 3, "batch_size": 2}, seeds=(3, 4, 5)),
    "dtype": Case({"dtype": "bfloat16"}, {"dtype": torch.bfloat16}),
    "distilled": Case(
        {"distilled": True, "steps": None, "guidance_scale": None},
        {"num_inference_steps": 8, "guidance_scale": 0.0},
    ),
    "vae_tile_size": Case(
        {"vae_tile_size": 64, "width": 128}, {"width": 128, "height": 64}, change=tiled
    ),
    "image": Case({"image": PHOTO}, OVER, "image"),
    "denoise": Case({"image": PHOTO, "denoise": 0.4}, OVER | {"strength": 0.4}, "image"),
    "mask_image": Case({"image": PHOTO, "mask_image": MASK}, OVER | {"mask_image": mask()}, "mask"),
}  # fmt: skip
# A setting, another one that is needed, and the same image without it.
WITHOUT_EFFECT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "scheduler": ({"scheduler": "dpm++"}, {}),
    "max_token_length": ({"max_token_length": 150}, {}),
    "quantize_convolutions": (
        {"quantize": "int8", "quantize_convolutions": True}, {"quantize": "int8"},
    ),
}  # fmt: skip
REFUSED = {
    "guidance_rescale": 0.7, "prediction_type": "v_prediction", "zero_terminal_snr": True,
}  # fmt: skip
WITH_ADAPTER: dict[str, dict[str, Any]] = {
    "strength": {"strength": 0.5},
    "direction_strength": {"direction_strength": 0.2},
    "magnitude_strength": {"magnitude_strength": 0.0},
}
HERE = "a test of its own below"
ELSEWHERE = {
    "adapter": HERE, "adapters_file": HERE, "clip_skip": HERE, "grid": HERE,
    "grid_limit": HERE, "repeat": HERE, "quantize": HERE,
    "base": "every case has one", "variant": "which files are read", "revision": "of a hub",
    "model_config": "how a single file is read, before there is a model",
    "alpha": "how an adapter's file is read, before there is a model",
    "output": "where the image is written", "overwrite": "where the image is written",
    "offload": "where modules are computed", "compile": "how blocks are computed",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_z_image(tmp_path_factory.mktemp("z-image") / "model")


@pytest.fixture(scope="module")
def adapters(folder, random_adapter, tmp_path_factory):
    """Two DoRAs on the transformer."""
    files, out = [], tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("first", "second")):
        layers = random_adapter(folder, components=("transformer",), seed=seed, every=3)
        layers = {k: v for k, v in layers.items() if k.startswith("transformer.layers.")}
        assert layers
        file = AdapterFile(layers, AdapterMetadata("z-image", trigger="dog"))
        files.append(write_adapter(out / f"{name}.safetensors", file))
    return files


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo().save(PHOTO)
    mask().save(MASK)


@pytest.fixture
def generate(folder, inputs):
    """Run ``generate``. Returns the file of the image."""

    def run(output: str = "image.png", **settings: Any) -> Path:
        values = {"base": str(folder), "output": output, **BASE, **settings}
        assert GenerateSettings.read(values).perform() == 0
        return Path(output)

    return run


@functools.cache
def stock(folder: Path, dtype: torch.dtype) -> Mapping[str, Any]:
    pipeline = diffusers.ZImagePipeline.from_pretrained(folder, torch_dtype=dtype)
    return dict(pipeline.components)


def by_hand(folder: Path, case: Case = PLAIN, adapter: Path | None = None) -> list[Any]:
    """Return the images of Diffusers' own pipeline."""
    call = {"prompt": "a dog", "num_inference_steps": 3, "guidance_scale": 3.0, **case.call}
    parts = stock(folder, call.pop("dtype", torch.float32))
    pipeline = PIPELINES[case.task](**copy.deepcopy(parts))
    pipeline.set_progress_bar_config(disable=True)
    if adapter is not None:
        pipeline.load_lora_weights(adapter)
    case.change(pipeline)
    if not case.task:
        call = {"width": 64, "height": 64, **call}
    return [
        pipeline(**call, generator=torch.Generator().manual_seed(seed)).images[0]
        for seed in case.seeds
    ]


def test_every_setting_is_answered():
    settings = {setting.name for setting in GenerateSettings.settings()}
    groups = (
        {name.partition(" ")[0] for name in CASES}, WITHOUT_EFFECT.keys(), REFUSED.keys(),
        WITH_ADAPTER.keys(), ELSEWHERE.keys(),
    )  # fmt: skip
    assert settings == set().union(*groups)
    assert sum(map(len, groups)) == len(settings)
    assert FAMILY.without_effect.keys() & settings == WITHOUT_EFFECT.keys()
    assert FAMILY.refused.keys() & settings <= REFUSED.keys()


def assert_generates(case: Any, expected: Sequence[Any], generate: Callable[..., Path]) -> None:
    """Check that the settings of a case give the expected images, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        generate(**case.settings)
    for seed, image in zip(case.seeds, expected, strict=True):
        file = Path(f"image-{seed}.png" if len(case.seeds) > 1 else "image.png")
        assert difference(file, image) <= 1
        assert pixels(file).std() > 5


@pytest.mark.parametrize("name", CASES)
def test_images_are_those_of_diffusers(name, folder, generate):
    assert_generates(CASES[name], by_hand(folder, CASES[name]), generate)


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_settings_without_effect_are_named_once_with_the_reason(name, generate):
    settings, others = WITHOUT_EFFECT[name]
    line = f"{name} has no effect on Z-Image: {FAMILY.without_effect[name]}"
    with pytest.warns(UserWarning, match=re.escape(line)) as caught:
        image = generate("with.png", num_images=1, **settings)
    assert len([w for w in caught if issubclass(w.category, UserWarning)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        other = generate("without.png", **others)
        # The file states no setting that had no effect; it repeats to the same image.
        repeated = generate("again.png", repeat=str(other), **others)
    assert difference(image, other) == 0 == difference(repeated, other)
    assert not read_fields(image).keys() & {"Sampler", "Schedule type", "Max token length"}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_would_give_wrong_images_are_refused(name, generate):
    with refused(name):
        generate(**{name: REFUSED[name]})


@pytest.mark.parametrize("name", ["width", "height"])
def test_sizes_between_patches_are_refused_with_the_nearest(name, generate, folder, monkeypatch):
    components = load_components(folder)
    for value, advised in ((72, 64), (88, 96), (24, 32)):
        with pytest.raises(ConfigError, match=rf"multiple of 16, such as {advised}$"):
            generate_images(components, "a dog", [1], SamplingSettings(1, **{name: value}))
    monkeypatch.setattr("dora_diffusion.sampling.load.load_adapted", None)  # It is not loaded.
    with refused(name, "72", "multiple of 16", "such as 64"):
        generate(**{name: 72})


def test_an_adapter_gives_the_image_of_diffusers_with_its_file(folder, generate, adapters):
    image = generate(adapter=[str(adapters[0])])
    (expected,) = by_hand(folder, adapter=adapters[0])
    assert difference(image, expected) <= 1
    assert difference(image, by_hand(folder)[0]) > 3


def test_each_image_of_a_batch_has_its_own_adapter_and_prompt(folder, generate, adapters):
    prompts = ["a dog", "a dog on a long road in the rain, in black and white", "a dog"]
    files = [adapters[0], adapters[1], None]
    lines = [
        f"- {{adapter: {'null' if file is None else file}, prompt: '{prompt}', seed: {seed}}}\n"
        for seed, (prompt, file) in enumerate(zip(prompts, files, strict=True))
    ]
    Path("rows.yaml").write_text("".join(lines), encoding="utf-8")
    generate("rows.png", adapters_file="rows.yaml", prompt="", seed=None)
    for seed, (prompt, file) in enumerate(zip(prompts, files, strict=True)):
        case = Case({}, {"prompt": prompt}, seeds=(seed,))
        assert difference(Path(f"rows-{seed + 1}.png"), by_hand(folder, case, file)[0]) <= 1


def states_of(pipeline: Any, prompt: str, layer: int) -> list[torch.Tensor]:
    """Return a prompt's states after a layer, without padding, as Diffusers' pipeline has them."""
    messages = [{"role": "user", "content": prompt}]
    text = pipeline.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    ids = pipeline.tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        output = pipeline.text_encoder(ids, output_hidden_states=True)
    return [output.hidden_states[layer][0]]


def test_clip_skip_leaves_out_one_more_layer(folder, generate):
    with pytest.warns(UserWarning, match="penultimate"):
        image = generate(clip_skip=1)
    pipeline = diffusers.ZImagePipeline.from_pretrained(folder)
    call = {
        "prompt": None, "prompt_embeds": states_of(pipeline, "a dog", -3),
        "negative_prompt_embeds": states_of(pipeline, "", -2),
    }  # fmt: skip
    assert difference(image, by_hand(folder, Case({}, call))[0]) <= 1
    assert difference(image, by_hand(folder)[0]) > 1
    assert difference(generate("again.png", repeat=str(image)), image) == 0


def test_a_long_prompt_is_cut_at_512_tokens_without_advice_that_does_not_help(folder):
    components, settings = load_components(folder), SamplingSettings(1)
    text = "a" * 500 + "b" * 100
    with pytest.warns(UserWarning, match="longer than the model's 512 tokens") as caught:
        (cut,) = generate_images(components, text, [1], settings)
    assert str(caught[0].message).endswith("bbb'")
    case = Case({}, {"prompt": text, "num_inference_steps": 1, "guidance_scale": 6.5}, seeds=(1,))
    assert difference(cut, by_hand(folder, case)[0]) <= 1


def test_a_grid_has_a_cell_for_each_value(folder, inputs, adapters):
    words = [f"--{name}={value}" for name, value in BASE.items()]
    code = main([
        "generate", f"--base={folder}", *words, f"--adapter={adapters[0]}",
        "--grid=strength=0.5, 1", "--grid=guidance_scale=1, 4", "--output=grid",
    ])  # fmt: skip
    assert code == 0
    cells = sorted(Path("grid/images").glob("*.png"))
    assert len(cells) == 4
    values = [read_fields(path) for path in cells]
    (whole,) = (
        path for path, fields in zip(cells, values, strict=True)
        if (fields["CFG scale"], fields["Adapter strength"]) == ("4", "1")
    )  # fmt: skip
    (expected,) = by_hand(folder, adapter=adapters[0])
    assert difference(whole, expected) <= 1


def test_a_turbo_model_is_known_by_its_name(tmp_path, folder, generate):
    turbo = tmp_path / "Z-Image-Turbo"
    turbo.symlink_to(folder)
    components, _ = load_adapted(str(turbo))
    found = few_steps(components)
    assert found is not None
    assert (found[1].steps, found[1].guidance_scale, found[1].scheduler) == (8, 1.0, None)
    image = generate(base=str(turbo), steps=None, guidance_scale=None)
    case = Case({}, {"num_inference_steps": 8, "guidance_scale": 0.0})
    assert difference(image, by_hand(folder, case)[0]) <= 1
    assert few_steps(load_components(folder)) is None
