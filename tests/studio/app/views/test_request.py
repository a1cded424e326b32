"""The Generate tab's fields as a request."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dora_diffusion.config.base import BaseModel
from dora_diffusion.numerics.weights import STRENGTH_LIMIT
from dora_diffusion.studio.jobs.store import UserError


@pytest.mark.parametrize(
    ("text", "pixels"), [("", None), (" ", None), ("512", 512), ("504", 504), (64, 64)]
)
def test_an_empty_size_is_the_model_s(text: object, pixels: int | None) -> None:
    assert _asked(width=text).settings.width == pixels


@pytest.mark.parametrize(("text", "next_size"), [("500", 504), ("3", 8)])
def test_a_size_is_refused_as_on_the_command_line(text: str, next_size: int) -> None:
    with pytest.raises(ValueError, match=f"width is {text}; .* such as {next_size}"):
        _asked(width=text)


@pytest.mark.parametrize("name", ["strength", "direction", "magnitude"])
def test_the_limits_of_strengths_are_the_library_s(name: str) -> None:
    for value in (-STRENGTH_LIMIT, STRENGTH_LIMIT):
        strengths = _asked(**{name: value}).strengths
        assert value in (
            strengths.strength, strengths.direction_strength, strengths.magnitude_strength
        )  # fmt: skip
        with pytest.raises(ValueError, match=f"must be between -{STRENGTH_LIMIT} and"):
            _asked(**{name: 1.01 * value})


@pytest.mark.parametrize("text", ["0", "-8", "wide", "1.5"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"height is .*; write pixels"):
        _asked(height=text)


@pytest.mark.parametrize(
    ("text", "scale"), [("5", 5.0), ("4.5", 4.5), (2, 2.0), ("0", 0.0), ("", 3.5), (None, 3.5)]
)
def test_an_empty_guidance_is_the_model_s(text: object, scale: float) -> None:
    assert _asked(guidance_scale=text).settings.guidance_scale == scale


def test_a_released_model_has_the_usual_guidance(tmp_path: Path) -> None:
    assert _asked(str(tmp_path), guidance_scale="").settings.guidance_scale == 7.5


def test_no_image_waits_for_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(name: str, **options: Any) -> str:
        assert options["local_files_only"]
        raise FileNotFoundError(name)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(UserError, match=r"org/model is not on this machine.*hf download org/m"):
        _asked("org/model")


@pytest.mark.parametrize("text", ["much", "-1", "31", "nan", "inf"])
def test_a_guidance_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"guidance is .*; write a number from 0 to 30"):
        _asked(guidance_scale=text)


@pytest.mark.parametrize("settings", [{"validation_guidance_scale": 6.0}, {}])
def test_a_run_s_guidance_is_that_of_its_samples(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, float]
) -> None:
    request = pytest.importorskip("dora_diffusion.studio.app.views.generate")
    monkeypatch.setattr(request, "chosen_adapter", lambda job, name: None)
    base = BaseModel("embedded:tiny-sd")
    run = SimpleNamespace(base=base.path, base_model=base, trigger="sks mug", settings=settings)
    *_, guidance = request._model(_context(job=lambda name: run), "20260101-000000-abcdef")
    assert guidance == settings.get("validation_guidance_scale", 3.5)


def _context(**parts: Any) -> Any:
    return SimpleNamespace(allowed_model=lambda name: name, **parts)


def _asked(model: str = "embedded:tiny-sd", **changes: object) -> Any:
    pytest.importorskip("gradio", reason="gradio is not installed")
    from dora_diffusion.studio.app.views.generate import BASE, make_request

    form: dict[str, Any] = {
        "prompt": "a mug", "negative_prompt": "", "seed": 1, "count": 1, "steps": 2,
        "guidance_scale": 2, "scheduler": None, "width": "", "height": "", "strength": 1,
        "direction": 1, "magnitude": 1,
    }  # fmt: skip
    return make_request(_context(), f"{BASE}/{model}", form | changes)


def test_how_prompts_are_read_is_the_run_s_unless_asked_for() -> None:
    asked = _asked(max_token_length=" 150 ", clip_skip="1")
    assert (asked.max_token_length, asked.clip_skip) == (150, 1)
    plain = _asked(max_token_length="", clip_skip=None)
    assert (plain.max_token_length, plain.clip_skip) == (None, None)
    with pytest.raises(UserError, match="the clip skip is '-1'; write a whole number, or leave"):
        _asked(clip_skip="-1")
