"""Images of a finished run: seeds, strengths, grids, and the device lock."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dora_diffusion.adapters.inject import layer_adapters
from dora_diffusion.config.base import BaseModel
from dora_diffusion.data.sheets import labelled_sheet
from dora_diffusion.formats.adapter.file import read_adapter, write_adapter
from dora_diffusion.models.load import load_vae
from dora_diffusion.numerics.weights import Strengths
from dora_diffusion.sampling.generate import BrokenImageError, SamplingSettings, load_model
from dora_diffusion.sampling.images import parse_parameters
from dora_diffusion.studio.jobs.image_generator import (
    GeneratedImage,
    GenerationRequest,
    ImageGenerator,
)
from dora_diffusion.studio.jobs.queue import Lock
from dora_diffusion.studio.jobs.snapshot import adapter_of
from dora_diffusion.studio.jobs.store import UserError, Workspace
from dora_diffusion.studio.jobs.uploads import read_generation_settings
from tests.studio.jobs.helpers import (
    job_of,
)


@pytest.fixture(scope="module")
def studio(finished: tuple[Workspace, str]) -> ImageGenerator:
    return ImageGenerator(finished[0])


STRENGTHS = ("strength", "direction_strength", "magnitude_strength")


def ask(finished: tuple[Workspace, str], **changes: Any) -> GenerationRequest:
    job = job_of(finished)
    prompt = changes.pop("prompt", "a photo of a sks dog")
    values = {"steps": 2, "width": 64, "height": 64} | changes
    request = {name: values.pop(name) for name in ("seed", "count") if name in values}
    strengths = {name: values.pop(name) for name in STRENGTHS if name in values}
    return GenerationRequest(
        BaseModel(job.base), adapter_of(job), prompt, SamplingSettings(**values),
        strengths=Strengths(**strengths), **({"seed": 5} | request),
    )  # fmt: skip


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def test_one_seed_gives_the_same_pixels_and_the_file_says_how(
    finished: tuple[Workspace, str], studio: ImageGenerator
) -> None:
    (first,), (second,) = studio.make(ask(finished)), studio.make(ask(finished))
    assert pixels(first.path) == pixels(second.path)
    found = read_generation_settings(first.path)
    assert (found["Prompt"], found["Seed"], found["Steps"]) == ("a photo of a sks dog", "5", "2")
    assert found["Adapter strength"] == "1"
    assert str(finished[0].root) not in first.parameters


def test_strength_0_is_the_base_and_1_is_not(
    finished: tuple[Workspace, str], studio: ImageGenerator
) -> None:
    base, adapted = studio.compare(ask(finished))
    (plain,) = studio.make(ask(finished, strength=0.0))
    (full,) = studio.make(ask(finished))
    assert pixels(plain.path) == pixels(base.path)
    assert pixels(full.path) == pixels(adapted.path) != pixels(base.path)
    assert "<lora:" not in base.parameters
    assert "<lora:" in adapted.parameters


def test_direction_and_magnitude_are_written_into_the_file(
    finished: tuple[Workspace, str], studio: ImageGenerator
) -> None:
    (picture,) = studio.make(ask(finished, direction_strength=0.5, magnitude_strength=0.0))
    found = read_generation_settings(picture.path)
    assert (found["Direction strength"], found["Magnitude strength"]) == ("0.5", "0")


def test_the_page_reads_an_adapters_strengths_back(
    finished: tuple[Workspace, str], studio: ImageGenerator
) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed")
    from dora_diffusion.studio.app.views.generate import field_value

    def fields(image: GeneratedImage) -> list[Any]:
        found = read_generation_settings(image.path)
        return [field_value(name, found) for name in ("strength", "direction", "magnitude")]

    adapted = ask(finished, strength=0.75, direction_strength=0.5)
    assert fields(studio.make(adapted)[0]) == [0.75, 0.5, 1]
    assert fields(studio.make(ask(finished))[0]) == [1, 1, 1]
    assert fields(studio.compare(adapted)[0]) == [None, None, None]


def test_the_page_says_what_of_a_long_prompt_was_not_read(
    finished: tuple[Workspace, str], studio: ImageGenerator
) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed")
    from dora_diffusion.studio.app.views.generate import _results

    short = ask(finished)
    long = ask(finished, prompt="a photo of a sks dog" + " on grass" * 60 + " by the <lake>")
    adapters = {"result": short.adapter}
    for pictures in (
        studio.make(long),
        studio.compare(long),
        [studio.grid(long, adapters, [1.0], lambda *_: None)],
    ):
        for picture in pictures:
            (line,) = picture.unread
            assert line.startswith("The prompt is longer than the model's 77 tokens; it did not")
            assert line.endswith("by the < lake >")
    assert "by the &lt; lake &gt;" in _results(pictures)[-1]
    (negative,) = studio.make(ask(finished, negative_prompt="blurred, " * 80))[0].unread
    assert negative.startswith("The negative prompt is longer")
    (plain,), (cut,) = studio.make(short), studio.make(long)
    assert plain.unread == ()
    (whole,) = studio.make(replace(long, max_token_length=0))
    assert whole.unread == ()
    assert pixels(whole.path) != pixels(cut.path)
    (skips,) = studio.make(replace(short, clip_skip=1))
    assert pixels(skips.path) != pixels(plain.path)
    found = [parse_parameters(image.parameters).get("Clip skip") for image in (plain, skips)]
    assert found == [None, "2"]
    assert "longer than" not in _results(studio.compare(short), is_pair=True)[-1]


def test_what_a_grid_did_not_see_is_counted_by_the_adapter_s_own_words(
    finished: tuple[Workspace, str], studio: ImageGenerator, tmp_path: Path
) -> None:
    request = ask(finished, prompt="a <toy>" + " dog" * 60)
    assert request.adapter is not None
    adapter = read_adapter(request.adapter)
    width = studio._model(request).text_encoders[0].config.hidden_size
    tokens = {"<toy>": {"text_encoder": torch.randn(30, width)}}
    file = write_adapter(tmp_path / "toy.safetensors", replace(adapter, tokens=tokens), "kohya")
    request = replace(request, adapter=file)
    (made,) = studio.make(request)
    assert made.unread[0].endswith("the end: " + " ".join(["dog"] * 16))
    assert studio.grid(request, {"toy": file}, [1.0], lambda *_: None).unread == made.unread


def test_images_that_would_be_black_are_refused_in_words(
    finished: tuple[Workspace, str], studio: ImageGenerator
) -> None:
    job, pictures = job_of(finished), finished[0].images
    file = adapter_of(job)
    assert file is not None
    broken = file.with_name("broken.safetensors")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(
        {name: torch.full_like(tensor, 3e38) for name, tensor in load_file(file).items()},
        broken,
        metadata,
    )
    asked = replace(ask(finished), adapter=broken)
    before = sorted(pictures.glob("*"))
    for make in (
        studio.make,
        studio.compare,
        lambda one: studio.grid(one, {"x": broken}, [1.0], lambda *_: None),
    ):
        with pytest.raises(BrokenImageError, match=r"not finite|black all"):
            make(asked)
    broken.unlink()
    assert sorted(pictures.glob("*")) == before


def test_a_grid_has_a_cell_per_checkpoint_and_strength(
    finished: tuple[Workspace, str], studio: ImageGenerator
) -> None:
    job = job_of(finished)
    result, early = adapter_of(job), adapter_of(job, "checkpoint-2")
    assert result is not None
    assert early is not None
    steps: list[int] = []
    adapters = {"checkpoint-2": early, "result": result}
    picture = studio.grid(ask(finished), adapters, [0.0, 1.0], lambda done, _: steps.append(done))
    # In one batch, of one model that is its base again; PNDM takes a step more than asked.
    assert steps == [4, 8, 12]
    assert not any(layer_adapters(studio._components.unet))
    cells = [
        Image.open(studio.make(replace(ask(finished, strength=strength), adapter=adapter))[0].path)
        for adapter in adapters.values()
        for strength in (0.0, 1.0)
    ]
    # Names of checkpoints are longer than a small image is wide: each has a line of its own.
    title = f"Seed {picture.seed}; above each column, the strength"
    wanted = labelled_sheet(cells, title, ["checkpoint-2", "result"], ["0", "1"])
    with Image.open(picture.path) as image:
        assert image.size == wanted.size
        assert np.ptp(np.asarray(image, np.int16) - np.asarray(wanted, np.int16)) <= 2
    assert read_generation_settings(picture.path)["Size"] == "64x64"


def test_pictures_wait_their_turn_while_a_run_has_the_device_and_can_be_withdrawn(
    finished: tuple[Workspace, str], studio: ImageGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio.make(ask(finished))
    lock = Lock(finished[0].device_lock)
    assert lock.take()
    asked: Queue[bool] = Queue()
    keep_waiting = studio._waits_on
    monkeypatch.setattr(studio, "_waits_on", lambda: asked.put(True) or keep_waiting())
    monkeypatch.setattr("dora_diffusion.studio.jobs.image_generator.is_running", lambda job: True)
    with ThreadPoolExecutor() as threads:
        images = threads.submit(studio.make, ask(finished))
        asked.get()
        asked.get()  # By the second time it has been said that it waits.
        assert studio.is_waiting
        studio.release()  # as before a run starts
        assert studio._loaded is None
        studio.withdraw()
        with pytest.raises(UserError, match="cancelled while they waited"):
            images.result()
        assert not studio.is_waiting
        images = threads.submit(studio.make, ask(finished))
        asked.get()
        lock.free()
        assert len(images.result()) == 1
    assert not studio.is_waiting
    assert studio._loaded is None, "the run that waits now has the memory"
    assert lock.take()
    lock.free()


@pytest.mark.parametrize(
    "changes",
    [{"prompt": ""}, {"count": 99}, {"steps": 999}, {"width": 10_000}, {"seed": -2}],
)
def test_requests_have_limits(finished: tuple[Workspace, str], changes: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        ask(finished, **changes)


def test_a_model_that_makes_images_holds_no_file(
    finished: tuple[Workspace, str], studio: ImageGenerator
) -> None:
    """Files that are mapped into memory, as weights might be, Windows would not let be deleted."""
    base = job_of(finished).base

    def mapped() -> list[str]:
        return [map.path for map in psutil.Process().memory_maps() if map.path.startswith(base)]

    weights = next(Path(base).rglob("*.safetensors"))
    with safe_open(weights, "pt") as file:
        assert len(file.keys())
        assert mapped() == [str(weights)]
    studio.make(ask(finished))
    assert mapped() == []


def write_other_vae(source: Path, target: Path) -> torch.Tensor:
    """The VAE of a folder with one weight changed; that weight."""
    vae = load_vae(source)
    weight = vae.decoder.conv_out.weight
    with torch.no_grad():
        weight.add_(1.0)
    vae.save_pretrained(target)
    return weight.detach()


def test_another_vae_is_used_for_images_too(sd1_folder: Path, tmp_path: Path) -> None:
    changed = write_other_vae(sd1_folder, tmp_path / "vae")
    plain = load_model(BaseModel(sd1_folder), None)
    other = load_model(BaseModel(sd1_folder, vae=tmp_path / "vae"), None)
    loaded = other.vae.decoder.conv_out.weight.float().cpu()
    assert torch.equal(loaded, changed.to(other.vae.dtype).float())
    assert not torch.equal(loaded, plain.vae.decoder.conv_out.weight.float().cpu())
    assert not other.vae.decoder.conv_out.weight.requires_grad
