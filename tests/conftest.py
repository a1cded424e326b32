"""Shared fixtures: tiny random pipelines with the real families' structure, and the samples.

The widths are tiny; the levels, layers per block and attention placement are those of the
released models, so that module names and checkpoint key maps meet every case. Folders are built
once per session: treat them as read-only.
"""

from __future__ import annotations

import functools
import gc
import gzip
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
# MKL sums in an order that depends on where in memory a tensor lies, unless told not to; several
# tests compare to the last bit.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from dora_diffusion.formats.checkpoint.models import PipelineFolder
from dora_diffusion.formats.checkpoint.weights import module_shapes
from dora_diffusion.numerics.dora import weight_norm
from dora_diffusion.numerics.weights import LayerWeights, NormAxis
from tests.skips import summary
from tests.suite import ALONE
from tests.waiting import Clock

if TYPE_CHECKING:
    from tests.apple import AppleGPU

# Each takes ten seconds or more, and quicker ones hold most of what it holds: `make test-slow`.
LONG = (
    "browser/test_train_form.py::test_a_section_that_is_closed_and_opened_changes_nothing",
    "browser/test_train_form.py::test_every_preset_of_every_base_is_trained_as_it_is_shown",
    "cli/commands/test_evaluate.py::test_photos_that_were_trained_on_are_told",
    "cli/commands/test_train.py::test_the_script_trains_the_same",
    "export/test_verify.py::test_every_way_from_base_to_output_is_proven[sd2]",
    "integration/test_apple_gpu.py::test_a_run_learns_what_it_learns_on_the_cpu",
    "integration/test_apple_gpu.py::test_auto_is_the_half_precision_that_the_device_has",
    "toy/test_judges.py::test_the_base_does_not_drift_from_itself",
    "integration/test_cuda.py::test_a_run_learns_what_it_learns_on_the_cpu",
    "integration/test_cuda.py::test_a_run_resumes",
    "integration/test_cuda.py::test_auto_is_the_half_precision_that_the_device_has[False",
    "integration/test_cuda.py::test_eight_bit_adam_trains_and_resumes",
    "integration/test_cuda.py::test_gradients_that_are_not_finite_move_nothing_and_are_told_a_step"
    "_later[adafactor]",
    "integration/test_cuda.py::test_steps_and_their_records_wait_for_nothing[sdxl",
    "test_wheel.py::test_a_user_s_program_passes_mypy_strictly",
    "training/features/test_full.py::test_a_resumed_run_is_that_of_one_piece_bit_for_bit[adafactor]",
    "training/features/test_full.py::test_compiled_blocks_train_the_same_weights",
    "training/test_run.py::test_no_bit_of_a_run_depends_on_it[class images]",
    "training/test_run.py::test_weights_of_the_model_that_train_never_leave",
    "training/test_variants.py::test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit[dvora]",
    "training/test_variants.py::test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit[pissa]",
)

torch.set_num_threads(1)


# Property tests try the same examples in every run of the suite, and many other ones each time in
# the long one, `make test-properties`. Neither judges by the clock.
suite = settings(
    max_examples=100,
    derandomize=True,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("suite", suite)
settings.register_profile("long", suite, max_examples=10_000, derandomize=False)
settings.load_profile("suite")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that take long, and those that run alone."""
    for item in items:
        if item.nodeid.removeprefix("tests/").startswith(LONG):
            item.add_marker(pytest.mark.slow)
        for folder, marker in ALONE.items():
            is_marked = not marker or item.get_closest_marker(marker) is not None
            if item.nodeid.startswith(f"{folder}/") and is_marked:
                item.add_marker(pytest.mark.alone)


def pytest_collection_finish() -> None:
    """Have the collector pass over all that was imported: a test leaves far less to look at."""
    gc.collect()
    gc.freeze()
    # A model is made of more objects than it waits for by itself.
    gc.set_threshold(10_000, 20, 20)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Give fixtures the same draws and threads wherever a test runs, whatever ran before it."""
    torch.default_generator.manual_seed(0)
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """Give a test the same draws, whichever of its fixtures were made for another one before."""
    torch.default_generator.manual_seed(1)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """List skipped tests by reason, each with the place where it runs."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = [str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped]
    for line in summary(reasons):
        terminalreporter.write_line(line)


TOKEN_LIMIT = 77
# Words that the tiny vocabulary holds as one token; anything else is spelled out in bytes.
WHOLE_WORDS = ("a", "photo", "of", "sks", "dog", "toy", "backpack", "the", "on", "in", "red", "cat")
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def byte_symbols() -> list[str]:
    """The 256 printable stand-ins for bytes, in CLIP's order ("!" is the first)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A CLIP byte-pair vocabulary of about 560 entries that spells any text, and its merges."""
    symbols = byte_symbols()
    tokens = symbols + [f"{symbol}</w>" for symbol in symbols]
    merges: list[tuple[str, str]] = []
    for word in WHOLE_WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            pieces[:2] = ["".join(pair)]
            if pair not in merges:
                merges.append(pair)
                tokens.append(pieces[0])
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}, merges


