"""The Generate tab's handlers."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("gradio", reason="gradio is not installed")
import gradio
import numpy as np
from PIL import Image

from dora_diffusion.sampling.images import save_image
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.views import generate
from dora_diffusion.studio.app.views.generate import GenerateTab, refresh
from dora_diffusion.studio.app.views.request import MORE, UNSET, make_request
from dora_diffusion.studio.app.views.restore import restore
from dora_diffusion.studio.jobs import records, tasks
from dora_diffusion.studio.jobs.image_generator import GeneratedImage, _Turn
from dora_diffusion.studio.jobs.snapshot import Job
from dora_diffusion.studio.jobs.store import GONE, UserError, write_json
from tests.studio.app.views.helpers import handler, handlers, triggers
from tests.studio.jobs.helpers import ended_run, photo, seen, started_run

ADAPTER = Path(__file__).parents[3] / "formats/golden/0.1.0/diffusers-dora-ranks.safetensors"


def test_images_are_made_of_the_newest_result_where_nothing_is_chosen(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def make_request(context: Context, choice: str | None, form: dict[str, Any]) -> None:
        asked.append(choice)
        raise UserError("enough")

    monkeypatch.setattr(generate, "make_request", make_request)
    with gradio.Blocks():
        tab = generate.GenerateTab(context)
        fields = [None] * (len(tab.fields) + 2)
    find = handlers(context)
    grid: list[Any] = [None] * len(tab.grid.fields)
    for name, more in (("make", []), ("compare", []), ("make_grid", grid)):
        with pytest.raises(gradio.Error):
            find(name, "generate")(None, *more, *fields)
    assert asked == [f"base/{context.models[0]}"] * 3


def test_the_page_says_what_images_wait_for(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    def turn(*jobs: Job) -> str:
        return str(refresh(context, jobs, None)["turn"])

    job = seen(started_run(context.workspace, 4, "<mug>"))
    assert turn(job) == ""
    running = dataclasses.replace(job, state="running")
    assert "Images wait until &lt;mug&gt; has ended (about 12 s)" in turn(running)
    own = _Turn("ann")
    monkeypatch.setattr(context.generator, "_turns", [own])
    assert turn(job) == ""  # somebody else's
    own.person = ""
    for said in (turn(running), turn(job)):
        assert "Waiting until" in said
        assert "data-do='withdraw'" in said
    own.is_making = True
    assert "data-do='withdraw'>Stop<" in turn(job).replace(" data-value=''", "")
    handler(context, "withdraw", "generate")()
    assert own.is_withdrawn


@pytest.fixture
def made(context: Context, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The requests that images were made of; each image is one gray one."""
    asked: list[Any] = []

    def make(request: Any, on_step: Any = None) -> list[GeneratedImage]:
        asked.append(request)
        text = f"{request.prompt}\nSteps: 2, Seed: {request.seed}"
        path = context.workspace.images / f"made-{len(asked)}.png"
        return [GeneratedImage(save_image(Image.new("RGB", (8, 8)), path, text), 0, text)]

    monkeypatch.setattr(context.generator, "make", make)
    return asked


def stored(context: Context, name: str, text: str, side: int = 64) -> str:
    image = Image.effect_noise((side, side), 60).convert("RGB")
    save_image(image, context.workspace.images / name, text)
    return name


OWN = "Model: embedded:tiny-sd, Version: dora_diffusion 0.1.0"


def test_an_image_s_menu_makes_it_again_and_varies_it(context: Context, made: list[Any]) -> None:
    find = handlers(context)
    text = (
        "a red mug\nNegative prompt: blurred\n"
        f"Steps: 3, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 2.5, Seed: 7, "
        f"Size: 64x72, Batch size: 4, Batch pos: 2, Guidance rescale: 0.5, {OWN}"
    )
    name = stored(context, "a.png", text)
    for nth, (seed, batch) in enumerate(((7, (4, 2)), (None, (1, 0)))):
        filled = find("run", "results", nth)(name)
        asked = made.pop()
        assert (asked.seed, asked.batch_position) == (seed, batch)
        assert (asked.prompt, asked.sampling.negative_prompt) == (
            "a red mug",
            "blurred",
        )
        assert asked.model.base == "embedded:tiny-sd"
        same = asked.sampling
        assert (same.steps, same.guidance_scale, same.guidance_rescale) == (3, 2.5, 0.5)
        assert (same.width, same.height, same.scheduler) == (64, 72, "dpm++_karras")
        assert (asked.num_images, asked.adapter, asked.model.clip_skip) == (1, None, None)
        # The fields say it too, and the new image is shown.
        assert filled[0] == "base/embedded:tiny-sd"
        assert {"a red mug", "blurred", -1 if seed is None else seed} <= {
            one["value"] for one in filled if isinstance(one, dict) and "value" in one
            and isinstance(one["value"], (str, int))
        }  # fmt: skip
        assert "made-1.png" in filled[-4:]


