"""Threads that read: how many, and batches that are made while another is used."""

import os
from collections import deque
from typing import Any, Callable, Iterable, Iterator


def core_count() -> int:
    """Return how many cores this process may use: fewer than the machine has where an affinity is set."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def made_ahead(begin: Callable[[int], Any], numbers: Iterable[int], ahead: int = 2) -> Iterator:
    """Yield `begin(number)` of each number, having called it for the `ahead` numbers that follow.

    `begin` hands work to other threads and returns what to wait for, for example futures.
    """
    begun = deque()
    for number in numbers:
        begun.append(begin(number))
        if len(begun) > ahead:
            yield begun.popleft()
    yield from begun
