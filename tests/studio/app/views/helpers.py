"""Handlers of the page by their names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast
from unittest import mock

from dora_diffusion.studio.app.context import Context


@functools.lru_cache(maxsize=1)
def built_page(context: Context) -> Any:
    """The page of an app, built once, without the routes by which it would be served."""
    from dora_diffusion.studio.app.page import build_page

    with mock.patch("gradio.blocks.App.create_app"):
        return build_page(context)


def handlers(context: Context) -> Callable[..., Callable[..., list[Any]]]:
    """Finds handlers of one page: by name, tab (a module of `studio.app.views`) and place."""
    functions = [one.fn for one in built_page(context).fns.values()]

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


def triggers(context: Context, name: str, tab: str) -> set[tuple[str, str]]:
    """Fields, by their id on the page, and events of them that set a handler off."""
    page = built_page(context)
    found = set()
    for function in page.fns.values():
        module = getattr(function.fn, "__module__", "")
        if getattr(function.fn, "__name__", "") == name and module.endswith(f"views.{tab}"):
            found |= _triggers(page, function)
    return found


def pressed(context: Context, name: str) -> Callable[..., Any]:
    """The handler of a button, by the button's id on the page."""
    page = built_page(context)
    *_, function = (  # The first one asks, where it is to be confirmed.
        one.fn for one in page.fns.values() if one.fn and (name, "click") in _triggers(page, one)
    )
    return cast("Callable[..., Any]", function)


def _triggers(page: Any, function: Any) -> set[tuple[str, str]]:
    while function.trigger_after is not None:
        function = page.fns[function.trigger_after]
    return {
        (page.blocks[part].elem_id, event)
        for part, event in function.targets
        if part in page.blocks
    }
