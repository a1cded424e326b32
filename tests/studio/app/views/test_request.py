"""The Generate tab's fields as a request."""

from __future__ import annotations

import base64
import io
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gradio", reason="gradio is not installed")
import gradio as gr
from PIL import Image

from dora_diffusion.cli.commands.generate import GenerateSettings
from dora_diffusion.config.images import DENOISE
from dora_diffusion.config.schedulers import A1111_NAMES, SCHEDULERS
from dora_diffusion.numerics.weights import MergeStrengths
from dora_diffusion.sampling.images import painted_fields, parse_parameters
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.views.generate import GenerateTab
from dora_diffusion.studio.app.views.request import adapter_choices
from dora_diffusion.studio.jobs import records
from dora_diffusion.studio.jobs.image_generator import GenerationRequest, ImageGenerator
from dora_diffusion.studio.jobs.image_store import keep_input
from dora_diffusion.studio.jobs.snapshot import choose
from dora_diffusion.studio.jobs.store import UserError, Workspace
from tests.flux2_klein import write_flux2_klein
from tests.studio.jobs.helpers import ended_run

OWN = "Model: embedded:tiny-sd, Version: dora_diffusion 0.1.0"
ADAPTER = Path(__file__).parents[3] / "formats/golden/0.1.0/diffusers-dora-ranks.safetensors"


@pytest.mark.parametrize(
    ("is_distilled", "steps", "guidance"), [(False, "50", "4"), (True, "4", "1")]
)
def test_empty_steps_and_guidance_are_the_model_s(
    is_distilled: bool, steps: str, guidance: str, tmp_path: Path
) -> None:
    folder = write_flux2_klein(tmp_path / "model", is_distilled=is_distilled)
    request = _asked(str(folder), steps="", guidance_scale="")
    (image,) = ImageGenerator(Workspace(tmp_path / "runs").make()).make(request)
    fields = parse_parameters(image.parameters)
    assert (fields["Steps"], fields["CFG scale"]) == (steps, guidance)
    assert image.notes == ()


def test_no_image_waits_for_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(name: str, **options: Any) -> str:
        assert options["local_files_only"]
        raise FileNotFoundError(name)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(UserError, match=r"org/model is not on this machine.*hf download org/m"):
        _asked("org/model")


@pytest.fixture
def run(context: Context) -> SimpleNamespace:
    """A run with a result and a checkpoint of the embedded model, and requests of its fields."""
    job = ended_run(context.workspace, (4,), 8, code=0)
    (job.folder / records.SETTINGS).write_text(
        "pretrained_model_name_or_path: embedded:tiny-sd\ntoken: sks\nclass_word: mug\n",
        encoding="utf-8",
    )
    for folder in (job.folder, job.folder / "checkpoint-4"):
        shutil.copyfile(ADAPTER, folder / "pytorch_lora_weights.safetensors")
    from dora_diffusion.studio.app.views.request import UNSET, make_request

    plain = {**UNSET, "prompt": "a {subject}", "seed": 1, "steps": 4}

    def asked(**changes: object) -> GenerationRequest:
        return make_request(context, job.id, {**plain, **changes})

    return SimpleNamespace(id=job.id, folder=job.folder, asked=asked, context=context)


def test_every_setting_of_generate_has_a_field_or_is_not_the_page_s() -> None:
    from dora_diffusion.studio.app.views.request import FORM, MORE, UNSET

    # Of the file, the model and the machine, which are a run's and the app's own; and files of many
    # adapters, which are the command line's.
    others = {
        "adapter", "adapters_file", "base", "variant", "revision", "dtype", "model_config",
        "compile", "quantize", "quantize_convolutions", "vae_tile_size", "prediction_type",
        "zero_terminal_snr", "distilled", "alpha", "output", "overwrite", "repeat", "offload",
        "batch_size", "grid", "grid_limit",
    }  # fmt: skip
    settings = {setting.name: setting for setting in GenerateSettings.settings()}
    further = {*MORE, *MORE.values()}
    assert {*FORM} - further | others == {*settings}
    assert not {*FORM} & others
    for name in (
        "guidance_rescale", "strength",
    ):  # fmt: skip
        assert UNSET[name] == settings[name].default
    assert UNSET["denoise"] == DENOISE
    with gr.Blocks():
        tab = GenerateTab(SimpleNamespace())
    assert {*tab.fields} == {*FORM} - {"image", "mask_image"}
    labels = {name: field.label for name, field in tab.fields.items()}
    assert labels == {name: FORM[name].label for name in labels}
    # Schedulers by the names that users of A1111 know, none of them twice.
    (_, *titles) = tab.fields["scheduler"].choices
    assert [name for _, name in titles] == [*SCHEDULERS]
    assert [A1111_NAMES[title.lower()] for title, _ in titles] == [*SCHEDULERS]


def strengths_of(asked: GenerationRequest) -> Any:
    return asked.uses()[0].strengths


