"""``dora-diffusion generate --grid``: its cells are plain images, made once, also after a stop."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dora_diffusion.cli.main import main
from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter
from dora_diffusion.formats.files.atomic import atomic_file
from dora_diffusion.sampling.generate import Pass
from dora_diffusion.sampling.images import parse_parameters, read_parameters
from dora_diffusion.sampling.page import PAGE, RECORD, SHEET
from dora_diffusion.sampling.settings import SamplingSettings
from dora_diffusion.training.results.folders import locked
from tests.waiting import STAY

# Stops while the fifth image is written: its temporary file is there, under half of its bytes.
_HELD = f"""
import sys
from dora_diffusion import system
from dora_diffusion.cli.main import main
replace, images = system.replace, []
def held(source, target):
    images.extend([target] * (target.parent.name == "images"))
    if len(images) == 5:
        source.write_bytes(source.read_bytes()[:99])
        {STAY}
    replace(source, target)
system.replace = held
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def adapters(sd1_folder, random_adapter, tmp_path_factory):
    """A DoRA with a text encoder, which reads prompts by a layer less, and a LoRA."""
    folder, files = tmp_path_factory.mktemp("adapters"), []
    for seed, axis in enumerate(("output", None), start=1):
        layers = random_adapter(sd1_folder, axis=axis, seed=seed, every=4, mixed_ranks=True)
        extra = {"clip_skip": "1"} if axis else {}
        file = AdapterFile(layers, AdapterMetadata("sd1", trigger="dog", extra=extra))
        files.append(str(write_adapter(folder / f"{seed}.safetensors", file)))
    return files


@pytest.fixture
def generate(sd1_folder):
    """Run the command into a folder or file. Returns the exit code."""

    def run(output, *words, **flags):
        flags = {"base": sd1_folder, "prompt": "a red dog", "seed": 3, "steps": 2, **flags}
        named = [f"--{name}={value}" for name, value in flags.items() if value is not None]
        return main(["generate", *named, "--output", str(output), *map(str, words)])

    return run


@pytest.fixture
def batches(monkeypatch):
    """The seeds of each batch that a pipeline samples from now on."""
    found, sample = [], Pass.sample

    def count(current, rows, *more):
        found.append(list(rows.seeds))
        return sample(current, rows, *more)

    monkeypatch.setattr(Pass, "sample", count)
    return found


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image, np.int16)


def record_of(folder):
    return json.loads((folder / RECORD).read_text(encoding="utf-8"))


def test_each_cell_is_the_plain_image_of_its_settings_and_repeats_to_the_same_bytes(
    generate, adapters, sd1_folder, tmp_path, batches, capsys
):
    """Bit for bit, where each is a batch; with strengths of components."""
    first, second = adapters
    grid, values = tmp_path / "grid", (None, f"{first}:0.5:0.8", second)
    flags = {"batch_size": 1}
    assert generate(grid, "--grid", f"adapter=none, {', '.join(values[1:])}", **flags) == 0
    assert batches == [[3]] * 3
    assert f"{grid / PAGE} (3 images; seed 3)" in capsys.readouterr().out
    record, seen = record_of(grid), set()
    plain, again = tmp_path / "plain.png", tmp_path / "again.png"
    for adapter, file in zip(values, record["files"], strict=True):
        own = {"adapter": adapter, **flags} if adapter else {}
        assert generate(plain, "--overwrite", **own) == 0
        assert plain.read_bytes() == (grid / file).read_bytes()
        assert read_parameters(plain) == record["texts"][file]
        seen.add(pixels(plain).tobytes())
    more = ["--adapter", first, "--output", again]
    file = grid / record["files"][1]
    assert main(["generate", *map(str, ["--base", sd1_folder, "--repeat", file, *more])]) == 0
    assert again.read_bytes() == file.read_bytes()
    assert len(seen) == 3
    with Image.open(grid / SHEET) as sheet:
        assert sheet.width == 3 * 66 - 2


