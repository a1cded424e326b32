"""Answers of a replica: each request its adapter's image, and what is wrong to itself alone."""

from __future__ import annotations

import hashlib
import io
import shutil
from pathlib import Path

import numpy as np
import pydantic
import pytest
import torch
from PIL import Image

from dora_diffusion.cluster.serving.engine import ApiAnswer, ApiRequest, BatchItem, Engine, Refusal
from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter
from dora_diffusion.models.load import load_components
from dora_diffusion.models.text import truncated_text
from dora_diffusion.sampling.generate import BrokenImageError, generate_images
from dora_diffusion.sampling.images import parse_parameters
from dora_diffusion.sampling.load import load_adapted
from dora_diffusion.sampling.pool import AdapterPool
from dora_diffusion.sampling.settings import SamplingSettings


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
        (expected,) = generate_images(alone, request.prompt, [seed], SamplingSettings.of(request))
        assert abs(image(answers[number]) - np.asarray(expected, np.int16)).max() <= 1
    facts = parse_parameters(Image.open(io.BytesIO(answers[2].png)).info["parameters"])
    assert (facts["Seed"], facts["Adapter"], facts["Model"]) == ("3", "cat", "a/base")
    assert facts["Adapter strength"] == "0.5"
    data = files["cat"].read_bytes()[8 + int.from_bytes(files["cat"].read_bytes()[:8], "little") :]
    assert facts["Lora hashes"] == f"cat: {hashlib.sha256(data).hexdigest()[:12]}"
    assert [len(answers[number].notes) for number in (0, 2, 4)] == [0, 1, 1]
    assert "lacks the adapter's trigger word, 'sks cat'" in answers[2].notes[0]
    assert "longer than the model's 77 tokens" in answers[4].notes[0]
    again = engine.answer([asked[2], asked[0]])
    assert again.loads < loads
    assert again.answers[0].png == answers[2].png or abs(
        image(again.answers[0]) - image(answers[2])
    ).max() <= 1  # fmt: skip


def test_what_was_cut_is_counted_by_each_adapter_s_own_words(
    files, sd1_folder, random_adapter, tmp_path, recwarn
):
    """One word of 2 and of 30 vectors, and a base without it: what fits differs in one batch."""
    layers = random_adapter(sd1_folder, components=("unet",), every=9)
    files = {None: None}
    for name, count in (("short", 2), ("long", 30)):
        tokens = {"<toy>": {"text_encoder": torch.randn(count, 32)}}
        adapter = AdapterFile(layers, AdapterMetadata("sd1"), tokens=tokens)
        files[name] = write_adapter(tmp_path / f"{name}.safetensors", adapter, "kohya")
    text = "a <Toy>" + " dog" * 60 + " by the sea"
    engine = Engine(AdapterPool(load_components(sd1_folder)), "base")
    asked = [ask(files, name, 1, text, negative_prompt=f"dog {text}") for name in files]
    cut = {}
    for (request, _, file), answer in zip(asked, engine.answer(asked).answers, strict=True):
        alone, _ = load_adapted(sd1_folder, file, device="cpu")
        texts = {"prompt": request.prompt, "negative prompt": request.negative_prompt}
        ends = {what: truncated_text(alone, text) for what, text in texts.items()}
        assert answer.notes == tuple(
            f"the {what} is longer than the model's 77 tokens; its end was not read: {end}"
            for what, end in ends.items()
            if end
        )
        cut[request.adapter] = [len(end.split()) for end in ends.values()]
    assert cut["long"] == [19, 20]
    assert cut[None] == cut["short"] == [0, 0]
    warned = [str(w.message) for w in recwarn if "the model will not see the end" in str(w.message)]
    assert len(warned) == 2  # of the prompt and the negative prompt, with the long word
    recwarn.clear()
    words = " <toy>" * 30  # 60 tokens with the word, and more of its letters without
    (answer,) = engine.answer([ask(files, "short", 2, f"a{words}", negative_prompt=words)]).answers
    assert truncated_text(engine.pool.components, words)
    assert answer.notes == ()
    assert [str(w.message) for w in recwarn if w.category is UserWarning] == []


def test_a_row_that_breaks_its_batch_and_a_budget_for_one_alone(files, sd1_folder, monkeypatch):
    from dora_diffusion.sampling import pool as module

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
    settings = SamplingSettings.of(request)
    assert (settings.scheduler, settings.guidance_scale, settings.negative_prompt) == (
        "euler", 3, "b",
    )  # fmt: skip
    other = ApiRequest(prompt="c", adapter="x", seed=3, strength=0.1, **{
        name: getattr(request, name) for name in ("scheduler", "guidance_scale", "negative_prompt")
    })  # fmt: skip
    assert other.shared == request.shared
    assert other.model_copy(update={"steps": 3}).shared != request.shared


@pytest.mark.parametrize(
    ("field", "most", "beyond"),
    [("steps", 200, 201), ("guidance_scale", 100, 100.5), ("guidance_rescale", 1, 1.1),
     ("width", 2048, 2056), ("height", 2048, 2056), ("seed", 2**63 - 1, 2**63),
     ("strength", 3, 3.1), ("prompt", "x" * 4000, "x" * 4001),
     ("negative_prompt", "x" * 4000, "x" * 4001)],
)  # fmt: skip
def test_a_server_has_limits(field, most, beyond):
    assert getattr(ApiRequest(**{"prompt": "a", field: most}), field) == most
    with pytest.raises(pydantic.ValidationError, match=field):
        ApiRequest(**{"prompt": "a", field: beyond})


