"""One run, shared by several processes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch.distributed import distributed_c10d

from vlm_probe.checkpoint import State

_RUNS = itertools.count()
"""Numbers of the runs of this process, which are those of the others, too."""
_SILENCE = 120.0
"""Seconds after which a process that gives no sign of life is taken for dead."""
_PATIENCE = timedelta(minutes=30)
"""How long one exchange may take, once all processes are there."""


class Shard:
    """Which of the processes of a run this is."""

    def __init__(self) -> None:
        """As torch.distributed says; the only one where that is not in use."""
        self.rank, self.size = 0, 1
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
        if self.size > 1:
            self._store = distributed_c10d.PrefixStore(
                f"vlm_probe/{next(_RUNS)}", distributed_c10d._get_default_store()
            )

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Tells the others that this process lives, and if what is done in it fails.

        So that none waits for it in vain.
        """
        if self.size == 1:
            yield
            return
        over = threading.Event()
        threading.Thread(target=self._beat, args=[over], daemon=True).start()
        try:
            yield
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
            self._store.set(f"{self.rank}", f"failed: {said}")
            raise
        finally:
            over.set()

    def gather(self, state: State) -> Iterator[State]:
        """The states of all processes, one after the other; on every process alike.

        Every process must call it, and take all of them.

        Raises:
            RuntimeError: Another process failed; says which, and with what.
        """
        if self.size == 1:
            yield state
            return
        self._store.set(f"{self.rank}", "done")
        for rank in range(self.size):
            said = self._wait_for(rank)
            if said != "done":
                raise RuntimeError(
                    f"process {rank} of {self.size} {said}. What it had done is in its "
                    "checkpoint, if there is one; start all of them again"
                )
        # Sums lie in the CPU's memory by then, whatever the models were run on.
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        for rank in range(self.size):
            yield _broadcast(state if rank == self.rank else None, rank, group)
        dist.destroy_process_group(group)

    def _wait_for(self, rank: int) -> str:
        """What a process says when it is through.

        Not in one call of the library, which may take all night and hears no signal.
        """
        beat, heard = b"", time.monotonic()
        while not self._store.check([f"{rank}"]):
            if self._store.check([f"{rank} beat"]):
                before, beat = beat, self._store.get(f"{rank} beat")
                heard = heard if beat == before else time.monotonic()
            if time.monotonic() - heard > _SILENCE:
                return f"gave no sign of life for {_SILENCE:.0f} s"
            time.sleep(0.2)
        return self._store.get(f"{rank}").decode()

    def _beat(self, over: threading.Event) -> None:
        for n in itertools.count():
            try:
                self._store.set(f"{self.rank} beat", f"{n}")
            except RuntimeError:  # the process that has the store has ended
                return
            if over.wait(_SILENCE / 10):
                return


@contextlib.contextmanager
def joined() -> Iterator[Shard]:
    """Joins the processes that torchrun started, and leaves them when all are done.

    Each takes the GPU of its number on its machine, if there are any. Alone, nothing
    is done.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield Shard()
        return
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
        torch.cuda.set_device(local % torch.cuda.device_count())
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Shard()
        # What starts them ends all as soon as one has ended otherwise than well.
        dist.barrier()
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
