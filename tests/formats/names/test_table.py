"""The pairs of names, and the two directions that follow from them."""

from __future__ import annotations

import pytest

from dora_diffusion.formats.names.modules import NameTable


def test_a_pair_that_is_not_one_to_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not one-to-one: x$"):
        NameTable([("a", "x"), ("b", "x")])
    with pytest.raises(ValueError, match=r"not one-to-one: a$"):
        NameTable([("a", "x"), ("a", "y")])
    with pytest.raises(ValueError, match=r"are below another: a\.b$"):
        NameTable([("a", "x"), ("a.b", "y")])
    with pytest.raises(ValueError, match=r"are below another: x\.y$"):
        NameTable([("a", "x"), ("b", "x.y")])
