"""Seconds, peak memory, and on which processor."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
_PROCESS = Path("/proc/self")


@dataclass(frozen=True)
class Measured(Generic[T]):
    """One run of something."""

    result: T
    """What it gave."""
    seconds: float
    """How long it took, by the clock on the wall."""
    cpu_seconds: float
    """How long all threads together computed, or waited for each other busily."""
    peak_mb: float | None
    """The most memory that the process (or the GPU) held meanwhile, in MB of 10^6
    bytes, weights of the models included; None where the system does not say."""
    added_mb: float | None
    """How much of that it did not hold before."""


def measured(run: Callable[[], T], device: str = "cpu") -> Measured[T]:
    """Runs something once, with the peak of memory set back before."""
    gc.collect()
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 1e6
    else:
        _reset_peak()
        before = _status_mb("VmRSS")
    begun, cpu_begun = time.perf_counter(), time.process_time()
    result = run()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    cpu_seconds = time.process_time() - cpu_begun
    peak = torch.cuda.max_memory_allocated() / 1e6 if on_gpu else peak_mb()
    added = None if peak is None or before is None else peak - before
    return Measured(result, seconds, cpu_seconds, peak, added)


def take_turns(
    runs: Mapping[str, Callable[[], T]],
    rounds: int,
    device: str = "cpu",
    *,
    check: Callable[[str, T], None] | None = None,
) -> dict[str, list[Measured[T]]]:
    """Runs all once, then all once more, so that a busy hour is nobody's alone.

    Args:
        runs: What is run, by name, in this order.
        rounds: How often each is.
        device: What it computes on.
        check: Gets the name and result of each, in the first round.
    """
    found: dict[str, list[Measured[T]]] = {name: [] for name in runs}
    for number in range(rounds):
        for name, run in runs.items():
            once = measured(run, device)
            say(f"round {number + 1} of {rounds}: {name}, {once.seconds:.2f} s")
            found[name].append(once)
            if check is not None and number == 0:
                check(name, once.result)
    return found


def summary(found: Sequence[Measured]) -> dict[str, object]:
    """The fields of a line that tell how long something took and what it held."""
    seconds = [once.seconds for once in found]
    peaks = [once.peak_mb for once in found if once.peak_mb is not None]
    added = [once.added_mb for once in found if once.added_mb is not None]
    return {
        "seconds": min(seconds),
        "seconds_median": statistics.median(seconds),
        "seconds_each": seconds,
        "cpu_seconds": min(once.cpu_seconds for once in found),
        "peak_mb": max(peaks, default=None),
        "added_mb": max(added, default=None),
    }


def say(words: str) -> None:
    """Tells whoever waits how far it is."""
    print(words, file=sys.stderr, flush=True)


def peak_mb() -> float | None:
    """The most memory this process has held since it began, or since the last reset."""
    return _status_mb("VmHWM")


def processor(device: str = "cpu") -> str:
    """The processor's name and what its arithmetic can do; the GPU's, if it is used."""
    named = [
        line.partition(":")[2].strip()
        for line in _lines(Path("/proc/cpuinfo"))
        if line.startswith("model name")
    ]
    name = next(iter(named), platform.processor() or platform.machine())
    can = torch.backends.cpu.get_cpu_capability() + (", AMX" if has_amx() else "")
    found = f"{name} ({can}, {os.cpu_count()} cores)"
    if torch.device(device).type == "cuda":
        found += f", {torch.cuda.get_device_name(device)}"
    return found


def has_amx() -> bool:
    """Whether the processor multiplies bfloat16 matrices in tiles."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(supported and supported())


def fast_bfloat16(device: str = "cpu") -> bool:
    """Whether products in bfloat16 are much faster than in float32."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return has_amx()


def _reset_peak() -> None:
    # Elsewhere than on Linux, or where that is forbidden, the peak is the process's.
    with contextlib.suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5")


def _status_mb(name: str) -> float | None:
    for line in _lines(_PROCESS / "status"):
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / 1e6
    return None


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.is_file() else []
