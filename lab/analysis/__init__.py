"""Change of a model's weights by training: magnitude, direction, rank, part of the model."""

from __future__ import annotations

from lab.analysis.analyze import analyze_weights
from lab.analysis.report import Analysis

__all__ = ["Analysis", "analyze_weights"]
