"""A process of its own for each probe whose memory is measured.

Memory that a process has once held is not always given back, so that a peak says
something only of a process that has done nothing before. This file is both: what starts
such processes, and, run as a program, what they do.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from benchmarks.measure import peak_mb, say
from benchmarks.workload import GROUPS, SMALL, Size

MEMORY_COUNTS = (16, 64, 256)
MILLION_LIMIT_MB = 10_000
_CEILING_MB = 16_000
"""Where a probe that takes far too much is stopped, rather than the whole machine."""


@dataclass(frozen=True)
class _Task:
    """What a process is to do."""

    size: Size
    images: int
    threads: int
    device: str
    ceiling_mb: int | None = None


def memory(
    size: Size, threads: int, device: str, *, full: bool
) -> Iterator[dict[str, object]]:
    """Peak memory against the number of pictures, which are made as they are asked for.

    By default with four layers of a quarter of the features: 336 pictures through the
    whole shape take minutes. Less is held beside what grows then, so that a growth in
    percent is rather too large than too small.
    """
    small = size is SMALL
    counts = (4, 8) if small else MEMORY_COUNTS
    if not small and not full:
        size = replace(size, layers=4, features=size.features // 4)
    first = None
    for images in counts:
        found = _start(_Task(size, images, threads, device))
        line = _line(f"memory {images} images", found, images, size)
        if first is None:
            first = found
        elif "peak_mb" in found and "peak_mb" in first:
            line["growth_percent"] = 100 * (found["peak_mb"] / first["peak_mb"] - 1)
        yield line


def million(size: Size, threads: int, device: str) -> Iterator[dict[str, object]]:
    """One SAE of 1,048,576 features: both its matrices take 6.4 GB."""
    features = 2**13 if size is SMALL else 2**20
    size = replace(size, layers=1, features=features)
    ceiling = _CEILING_MB if device == "cpu" else None
    found = _start(_Task(size, 4, threads, device, ceiling))
    line = _line("one million features", found, 4, size)
    if "peak_mb" in found:
        line["under_10_gb"] = found["peak_mb"] < MILLION_LIMIT_MB
    yield line


def _line(
    contender: str, found: dict[str, object], images: int, size: Size
) -> dict[str, object]:
    return {"contender": contender, "images": images, "size": asdict(size), **found}


def _start(task: _Task) -> dict[str, object]:
    """Runs a task and gives back what it measured, or the error it ended with."""
    say(f"{task.images} images, {task.size.features} features, in a process of its own")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.alone", json.dumps(asdict(task))],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"ended by {done.returncode}"]
        if task.ceiling_mb is not None and "allocate memory" in last[0]:
            return {"error": f"stopped at {task.ceiling_mb} MB"}
        return {"error": last[0]}
    return json.loads(done.stdout)


def _do(task: _Task) -> dict[str, object]:
    if task.ceiling_mb is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (task.ceiling_mb * 10**6,) * 2)
    import torch

    from benchmarks.workload import make_examples, make_model
    from vlm_probe import probe_layers

    torch.set_num_threads(task.threads)
    model = make_model(task.size, task.device)
    ready = peak_mb()
    begun = time.perf_counter()
    probe_layers(
        model,
        make_examples(task.size, task.images),
        groups=GROUPS,
        batch_size=task.size.batch,
        progress=False,
    )
    seconds = time.perf_counter() - begun
    if torch.device(task.device).type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e6
    else:
        peak = peak_mb()
    return {"seconds": seconds, "peak_mb": peak, "peak_mb_before_probe": ready}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(_do(_Task(**given | {"size": Size(**given["size"])}))))
