"""The names of precisions: torch's, Accelerate's, and those that people type."""

from __future__ import annotations

AUTO = "auto"
_LONG = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_SHORT = {dtype: short for short, dtype in _LONG.items()}

DTYPES = tuple(_SHORT)
"""What ``--dtype`` takes: torch's names."""


def dtype_name(word: str) -> str:
    """A precision under torch's name: ``"bf16"`` -> ``"bfloat16"``; other words stay."""
    return _LONG.get(word, word)


def precision_name(word: str) -> str:
    """A precision under Accelerate's name: ``"float32"`` -> ``"no"``; other words stay."""
    short = _SHORT.get(word, word)
    return "no" if short in ("fp32", "none") else short


PRECISIONS = (AUTO, *map(precision_name, DTYPES))
"""What ``--mixed_precision`` takes: Accelerate's names."""
