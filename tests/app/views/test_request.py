"""The Generate tab's fields as a request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dora_diffusion.jobs.errors import RequestError


@pytest.mark.parametrize(
    ("text", "pixels"), [("", None), (" ", None), ("512", 512), ("100", 96), (64, 64), ("3", 8)]
)
def test_an_empty_size_is_the_model_s(text: object, pixels: int | None) -> None:
    assert _asked(width=text).settings.width == pixels


@pytest.mark.parametrize("text", ["0", "-8", "wide", "1.5"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match=r"height is .*; write pixels"):
        _asked(height=text)


def _asked(**changes: object) -> Any:
    pytest.importorskip("gradio", reason="gradio is not installed")
    from dora_diffusion.app.views.request import BASE, make_request

    form: dict[str, Any] = {
        "prompt": "a mug", "negative_prompt": "", "seed": 1, "count": 1, "steps": 2,
        "guidance_scale": 2, "scheduler": None, "width": "", "height": "", "strength": 1,
        "direction": 1, "magnitude": 1,
    }  # fmt: skip
    context: Any = SimpleNamespace(allowed_model=lambda name: name)
    return make_request(context, f"{BASE}/embedded:tiny-sd", form | changes)
