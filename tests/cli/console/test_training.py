"""A run's events as lines and bars of a terminal."""

from __future__ import annotations

import ast
import shlex
from pathlib import Path
from typing import Any

import pytest

from dora_diffusion.cli.console.output import telling
from dora_diffusion.cli.console.training import TrainProgress, next_steps
from dora_diffusion.cli.main import build_parser, read_settings
from dora_diffusion.config import TrainConfig
from dora_diffusion.training.events import (
    CheckpointSaved,
    ClassImagesProgress,
    Event,
    ModelLoading,
    SampleSaved,
    StepDone,
    SubjectLeft,
    TrainingEnded,
    TrainingStarted,
    Validated,
)


def started(**changes: Any) -> TrainingStarted:
    values: dict[str, Any] = {
        "step": 0, "total_steps": 9, "resumed_from": None, "steps_dropped": 0, "photos": 5,
        "resolutions": (64,), "family": "Stable Diffusion 1", "device": "cpu", "adapter": "DoRA",
        "schedule": "v-prediction", "trigger": "sks mug", "changed": {}, "unused": {},
    }  # fmt: skip
    return TrainingStarted(**values | changes)


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]):
    """Shows events; gives the lines of stdout, and what the bars wrote."""

    def run(*events: Event) -> tuple[list[str], str]:
        progress = TrainProgress()
        for event in events:
            progress(event)
        progress.close()
        captured = capsys.readouterr()
        return captured.out.splitlines(), captured.err

    return run


def test_what_is_trained_and_on_what_is_said_first(show) -> None:
    lines, bar = show(ModelLoading("org/model", "cpu", "no"), started(), StepDone(1, 9, 0.25, {}))
    assert lines == [
        "training org/model on cpu in float32",
        "Stable Diffusion 1 on cpu: 5 photos at 64 px, DoRA; v-prediction",
    ]
    assert "1/9" in bar
    assert "loss=0.2500" in bar


def test_a_job_is_told_of_phases_and_where_it_began(show) -> None:
    told: list[dict[str, Any]] = []
    with telling(lambda **figures: told.append(figures)):
        loading, begun = ModelLoading("org/model", "cpu", "no"), started(step=7)
        steps = (StepDone(8, 9, 0.2, {}), StepDone(9, 9, 0.2, {}))
        show(loading, ClassImagesProgress(1, 4), begun, *steps)
    assert told[0]["phase"] == "loading the model"
    assert told[0]["device_name"]
    assert told[1:] == [
        {"phase": "class images: 1 of 4"},
        {"phase": "training", "first_step": 7, "total_steps": 9, "trigger": "sks mug"},
        {"phase": "saving and sampling"},
    ]


def test_a_pack_has_one_bar_of_all_steps_and_lines_with_names(
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress, told = TrainProgress(), list[dict[str, Any]]()
    with telling(lambda **figures: told.append(figures)):
        for name, first, total in (("mug", 2, 9), ("cat", 0, 5)):
            progress(started(step=first, total_steps=total), name)
        progress(StepDone(3, 9, 0.2, {}), "mug")
        progress(StepDone(1, 5, 0.2, {}), "cat")
        progress(SubjectLeft("no photos"), "cat")
        progress.close()
    assert told[-2:] == [
        {"phase": "training", "done": 3, "total": 14}, {"phase": "training", "done": 4, "total": 14}
    ]  # fmt: skip
    assert progress.triggers == {"mug": "sks mug", "cat": "sks mug"}
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "mug: 5 photos at 64 px, DoRA", "cat: 5 photos at 64 px, DoRA",
        "cat has left the pack: no photos",
    ]  # fmt: skip
    assert "4/14" in captured.err


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"step": 4, "resumed_from": "checkpoint-4"}, "resuming from checkpoint-4, at step 4 of 9"),
        ({"step": 4, "resumed_from": "checkpoint-4", "steps_dropped": 2},
         "resuming from checkpoint-4, at step 4 of 9; steps 5 to 6 are repeated"),
        ({"step": 9, "resumed_from": "checkpoint-9"},
         "resuming from checkpoint-9, at step 9 of 9; nothing is left to train"),
        ({"step": 4, "changed": {"rank": (8, 16), "use_dora": (True, False)}},
         "changed from step 5 on: rank (8 -> 16), use_dora (on -> off)"),
        ({"step": 9, "unused": {"learning_rate": (1e-4, None)}},
         "without effect, since no step is left: learning_rate (0.0001 -> not set)"),
    ],
)  # fmt: skip
def test_a_resumed_run_says_where_it_is_and_what_changed(
    changes: dict[str, Any], line: str, show
) -> None:
    lines, bar = show(started(**changes))
    assert lines[1:] == [line]
    assert f"{changes['step']}/9" in bar


