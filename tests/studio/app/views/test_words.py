"""Styles and wildcards of the Generate tab: what is uploaded, kept and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="gradio is not installed")
import gradio

from dora_diffusion.config.prompts import read_styles
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.views import words
from dora_diffusion.studio.app.views.generate import GenerateTab
from dora_diffusion.studio.app.views.request import SUBJECT, UNSET
from dora_diffusion.studio.jobs.store import UserError
from tests.studio.app.views.helpers import handler

STYLES = "name,prompt,negative_prompt\nink,{prompt} in ink,photo\n"


def shown(context: Context) -> tuple[list[str], str]:
    """The styles to choose from, and what the tab says is kept."""
    parts = words.refresh(context.workspace)
    return [name for _, name in parts["style"][0]["choices"]], parts["words"]


def test_what_is_uploaded_is_kept_and_offered(context: Context, tmp_path: Path) -> None:
    upload = handler(context, "upload", "words")
    assert shown(context)[0] == []
    assert "Upload a styles.csv" in shown(context)[1]
    files = {"my styles.csv": STYLES, "colours.txt": "red\nblue\n", "fish.txt": "# of it\ncod"}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    cleared, choices, said, row, kept = upload([str(tmp_path / name) for name in files])
    assert (cleared, choices["choices"]) == (None, [("ink", "ink")])
    assert (row["visible"], kept["value"]) == (True, None)
    assert [value for _, value in kept["choices"]] == ["styles.csv", "colours.txt", "fish.txt"]
    assert said == shown(context)[1]
    assert "1 style; wildcards __colours__, __fish__." in said
    assert read_styles(context.workspace.styles, ["ink"]) == [("{prompt} in ink", "photo")]
    # Another file of styles replaces it; those of wildcards are added.
    (tmp_path / "b.csv").write_text("name,text\noil,oil\n,none\n", encoding="utf-8")
    upload([str(tmp_path / "b.csv")])
    assert shown(context)[0] == ["oil"]
    assert "__colours__" in shown(context)[1]
    assert upload(None) == [gradio.skip()] * 5
    context.workspace.styles.write_bytes(b"\xff")
    names, said = shown(context)
    assert names == []
    assert "is not UTF-8 text; save it as UTF-8" in said


def test_a_file_is_deleted_where_it_is_confirmed_and_no_other(context: Context) -> None:
    workspace, delete = context.workspace, handler(context, "delete", "words")
    workspace.styles.write_text(STYLES, encoding="utf-8")
    texts = [workspace.wildcards / name for name in ("colours.txt", "sea/fish.txt")]
    for path in texts:
        path.parent.mkdir(exist_ok=True)
        path.write_text("red", encoding="utf-8")
    outside = workspace.root / "notes.txt"
    outside.write_text("mine", encoding="utf-8")
    assert delete("") == [gradio.skip()] * 4  # it is not confirmed
    for name in ("../notes.txt", str(outside), "colours", "__colours__", ["colours.txt"]):
        with pytest.raises(gradio.Error, match="This file no longer exists"):
            delete(name)
    for name, left in (
        ("sea/fish.txt", ["styles.csv", "colours.txt"]), ("styles.csv", ["colours.txt"]),
        ("colours.txt", []),
    ):  # fmt: skip
        choices, said, row, kept = delete(name)
        assert [value for _, value in kept["choices"]] == left
        assert (kept["value"], row["visible"], said) == (None, bool(left), shown(context)[1])
        assert bool(choices["choices"]) == ("styles.csv" in left)
        files = [workspace.styles, *texts]
        there = [path for path in files if path.exists()]
        assert [path.name for path in there] == [Path(name).name for name in left]
    assert outside.read_text(encoding="utf-8") == "mine"
    with pytest.raises(gradio.Error, match="This file no longer exists"):
        delete("colours.txt")


def test_a_grid_s_prompts_are_given_the_styles_once(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    context.workspace.styles.write_text(STYLES, encoding="utf-8")
    asked = []

    def grid(request: Any, axes: Any, on_step: Any) -> None:
        asked.append((request.prompts.prompt, request.negative_prompt, axes, request.prompts.style))
        raise UserError("enough")

    monkeypatch.setattr(context.generator, "grid", grid)
    with gradio.Blocks():
        tab = GenerateTab(context)
    form = {**UNSET, "prompt": "a {subject}", "style": ["ink"], "negative_prompt": "dull"}
    values = [form[name] for name in (*tab.fields, "image", "mask_image")]
    axes = ["style", "ink", None, None, None, None]
    with pytest.raises(gradio.Error, match="Enough"):
        handler(context, "make_grid", "generate")("base/embedded:tiny-sd", *axes, *values)
    assert asked == [(f"a {SUBJECT}", "dull", ["style=ink"], ["ink"])]
