"""Images of a finished run: seeds, strengths, grids, and the device lock."""

from __future__ import annotations

import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import replace
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from safetensors import safe_open

from dora_diffusion.config import ConfigError
from dora_diffusion.config.base import BaseModel
from dora_diffusion.numerics.weights import Strengths
from dora_diffusion.sampling.generate import generate_images
from dora_diffusion.sampling.images import parse_parameters
from dora_diffusion.sampling.load import load_adapted
from dora_diffusion.sampling.settings import SamplingSettings
from dora_diffusion.sampling.stack import AdapterUse
from dora_diffusion.studio.jobs.image_generator import (
    GeneratedImage,
    GenerationRequest,
    ImageGenerator,
)
from dora_diffusion.studio.jobs.image_store import input_path, keep_input
from dora_diffusion.studio.jobs.queue import PERSON, Lock
from dora_diffusion.studio.jobs.snapshot import adapter_of
from dora_diffusion.studio.jobs.store import UserError, Withdrawn, Workspace
from dora_diffusion.studio.jobs.uploads import read_generation_settings
from tests.refusal import refused
from tests.studio.jobs.helpers import job_of


@pytest.fixture(scope="module")
def studio(finished: tuple[Workspace, str]) -> ImageGenerator:
    return ImageGenerator(finished[0])


def ask(finished: tuple[Workspace, str], **changes: Any) -> GenerationRequest:
    job = job_of(finished)
    usual: dict[str, Any] = {
        "adapter": [str(adapter_of(job))], "prompt": "a photo of a sks dog", "seed": 5, "steps": 2,
        "width": 64, "height": 64,
    }  # fmt: skip
    return GenerationRequest.of(base=job.base, **(usual | changes))


def with_adapter(
    request: GenerationRequest, file: Path | None, **strengths: float
) -> GenerationRequest:
    return request.changed(adapter=[str(file)], **strengths)


def kept(finished: tuple[Workspace, str], image: Image.Image) -> str:
    """The file of an image, or a mask, that is kept to paint over."""
    return str(input_path(finished[0], keep_input(finished[0], image)))


def fields_of(image: GeneratedImage) -> dict[str, str]:
    return parse_parameters(read_generation_settings(image.path))


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def test_one_seed_gives_the_same_pixels_and_the_file_says_how(
    finished: tuple[Workspace, str], studio: ImageGenerator
) -> None:
    (first,), (second,) = studio.make(ask(finished)), studio.make(ask(finished))
    assert pixels(first.path) == pixels(second.path)
    found = fields_of(first)
    assert (found["Prompt"], found["Seed"], found["Steps"]) == ("a photo of a sks dog", "5", "2")
    assert found["Adapter strength"] == "1"
    assert str(finished[0].root) not in first.parameters


def test_several_adapters_and_images_to_start_from_are_the_library_s(
    finished: tuple[Workspace, str], studio: ImageGenerator
) -> None:
    """Images of the page are those of the library with the same settings, bit for bit."""
    job, plain = job_of(finished), ask(finished, scheduler="euler")
    result, early = adapter_of(job), adapter_of(job, "checkpoint-2")
    assert result is not None
    assert early is not None
    uses = (
        AdapterUse(result, Strengths(0.7, 0.9)),
        AdapterUse(early, Strengths(-0.5, 0.9)),
    )
    source = Image.effect_noise((80, 64), 60).convert("RGB")
    mask = Image.new("L", source.size)
    mask.paste(255, (0, 0, 40, 64))
    quick = SamplingSettings(steps=2, width=64, height=64, scheduler="euler")
    files = {"image": kept(finished, source), "mask_image": kept(finished, mask)}
    over, into = {"image": files["image"], "denoise": 0.6}, {**files, "denoise": 0.6}
    wanted: dict[str, tuple[dict[str, Any], SamplingSettings]] = {
        "several": ({}, quick),
        "over": (over, replace(quick, image=source, denoise=0.6)),
        "into": (into, replace(quick, image=source, mask_image=mask, denoise=0.6)),
    }
    several = plain.changed(
        adapter=[f"{result}:0.7", f"{early}:-0.5"], direction_strength=0.9,
    )  # fmt: skip
    studio.make(plain)  # with another adapter before
    components = load_adapted(BaseModel(job.base), uses, device="cpu")[0]
    for name, (changes, settings) in wanted.items():
        (made,) = studio.make(several.changed(**changes))
        (image,) = generate_images(components, plain.prompt, [5], settings)
        assert pixels(made.path) == image.tobytes(), name
        fields = fields_of(made)
        assert fields["Adapter"] == f"{finished[1]}, {finished[1]}-checkpoint-2"
        assert fields["Adapter strength"] == "0.7, -0.5"
        assert ("Init image hash" in fields) == (settings.image is not None)
        assert ("Mask image hash" in fields) == (name == "into")
    # The other way round, on the model that is loaded: nothing of the one before stays.
    (alone,) = studio.make(several.changed(adapter=[f"{result}:0.7"]))
    (full,) = studio.make(with_adapter(plain, result))
    assert pixels(full.path) == pixels(studio.make(plain)[0].path) != pixels(alone.path)
    base, adapted = studio.compare(several)
    assert pixels(base.path) == pixels(studio.make(plain.changed(strength=0.0))[0].path)
    assert adapted.parameters == studio.make(several)[0].parameters
    # Cells of a grid have them all too.
    asked = several.changed(**into)
    grid, _ = studio.grid(asked, ["strength=1"], lambda *_: None)
    assert grid.parameters == studio.make(asked)[0].parameters