def test_one_batch_holds_several_adapters_and_prompts_up_to_rounding(
    generate, adapters, tmp_path, batches
):
    first, second = adapters
    grid, plain, values = tmp_path / "grid", tmp_path / "plain.png", (None, second, first)
    axes = [f"adapter=none, {second}, {first}", "replace=red, toy"]
    assert generate(grid, "--grid", *axes, batch_size=4) == 0
    # The DoRA has a layer of the text encoder left out, so that its cells are a batch apart.
    assert batches == [[3, 3], [3, 3, 3, 3]] or batches == [[3, 3, 3, 3], [3, 3]]
    files = record_of(grid)["files"]
    for adapter, file in zip(values, files[1::2], strict=True):
        assert generate(plain, "--overwrite", adapter=adapter, prompt="a toy dog") == 0
        assert read_parameters(plain) == read_parameters(grid / file)
        assert np.abs(pixels(grid / file) - pixels(plain)).max() <= 1
    assert len({pixels(grid / file).tobytes() for file in files}) == 6


def interrupted(words, monkeypatch):
    asked, sample = [], Pass.sample

    def stop(*args):
        asked.append(1)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return sample(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Pass, "sample", stop)
        assert main(words) == 130


def killed(words, monkeypatch):
    process = subprocess.Popen(
        [sys.executable, "-c", _HELD, *words], stdout=subprocess.PIPE, text=True, encoding="utf-8",
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "ready\n"
    finally:
        process.kill()  # without a chance to clean up
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("stop", [interrupted, pytest.param(killed, marks=pytest.mark.slow)])
def test_a_grid_that_was_stopped_continues(
    stop, generate, sd1_folder, adapters, tmp_path, batches, monkeypatch, capsys
):
    grid, whole = tmp_path / "stopped" / "grid", tmp_path / "whole" / "grid"
    axes = ["seed=1, 2, 3", f"adapter=none, {adapters[1]}"]
    words = ["generate", "--base", sd1_folder, "--prompt", "a red dog", "--steps", "2"]
    words += ["--batch_size", "2", "--output", grid, "--grid", *axes]
    stop([str(word) for word in words], monkeypatch)
    record = record_of(grid)
    files = record["files"]
    made = sorted(file for file in files if (grid / file).exists())
    assert len(made) == 4
    # The page has all images that are there, of whoever was killed too.
    assert sorted(record["texts"]) == made
    shown = (grid / PAGE).read_text(encoding="utf-8").partition('"texts"')[2]
    assert all(file in shown for file in made)
    assert not (grid / SHEET).exists()
    assert len([*grid.rglob("*.tmp")]) == (stop is killed)
    kept = {file: ((grid / file).stat().st_mtime_ns, (grid / file).read_bytes()) for file in made}
    batches.clear()
    flags = {"batch_size": 2, "seed": None}
    assert generate(grid, "--grid", *axes, **flags) == 0
    assert sum(map(len, batches)) == 2
    assert "6 images, 2 of them new" in capsys.readouterr().out
    now = {file: ((grid / file).stat().st_mtime_ns, (grid / file).read_bytes()) for file in made}
    assert now == kept
    # As one that was never stopped, to the last byte.
    assert generate(whole, "--grid", *axes, **{**flags, "seed": record["seed"]}) == 0
    found = ({str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}
             for folder in (grid, whole))  # fmt: skip
    assert next(found) == next(found)


def test_one_process_at_a_time_makes_a_grid(generate, tmp_path, batches, last_line):
    grid = tmp_path / "grid"
    with atomic_file(grid / "x") as temporary, locked(grid, "it"):
        temporary.touch()
        assert generate(grid, "--grid", "steps=1") == 1
        assert f"another run is writing to output {grid}; wait until it has ended" in last_line()
        assert temporary.exists()
        assert not batches
    (grid / "x").unlink()
    assert generate(grid, "--grid", "steps=1") == 0
    assert sum(map(len, batches)) == 1


def test_a_grid_grows_by_its_new_cells_alone(generate, adapters, tmp_path, batches):
    grid, axes = tmp_path / "grid", ["seed=1, 2, 3", f"adapter=none, {adapters[1]}"]
    flags = {"batch_size": 2, "seed": None}
    assert generate(grid, "--grid", *axes, **flags) == 0
    files = record_of(grid)["files"]
    # The same again, another order, a value less or more, one twice by its name: nothing twice.
    for words, new in (
        (axes, 0), (axes[::-1], 0), (["seed=3, 1", axes[1]], 0),
        (["seed=2, 3, 4", axes[1]], 2), (["seed=1, 2", "steps=2, 1"], 2),
        ([axes[0], f"adapter=none, {adapters[1]}", "strength=1, 0.5"], 3),
    ):  # fmt: skip
        batches.clear()
        assert generate(grid, "--grid", *words, **flags) == 0
        assert sum(map(len, batches)) == new, words
    # A damaged, replaced or changed file is replaced; so is everything that is asked for.
    (grid / files[0]).write_bytes((grid / files[0]).read_bytes()[:-300])
    (grid / files[1]).write_bytes((grid / files[2]).read_bytes())
    (grid / files[3]).unlink()
    batches.clear()
    assert generate(grid, "--grid", *axes, **flags) == 0
    assert sum(map(len, batches)) == 3
    batches.clear()
    assert generate(grid, "--grid", *axes, "--overwrite", **flags) == 0
    assert sum(map(len, batches)) == 6


def test_settings_that_follow_from_an_adapter_are_those_of_its_cells_alone(
    generate, adapters, tmp_path, batches, capsys
):
    few = shutil.copy(adapters[1], tmp_path / "lcm-lora-own.safetensors")
    grid, plain = tmp_path / "grid", tmp_path / "plain.png"
    given = {"steps": None, "scheduler": "ddim", "width": 16, "height": 16}
    for new in (3, 0):
        batches.clear()
        assert generate(grid, "--grid", f"adapter={few}, none, {few}:0.5", **given) == 0
        assert sum(map(len, batches)) == new
        said = capsys.readouterr().err
        assert said.count("lcm-lora-own is for few steps") == (new > 0)
    texts = [read_parameters(grid / file) for file in record_of(grid)["files"]]
    assert generate(plain, adapter=few, **given) == 0
    assert texts[0] == read_parameters(plain)
    steps = [parse_parameters(text)["Steps"] for text in texts]
    assert steps[0] == steps[2] != steps[1] == str(SamplingSettings.steps)


def test_a_grid_around_an_image_has_its_settings(generate, adapters, tmp_path, capsys):
    first, grid = tmp_path / "first.png", tmp_path / "grid"
    own = {"adapter": f"{adapters[0]}:0.7", "guidance_scale": 4.5, "scheduler": "ddim"}
    assert generate(first, **own) == 0
    bare = {"prompt": None, "seed": None, "steps": None, "adapter": adapters[0], "batch_size": 1}
    assert generate(grid, "--repeat", first, "--grid", "cfg=4.5, 6", **bare) == 0
    same, other = (grid / file for file in record_of(grid)["files"])
    assert same.read_bytes() == first.read_bytes()
    expected = parse_parameters(read_parameters(first)) | {"CFG scale": "6"}
    assert parse_parameters(read_parameters(other)) == expected


@pytest.mark.parametrize(
    ("words", "flags", "message"),
    [
        (["size=33x64"], {}, "width is 33; it must be a multiple of 8"),
        (["strength=70"], {"adapter": "{adapter}"}, "strength is 70; it must be between"),
        (["adapter=nowhere"], {}, "there is no adapter at nowhere"),
        (["image=nowhere.png"], {}, "nowhere.png"),
        (["base=./nowhere"], {}, "nowhere does not exist"),
        (["seed=-1"], {}, "seed is -1"),
        (["prompt=<lora:x:1> a"], {}, "<lora:x:1> in the prompt is not read"),
        (["steps=1, 2"], {"prompt": None}, "generate has no prompt"),
        (["steps=1, 2"], {"num_images": 2}, "num_images is 2; for a grid give seeds"),
        (["steps=1, 2"], {"adapters_file": "x.yaml"}, "grid and adapters_file are both given"),
        (["steps=1, 2", "seed=1, 2, .., 99"], {}, "the grid has 198 images, more than grid_limit"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(
    words, flags, message, generate, adapters, tmp_path, last_line
):
    flags = {name: str(value).format(adapter=adapters[0]) if value else None
             for name, value in flags.items()}  # fmt: skip
    assert generate(tmp_path / "new" / "grid", "--grid", *words, **flags) == 1
    line = last_line()
    assert line.startswith("error: ")
    assert message in line
    assert not list(tmp_path.iterdir())


def test_a_folder_of_other_things_is_left_alone(generate, tmp_path, last_line):
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    assert generate(tmp_path, "--grid", "steps=1") == 1
    assert "contains other files; choose another --output" in last_line()
    assert generate(tmp_path / "x.png", "--grid", "steps=1") == 1
    assert "x.png must be a folder with grid" in last_line()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
