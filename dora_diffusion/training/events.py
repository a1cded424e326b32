"""What a run tells whoever watches it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

OnEvent = Callable[[dict[str, Any]], None]
"""Called with ``{"event": name, ...}``; `dora_diffusion.training.loop.train` lists the names."""


def ignore(event: dict[str, Any]) -> None:
    """Watch nothing."""
