"""Threads that want one core, side by side."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

import pytest
import torch

from dora_diffusion.numerics.threads import one_thread


class Visitor:
    """A thread of its own, that enters a context and leaves it when it is told to."""

    def __init__(self, context: Callable[[], AbstractContextManager[None]]) -> None:
        self._context = context()
        self._thread = ThreadPoolExecutor(1)
        self._thread.submit(torch.get_num_threads).result()

    def enter(self) -> None:
        self._thread.submit(self._context.__enter__).result()

    def leave(self) -> None:
        self._thread.submit(self._context.__exit__, None, None, None).result()

    def ask(self, question: Callable[[], object]) -> object:
        return self._thread.submit(question).result()


def in_a_new_thread(question: Callable[[], object]) -> object:
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.append(question()))
    thread.start()
    thread.join()
    return answers[0]


@pytest.fixture(autouse=True)
def three_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("first_out", [0, 1])
@pytest.mark.parametrize("late", [False, True])
def test_one_core_lasts_as_long_as_the_last_of_two_threads(first_out: int, late: bool) -> None:
    """Late: the second thread starts when the first one has changed what new ones get."""
    visitors = [Visitor(one_thread)]
    if late:
        visitors[0].enter()
    visitors.append(Visitor(one_thread))
    if not late:
        visitors[0].enter()
    visitors[1].enter()
    leaves, stays = visitors[first_out], visitors[1 - first_out]
    leaves.leave()
    assert stays.ask(torch.get_num_threads) == 1
    assert in_a_new_thread(torch.get_num_threads) == 1, "one that starts inside of the other"
    stays.leave()
    assert in_a_new_thread(torch.get_num_threads) == 3
    assert visitors[0].ask(torch.get_num_threads) == 3


def test_one_inside_another_leaves_that_as_it_is() -> None:
    with one_thread():
        with one_thread():
            pass
        assert torch.get_num_threads() == in_a_new_thread(torch.get_num_threads) == 1
    assert torch.get_num_threads() == in_a_new_thread(torch.get_num_threads) == 3