@pytest.mark.parametrize(
    "common", [{"adapter": "dog"}, {"adapter": None}, {"adapter": "dog", "guidance_scale": 1.0}]
)
def test_each_field_of_a_request_acts_or_is_named(files, sd1_folder, common):
    changes = {
        "prompt": "a cat", "adapter": "cat", "strength": 2.0, "seed": 2, "negative_prompt": "dark",
        "steps": 3, "guidance_scale": 3.0, "guidance_rescale": 0.7, "scheduler": "euler",
        "width": 72, "height": 72,
    }  # fmt: skip
    assert changes.keys() == ApiRequest.model_fields.keys()
    engine = Engine(AdapterPool(load_components(sd1_folder)), "base")
    start = {"prompt": "a sks dog", "steps": 2, "width": 64, "height": 64, "seed": 1, **common}

    def answer(values):
        request = ApiRequest(**values)
        return engine.answer([BatchItem(request, request.seed, files.get(request.adapter))])[0][0]

    plain, idle = answer(start), set()
    assert not any("no effect" in note for note in plain.notes)
    for name, value in changes.items():
        changed = answer({**start, name: value})
        named = any(note.startswith(f"{name} has no effect because ") for note in changed.notes)
        pixels = [np.asarray(Image.open(io.BytesIO(one.png))).tobytes() for one in (plain, changed)]
        assert (pixels[0] == pixels[1]) == named, name
        idle |= {name} if named else set()
    guided = common.get("guidance_scale") != 1
    expected = set() if guided else {"negative_prompt", "guidance_rescale"}
    assert idle == expected | (set() if common["adapter"] else {"strength"})


def test_a_model_with_guidance_as_an_input_has_no_negative_prompt():
    request = ApiRequest(prompt="a", negative_prompt="b", guidance_scale=8)
    assert request.without_effect(7.5, guidance_is_input=False) == []
    (note,) = request.without_effect(7.5, guidance_is_input=True)
    assert note.startswith("negative_prompt has no effect because this model was distilled")


@pytest.mark.parametrize("trouble", ["deleted", "cut", "replaced", "locked"])
def test_a_file_that_goes_while_its_batch_is_sampled_matters_to_nobody(
    trouble, files, sd1_folder, tmp_path, monkeypatch
):
    """It is loaded before; the images are those of an undisturbed batch, to the bit."""
    from dora_diffusion.sampling import pool as module

    copies = {name: shutil.copy(files[name], tmp_path / f"{name}.safetensors") for name in files}
    copies = {name: Path(file) for name, file in copies.items()}
    engine = Engine(AdapterPool(load_components(sd1_folder)), "base")
    asked = [ask(copies, name, seed, "a") for seed, name in enumerate(("dog", "cat", None, "cat"))]
    expected = engine.answer(asked).answers
    engine = Engine(AdapterPool(load_components(sd1_folder)), "base")
    generate, opened, calls = module.generate_images, [], []

    def disturbed(*args, **options):
        calls.append(len(args[1]))
        if trouble == "deleted":
            copies["cat"].unlink(missing_ok=True)
        elif trouble == "cut":
            copies["cat"].write_bytes(copies["cat"].read_bytes()[:50])
        elif trouble == "replaced":
            shutil.copy(files["large"], copies["cat"])
        else:
            monkeypatch.setattr(module, "read_metadata", opened.append)
        return generate(*args, **options)

    monkeypatch.setattr(module, "generate_images", disturbed)
    answers = engine.answer(asked).answers
    assert calls == [4]
    assert not opened
    assert [answer.png for answer in answers] == [answer.png for answer in expected]
    assert answers[1].notes == ("the prompt lacks the adapter's trigger word, 'sks cat'",)


def test_a_pinned_adapter_that_was_dropped_is_not_another_file_s(files, sd1_folder, tmp_path):
    file = Path(shutil.copy(files["dog"], tmp_path / "a.safetensors"))
    pool = AdapterPool(load_components(sd1_folder))
    pinned = pool.pin(file)
    assert pool.pin(None) is None
    assert pool.metadata(pinned).trigger == pool.metadata(file).trigger == "sks dog"
    assert pool.components_for(pinned) == pool.components_for(file)
    assert pool.names([pinned, file]) == [*{*pool.names([file])}] * 2
    pool.clear()
    assert pool.names([pinned]) == pool.names([file])
    pool.clear()
    shutil.copy(files["cat"], file)
    with pytest.raises(ValueError, match=r"a\.safetensors was replaced while it was used"):
        pool.names([pinned])


def test_sampling_ends_at_the_step_at_which_nobody_waits_any_longer(files, sd1_folder):
    engine, steps = Engine(AdapterPool(load_components(sd1_folder)), "base"), []

    def is_given_up():
        steps.append(engine.busy_since is not None)
        return len(steps) > 1

    asked = [ask(files, "dog", 1), ask(files, None, 2)]
    answers = engine.answer(asked, is_given_up).answers
    assert all(isinstance(answer, Refusal) for answer in answers)
    # Of two steps one, and none for each by itself.
    assert steps == [True] * 4
    assert engine.busy_since is None
    assert all(isinstance(answer, ApiAnswer) for answer in engine.answer(asked).answers)
