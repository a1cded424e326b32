"""Change of a model's weights by an adapter or fine-tune: magnitude, direction, rank, place."""

from __future__ import annotations

from dora_diffusion.lab.analysis.analyze import analyze_weights
from dora_diffusion.lab.analysis.report import Analysis

__all__ = ["Analysis", "analyze_weights"]
