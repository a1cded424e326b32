"""The Generate tab's handlers."""

from __future__ import annotations

import pytest

pytest.importorskip("gradio", reason="gradio is not installed")
import gradio

from dora_diffusion.app.context import Context
from tests.app.views.helpers import handler


def test_a_template_that_is_opened_and_left_keeps_the_prompt(context: Context) -> None:
    use = handler(context, "use_template", "generate")
    assert use("a photo of two {subject}s") == "a photo of two {subject}s"
    for left in (None, ""):
        assert use(left) == gradio.skip()
