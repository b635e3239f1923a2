"""Where a run's time goes."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")


class Clock:
    """Seconds by stage: of stages inside others, each has its own time only.

    On a GPU, work is counted where it is waited for.
    """

    def __init__(self) -> None:
        """Starts at zero."""
        self.spent: defaultdict[str, float] = defaultdict(float)
        self._inside = 0.0

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Counts the time of what is done in it."""
        before, self._inside = self._inside, 0.0
        begun = time.perf_counter()
        try:
            yield
        finally:
            passed = time.perf_counter() - begun
            self.spent[stage] += passed - self._inside
            self._inside = before + passed

    def waiting(self, stage: str, source: Iterator[T]) -> Iterator[T]:
        """The same things; the time that each is waited for is counted."""
        while True:
            with self(stage):
                thing = next(source, None)
            if thing is None:
                return
            yield thing
