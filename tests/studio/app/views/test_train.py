"""The Train tab's handlers: what they refuse, and what a run is started with."""

from __future__ import annotations

import html
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="gradio is not installed")
import gradio
import yaml
from PIL import Image

from dora_diffusion.config import PRESETS, TrainConfig
from dora_diffusion.config.features.slider import pairs_of
from dora_diffusion.models.memory import Device, needed_memory
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.launch import Launch
from dora_diffusion.studio.app.settings import (
    ADVANCED,
    EMBEDDED,
    PROMPTS,
    preset_values,
    setting_text,
)
from dora_diffusion.studio.app.views import generate, library, run, train
from dora_diffusion.studio.jobs import records
from dora_diffusion.studio.jobs.store import ids_in
from dora_diffusion.studio.jobs.subjects import (
    add_photos,
    keep_words,
    new_subject,
    read_subject,
    save_caption,
)
from tests.studio.app.views.helpers import built_page, handler
from tests.studio.jobs.helpers import photo

GOLDEN = Path(__file__).parents[4] / "tests/formats/golden/0.1.0/diffusers-dora-ranks.safetensors"

# What the preset has filled in, and what the page shows.
FILLED = [
    {name: setting_text(value) for name, value in preset_values("balanced", EMBEDDED).items()},
    *(setting_text(value) for value in preset_values("balanced", EMBEDDED).values()),
]


def fields(subject: str, prompts: str) -> list[Any]:
    """Values as the page sends them: list settings as words."""
    values = preset_values("fast", EMBEDDED)
    shown = [setting_text(values[name]) for name in ADVANCED]
    return [subject, EMBEDDED, "sks", "mug", prompts, *shown]


def test_a_sample_prompt_without_the_token_is_said_to_show_the_class(
    context: Context, subject: str
) -> None:
    asked = fields(subject, "a {subject} --d 3\na photo of a mug at night\na mug --drift")
    # HTML on the page.
    said = html.unescape(handler(context, "plan")(*asked)[0])
    assert "Sample prompt 'a photo of a mug at night' does not contain the token 'sks'" in said
    assert said.count("does not contain the token") == 1
    with pytest.raises(gradio.Error, match="--x is not an option here"):
        handler(context, "start")("", *fields(subject, "a {subject} --x 3"))


def test_a_setting_without_effect_is_said_and_presets_have_none(
    context: Context, subject: str
) -> None:
    def said(model: str, preset: str, **changes: Any) -> str:
        values = {name: setting_text(v) for name, v in preset_values(preset, model).items()}
        token = "<sks>" if preset == "fast-word" else "sks"
        asked = [subject, model, token, "mug", "", *(values | changes).values()]
        return html.unescape(handler(context, "plan")(*asked)[0])

    for model in (EMBEDDED, "stabilityai/stable-diffusion-xl-base-1.0"):
        for preset in PRESETS:
            assert "has no effect" not in said(model, preset)
    assert "new word 'sks', which has no vectors yet" in said(
        EMBEDDED, "fast", train_text_encoder_ti=True, initializer_concept="sks"
    )
    changed = said(EMBEDDED, "fast", keep_tags="3")
    assert "keep_tags has no effect because shuffle_tags is off and tag_dropout is 0.0" in changed


def test_no_number_field_can_be_empty(context: Context) -> None:
    """Gradio's turn into 0 as soon as they are unfolded."""
    blocks = built_page(context).blocks.values()
    numbers = [block for block in blocks if type(block).__name__ == "Number"]
    assert all(block.value is not None for block in numbers)
    labels = {getattr(block, "label", "") for block in numbers}
    assert not labels & set(ADVANCED)


def asked(context: Context, subject: str, model: str, **changes: Any) -> list[Any]:
    values = dict(zip(ADVANCED, fields(subject, "")[5:], strict=True)) | changes
    return [subject, model, "sks", "dog", "", *values.values()]


