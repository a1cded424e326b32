"""Handlers of the page by their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dora_diffusion.studio.app.context import Context


def handlers(context: Context) -> Callable[..., Callable[..., list[Any]]]:
    """Finds handlers of one page: by name, tab (a module of `studio.app.views`) and place."""
    from dora_diffusion.studio.app.page import build_page

    functions = [one.fn for one in build_page(context).fns.values()]

    def find(name: str, tab: str = "train", nth: int | None = None) -> Callable[..., list[Any]]:
        found = [
            function for function in functions
            if getattr(function, "__module__", "").endswith(f"views.{tab}")
            and function.__name__ == name
        ]  # fmt: skip
        assert nth is not None or len(found) == 1
        return found[nth or 0]

    return find


def handler(
    context: Context, name: str, tab: str = "train", nth: int | None = None
) -> Callable[..., list[Any]]:
    """One handler of a page, as `handlers` finds it."""
    return handlers(context)(name, tab, nth)
