"""How much memory is at hand, on a device and within what a scheduler allows."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil
import torch


def memory_at_hand(device: str) -> int:
    """What this process can allocate on a device now, in bytes.

    Beside the CPU's memory, only that of CUDA can be told. Processes that torchrun
    started on one machine have equal parts of the CPU's.
    """
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What PyTorch keeps for itself, and has given to no tensor, is free too.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + kept
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(psutil.virtual_memory().available, allowed()) // sharing


def allowed(
    proc: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> int:
    """What the control groups of this process leave it, in bytes.

    A job of Slurm and a container are limited so, often to far less than the machine
    has. Each group is within those above it, and the narrowest decides. Files kept in
    memory count as free, for they make way.

    Args:
        proc: Where Linux says which groups this process is in.
        mount: Where the groups are.

    Returns:
        What is left; `sys.maxsize` where nothing limits it.
    """
    if not proc.is_file():
        return sys.maxsize
    left = [sys.maxsize]
    for line in proc.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            top, names, prefix = mount, ("memory.max", "memory.current"), ""
        elif "memory" in controllers.split(","):  # version 1
            top, prefix = mount / "memory", "total_"
            names = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = top / path.lstrip("/")
        # In a container, the path may be the one that it has outside.
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                left += _left(folder, *names, prefix)
    return max(0, min(left))


def _left(group: Path, limit: str, usage: str, prefix: str) -> list[int]:
    """What one group leaves; nothing if it sets no limit."""
    limits, stat = group / limit, group / "memory.stat"
    if not limits.is_file() or (most := limits.read_text().strip()) == "max":
        return []
    told = dict(line.split() for line in stat.read_text().splitlines())
    files = sum(int(told[f"{prefix}{kind}_file"]) for kind in ("inactive", "active"))
    return [int(most) - int((group / usage).read_text()) + files]