# A value of each field that is not the default -> what of the request is then another.
CHANGED: dict[str, tuple[object, Any]] = {
    "prompt": ("a dog", lambda asked: asked.prompt == "a dog"),
    "negative_prompt": ("blurred", lambda asked: asked.sampling.negative_prompt == "blurred"),
    "seed": (7, lambda asked: asked.seed == 7),
    "num_images": (3, lambda asked: asked.num_images == 3),
    "strength": (0.5, lambda asked: strengths_of(asked).strength == 0.5),
    "direction_strength": (0.5, lambda asked: strengths_of(asked).direction_strength == 0.5),
    "magnitude_strength": (0.5, lambda asked: strengths_of(asked).magnitude_strength == 0.5),
    "steps": (9, lambda asked: asked.sampling.steps == 9),
    "scheduler": ("euler", lambda asked: asked.sampling.scheduler == "euler"),
    "guidance_scale": ("3", lambda asked: asked.sampling.guidance_scale == 3),
    "guidance_rescale": (0.7, lambda asked: asked.sampling.guidance_rescale == 0.7),
    "width": ("72", lambda asked: asked.sampling.width == 72),
    "height": ("80", lambda asked: asked.sampling.height == 80),
    "max_token_length": ("150", lambda asked: asked.model.max_token_length == 150),
    "clip_skip": ("1", lambda asked: asked.model.clip_skip == 1),
}  # fmt: skip


def test_no_field_is_ignored(run: SimpleNamespace) -> None:
    from dora_diffusion.studio.app.views.request import FORM, MORE

    others = {*MORE, *MORE.values()}
    assert {*CHANGED} == {*FORM} - {"image", "mask_image", "denoise"} - others
    usual = run.asked()
    for name, (value, is_there) in CHANGED.items():
        assert is_there(run.asked(**{name: value})), name
        assert not is_there(usual), name
    second, third, _ = MORE
    several = run.asked(
        **{second: f"{run.id}/checkpoint-4", MORE[second]: -0.5}, strength=0.7,
        direction_strength=0.9,
    )  # fmt: skip
    uses = several.uses()
    assert [Path(use.path).parent.name for use in uses] == [run.id, "checkpoint-4"]
    assert [use.strengths for use in uses] == [
        MergeStrengths(1.0, 0.9, 1.0, share, share) for share in (0.7, -0.5)
    ]
    with pytest.raises(UserError, match="Third adapter: this run no longer exists; choose another"):
        run.asked(**{third: "20260101-000000-abcdef"})
    with pytest.raises(UserError, match="the same adapter is chosen twice"):
        run.asked(**{third: run.id})


def test_what_is_out_of_sight_and_changes_the_images_is_said(run: SimpleNamespace) -> None:
    from dora_diffusion.studio.app.views.request import FORM, MORE, UNSET, acting

    with gr.Blocks() as page:
        tab = GenerateTab(run.context)
    folded = {
        name for name, field in tab.fields.items()
        if any(isinstance(parent, gr.Accordion) and not parent.open for parent in _above(field))
    }  # fmt: skip
    visible = {name for name, field in FORM.items() if field.is_visible}
    assert folded == {*tab.fields} - visible
    assert len(page.blocks) > len(folded) > 10

    def said(**changes: object) -> list[str]:
        return acting(run.context, {**UNSET, "prompt": "a {subject}", "seed": 1, **changes})

    second, strength = next(iter(MORE.items()))
    other = f"{run.id}/checkpoint-4"
    changed = {name: value for name, (value, _) in CHANGED.items()} | {
        "image": "0" * 32, "mask_image": "1" * 32, "denoise": 0.5, second: other,
        **dict.fromkeys(MORE.values(), 0.5),
        **dict.fromkeys([*MORE][1:], run.id),
    }  # fmt: skip
    # Each has a line with its label, and those that are in sight have none.
    assert {*changed} == {*UNSET}
    assert said() == said(**{name: changed[name] for name in visible}) == []
    lines = said(**changed)
    assert len(lines) == len({*UNSET} - visible) == len({*lines})
    labels = [field.label for field in (*FORM.values(), *tab.fields.values())]
    heads = {re.split(r":| [(]", line)[0] for line in lines}
    assert heads <= {re.split(r":| [(]", label)[0] for label in labels}
    # Alone, unless they do something to another one only; whoever empties a field sends nothing.
    for name in {*UNSET} - visible:
        is_detail = name in {"denoise", "mask_image", *MORE.values()}
        assert len(said(**{name: changed[name]})) == (not is_detail), name
        assert said(**{name: None}) == []
    assert said(scheduler="dpm++_karras") == ["Scheduler: DPM++ 2M Karras"]
    label = next(text for text, value in adapter_choices(run.context.jobs()) if value == other)
    assert said(**{second: other, strength: -0.5}) == [
        f"Second adapter: {label}", "Second strength: -0.5"
    ]  # fmt: skip
    assert said(**{second: "gone"}) == ["Second adapter: gone"]


