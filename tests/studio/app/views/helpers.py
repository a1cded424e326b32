"""Handlers of the page by their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dora_diffusion.studio.app.context import Context


def handler(
    context: Context, name: str, tab: str = "train", nth: int | None = None
) -> Callable[..., list[Any]]:
    """A handler of a tab: a module of `dora_diffusion.studio.app.views`."""
    from dora_diffusion.studio.app.page import build_page

    functions = (one.fn for one in build_page(context).fns.values())
    found = [
        function for function in functions
        if getattr(function, "__module__", "").endswith(f"views.{tab}")
        and function.__name__ == name
    ]  # fmt: skip
    assert nth is not None or len(found) == 1
    return found[nth or 0]
