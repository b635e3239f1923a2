"""What a second process adds: the same pictures under torchrun, on one core each.

Run as a program, under torchrun, it is one of those processes.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
import torch.distributed

from benchmarks import contenders
from benchmarks.compare import DisagreementError
from benchmarks.measure import peak_mb, say
from benchmarks.workload import Size, make_workload

_SAME = 1e-9
"""By how much of their value the tables of one and of two processes may differ."""


def scaling(size: Size, images: int) -> Iterator[dict[str, object]]:
    """One line for one process and one for two, each with one thread, on the CPU.

    `peak_mb` is that of the process that held most.

    Raises:
        DisagreementError: Two processes found other numbers than one.
    """
    one = None
    for processes in (1, 2):
        found = _start(processes, size, images)
        table = pd.DataFrame(found.pop("table"))
        one = one or (found["seconds"], table)
        difference = _difference(table, one[1])
        yield {
            "contender": f"torchrun {processes}",
            **found,
            "threads": 1,
            "images": images,
            "images_per_second": images / found["seconds"],
            "speed_up": one[0] / found["seconds"],
            "largest_difference": difference,
        }
        if difference > _SAME:
            raise DisagreementError(
                f"{processes} processes found numbers that differ from those of one "
                f"by up to {difference:g} of their value"
            )


def _difference(table: pd.DataFrame, other: pd.DataFrame) -> float:
    """The largest relative difference of any number in two tables."""
    keys = ["layer", "group", "condition"]
    a, b = (t.set_index(keys).sort_index() for t in (table, other))
    if not a.index.equals(b.index) or not a.columns.equals(b.columns):
        raise DisagreementError("tables have other rows or columns")
    return float(((a - b).abs() / b.abs()).max(axis=None))


def _start(processes: int, size: Size, images: int) -> dict:
    say(f"torchrun with {processes} of one thread")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        task = {"size": asdict(size), "images": images, "file": str(file)}
        done = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc-per-node", str(processes)),
                *("-m", "benchmarks.scaling", json.dumps(task)),
            ],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=sys.stderr,
        )
        if done.returncode:
            raise RuntimeError(f"torchrun ended with {done.returncode}")
        return json.loads(file.read_text())


def _do(size: Size, images: int, file: Path) -> None:
    torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    workload = make_workload(size, images)
    workload.model.identities()  # weights are hashed once, however long a run is
    torch.distributed.barrier()
    begun = time.perf_counter()
    result = contenders.run_probe(workload)
    torch.distributed.barrier()
    seconds = time.perf_counter() - begun
    peak = torch.tensor(peak_mb() or math.nan)
    torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX)
    if torch.distributed.get_rank() == 0:
        found = {
            "seconds": seconds,
            "peak_mb": None if peak.isnan() else peak.item(),
            "table": result.layers.to_dict("list"),
        }
        file.write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    _do(Size(**given["size"]), given["images"], Path(given["file"]))