def save_tokenizer(folder: Path, pad_token: str = "<|endoftext|>") -> None:
    """Write a CLIP tokenizer folder as the hub holds it (vocab.json, merges.txt, config)."""
    vocabulary, merges = clip_vocabulary()
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": TOKEN_LIMIT,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad_token,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def save_text_encoder(folder: Path, *, width: int, act: str, projection: int | None = None) -> None:
    """Write a three-layer CLIP text encoder, with a projection when a width for it is given."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    vocabulary, _ = clip_vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection or width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TOKEN_LIMIT,
        hidden_act=act,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=2,  # as in the released configs: pools at the largest id, the end token's
        pad_token_id=1,
    )
    (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).save_pretrained(folder)


def save_vae(
    folder: Path, *, scaling_factor: float = 0.18215, latent_channels: int = 4, layers: int = 2
) -> None:
    """Write a four-level autoencoder (8 pixels per latent)."""
    from diffusers import AutoencoderKL

    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=layers,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=scaling_factor,
        force_upcast=scaling_factor == 0.13025,
    ).save_pretrained(folder)


def unet_config(family: str) -> dict[str, Any]:
    """UNet settings with the released family's levels and narrow widths."""
    common: dict[str, Any] = {"sample_size": 8, "norm_num_groups": 8, "layers_per_block": 2}
    four_levels = {
        "block_out_channels": (32, 32, 64, 64),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    }
    if family == "sd1":
        return common | four_levels | {"cross_attention_dim": 32, "attention_head_dim": 4}
    if family == "sd2":
        return (
            common
            | four_levels
            | {
                "cross_attention_dim": 64,
                "attention_head_dim": (2, 2, 4, 4),
                "use_linear_projection": True,
            }
        )
    return common | {
        "block_out_channels": (32, 32, 64),
        "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
        "transformer_layers_per_block": (1, 1, 2),
        "cross_attention_dim": 96,
        "attention_head_dim": (2, 2, 4),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 96,  # projection 48 + 6 time ids of 8
    }


def shallow_config(family: str) -> dict[str, Any]:
    """The same with two levels of one layer each: a third of the modules, of every kind."""
    sizes: dict[str, Any] = {"layers_per_block": 1, "block_out_channels": (32, 64)}
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    if family == "sdxl":
        down, up = down[::-1], up[::-1]
        sizes["transformer_layers_per_block"] = (1, 2)
    if family != "sd1":
        sizes["attention_head_dim"] = (2, 4)
    return unet_config(family) | sizes | {"down_block_types": down, "up_block_types": up}


