"""The pairs of names, and the two directions that follow from them."""

from __future__ import annotations

import pytest

from dora_diffusion.formats.names.modules import NameTable, renamed


def test_a_pair_that_is_not_one_to_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not one-to-one: x$"):
        NameTable([("a", "x"), ("b", "x")])
    with pytest.raises(ValueError, match=r"not one-to-one: a$"):
        NameTable([("a", "x"), ("a", "y")])
    with pytest.raises(ValueError, match=r"are below another: a\.b$"):
        NameTable([("a", "x"), ("a.b", "y")])
    with pytest.raises(ValueError, match=r"are below another: x\.y$"):
        NameTable([("a", "x"), ("b", "x.y")])


def test_pairs_hold_for_all_that_lies_below_them() -> None:
    table = NameTable([("a.b", "x"), ("a.c", "y.0.z")])
    assert table.to_original("a.b.weight") == "x.weight"
    assert table.to_canonical("y.0.z.q.bias") == "a.c.q.bias"
    assert table.to_original("a") is None
    assert table.to_original("a.bc") is None
    assert renamed("a_c_1", table.with_underscores().original, "_") == "y_0_z_1"
    assert table.below("p.", "q.") == [("p.a.b", "q.x"), ("p.a.c", "q.y.0.z")]
