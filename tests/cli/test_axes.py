"""Axes of a grid: what they are read as, how many cells they make, and what is refused."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_diffusion.cli.axes import NO_AXES, SPECIAL, plan_grid, read_axis
from dora_diffusion.cli.commands.generate import GenerateSettings
from dora_diffusion.formats.files.runs import ADAPTER_FILES
from tests.every import every
from tests.refusal import refused

KNOWN = {setting.name: setting for setting in GenerateSettings.settings()}


def asked(*axes, **changes):
    values = {"base": "b", "prompt": "a red mug, red", "output": "o", "seed": 1, **changes}
    return GenerateSettings.of(grid=list(axes), **values)


def cells(*axes, **changes):
    return list(plan_grid(asked(*axes, **changes)).cells.values())


def values(name, *axes, **changes):
    return [cell.values()[name] for cell in cells(*axes, **changes)]


@given(st.integers(-50, 50), st.integers(1, 9), st.integers(2, 9), st.sampled_from([1, 4, 100]))
def test_a_range_is_an_arithmetic_sequence(start, step, count, parts):
    """Against exact fractions; in both directions, and after other values."""
    for sign in (1, -1):
        numbers = [(start + sign * n * step) / parts for n in range(count + 1)]
        text = f"{numbers[0]:f}, {numbers[1]:f}, .., {numbers[-1]:f}"
        axis = read_axis(f"direction_strength=-999, {text}", KNOWN)
        assert [change.key for change in axis.changes] == list(map(repr, [-999.0, *numbers]))


AXES = {
    "steps": st.integers(1, 99).map(str),
    "guidance_scale": st.floats(0, 30).map(repr),
    "negative_prompt": st.text("ab |&=", max_size=5).filter(lambda text: "||" not in text),
    "scheduler": st.sampled_from(["none", "ddim", "euler", "lcm"]),
}


@given(st.data())
def test_the_product_has_each_combination(data):
    names = data.draw(st.lists(st.sampled_from(sorted(AXES)), unique=True, min_size=1, max_size=3))
    words, kept = [], []
    for name in names:
        texts = data.draw(
            st.lists(AXES[name].map(str.strip), unique_by=str, min_size=1, max_size=3)
        )
        if texts == [""]:
            continue
        words.append(f"{name}=" + " || ".join(texts) + " ||")
        kept.append(texts)
    if not words:
        return
    grid = plan_grid(asked(*words))
    assert [list(axis.labels) for axis in grid.axes] == [
        [text or "(empty)" for text in texts] for texts in kept
    ]
    assert len(grid.cells) == math.prod(map(len, kept))
    assert len(set(map(repr, grid.cells.values()))) == len(grid.cells)
    assert max(grid.cells) == tuple(len(texts) - 1 for texts in kept)


def test_a_word_of_both_prompts_is_replaced_as_a1111_does():
    found = cells("Prompt S/R=red, blue, ", negative_prompt="not red")
    assert [(cell.prompt, cell.negative_prompt) for cell in found] == [
        ("a red mug, red", "not red"), ("a blue mug, blue", "not blue"), ("a  mug, ", "not "),
    ]  # fmt: skip
    # In the prompts of another axis, and one after the other.
    prompts = values("prompt", "prompt=a cat || one red, two", "replace=red, a dog", "replace=a, A")
    assert prompts[0] == "a cat"
    assert prompts[-1] == "one A dog, two"


def test_a_strength_of_a_part_is_every_adapter_s():
    adapters = ["a:0.7", "/b/c:0.5:0.8"]
    assert values("adapter", "unet_strength=0.25", adapter=adapters) == [
        ["a:0.7:0.25", "/b/c:0.5:0.25"]
    ]
    assert values("adapter", "text_encoder_strength=0", adapter=adapters) == [
        ["a:0.0:0.7", "/b/c:0.0:0.8"]
    ]


def test_adapters_are_lists_patterns_and_none(tmp_path):
    for number in (2, 10, 1):
        (tmp_path / f"checkpoint-{number}").mkdir()
    word = f"adapter={tmp_path}/checkpoint-*:0.5, {tmp_path}/checkpoint-1 + /x/y:0.5:1, none"
    grid = plan_grid(asked(word))
    ordered = [f"{tmp_path}/checkpoint-{number}" for number in (1, 2, 10)]
    assert [cell.adapter for cell in grid.cells.values()] == [
        *([f"{path}:0.5"] for path in ordered), [ordered[0], "/x/y:0.5:1"], None,
    ]  # fmt: skip
    # No folder of this machine is on a page.
    assert grid.axes[0].labels == [
        *(f"checkpoint-{number}:0.5" for number in (1, 2, 10)), "checkpoint-1 + y:0.5:1", "none",
    ]  # fmt: skip


def test_every_setting_is_an_axis_or_says_why_not():
    usual = {str: "a, b", int: "16, 32", float: "0.5, 1", bool: "on, off"}
    for setting in GenerateSettings.settings():
        text = ", ".join(setting.choices[:2]) if setting.choices else usual[setting.kind]
        if setting.name in ("vae_tile_size", "max_token_length"):
            text = "0, 2400"
        if setting.name in NO_AXES:
            with refused("grid", f"{setting.name} is not an axis"):
                plan_grid(asked(f"{setting.name}={text}"))
            continue
        found = values(setting.name, f"{setting.name}={text}")
        expected = [part.strip() for part in text.split(",")]
        if setting.is_list:
            assert found == [[word] for word in expected]
        elif setting.kind is bool:
            assert found == [True, False]
        else:
            assert found == [setting.kind(word) for word in expected]


# Words of axes -> what is wrong with them.
WRONG: list[tuple[list[str], str]] = [
    (["stepz=1"], r"no axis 'stepz' \(did you mean steps\?\); an axis is a setting of "
                     f"generate, or {', '.join(SPECIAL)}"),
    (["steps"], "grid is 'steps'; it must be AXIS=VALUES"),
    (["=1"], "grid is '=1'; it must be AXIS=VALUES"),
    (["steps=1, x"], "the axis steps: steps is 'x'; it must be a whole number"),
    (["steps=2.5"], "the axis steps: steps is '2.5'; it must be a whole number"),
    (["strength=nan"], "the axis strength: strength is nan; it must be a finite number"),
    (["unet_strength=x"], "the axis unet_strength: unet_strength is 'x'; it must be a number"),
    (["scheduler=eulr"], r"the axis scheduler: .*did you mean euler\?"),
    (["seed=none"], "the axis seed: seed is 'none'; it must be a whole number"),
    (["size=512"], "the axis size: size is '512'; write width and height, such as 512x768"),
    (["steps="], "the axis steps has an empty value"),
    (["steps=1,,2"], "the axis steps has an empty value: 'steps=1,,2'; put an axis with"),
    (["steps=4, SKIP:1"], "the axis steps has 'SKIP:1': no value is skipped"),
    (["steps=1, 01"], "the axis steps has the value '01' twice"),
    (["cfg=1", "guidance_scale=2"], "the grid has guidance_scale twice; give it one axis"),
    (["size=16x16", "height=16"], "the grid has height twice"),
    (["replace=red, a", "replace=red, b"], "the grid has replace of 'red' twice"),
    (["replace=purple, a"], "does not find 'purple', its first value, in the prompt"),
    (["replace=, a"], "replace has an empty value"),
    (["unet_strength=1"], "unet_strength needs an adapter, but none is given"),
    (["steps=1, 2 & cfg=1, 2, 3"], "the axis steps has '2 & cfg=1': .* no axes move together"),
    (["num_images=1, 2"], r"num_images is not an axis of a grid; give its seeds with seed=1, 2"),
    (["adapter=/nowhere/x-*"], "'/nowhere/x-.' matches no file or folder"),
    *(
        ([f"cfg={text}"], message)
        for text, message in (
            ("1, 2, .., 1", "the range 1, 2, .. does not reach 1; write two numbers"),
            ("1, 2, .., 0", "the range 1, 2, .. does not reach 0"),
            ("1, 2, .., 2", "the range 1, 2, .. does not reach 2"),
            ("0, 0.3, .., 1", "the range 0, 0.3, .. does not reach 1"),
            ("1, 1, .., 2", "the range has no step"),
            ("1, .., 2", "the range has no step"),
            ("1, 2, ..", "the range has no step"),
            ("..", "the range has no step"),
            ("nan, 1, .., 2", "the range has no step"),
            ("x, 1, .., 2", "the range has no step"),
            ("0, 1e-9, .., 1", "the range to 1 has more than 10,000 values"),
            ("0, 1, .., 1e999999", r"the range to .* has more than 10,000 values"),
            ("0, 1, .., inf", "the range to Infinity has more than 10,000 values"),
        )
    ),
]  # fmt: skip


def test_what_cannot_be_is_one_line():
    with every() as case:
        for axes, message in WRONG:
            with case(axes):
                with refused("grid") as caught:
                    plan_grid(asked(*axes))
                assert re.search(message, str(caught.value))


def test_too_many_cells_are_counted_and_have_to_be_confirmed():
    axes = ["seed=1, 2, .., 50", "steps=1, 2, 3"]
    with refused("grid_limit", "150 images"):  # fmt: skip
        plan_grid(asked(*axes))
    assert len(cells(*axes, grid_limit=150)) == 150


@pytest.mark.parametrize("file", ADAPTER_FILES)
def test_an_adapter_of_a_run_or_checkpoint_is_called_by_its_folder(file):
    word = f"adapter=/runs/dog/checkpoint-5/{file} || /runs/dog/{file} || /runs/cat.safetensors"
    assert plan_grid(asked(word)).axes[0].labels == ["checkpoint-5", "dog", "cat.safetensors"]
