"""The pairs of names, and the two directions that follow from them."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

import dora_diffusion
from dora_diffusion.formats.names.modules import NAMES, NameTable, renamed


def test_a_pair_that_is_not_one_to_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not one-to-one: x$"):
        NameTable([("a", "x"), ("b", "x")])
    with pytest.raises(ValueError, match=r"not one-to-one: a$"):
        NameTable([("a", "x"), ("a", "y")])
    with pytest.raises(ValueError, match=r"lie below another: a\.b$"):
        NameTable([("a", "x"), ("a.b", "y")])
    with pytest.raises(ValueError, match=r"lie below another: x\.y$"):
        NameTable([("a", "x"), ("b", "x.y")])


def test_pairs_hold_for_all_that_lies_below_them() -> None:
    table = NameTable([("a.b", "x"), ("a.c", "y.0.z")])
    assert table.to_original("a.b.weight") == "x.weight"
    assert table.to_canonical("y.0.z.q.bias") == "a.c.q.bias"
    assert table.to_original("a") is None
    assert table.to_original("a.bc") is None
    assert renamed("a_c_1", table.with_underscores().original, "_") == "y_0_z_1"
    assert table.below("p.", "q.") == [("p.a.b", "q.x"), ("p.a.c", "q.y.0.z")]


def test_original_names_are_written_once() -> None:
    """A second hand-written direction of a table would have to repeat them."""
    tables = ("unet_top", "unet_resnet", "vae_attention", "vae_resnet", "vae_early",
              "open_clip_top", "open_clip_layer")  # fmt: skip
    pairs = [pair for table in tables for pair in NAMES[table].items()]
    leaves = {original for name, original in pairs if name != original}
    # Short ones and two others are canonical names of something else, too; and families are told by
    # the last norm.
    originals = {leaf for leaf in leaves if len(leaf) > 5 and "#" not in leaf}
    originals -= {"proj_out", "text_projection", "ln_final"}
    assert {"in_layers.0", "nin_shortcut", "mlp.c_fc", "input_blocks.0.0", "proj_attn"} <= originals
    written: Counter[str] = Counter()
    for file in Path(dora_diffusion.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                written.update(originals & {node.value, node.value.removesuffix(".weight")})
    assert not written  # The data file has them.
    assert max(Counter(original for _, original in pairs if original in originals).values()) == 1