def test_what_of_an_image_is_not_here_is_said_and_not_made(
    context: Context, made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    find, toasts = handlers(context), list[str]()
    monkeypatch.setattr(gradio, "Warning", lambda text, **_: toasts.append(text))
    text = (
        "a mug <lora:other:0.4:0.8>\nSteps: 3, Sampler: Euler, Seed: 7, Model: dreamer, ENSD: 5, "
        "Clip skip: 2, Init image hash: 0123456789abcdef0123456789abcdef, Denoising strength: 0.6"
    )
    name = stored(context, "a.png", text)
    *filled, _ = find("run", "results", 0)(name)
    assert made == []
    said = next(one for one in filled if "Not as in the image" in str(one))
    for line in (
        "ENSD: 5",
        "Image to start from",
        "the model dreamer: choose it",
        "Clip skip 2: ",
        "the adapter other is not here any more; choose another",
    ):
        assert f"Not as in the image: {line}" in said.replace("no field here: ", "")
        assert line in toasts[0]
    with gradio.Blocks():
        names = ["choice", *GenerateTab(context).fields]
    values = dict(zip(names, filled, strict=False))
    # Nothing is made with the base instead, and the strength waits for another adapter.
    assert values["choice"]["value"] == GONE
    assert (GONE, GONE) in values["choice"]["choices"]
    assert values["strength"]["value"] == 0.8
    assert (values["denoise"]["value"], values["scheduler"]["value"]) == (0.6, "euler")
    with pytest.raises(gradio.Error, match="does not say how it was made"):
        find("use", "results")(stored(context, "b.png", ""))


def test_an_adapter_s_image_chooses_the_run_and_its_strengths(
    context: Context, tmp_path: Path
) -> None:
    job = ended_run(context.workspace, (4,), 8, code=0)
    (job.folder / records.SETTINGS).write_text(
        "pretrained_model_name_or_path: embedded:tiny-sd\n", encoding="utf-8"
    )
    for folder in (job.folder, job.folder / "checkpoint-4"):
        shutil.copyfile(ADAPTER, folder / "pytorch_lora_weights.safetensors")
    context.jobs(fresh=True)
    tags = f"<lora:{job.id}-checkpoint-4:0.7> <lora:{job.id}:-0.5>"
    known = restore(context, f"a mug {tags}\nSteps: 3, Seed: 7, Direction strength: 0.5, {OWN}")
    assert known.unread == ()
    assert (known.choice, known.form["strength"]) == (f"{job.id}/checkpoint-4", 0.7)
    (second, strength), *_ = MORE.items()
    assert (known.form[second], known.form[strength]) == (job.id, -0.5)
    assert (known.form["direction_strength"], known.form["magnitude_strength"]) == (0.5, 1)
    # The form has no strength of text encoders alone.
    for strengths, lines in (
        (("0.7:0.7", "-0.5"), 0), (("0.35:0.7", "-0.5"), 1), (("0.7:0", "0.7:0"), 1),
    ):  # fmt: skip
        names = (f"{job.id}-checkpoint-4", job.id)
        tags = " ".join(f"<lora:{n}:{s}>" for n, s in zip(names, strengths, strict=True))
        known = restore(context, f"a mug {tags}\nSteps: 3, Seed: 7, {OWN}")
        assert len(known.unread) == lines, strengths
    known = restore(
        context, f"a <lora:{job.id}:1>\nSteps: 3, Strength schedule: 0:1, Detail model: x, {OWN}"
    )
    assert known.unread == (
        "no field here: Strength schedule: 0:1", "no field here: Detail model: x"
    )  # fmt: skip
    # What was trained further since is another adapter.
    text = (
        f'a mug <lora:{job.id}:1>\nSteps: 3, Seed: 7, Lora hashes: "{job.id}: 0123456789ab", {OWN}'
    )
    (line,) = restore(context, text).unread
    assert "trained further" in line
    # One that stands twice is used twice, in order.
    known = restore(context, f"a <lora:{job.id}:0.8> <lora:{job.id}:0.2>\nSteps: 3, {OWN}")
    assert (known.choice, known.form["strength"]) == (job.id, 0.8)
    assert (known.form[second], known.form[strength]) == (job.id, 0.2)
    # One that is gone keeps its place, which no other one takes.
    for names, places in (
        (("gone", job.id), (GONE, job.id)), ((job.id, "gone"), (job.id, GONE)),
    ):  # fmt: skip
        known = restore(context, f"a <lora:{names[0]}:0.4> <lora:{names[1]}:0.2>\nSteps: 3, {OWN}")
        assert (known.choice, known.form[second]) == places
        assert (known.form["strength"], known.form[strength]) == (0.4, 0.2)
        assert ["gone is not here" in line for line in known.unread] == [True]


def test_a_grid_is_of_a_base_with_further_adapters_too(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ended_run(context.workspace, (), 8, code=0)
    shutil.copyfile(ADAPTER, job.folder / "pytorch_lora_weights.safetensors")
    context.jobs(fresh=True)
    grids: list[Any] = []

    def grid(request: Any, axes: list[str], on_step: Any) -> Any:
        grids.append((request, axes))
        raise UserError("enough")

    monkeypatch.setattr(context.generator, "grid", grid)
    with gradio.Blocks():
        tab = generate.GenerateTab(context)
    (second, strength), *_ = MORE.items()
    form = {**UNSET, "prompt": "a {subject}", second: job.id, strength: 0.5}
    values = [form[name] for name in (*tab.fields, "image", "mask_image")]
    axes = ["strength", "0, 1", "prompt", "one {subject}", "", ""]
    with pytest.raises(gradio.Error, match="Enough"):
        handlers(context)("make_grid", "generate")("base/embedded:tiny-sd", *axes, *values)
    ((request, words),) = grids
    assert (request.prompt, words) == ("a mug", ["strength=0, 1", "prompt=one mug"])
    (use,) = request.uses()
    assert (Path(use.path).parent.name, use.strengths.strength) == (job.id, 0.5)


def test_an_image_is_started_from(context: Context, tmp_path: Path) -> None:
    find = handlers(context)
    name = stored(context, "a.png", f"a mug\nSteps: 3, Seed: 7, {OWN}")
    pixels = read_image(context.workspace.images / name)
    *filled, box = find("begin", "results")(name)
    assert box["open"]
    image, _, editor = find("take", "results")(name)
    assert image in filled
    assert "data-tool='paint'" in editor
    assert np.array_equal(read_image(context.workspace.inputs / f"{image}.png"), pixels)
    file = photo(tmp_path / "turned.jpg", (64, 48), exif=Image.Exif())
    uploaded, *_ = find("upload", "results")(str(file))
    assert len([*context.workspace.inputs.iterdir()]) == 2
    assert read_image(context.workspace.inputs / f"{uploaded}.png").shape == (48, 64, 3)
    (tmp_path / "no.jpg").write_bytes(b"text")
    with pytest.raises(gradio.Error, match="not a JPEG"):
        find("upload", "results")(str(tmp_path / "no.jpg"))
    with pytest.raises(gradio.Error, match="No image is shown"):
        find("take", "results")("")
    assert find("drop", "results")()[:2] == ["", ""]


def read_image(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_a_card_shows_its_image_with_its_settings(context: Context) -> None:
    find = handlers(context)
    stored(context, "7.png", "a <mug>\nSteps: 2, Seed: 7, Size: 8x8")
    show = find("show", "generate")
    (context.workspace.images / ".part.png").symlink_to("/etc/passwd")

    def clicked(name: str) -> list[Any]:
        event: Any = SimpleNamespace(what="show", value=name)
        return show(event)

    _, images, settings, shown, names, menu = clicked("7.png")
    assert images["value"] == [(str(context.workspace.images / "7.png"), "seed 7")]
    assert "Steps: 2, Seed: 7" in settings
    assert (shown, names, menu["visible"]) == ("7.png", ["7.png"], True)
    for name in ("../.device.lock", ".part.png", "none.png"):
        with pytest.raises(gradio.Error, match="no longer exists"):
            clicked(name)
    # Not without a yes, which the page's script gives by the name.
    assert find("delete", "results")("") == [gradio.skip()] * 6
    assert (context.workspace.images / "7.png").exists()
    find("delete", "results")("7.png")
    assert not (context.workspace.images / "7.png").exists()


def test_a_pair_is_shown_on_a_slider_with_what_is_left_and_right(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ended_run(context.workspace, (), 8, code=0)
    shutil.copyfile(ADAPTER, job.folder / "pytorch_lora_weights.safetensors")
    context.jobs(fresh=True)

    def compare(request: Any, on_step: Any) -> tuple[GeneratedImage, ...]:
        paths = [context.workspace.images / f"{side}.png" for side in ("left", "right")]
        return tuple(
            GeneratedImage(save_image(Image.new("RGB", (8, 8)), path, path.stem), 7, path.stem)
            for path in paths
        )

    monkeypatch.setattr(context.generator, "compare", compare)
    with gradio.Blocks():
        fields = [*generate.GenerateTab(context).fields, "image", "mask_image"]
    values = [({**UNSET, "prompt": "a {subject}"})[name] for name in fields]
    press = handler(context, "compare", "generate")
    slider, gallery, settings, shown, names, *_ = press(job.id, *values)
    assert [Path(path).name for path in slider["value"]] == ["left.png", "right.png"]
    assert (slider["visible"], gallery["visible"]) == (True, False)
    assert "Left: the base model. Right: with the adapter" in settings
    assert (shown, names) == ("right.png", ["left.png", "right.png"])
    with pytest.raises(gradio.Error, match=r"(?i)choose a run or a checkpoint"):
        press("base/embedded:tiny-sd", *values)


def test_settings_are_loaded_from_an_image_or_it_is_said_why_not(context: Context) -> None:
    load = handler(context, "load", "generate")
    text = f"a mug\nSteps: 3, Seed: 7, {OWN}"
    path = save_image(Image.new("RGB", (8, 8)), context.workspace.images / "a.png", text)
    with gradio.Blocks():
        names = ["choice", *GenerateTab(context).fields]
    filled = dict(zip(names, load(str(path)), strict=False))
    assert [filled[name]["value"] for name in ("seed", "steps", "prompt")] == [7, "3", "a mug"]
    assert load(None) == [gradio.skip()] * len(load(str(path)))
    plain = context.workspace.root / "plain.png"
    Image.new("RGB", (8, 8)).save(plain)
    with pytest.raises(gradio.Error, match="does not say how it was made"):
        load(str(plain))
    assert triggers(context, "load", "generate") == {("load-png", "upload")}


def test_a_merged_model_is_offered_and_asked_for_as_its_run_was(context: Context) -> None:
    job = ended_run(context.workspace, (), 8, code=0)
    (job.folder / records.SETTINGS).write_text(
        "pretrained_model_name_or_path: embedded:tiny-sd\n", encoding="utf-8"
    )
    shutil.copyfile(ADAPTER, job.folder / "pytorch_lora_weights.safetensors")
    made = tasks.start_merge(context.workspace, context.job(job.id), "1")
    merge = context.workspace.root / made
    file = Path(seen(merge).record.output)
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ADAPTER, file)

    def offered() -> list[str]:
        listed = refresh(context, context.jobs(fresh=True), None)["adapter"][0]["choices"]
        return [value for _, value in listed]

    assert f"merged/{merge.name}" not in offered()
    with pytest.raises(UserError, match="this merged model no longer exists"):
        make_request(context, f"merged/{merge.name}", {**UNSET, "prompt": "a mug"})
    write_json(merge / records.RESULT, {"code": 0})
    assert f"merged/{merge.name}" in offered()
    asked = make_request(context, f"merged/{merge.name}", {**UNSET, "prompt": "a mug"})
    assert (asked.model.base, asked.adapter) == (str(file), None)
    assert asked.model.base_model.model_config == "embedded:tiny-sd"