def save_pipeline(
    folder: Path, family: str, in_channels: int = 4, *, shallow: bool = False
) -> Path:
    """Write a whole diffusers pipeline folder for "sd1", "sd2" (v-prediction) or "sdxl".

    With 9 channels it is an inpainting model.
    """
    from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(family) + ord(family[-1]))
        config = (shallow_config if shallow else unet_config)(family)
        UNet2DConditionModel(**config | {"in_channels": in_channels}).save_pretrained(
            folder / "unet"
        )
        factor = 0.13025 if family == "sdxl" else 0.18215
        save_vae(folder / "vae", scaling_factor=factor, layers=1 if shallow else 2)
        width = 64 if family == "sd2" else 32
        act = "gelu" if family == "sd2" else "quick_gelu"
        save_text_encoder(folder / "text_encoder", width=width, act=act)
        save_tokenizer(folder / "tokenizer", "!" if family == "sd2" else "<|endoftext|>")
        if family == "sdxl":
            save_text_encoder(folder / "text_encoder_2", width=64, act="gelu", projection=48)
            save_tokenizer(folder / "tokenizer_2", "!")
    scheduler = {
        "sd1": lambda: PNDMScheduler(**SCHEDULE, steps_offset=1, skip_prk_steps=True),
        "sd2": lambda: DDIMScheduler(
            **SCHEDULE,
            steps_offset=1,
            clip_sample=False,
            set_alpha_to_one=False,
            prediction_type="v_prediction",
        ),
        "sdxl": lambda: EulerDiscreteScheduler(**SCHEDULE, steps_offset=1),
    }[family]()
    scheduler.save_pretrained(folder / "scheduler")
    write_model_index(folder, family, type(scheduler).__name__, "Inpaint" * (in_channels == 9))
    return folder


def write_model_index(folder: Path, family: str, scheduler: str, task: str = "") -> None:
    """Write the pipeline's model_index.json by hand: what the folder is, in diffusers' words."""
    index: dict[str, Any] = {
        "_class_name": f"StableDiffusion{task}Pipeline",
        "_diffusers_version": "0.35.0",
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if family == "sdxl":
        index |= {
            "_class_name": f"StableDiffusionXL{task}Pipeline",
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "force_zeros_for_empty_prompt": True,
        }
    else:
        none = [None, None]
        index |= {
            "safety_checker": none,
            "feature_extractor": none,
            "requires_safety_checker": False,
        }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def pipelines(folder: Path, *, shallow: bool) -> Callable[[str], Path]:
    """Return what makes a family's tiny pipeline in a folder, once: "sd1", "sdxl-inpainting"..."""

    @functools.cache
    def pipeline(name: str) -> Path:
        family, _, task = name.partition("-")
        return save_pipeline(folder / name, family, 9 if task else 4, shallow=shallow)

    return pipeline


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny random pipelines with the released models' levels and layers, by name."""
    return pipelines(tmp_path_factory.mktemp("pipelines"), shallow=False)


@pytest.fixture(scope="session")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny random pipelines with fewer levels and layers, by name."""
    return pipelines(tmp_path_factory.mktemp("shallow"), shallow=True)


@pytest.fixture(scope="session")
def sd1_folder(deep: Callable[[str], Path]) -> Path:
    """A tiny random Stable Diffusion 1 folder (epsilon prediction)."""
    return deep("sd1")


@pytest.fixture(scope="session")
def sd2_folder(deep: Callable[[str], Path]) -> Path:
    """A tiny random Stable Diffusion 2 folder (v prediction)."""
    return deep("sd2")


@pytest.fixture(scope="session")
def sdxl_folder(deep: Callable[[str], Path]) -> Path:
    """A tiny random SDXL folder (two text encoders, size and crop conditioning)."""
    return deep("sdxl")


@pytest.fixture(scope="session")
def sd1_inpainting_folder(deep: Callable[[str], Path]) -> Path:
    """A tiny random Stable Diffusion 1 inpainting folder: its UNet reads 9 channels."""
    return deep("sd1-inpainting")


@pytest.fixture(scope="session")
def sdxl_inpainting_folder(deep: Callable[[str], Path]) -> Path:
    """A tiny random SDXL inpainting folder: its UNet reads 9 channels."""
    return deep("sdxl-inpainting")


@pytest.fixture
def tiny_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sd1_folder: Path, sd2_folder: Path,
    sdxl_folder: Path,
) -> Iterator[Path]:  # fmt: skip
    """The package's configurations and vocabulary are those of the tiny folders; no network."""
    from dora_diffusion.models import configuration

    home = tmp_path / "released"
    home.mkdir()
    for family, folder in (("sd1", sd1_folder), ("sd2", sd2_folder), ("sdxl", sdxl_folder)):
        config = {
            part.parent.name: json.loads(part.read_text("utf-8"))
            for part in folder.glob("*/config.json")
        }
        scheduler = folder / "scheduler" / "scheduler_config.json"
        config["scheduler"] = json.loads(scheduler.read_text("utf-8"))
        for part in folder.glob("tokenizer*/tokenizer_config.json"):
            pad = json.loads(part.read_text("utf-8"))["pad_token"]
            config[part.parent.name] = {"pad_token": pad}
        (home / f"{family}.json").write_text(json.dumps(config), encoding="utf-8")
    merges = (sd1_folder / "tokenizer" / "merges.txt").read_bytes()
    (home / "merges.txt.gz").write_bytes(gzip.compress(merges))

    def refuse(*args: object) -> None:
        raise AssertionError("nothing may be fetched")

    monkeypatch.setattr(configuration, "RELEASED", home)
    monkeypatch.setattr("socket.socket.connect", refuse)
    caches = (configuration.released_config, configuration.released_folder)
    for cache in caches:
        cache.cache_clear()
    yield home
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Clock]:
    """Gives modules a clock that the test turns, in the place of the time of this machine."""
    one = Clock()

    def of(*modules: object) -> Clock:
        for module in modules:
            monkeypatch.setattr(module, "time", one)
        return one

    return of