def test_an_image_of_a_batch_is_made_again_in_its_batch(
    finished: tuple[Workspace, str], studio: ImageGenerator
) -> None:
    six = studio.make(ask(finished, num_images=6))
    fields = [fields_of(image) for image in six]
    batches = [(one.get("Batch size"), one.get("Batch pos")) for one in fields]
    assert batches == [*(("4", str(n)) for n in range(4)), ("2", "0"), ("2", "1")]
    for place in (2, 5):
        size, position = (int(text or 0) for text in batches[place])
        asked = ask(finished).changed(seed=six[place].seed, batch_position=(size, position))
        (again,) = studio.make(asked)
        assert again.parameters == six[place].parameters
        assert pixels(again.path) == pixels(six[place].path)


def test_an_adapter_that_is_for_few_steps_says_so_where_there_are_more(
    finished: tuple[Workspace, str], studio: ImageGenerator, tmp_path: Path
) -> None:
    plain = ask(finished)
    file = tmp_path / "lcm-lora-sdv1-5.safetensors"
    file.write_bytes(Path((plain.adapter or [""])[0]).read_bytes())
    request = with_adapter(plain, file).changed(guidance_scale=7.5)
    (made,) = studio.make(request)
    line = "lcm-lora-sdv1-5 is for few steps (LCM): set steps 4, guidance 1, scheduler LCM"
    assert made.notes == (line,)
    for steps, notes in ((2, ()), (9, (line,))):
        (made,) = studio.make(request.changed(guidance_scale=1.0, steps=steps))
        assert made.notes == notes
    # Its scheduler is taken where none is chosen, as in a grid.
    for scheduler, name in ((None, "lcm"), ("euler", "euler")):
        asked = request.changed(scheduler=scheduler)
        sheet, _ = studio.grid(asked, ["strength=1"], lambda *_: None)
        assert sheet.parameters == studio.make(asked)[0].parameters
        assert fields_of(sheet)["Sampler"] == name


def test_a_grid_is_a_sheet_and_a_page_of_images_that_are_made_once(
    finished: tuple[Workspace, str], studio: ImageGenerator
) -> None:
    job = job_of(finished)
    adapters = [adapter_of(job), adapter_of(job, "checkpoint-2")]
    axes = [f"adapter={' || '.join(map(str, adapters))} ||", "strength=0, 1"]
    steps: list[tuple[int, int]] = []
    sheet, archive = studio.grid(ask(finished), axes, lambda *done: steps.append(done))
    # In one batch, and of one model, which is then that of the request.
    assert steps[-1] == (8, 8)
    cells = [
        studio.make(with_adapter(ask(finished), adapter, strength=strength))[0]
        for strength in (0.0, 1.0)
        for adapter in adapters
    ]
    with zipfile.ZipFile(archive) as packed:
        names = packed.namelist()
        record = json.loads(packed.read(f"{archive.stem}/grid.json"))
        assert names[:2] == [f"{archive.stem}/index.html", f"{archive.stem}/sheet.png"]
        files = [Image.open(packed.open(f"{archive.stem}/{name}")) for name in record["files"]]
        images = [np.asarray(image, np.int16) for image in files]
    by_row = [images[0], images[2], images[1], images[3]]
    for image, cell in zip(by_row, cells, strict=True):
        assert np.abs(image - np.asarray(Image.open(cell.path), np.int16)).max() <= 1
    assert str(finished[0].root) not in json.dumps(record)
    assert sheet.parameters == cells[0].parameters == record["texts"][record["files"][0]]
    assert sheet.path.parent == finished[0].images
    # The same request, a value more: what is there stays.
    steps.clear()
    again, other = studio.grid(ask(finished), [axes[0]], lambda *done: steps.append(done))
    assert (steps, other) == ([], archive)
    assert again.parameters == replace(cells[2]).parameters
    with pytest.raises(UserError, match="the grid has too many images; 48 can be made at once"):
        studio.grid(ask(finished), ["seed=1, 2, .., 49"], lambda *_: None)
    with pytest.raises(ConfigError, match="steps is 500; it must be at most 200"):
        studio.grid(ask(finished), ["steps=500"], lambda *_: None)


