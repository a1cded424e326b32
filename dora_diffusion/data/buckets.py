"""Aspect-ratio buckets: crop sizes of about equal area, so that photos lose little to the crop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Buckets:
    """Crop sizes around a resolution; calling one picks a photo's.

    Every size has sides that are multiples of ``step`` and an area of at most
    ``resolution ** 2``, so no bucket needs more memory than the square one.

    Attributes:
        resolution: Side of the square bucket in pixels.
        step: Sides are multiples of this; a multiple of the model's pixels per latent.
        max_ratio: The longest side over the shortest.

    Raises:
        ValueError: If no such sizes exist.
    """

    resolution: int
    step: int = 64
    max_ratio: float = 2.0

    def __post_init__(self) -> None:
        if self.step < 1 or self.resolution < self.step or self.resolution % self.step:
            raise ValueError(
                f"resolution {self.resolution} must be a multiple of the bucket step {self.step}"
            )
        if self.max_ratio < 1.0:
            raise ValueError(f"max_ratio must be at least 1, got {self.max_ratio}")

    @cached_property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """All sizes ``(height, width)``, from the tallest to the widest."""
        area = self.resolution**2
        sizes = set()
        longest = int(self.resolution * math.sqrt(self.max_ratio))
        for long in range(self.resolution, longest + 1, self.step):
            short = area // long // self.step * self.step
            if short and long / short <= self.max_ratio:
                sizes |= {(long, short), (short, long)}
        return tuple(sorted(sizes, key=lambda size: (size[1] / size[0], size)))

    def __call__(self, size: tuple[int, int]) -> tuple[int, int]:
        """The bucket whose shape is nearest to a photo's ``(height, width)``, by log ratio."""
        wanted = math.log(size[1] / size[0])
        return min(self.sizes, key=lambda bucket: abs(math.log(bucket[1] / bucket[0]) - wanted))