@pytest.fixture
def free_port() -> Callable[[], int]:
    """Finds a port that no program listens on, for a server that is not told port 0."""

    def find() -> int:
        with socket.create_server(("127.0.0.1", 0)) as server:
            return int(server.getsockname()[1])

    return find


@pytest.fixture(scope="session", autouse=True)
def usual_machine() -> Iterator[None]:
    """A machine of 32 GB of memory, 16 of them free, and 100 GB of free disk, whatever is true."""
    gb, real = 2**30, psutil.virtual_memory
    with pytest.MonkeyPatch.context() as patch:
        sizes = {"total": 32 * gb, "available": 16 * gb, "free": 16 * gb, "percent": 50.0}
        patch.setattr(psutil, "virtual_memory", lambda: real()._replace(**sizes))
        usage = shutil._ntuple_diskusage(500 * gb, 400 * gb, 100 * gb)
        patch.setattr(shutil, "disk_usage", lambda path: os.stat(path) and usage)
        yield


@pytest.fixture(scope="session", autouse=True)
def quick_disk() -> Iterator[None]:
    """A disk that has written what it was given: no test cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="session")
def samples_root() -> Path:
    """The sample subjects: JPEG photos of 768 pixels, square and not, with captions."""
    return Path(__file__).resolve().parents[1] / "samples"


PREPROCESSING = {
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_convert_rgb": True,
    "size": {"shortest_edge": 36},
    "crop_size": {"height": 32, "width": 32},
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
    "resample": 3,
}
LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}


def save_metric_model(model: object, folder: Path, kind: str) -> Path:
    model.save_pretrained(folder)  # type: ignore[attr-defined]
    values = PREPROCESSING | {"image_processor_type": kind}
    (folder / "preprocessor_config.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory, sd1_folder: Path) -> Path:
    """A tiny random CLIP with the tokenizer of the tiny pipelines."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("metric") / "tiny-clip"
    shutil.copytree(sd1_folder / "tokenizer", folder)
    words = len(CLIPTokenizer.from_pretrained(folder))
    text = {"vocab_size": words, "hidden_size": 32, "intermediate_size": 64, "eos_token_id": 2}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**LAYERS, "intermediate_size": 64, "image_size": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    return save_metric_model(model, folder, "CLIPImageProcessor")