def test_captions_with_another_token_than_the_field_are_said_before_the_start(
    context: Context, tmp_path: Path
) -> None:
    """Of the subject, and of the others in the same run."""
    made = []
    for title in ("Mug", "Rex"):
        made.append(new_subject(context.workspace, title, title.lower(), f"zw{title[0].lower()}"))
        for number in (0, 1):
            Image.effect_noise((64 + number, 80), 60).convert("RGB").save(tmp_path / "a.png")
            add_photos(context.workspace, made[-1], [tmp_path / "a.png"])
    form = [made[0], EMBEDDED, "zwm", "mug", *asked(context, "", EMBEDDED)[4:]]
    plan, start = (handler(context, name) for name in ("plan", "start"))

    def captions(subject: str, *texts: str) -> None:
        for name, text in zip(("001.jpg", "002.jpg"), texts, strict=True):
            save_caption(context.workspace, subject, name, text)

    for subject, token, others in ((made[0], "zwm", []), (made[1], "zwr", [made[1]])):
        right, wrong = f"a {token} on grass", "a sks on grass"
        said = f"trigger token '{token}' is"
        for texts in ((right, right), (right, ""), ("", "")):
            captions(subject, *texts)
            assert "trigger token" not in html.unescape(plan(*form, others)[0])
        captions(subject, right, wrong)
        cost, command = (html.unescape(text) for text in plan(*form, others))
        assert f"The {said} missing from 1 of 2 captions: '{wrong}'" in cost
        assert "train" in command
        captions(subject, wrong, wrong)
        assert f"The {said} in none of the 2 captions" in html.unescape(plan(*form, others)[0])
        with pytest.raises(gradio.Error, match="in none of the 2 captions"):
            start("", *form, others)
        captions(subject, "", "")
    assert ids_in(context.workspace.root) == []


def test_a_slider_needs_prompts_and_no_subject(context: Context, tmp_path: Path) -> None:
    preset = {k: setting_text(v) for k, v in preset_values("slider", EMBEDDED).items()}
    ends = ["a photo of a large mug\n\n a large mug", "a photo of a small mug\na small mug"]
    prompts = ["a photo of a mug", *ends]
    form = asked(context, "", EMBEDDED, **preset)
    form[4] = "a photo of a {subject} at night\na mug at night"
    for missing, setting in enumerate(("target", "positive", "negative")):
        given = ["" if place == missing else text for place, text in enumerate(prompts)]
        said = handler(context, "plan")(*form, [], *given, "")[0]
        assert f"teach slider has no {setting}" in html.unescape(said)
    cost, command = handler(context, "plan")(*form, [], *prompts, "a teapot")
    assert "24 images" not in cost
    assert "images of the prompts come first" in html.unescape(cost)
    assert "--teach slider" in html.unescape(command)
    handler(context, "start")("", *form, [], *prompts, "a teapot")
    (job_id,) = ids_in(tmp_path / "runs")
    job = context.job(job_id)
    assert job.record.title.startswith("a photo of a mug ")
    config = TrainConfig.from_dict(job.settings)
    assert pairs_of(config) == [
        ("a photo of a mug", ("a photo of a large mug", "a photo of a small mug")),
        ("a photo of a mug", ("a large mug", "a small mug")),
    ]
    assert (config.anchors, config.method) == (["a teapot"], "lora")
    assert config.validation_prompt == ["a mug at night"]
    assert config.instance_data_dir is None
    # Once more: it is the same, which waits already.
    with pytest.raises(gradio.Error, match="the same photos and settings"):
        handler(context, "start")("", *form, [], *prompts, "a teapot")


