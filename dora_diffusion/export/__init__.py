"""Merged checkpoints, and adapters converted, extracted and combined, as user-level functions."""

from __future__ import annotations

from dora_diffusion.lazy import lazy_names

_HOMES, __getattr__ = lazy_names(__name__, __file__)
__all__ = list(_HOMES)
