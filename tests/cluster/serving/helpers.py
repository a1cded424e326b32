"""An event loop whose time passes only while everybody sleeps, and then at once; the log."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest

Result = TypeVar("Result")


class Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        super().__init__()
        self.now, select = 0.0, self._selector.select

        def skip(timeout: float | None = None) -> Any:
            if timeout:
                self.now += timeout
                timeout = 0.0
            return select(timeout)

        self._selector.select = skip

    def time(self) -> float:
        return self.now


def serving_log(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Lines that serving logged; other tests' tasks may log too, whenever they are collected."""
    name = "dora_diffusion.cluster.serving"
    return [each.getMessage() for each in caplog.records if each.name == name]


def run(coroutine: Coroutine[Any, Any, Result]) -> Result:
    loop = Loop()
    try:
        return loop.run_until_complete(coroutine)
    finally:
        loop.close()