def test_the_plan_says_what_will_not_fit_and_what_to_change(
    context: Context, subject: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sdxl = "stabilityai/stable-diffusion-xl-base-1.0"

    def said(free: float, **changes: Any) -> str:
        device = Device("cuda", "a card", free)
        monkeypatch.setattr(context, "device", lambda: device)
        return html.unescape(handler(context, "plan")(*asked(context, subject, sdxl, **changes))[0])

    one = {"train_batch_size": "1", "with_prior_preservation": False}
    half = one | {"mixed_precision": "bf16", "gradient_checkpointing": True}
    settings = {"mixed_precision": "bf16", "gradient_checkpointing": True}
    needed = needed_memory("sdxl", 1024, settings, Device("cuda", "a card", 1.0))
    assert needed is not None
    fits, short = said(needed + 1, **half), said(needed - 0.5, **half)
    assert "will not fit" not in fits
    assert "Memory is from runs at full size" in fits
    assert f"{needed:.1f} GiB, {needed + 1:.1f} GiB free" in fits
    assert f"This will not fit: it takes about {needed:.1f} GiB" in short
    assert "Set quantize int8." in short
    assert "Set mixed_precision bf16 and gradient_checkpointing on." in said(
        needed, mixed_precision="no", gradient_checkpointing=False, **one
    )
    five = half | {"train_batch_size": "5", "with_prior_preservation": True}
    assert "Set quantize int8 and train_batch_size 1." in said(needed, **five)


def test_the_plan_announces_class_images(context: Context, subject: str) -> None:
    def said(mode: str) -> str:
        changes = {"with_prior_preservation": True, "prior_preservation_mode": mode}
        values = asked(context, subject, EMBEDDED, **changes)
        return html.unescape(handler(context, "plan")(*values)[0])

    announced = "100 class images come first, in the run's folder, which takes about as long as"
    assert announced in said("images")
    assert "class images" not in said("image-free")
    assert "class images" not in said("")  # the default


def settings_field(context: Context, name: str) -> Any:
    """The field of a setting on the page."""
    fields = [
        one for one in built_page(context).blocks.values() if getattr(one, "label", 0) == name
    ]
    (field,) = fields
    return field


def test_a_field_says_what_the_setting_says(context: Context) -> None:
    alpha = settings_field(context, "lora_alpha")
    assert (alpha.info, alpha.placeholder, alpha.value) == (
        "Alpha of Linear layers.", "default: rank, or “Start from”'s", "",
    )  # fmt: skip
    minutes = settings_field(context, "checkpointing_minutes")
    assert minutes.placeholder == "default: 5.0"
    assert settings_field(context, "cache_latents").value is True
    tracker = settings_field(context, "report_to")
    assert tracker.choices == [("none", ""), ("tensorboard", "tensorboard"), ("wandb", "wandb")]
    assert tracker.value == ""


def typed(subject: str, class_word: str, token: str) -> dict[str, str]:
    return {"subject": subject, "class_word": class_word, "token": token}


def test_class_and_token_stay_with_the_subject(context: Context, subject: str) -> None:
    keep, fill = handler(context, "keep"), handler(context, "fill", nth=0)
    other = new_subject(context.workspace, "Other", "cat")
    keep(subject, " teacup ", "zwx")
    assert fill(subject, {})[:2] == ["teacup", "zwx"]
    # What was typed and not kept yet, for its own subject alone.
    words = typed(subject, "bowl", "zwx")
    assert fill(subject, words) == ["bowl", "zwx", words]
    assert fill(other, words)[:2] == ["cat", "sks"]
    # Of fields that were still empty when it was chosen.
    assert fill(other, typed(other, "", "sks"))[:2] == ["cat", "sks"]
    keep(subject, "", "")  # a style
    assert fill(subject, {})[:2] == ["", ""]
    assert read_subject(context.workspace, subject).title == "Mug"
    keep(None, "dog", "sks")
    for class_word, token in (("x" * 101, "sks"), ("dog", "x" * 51)):
        with pytest.raises(gradio.Error, match="at most"):
            keep(subject, class_word, token)
    # What is in the fields as one is left, and not what another event has made of it by then.
    [fields] = [
        each.inputs
        for each in built_page(context).fns.values()
        if getattr(each.fn, "__name__", "") == "keep"
    ]
    assert [getattr(field, "label", None) for field in fields] == ["Subject", "Class", "Token"]


def test_words_typed_before_there_is_a_subject_are_the_first_one_s(context: Context) -> None:
    fill, words = handler(context, "fill", nth=0), typed("", "dog", "zwx")
    assert fill(None, words)[:2] == ["dog", "zwx"]
    sample = new_subject(context.workspace, "Bolt mug", "mug", sample="bolt_mug")
    assert fill(sample, words)[:2] == ["mug", "sks"]
    first, second = (new_subject(context.workspace, name) for name in ("First", "Second"))
    *shown, now = fill(first, words)
    assert shown == ["dog", "zwx"]
    assert fill(first, {})[:2] == ["dog", "zwx"]
    assert fill(second, now)[:2] == ["", "sks"]


def test_a_setting_that_was_typed_survives_preset_and_base(context: Context) -> None:
    use_preset = handler(context, "use_preset")
    values = preset_values("quality", EMBEDDED)
    before = {n: not v if isinstance(v, bool) else "of a preset" for n, v in values.items()}
    for place, name in enumerate(ADVANCED):
        shown = list(before.values())
        shown[place] = values[name] if isinstance(values[name], bool) else "typed"
        _, *updates = use_preset("quality", EMBEDDED, "", before, *shown)
        changed = {ADVANCED[i] for i, update in enumerate(updates) if update != gradio.skip()}
        assert changed == {*ADVANCED} - {name, "init_adapter"}, name


def test_a_model_that_is_not_there_starts_nothing(context: Context, subject: str) -> None:
    for model, match in (("/no/model", "does not exist"), ("no/body", "HF_HUB_OFFLINE is set")):
        with pytest.raises(gradio.Error, match=match):
            handler(context, "start")("", *asked(context, subject, model))
    assert ids_in(context.workspace.root) == []


def test_a_shared_app_takes_no_folders_and_no_other_vae(
    context: Context, subject: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = Launch(share=True, auth="ann:correct horse", models=("org/vae",))
    monkeypatch.setattr(context, "launch", shared)
    for name, value, match in (
        ("model_config", "/etc", "accepts no folder for model_config"),
        ("class_data_dir", "/etc", "accepts no folder for class_data_dir"),
        ("pretrained_vae_model_name_or_path", "/etc", "offers only"),
        ("report_to", "wandb", "does not report to wandb"),
    ):
        with pytest.raises(gradio.Error, match=match):
            handler(context, "start")("", *asked(context, subject, EMBEDDED, **{name: value}))
    assert [base.name for base in context.bases()] == [
        "embedded:tiny-sd", "embedded:tiny-sdxl", "org/vae",
    ]  # fmt: skip
    allowed = {"pretrained_vae_model_name_or_path": "org/vae"}
    handler(context, "start")("", *asked(context, subject, EMBEDDED, **allowed))
    assert len(ids_in(context.workspace.root)) == 1


def test_a_shared_app_looks_at_no_other_model(
    context: Context, subject: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A visitor must not learn from presets or warnings what lies on the machine."""
    from dora_diffusion.studio.app.views import photo

    sdxl = "stabilityai/stable-diffusion-xl-base-1.0"
    assert photo.preview(context, sdxl, "").side == 1024
    shared = Launch(share=True, auth="ann:correct horse")
    monkeypatch.setattr(context, "launch", shared)
    assert photo.preview(context, sdxl, "").side == 64
    assert photo.preview(context, sdxl, "300").side == 300
    with pytest.raises(gradio.Error, match="offers only"):
        handler(context, "use_preset")("fast", sdxl, "", *FILLED)


def test_several_subjects_are_one_run_each_with_its_own_words(
    context: Context, subject: str, tmp_path: Path
) -> None:
    other = new_subject(context.workspace, "Cat", "cat", "sks")
    add_photos(context.workspace, other, [photo(tmp_path / "b.png")])
    asked = [*fields(subject, "a photo of a {subject} at night"), [other]]
    said = html.unescape(handler(context, "plan")(*asked)[0])
    assert "the token 'sks' denotes a 'mug' and a 'cat'; give each subject its own token" in said
    keep_words(context.workspace, other, "cat", "zwx")
    _, command = handler(context, "plan")(*asked)
    assert "--dataset_config subjects.yaml" in html.unescape(command)
    handler(context, "start")("", *asked)
    (job,) = context.jobs(fresh=True)
    assert job.trigger == "sks mug, zwx cat"
    first, second = job.settings["dataset_config"]
    assert (first["token"], second["class_word"]) == ("sks", "cat")
    assert second["instance_data_dir"] == str(job.folder / "photos-2")
    assert [path.name for path in (job.folder / "photos-2").iterdir()] == ["001.jpg"]
    assert job.settings["validation_prompt"] == [
        "a photo of a sks mug at night", "a photo of a zwx cat at night",
    ]  # fmt: skip
    with pytest.raises(gradio.Error, match="same photos and settings is number 1 in the queue"):
        handler(context, "start")("", *asked)


def test_a_photo_of_two_subjects_is_said_before_the_start(
    context: Context, subject: str, tmp_path: Path
) -> None:
    other = new_subject(context.workspace, "Rex")
    photo(tmp_path / "b.png")
    add_photos(context.workspace, other, [tmp_path / "b.png", tmp_path / "a.png"])
    keep_words(context.workspace, other, "dog", "zwx")
    asked = [*fields(subject, "a photo of a {subject}"), [other]]
    with pytest.raises(gradio.Error, match=r"Rex/002.jpg is the same photo as Mug/001") as wrong:
        handler(context, "start")("", *asked)
    assert "'zwx dog' and 'sks mug'; remove it" in html.unescape(str(wrong.value))
    assert not ids_in(tmp_path / "runs")


def test_a_style_needs_captions_and_no_words(context: Context, subject: str) -> None:
    asked = fields(subject, "a photo of a {subject}\na castle")
    asked[2] = asked[3] = ""
    assert "but a caption for every image" in handler(context, "plan")(*asked)[0]
    save_caption(context.workspace, subject, "001.jpg", "a mug")
    handler(context, "start")("", *asked)
    (job,) = context.jobs(fresh=True)
    words = [job.settings[name] for name in ("token", "class_word", "instance_prompt")]
    assert words == ["", None, None]
    assert job.settings["validation_prompt"] == ["a castle"]


def test_a_run_of_the_library_is_started_from_with_its_base_model_and_layers(
    context: Context, subject: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler(context, "start")("first", *asked(context, subject, EMBEDDED, rank="5"))
    (job_id,) = ids_in(context.workspace.root)
    folder = context.workspace.root / job_id
    shutil.copy(GOLDEN, folder / "pytorch_lora_weights.safetensors")
    records.write_result(folder, records.JobResult(0))
    shown = train.refresh(context, context.jobs(fresh=True))["start"][0]["choices"]
    assert [value for _, value in shown] == ["", job_id]
    filled, model, *values = handler(context, "use_start")(job_id, {"rank": "8"})
    assert (filled, model) == ({"rank": "8", "init_adapter": job_id}, EMBEDDED)
    assert values[train._OF_ADAPTER.index("rank")]["value"] == "5"
    assert handler(context, "use_start")("", filled)[2] == gradio.skip()
    for launch in (context.launch, Launch(share=True, auth="ann:correct horse")):
        monkeypatch.setattr(context, "launch", launch)
        changes = {"init_adapter": job_id, "seed": str(len(ids_in(context.workspace.root)))}
        handler(context, "start")("next", *asked(context, subject, EMBEDDED, **changes))
        newest = context.workspace.root / max(ids_in(context.workspace.root))
        settings = yaml.safe_load((newest / records.SETTINGS).read_text(encoding="utf-8"))
        assert Path(settings["init_adapter"]).parent == folder
    other = asked(context, subject, EMBEDDED, init_adapter=str(tmp_path / "x.safetensors"))
    with pytest.raises(gradio.Error, match="accepts no folder for “Start from”"):
        handler(context, "start")("", *other)


def test_an_empty_start_is_refused_in_plain_words(context: Context) -> None:
    """The page before there is anything, and what the clock sends to it."""
    parts = {part.elem_id: part for part in built_page(context).blocks.values()}

    def is_hidden(part: Any) -> bool:
        return part is not None and (not part.visible or is_hidden(part.parent))

    assert "No subject yet" in parts["cost"].value
    assert "Nothing trained yet" in parts["status"].value
    assert "The library is empty" in parts["library-facts"].value
    assert is_hidden(parts["convert"])
    assert not is_hidden(parts["library-facts"])
    with pytest.raises(gradio.Error, match="add photos in the Subject tab"):
        handler(context, "start")("", *asked(context, "", EMBEDDED))
    assert "Choose a subject" in run.refresh(context, (), None)["status"]
    assert "No images yet" in generate.refresh(context, (), None)["history"]
    assert "Generate images" in generate.refresh(context, (), None)["history"]
    assert library.refresh((), None)["library_side"][0] == {"visible": False}
    assert "Start one in the Train tab" in handler(context, "show", "library")(None)


FOREIGN = Path(__file__).parents[4] / "tests/config/foreign"
# The fields that a file fills in, in the order of the page's updates.
LOADED = [
    "pretrained_model_name_or_path", "token", "class_word", "validation_prompt", *PROMPTS,
    *dict.fromkeys(("init_adapter", *ADVANCED)),
]  # fmt: skip


def loaded(context: Context, file: Path) -> tuple[str, dict[str, Any]]:
    """Message about an uploaded file, and the fields that it fills in."""
    message, *updates = handler(context, "load_settings")(str(file))
    fields = zip(LOADED, updates, strict=True)
    return html.unescape(message), {n: one["value"] for n, one in fields if "value" in one}


def test_an_uploaded_file_of_a_run_fills_in_the_form(context: Context, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    text = "preset: pet\nrank: 4\ntoken: zwx\noutput_dir: x\nvalidation_prompt: [a, b]\n"
    file.write_text(text, encoding="utf-8")
    message, filled = loaded(context, file)
    assert filled == {"rank": "4", "token": "zwx", "validation_prompt": "a\nb"}
    note = "config.yaml is a file of settings: 3 settings filled in; not in this form: output_dir<"
    assert note in message
    for text, error in (
        ("rnak: 4", "There is no setting rnak (did you mean rank?)"),
        ("rank: [4", "config.yaml, line 2: this is not valid YAML"),
    ):
        file.write_text(f"{text}\n", encoding="utf-8")
        with pytest.raises(gradio.Error, match=re.escape(error)):
            loaded(context, file)


def test_a_shared_app_does_not_fill_in_another_base_model(tmp_path: Path) -> None:
    shared = Context(Launch(runs_dir=tmp_path, share=True, auth="ann:correct horse"))
    message, filled = loaded(shared, FOREIGN / "diffusers_z_image.sh")
    assert "pretrained_model_name_or_path" not in filled
    left = "hub_model_id, instance_data_dir, instance_prompt, “Base model”, push_to_hub"
    assert f"; not in this form: {left}<" in message
