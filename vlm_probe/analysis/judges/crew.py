"""Several jobs at once; the first that fails stops all, and none is cut off."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import TypeVar

Job = TypeVar("Job")


def done(
    jobs: Sequence[Job],
    work: Callable[[Job], object],
    *,
    n: int,
    stopped: threading.Event,
) -> Generator[Job, None, None]:
    """Does all jobs, and gives each as it is done.

    If one fails, or the caller is interrupted, no other is begun; those under way end,
    and then the error is raised.

    Args:
        jobs: What there is to do.
        work: Does one.
        n: Jobs at once.
        stopped: Is set if one fails, for `work` to cut its waits short.
    """
    failures: list[BaseException] = []

    def one(job: Job) -> bool:
        # By the one that fails itself: its thread would begin another job before
        # whoever waits for results has heard of it.
        if stopped.is_set():
            return False
        try:
            work(job)
        except BaseException as error:
            # The first is the reason; others fail because they were stopped.
            failures.append(error)
            stopped.set()
            return False
        return True

    with ThreadPoolExecutor(n) as pool:
        futures: dict[Future[bool], Job] = {}
        try:
            futures |= {pool.submit(one, job): job for job in jobs}
            for future in as_completed(futures):
                if future.result():
                    yield futures[future]
        except BaseException:  # Ctrl-C, or the caller wants no more
            stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    if failures:
        raise failures[0]