def _above(field: Any) -> list[Any]:
    parents = [field]
    while parents[-1].parent is not None:
        parents.append(parents[-1].parent)
    return parents


def test_a_result_and_the_checkpoint_of_its_step_are_told_apart(context: Context) -> None:
    job = ended_run(context.workspace, (4, 8), 8, code=0)
    shutil.copyfile(ADAPTER, job.folder / "pytorch_lora_weights.safetensors")

    def listed() -> list[str]:
        return [label for label, _ in adapter_choices(context.jobs(fresh=True))]

    name = context.jobs(fresh=True)[0].label
    ends = ["step 8, the result", "step 8", "step 4"]
    assert listed() == [f"{name} · {end}" for end in ends]
    choose(context.job(job.id), "checkpoint-4")
    ends = ["step 4, chosen", "step 8, the result", "step 8"]
    assert listed() == [f"{name} · {end}" for end in ends]
    choose(context.job(job.id), "result")
    assert listed()[0] == f"{name} · step 8, the result, chosen"


def painted(size: tuple[int, int] = (32, 24)) -> str:
    """A mask whose left half is painted, as the page sends it."""
    mask = Image.new("RGBA", size)
    mask.paste("#e35d2b", (0, 0, size[0] // 2, size[1]))
    data = io.BytesIO()
    mask.save(data, format="PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def test_an_image_to_start_from_is_kept_with_its_mask(run: SimpleNamespace) -> None:
    source = Image.effect_noise((64, 48), 60).convert("RGB")
    name = keep_input(run.context.workspace, source)
    over = run.asked(image=name, denoise=0.6).sampling
    assert (over.image.tobytes(), over.mask_image, over.denoise) == (source.tobytes(), None, 0.6)
    assert run.asked(denoise=0.6).sampling.denoise is None  # of nothing
    into = run.asked(image=name, mask_image=painted()).sampling
    half = Image.new("L", (64, 48))
    half.paste(255, (0, 0, 32, 48))
    mask = np.asarray(into.mask_image.convert("L"), int)
    assert np.abs(mask - np.asarray(half)).max(0).nonzero()[0].size <= 4
    assert {*np.unique(mask)} == {0, 255}
    # As the file of an image states them.
    again = run.asked(image=name, mask_image=painted_fields(into)["Mask image hash"]).sampling
    assert painted_fields(again) == painted_fields(into)
    empty = Image.new("RGBA", (8, 8))
    empty.save(data := io.BytesIO(), format="PNG")
    nothing = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    assert run.asked(image=name, mask_image=nothing).sampling.mask_image is None
    for gone in ("0" * 32, "../../etc/passwd", "x"):
        with pytest.raises(UserError, match="no longer here; choose it again"):
            run.asked(image=gone)
    with pytest.raises(UserError, match="mask could not be read"):
        run.asked(image=name, mask_image="data:image/png;base64,AAAA")
    with pytest.raises(UserError, match=r"the prompt holds <lora:\.\.\.>"):
        run.asked(prompt="a mug <lora:mug:1>")


def _context(**parts: Any) -> Any:
    workspace = Workspace(Path("runs"))
    return SimpleNamespace(allowed_model=lambda name: name, workspace=workspace, **parts)


def _asked(model: str = "embedded:tiny-sd", **changes: object) -> Any:
    pytest.importorskip("gradio", reason="gradio is not installed")
    from dora_diffusion.studio.app.views.request import BASE, UNSET, make_request

    form = {**UNSET, "prompt": "a mug", "seed": 1, "steps": 2, "guidance_scale": 2}
    return make_request(_context(), f"{BASE}/{model}", {**form, **changes})


def test_how_prompts_are_read_is_the_run_s_unless_asked_for() -> None:
    asked = _asked(max_token_length=" 150 ", clip_skip="1")
    assert (asked.model.max_token_length, asked.model.clip_skip) == (150, 1)
    plain = _asked(max_token_length="", clip_skip=None)
    assert (plain.model.max_token_length, plain.model.clip_skip) == (None, None)
    with pytest.raises(UserError, match="“Clip skip, as Diffusers counts” is -1; it must not be"):
        _asked(clip_skip="-1")


def test_a_prompt_that_holds_an_image_s_text_is_refused() -> None:
    pytest.importorskip("gradio", reason="gradio is not installed")
    from dora_diffusion.studio.app.views.request import FORM

    for name in ("prompt", "negative_prompt"):
        for line in ("Steps: 12, Seed: 7", "Negative prompt: blurred"):
            with pytest.raises(UserError) as caught:
                _asked(**{name: f"a mug\n {line}\nmore"})
            assert str(caught.value) == (
                f"the {FORM[name].label.lower()} holds the settings of an image ('{line}'); load "
                "them by “Load settings from an image”, or paste its first line alone"
            )
    assert _asked(prompt="a mug\nSteps: of stone").prompt == "a mug Steps: of stone"