def test_what_is_written_is_named_and_class_images_are_counted(show) -> None:
    lines, bar = show(
        ClassImagesProgress(2, 6), ClassImagesProgress(6, 6), started(),
        SampleSaved("step-3", Path("out/step-3.png")), CheckpointSaved(3, Path("out/checkpoint-3")),
        CheckpointSaved(4, Path("out/checkpoint-4"), ("checkpoint-1", "checkpoint-2")),
    )  # fmt: skip
    assert lines[1:] == [
        "sample: out/step-3.png", "checkpoint: out/checkpoint-3",
        "checkpoint: out/checkpoint-4; removed checkpoint-1, checkpoint-2",
    ]  # fmt: skip
    assert "class images" in bar
    assert "6/6" in bar


ADAPTER = "pytorch_lora_weights.safetensors"


def next_of(file: str, **settings: Any) -> dict[str, list[str]]:
    """The next steps of a run, as words of a shell, without what is said behind a command."""
    config = TrainConfig(
        pretrained_model_name_or_path="my models/base", instance_prompt="a photo of Ann's sks dog",
        **settings,
    )  # fmt: skip
    lines = next_steps(config, Path("my dogs", file))
    named = dict(line.split(":", 1) for line in lines)
    return {name: shlex.split(text, comments=True) for name, text in named.items()}


@pytest.mark.parametrize(
    ("file", "settings", "to"),
    [
        (ADAPTER, {"variant": "fp16"}, ["convert", "comfyui"]),
        (ADAPTER, {"method": "lora", "distilled": True}, ["convert", "comfyui"]),
        (ADAPTER, {"distilled": False}, ["convert", "comfyui"]),
        ("dora_kohya.safetensors", {"norm_axis": "input"}, ["convert", "comfyui"]),
        ("model", {"method": "full"}, ["export"]),
    ],
)
def test_the_next_steps_are_commands_that_the_parser_takes(
    file: str, settings: dict[str, Any], to: list[str]
) -> None:
    steps = next_of(file, **settings)

    def read(words: list[str]) -> Any:
        return read_settings(build_parser().parse_args(words))

    assert list(steps) == ["images", "ComfyUI", "Diffusers"]
    image = read(steps["images"][1:]).flat
    assert (image.prompt, image.output) == ("a photo of Ann's sks dog", "my dogs.png")
    trained = (image.base, image.adapter)
    whole = ("my dogs", None)
    assert trained == (whole if file == "model" else ("my models/base", ["my dogs"]))
    assert image.variant == settings.get("variant")
    assert image.distilled == settings.get("distilled")
    if file == "dora_kohya.safetensors":
        assert read(steps["Diffusers"][1:]).output == "my dogs-merged"
    comfyui = steps["ComfyUI"]
    assert (comfyui[0], comfyui[1]) == ("dora-diffusion", to[0])
    assert "my dogs.safetensors" in comfyui
    if "variant" not in settings:
        args = read(comfyui[1:])
        assert getattr(args, "to", None) == (to[1] if len(to) > 1 else None)


def test_the_line_for_diffusers_is_python_with_the_path_quoted() -> None:
    config = TrainConfig(instance_prompt="a sks dog")
    line = next_steps(config, Path("my dog's", ADAPTER))[-1].partition(":")[2]
    call = ast.parse(line.strip(), mode="eval").body
    assert isinstance(call, ast.Call)
    assert ast.literal_eval(call.args[0]) == "my dog's"
    assert {k.arg: ast.literal_eval(k.value) for k in call.keywords} == {"weight_name": ADAPTER}
    assert "pip install peft" in line


def test_the_validation_loss_is_said_and_what_follows_from_it(show) -> None:
    def taken(step: int, loss: float, best: int | None) -> Validated:
        return Validated(step, loss, best, {"step": step, "validation_loss": loss})

    told: dict[str, Any] = {}
    with telling(told.update):
        lines, bar = show(
            started(held_out=("b.jpg", "a.jpg")),
            taken(0, 0.3, None), taken(2, 0.2, 2), taken(4, 0.25, 2),
            Validated(4, None, 2, {"validation_similarity": 0.7}),
            StepDone(5, 9, 0.5, {}),
            TrainingEnded(5, False, 2),
        )  # fmt: skip
    assert told["result_step"] == 2
    assert lines[1:] == [
        "held out: 2 photos (a.jpg, b.jpg)",
        "step 0: validation loss 0.3000, of the base model",
        "step 2: validation loss 0.2000, the lowest so far",
        "step 4: validation loss 0.2500 (lowest at step 2)",
        "step 4: similarity of the samples to the held-out photos 0.700",
        "the result is from step 2, which had the lowest validation loss (keep_best)",
    ]
    assert "loss=0.5000, validation=0.2500" in bar