def test_images_in_the_making_are_stopped_at_a_step(
    finished: tuple[Workspace, str], studio: ImageGenerator
) -> None:
    def stop(step: int) -> Any:
        def on_step(done: int, total: int) -> None:
            assert studio.turn == "making"
            steps.append(done)
            if done == step:
                studio.withdraw()

        return on_step

    steps: list[int] = []
    asked = ask(finished, steps=4)
    (wanted,) = studio.make(asked)
    there = {*finished[0].images.glob("*.png")}
    for make in (studio.make, studio.compare):
        steps.clear()
        with pytest.raises(Withdrawn, match="the images were stopped"):
            make(asked, stop(2))
        assert steps == [1, 2]
        assert {*finished[0].images.glob("*.png")} == there
    assert studio.turn == ""
    (again,) = studio.make(asked)
    assert pixels(again.path) == pixels(wanted.path)
    # Of a grid, what is done is kept.
    axes, grids = ["steps=2, 3"], finished[0].root / "grids"
    others = {*grids.glob("*/images")}
    with pytest.raises(Withdrawn):
        studio.grid(asked, axes, stop(3))
    (folder,) = {*grids.glob("*/images")} - others
    (first,) = folder.iterdir()
    written = first.stat().st_mtime_ns
    studio.grid(asked, axes, lambda *_: None)
    assert (first.stat().st_mtime_ns, len([*folder.iterdir()])) == (written, 2)


def test_images_wait_their_turn_while_a_run_has_the_device_and_can_be_withdrawn(
    finished: tuple[Workspace, str], studio: ImageGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio.make(ask(finished))
    lock = Lock(finished[0].device_lock)
    assert lock.take()
    asked: Queue[bool] = Queue()
    keep_waiting = studio._waits_on

    def withdraw_as(person: str) -> str:
        PERSON.set(person)
        studio.withdraw()
        return studio.turn

    monkeypatch.setattr(studio, "_waits_on", lambda turn: asked.put(True) or keep_waiting(turn))
    monkeypatch.setattr("dora_diffusion.studio.jobs.image_generator.is_running", lambda job: True)
    with ThreadPoolExecutor() as threads:
        images = threads.submit(studio.make, ask(finished))
        asked.get()
        asked.get()
        assert studio.turn == "waiting"
        assert copy_context().run(withdraw_as, "ben") == ""
        while not asked.empty():
            asked.get()
        asked.get()  # It waits on: that was another person.
        studio.release()  # as before a run starts
        assert studio._loaded is None
        studio.withdraw()
        with pytest.raises(Withdrawn, match="the images were withdrawn; none of them was made"):
            images.result()
        assert studio.turn == ""
        images = threads.submit(studio.make, ask(finished))
        asked.get()
        lock.free()
        assert len(images.result()) == 1
    assert studio.turn == ""
    assert studio._loaded is None, "the run that waits now has the memory"
    assert lock.take()
    lock.free()


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [("num_images", 17, "at most 16"), ("steps", 201, "at most 200"),
     ("width", 2056, "at most 2048"), ("guidance_scale", 30.5, "at most 30"),
     ("height", 2056, "at most 2048"), ("seed", 2**32, "at most 4294967295"),
     ("seed", -2, "not be negative")],
)  # fmt: skip
def test_requests_have_limits(
    finished: tuple[Workspace, str], name: str, value: float, problem: str
) -> None:
    with refused(name, f"{name} is {value}; it must {'be ' * problem.startswith('at')}{problem}"):
        ask(finished, **{name: value})
    with pytest.raises(UserError, match="write a prompt"):
        ask(finished, prompt=" ")


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
