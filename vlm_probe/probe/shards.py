"""One run, shared by several processes."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from safetensors.torch import load, save

from vlm_probe.checkpoint import State


@dataclass(frozen=True)
class Shard:
    """Which of the processes of a run this is."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Shard:
        """As torch.distributed says; the only one where that is not in use."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def of(self) -> tuple[int, int]:
        """Its number, and how many there are."""
        return self.rank, self.size

    def gather(self, state: State) -> Iterator[State]:
        """The states of all processes, one after the other; on every process alike.

        Every process must call it, and take all of them.
        """
        if self.size == 1:
            yield state
            return
        # Sums lie in the CPU's memory by then, whatever the models were run on.
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        for rank in range(self.size):
            yield _broadcast(state if rank == self.rank else None, rank, group)
        dist.destroy_process_group(group)


_PATIENCE = timedelta(days=7)
"""How long a process that is done waits for the others."""


@contextlib.contextmanager
def joined() -> Iterator[Shard]:
    """Joins the processes that torchrun started, and leaves them at the end.

    Each takes the GPU of its number on its machine, if there are any. Alone, nothing
    is done.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield Shard.current()
        return
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
        torch.cuda.set_device(local % torch.cuda.device_count())
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Shard.current()
    finally:
        dist.destroy_process_group()


def _broadcast(
    state: State | None, rank: int, group: dist.ProcessGroup | None
) -> State:
    """What one process has, to all."""
    blobs = [None, None]
    if state is not None:
        tensors = {n: t.cpu().contiguous() for n, t in state.tensors.items()}
        blobs = [save(tensors), json.dumps(state.record).encode()]
    tensors, record = (_broadcast_bytes(blob, rank, group) for blob in blobs)
    return State(load(tensors), json.loads(record))


def _broadcast_bytes(
    blob: bytes | None, rank: int, group: dist.ProcessGroup | None
) -> bytes:
    length = torch.tensor([0 if blob is None else len(blob)])
    dist.broadcast(length, rank, group=group)
    if blob is None:
        held = torch.empty(int(length), dtype=torch.uint8)
    else:
        held = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
    dist.broadcast(held, rank, group=group)
    return held.numpy().tobytes()
