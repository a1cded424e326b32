"""What a replica answers: each request its adapter's image, and what is wrong to itself alone."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter
from dora_diffusion.generate import BrokenImageError, generate_images, load_adapted
from dora_diffusion.images import parse_parameters
from dora_diffusion.models.load import load_components
from dora_diffusion.pool import AdapterPool
from dora_diffusion.serving.engine import BatchItem, Engine
from dora_diffusion.serving.request import ApiAnswer, ApiRequest, Refusal


@pytest.fixture(scope="module")
def files(sd1_folder, sdxl_folder, random_adapter, tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("served"), {}
    for name, base, family in (
        ("dog", sd1_folder, "sd1"), ("cat", sd1_folder, "sd1"), ("large", sdxl_folder, "sdxl"),
    ):  # fmt: skip
        layers = random_adapter(base, seed=len(made), components=("unet",), every=7)
        adapter = AdapterFile(layers, AdapterMetadata(family, trigger=f"sks {name}"))
        made[name] = write_adapter(folder / f"{name}.safetensors", adapter)
    return made


def ask(files, adapter, seed, prompt="a photo of a sks dog", **changes):
    request = ApiRequest(prompt=prompt, adapter=adapter, steps=2, width=64, height=64, **changes)
    return BatchItem(request, seed, files.get(adapter))


def image(answer):
    assert isinstance(answer, ApiAnswer), answer
    return np.asarray(Image.open(io.BytesIO(answer.png)), np.int16)


def test_each_answer_is_its_adapter_s_and_a_wrong_one_is_one_line(files, sd1_folder, tmp_path):
    files = {**files, "torn": tmp_path / "torn.safetensors", "gone": tmp_path / "gone"}
    files["torn"].write_bytes(b"torn")
    engine = Engine(AdapterPool(load_components(sd1_folder)), "a/base")
    asked = [
        ask(files, "dog", 1), ask(files, "large", 2), ask(files, "cat", 3, "a cat", strength=0.5),
        ask(files, "torn", 4), ask(files, None, 5, "x " * 99), ask(files, "gone", 6),
    ]  # fmt: skip
    answers, loads = engine.answer(asked)
    refused = [answers[number] for number in (1, 3, 5)]
    assert all(isinstance(refusal, Refusal) and refusal.status == 422 for refusal in refused)
    assert "Stable Diffusion XL" in refused[0].line
    assert "torn.safetensors" in refused[1].line
    assert not any("\n" in refusal.line for refusal in refused)
    assert not any(str(tmp_path) in refusal.line for refusal in refused)  # The server's own.
    for number in (0, 2, 4):
        request, seed, file = asked[number]
        alone, _ = load_adapted(sd1_folder, file, strength=request.strength, device="cpu")
        (expected,) = generate_images(alone, request.prompt, [seed], request.settings())
        assert abs(image(answers[number]) - np.asarray(expected, np.int16)).max() <= 1
    facts = parse_parameters(Image.open(io.BytesIO(answers[2].png)).info["parameters"])
    assert (facts["Seed"], facts["Adapter"], facts["Model"]) == ("3", "cat", "a/base")
    assert facts["Adapter strength"] == "0.5"
    assert [len(answers[number].notes) for number in (0, 2, 4)] == [0, 1, 1]
    assert "lacks the adapter's trigger word, 'sks cat'" in answers[2].notes[0]
    assert "longer than the model's 77 tokens" in answers[4].notes[0]
    again = engine.answer([asked[2], asked[0]])
    assert again.loads < loads
    assert again.answers[0].png == answers[2].png or abs(
        image(again.answers[0]) - image(answers[2])
    ).max() <= 1  # fmt: skip


def test_a_row_that_breaks_its_batch_and_a_budget_for_one_alone(files, sd1_folder, monkeypatch):
    from dora_diffusion import pool as module

    engine = Engine(AdapterPool(load_components(sd1_folder)), "base")
    generate, batches = module.generate_images, []

    def breaking(components, prompts, *more, **options):
        batches.append(len(prompts))
        if "black" in " ".join(prompts):
            raise BrokenImageError("the image of seed 2 is black all over")
        if "defect" in " ".join(prompts):
            raise KeyError("a defect")
        return generate(components, prompts, *more, **options)

    monkeypatch.setattr(module, "generate_images", breaking)
    asked = [ask(files, "dog", 1), ask(files, "cat", 2, "black"), ask(files, "cat", 3, "defect")]
    good, black, defect = engine.answer(asked).answers
    assert batches == [3, 1, 1, 1]
    assert image(good).shape == (64, 64, 3)
    assert (black.status, black.line) == (422, "the image of seed 2 is black all over")
    assert defect.status == 500
    assert "KeyError" in defect.line
    assert "a defect" not in defect.line  # for whoever sees the server's log
    # Both do not fit together: then one after the other.
    engine.pool.budget = engine.pool.size - 1
    answers = engine.answer([ask(files, "dog", 1), ask(files, "cat", 2)]).answers
    assert all(isinstance(answer, ApiAnswer) for answer in answers)
    assert engine.answer([]).answers == []


def test_the_settings_of_a_request_are_those_of_sampling(sd1_folder):
    request = ApiRequest(prompt="a", scheduler="euler", guidance_scale=3, negative_prompt="b")
    settings = request.settings()
    assert (settings.scheduler, settings.guidance_scale, settings.negative_prompt) == (
        "euler", 3, "b",
    )  # fmt: skip
    other = ApiRequest(prompt="c", adapter="x", seed=3, strength=0.1, **{
        name: getattr(request, name) for name in ("scheduler", "guidance_scale", "negative_prompt")
    })  # fmt: skip
    assert other.shared() == request.shared()
    assert other.model_copy(update={"steps": 3}).shared() != request.shared()
