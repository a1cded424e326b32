"""A progress bar over denoising steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def step_progress() -> Iterator[Callable[[int, int], None]]:
    """Yield what to call with (steps done, steps in all)."""
    from tqdm import tqdm

    with tqdm(unit="step", dynamic_ncols=True, leave=False) as bar:

        def show(step: int, total: int) -> None:
            bar.total = total
            bar.update(step - bar.n)

        yield show