@pytest.fixture(scope="session")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random DINOv2."""
    from transformers import Dinov2Config, Dinov2Model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Dinov2Model(Dinov2Config(**LAYERS, image_size=32))
    folder = tmp_path_factory.mktemp("metric") / "tiny-dino"
    return save_metric_model(model, folder, "BitImageProcessor")


@pytest.fixture(scope="session")
def held_out_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photos of a subject."""
    from dora_diffusion.toy.benchmark_subjects import find_subject, write_photos

    folder = tmp_path_factory.mktemp("photos") / "held-out"
    for photo in write_photos(find_subject("cross_mug"), folder)[3:]:
        photo.unlink()
    return folder


def random_layer(
    weight: Tensor,
    generator: torch.Generator,
    *,
    rank: int = 4,
    alpha: float = 3.0,
    axis: NormAxis | None = "output",
) -> LayerWeights:
    """A trained-looking layer for a weight ``(out, in, *k)``; no magnitude if ``axis`` is None."""
    out, into, *kernel = weight.shape
    size = weight.float().norm() / weight.numel() ** 0.5
    down = torch.randn(rank, into, *kernel, generator=generator)
    up = torch.randn(out, rank, *[1] * len(kernel), generator=generator) * size * 0.3
    if axis is None:
        return LayerWeights(down, up, None, alpha)
    start = weight_norm(weight, axis)
    moved = start * (1 + 0.2 * torch.randn(start.shape, generator=generator))
    return LayerWeights(down, up, moved, alpha, axis)


def is_adaptable(name: str, components: Iterable[str]) -> bool:
    """Return whether a weight belongs to a Linear or Conv2d of these components."""
    return name.split(".")[0] in components and "embeddings" not in name


def random_adapter(
    folder: Path,
    *,
    axis: NormAxis | None = "output",
    components: Iterable[str] = ("unet", "text_encoder", "text_encoder_2"),
    seed: int = 0,
    mixed_ranks: bool = False,
    every: int = 1,
) -> dict[str, LayerWeights]:
    """An adapter on every ``every``-th Linear and Conv2d of a pipeline folder."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    with PipelineFolder.open(folder) as pipeline:
        names = [n for n in module_shapes(pipeline) if is_adaptable(n, components)]
        for index, name in enumerate(sorted(names)[::every]):
            rank = 2 + index % 3 if mixed_ranks else 4
            alpha = 1.0 + index % 5 if mixed_ranks else 3.0
            layers[name] = random_layer(
                pipeline[f"{name}.weight"], generator, rank=rank, alpha=alpha, axis=axis
            )
    return layers


def assert_same_layers(
    actual: dict[str, LayerWeights], expected: dict[str, LayerWeights], tolerance: float = 0.0
) -> None:
    """Compare two adapters by what they do: scale * B @ A, magnitudes and axes."""
    assert actual.keys() == expected.keys()
    for name, layer in expected.items():
        other = actual[name]
        delta = layer.scale * (layer.up.flatten(1) @ layer.down.flatten(1))
        delta_other = other.scale * (other.up.flatten(1) @ other.down.flatten(1))
        torch.testing.assert_close(delta_other, delta, rtol=0, atol=max(tolerance, 1e-6), msg=name)
        assert (other.magnitude is None) == (layer.magnitude is None), name
        if layer.magnitude is not None:
            assert other.magnitude is not None
            assert torch.equal(other.magnitude, layer.magnitude), name
            assert other.norm_axis == layer.norm_axis, name


@pytest.fixture(name="random_adapter", scope="session")
def random_adapter_fixture() -> Callable[..., dict[str, LayerWeights]]:
    """Makes an adapter for a pipeline folder."""
    return random_adapter


@pytest.fixture(name="random_layer", scope="session")
def random_layer_fixture() -> Callable[..., LayerWeights]:
    """Makes a layer for a weight."""
    return random_layer


@pytest.fixture(name="assert_same_layers", scope="session")
def assert_same_layers_fixture() -> Callable[..., None]:
    """Compares two adapters by what they do."""
    return assert_same_layers


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[AppleGPU]:
    """An emulated GPU that has memory of its own, unlike Apple's."""
    from dora_diffusion.models import offload
    from tests.apple import apple_gpu

    monkeypatch.setattr(offload, "has_own_memory", lambda kind: kind != "cpu")
    with apple_gpu() as emulated:
        yield emulated
