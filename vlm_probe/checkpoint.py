"""A run that can be killed and goes on.

What a run has added up lies in one file, which is written beside the old one and then
takes its name, so that whenever the machine stops there is one that is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO
from weakref import WeakSet

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vlm_probe.weights import json_object, read_weights


@dataclass(frozen=True)
class State:
    """All that a run knows so far."""

    tensors: dict[str, Tensor]
    record: dict
    """What else there is, JSON only."""


class Checkpoint:
    """The file of one process' part of a run."""

    def __init__(
        self,
        folder: str | Path,
        configuration: Mapping,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        """Finds or makes the folder, and takes this part of it.

        Args:
            folder: Of the run; every process of it has a file of its own there.
            configuration: What must be the same for a run to go on, JSON only.
            part: Number of this process, and how many there are.

        Raises:
            OSError: The folder cannot be made or written to, or another process that
                is still running has this part.
            ValueError: The folder holds a run of another number of processes.
        """
        rank, size = part
        self.folder = Path(folder)
        # Through JSON, as it is when it is read again.
        self.configuration = json.loads(json.dumps(configuration))
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(
                f"the checkpoint {self.folder} is a file; give a folder, which is made "
                "if it is not there"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / f"checkpoint-{rank}-of-{size}.safetensors"
        others = sorted(
            {
                file.stem.partition("-of-")[2]
                for file in self.folder.glob("checkpoint-*-of-*.safetensors")
            }
            - {str(size)}
        )
        if others:
            raise ValueError(
                f"{self.folder} holds the checkpoint of a run by {others[0]} "
                f"processes, not {size}; start as many, or give another folder"
            )
        self._lock = _lock(self.file.with_suffix(".lock"))
        self._saved = time.monotonic()

    def load(self) -> State | None:
        """What was saved; None if nothing was.

        Raises:
            ValueError: The checkpoint is damaged, or of another configuration; names
                each difference.
        """
        if not self.file.is_file():
            return None
        try:
            tensors, metadata = read_weights(self.file)
            record = json_object(
                tensors.pop(_RECORD).numpy().tobytes(), f"the record in {self.file}"
            )
            kept = json_object(
                metadata["configuration"], f"the configuration in {self.file}"
            )
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"the checkpoint {self.file} is damaged, or no checkpoint ({error}); "
                "delete it, and the run begins again"
            ) from error
        differences = list(_differences(kept, self.configuration))
        if differences:
            more = len(differences) - 8
            raise ValueError(
                f"the checkpoint in {self.folder} is of another run: "
                + "; ".join(differences[:8])
                + (f"; and {more} more" if more > 0 else "")
                + ". Go on with what it was begun with, delete it, or give another "
                "folder"
            )
        return State(tensors, record)

    def save(self, state: State) -> None:
        """Writes the state; the one before is there until this one is whole.

        Raises:
            OSError: It cannot be written.
        """
        unfinished = self.file.with_suffix(".unfinished")
        tensors = {name: t.cpu().contiguous() for name, t in state.tensors.items()}
        # Not among the metadata, whose length is limited, as the images' is not.
        record = json.dumps(state.record).encode()
        tensors[_RECORD] = torch.frombuffer(bytearray(record), dtype=torch.uint8)
        metadata = {"configuration": json.dumps(self.configuration)}
        try:
            save_file(tensors, unfinished, metadata=metadata)
            _to_disk(unfinished)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise OSError(
                f"the checkpoint cannot be written to {self.folder} ({error}); make "
                "room there, or give another folder"
            ) from error
        unfinished.replace(self.file)
        _to_disk(self.folder)
        self._saved = time.monotonic()

    def age(self) -> float:
        """Seconds since it was last written, or opened."""
        return time.monotonic() - self._saved

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        """Lets another process take this part."""
        if self._lock is not None and not self._lock.closed:
            import fcntl

            _LOCKS.discard(self._lock)

            # Closing alone would leave it to processes forked meanwhile.
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            self._lock.close()


_RECORD = "record"


_LOCKS: WeakSet[IO[str]] = WeakSet()
"""Files that this process holds."""


def _let_go() -> None:
    """Closes what a fork inherited, which would outlive this process otherwise."""
    for lock in list(_LOCKS):
        lock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def _lock(file: Path) -> IO[str] | None:
    """Holds a file as long as this process lives; None where locks are not to be had.

    Else a job that was put back in the queue, and the one that is still dying, would
    write to the same checkpoint.
    """
    try:
        import fcntl
    except ImportError:
        return None
    opened = file.open("w")
    _LOCKS.add(opened)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        opened.close()
        raise BlockingIOError(
            f"another process goes on with the checkpoint in {file.parent}; wait for "
            "its end, or give another folder"
        ) from error
    except OSError:  # a file system without locks
        opened.close()
        return None
    return opened


def _to_disk(path: Path) -> None:
    """Waits until what was written to a file or folder lies on disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _differences(kept: object, now: object, name: str = "") -> Iterator[str]:
    """What differs, by the names of entries."""
    if isinstance(kept, dict) and isinstance(now, dict):
        for key in kept | now:
            inner = f"{name}.{key}" if name else key
            yield from _differences(kept.get(key), now.get(key), inner)
    elif kept != now:
        yield f"{name} was {_short(kept)}, is now {_short(now)}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:18]}...{text[-18:]}"


@dataclass
class Stop:
    """Whether someone asked the run to stop."""

    asked: bool = False
    at: float = 0.0
    """When, in seconds of the process' clock."""


_AGAIN = 1.0
"""Seconds until a second Ctrl-C is meant: one keypress reaches a process twice where
what started it passes signals on, as torchrun does."""


@contextlib.contextmanager
def stoppable() -> Iterator[Stop]:
    """Lets Ctrl-C, or a scheduler's SIGTERM, stop the run after its batch.

    A second Ctrl-C stops it at once. Where the signals are not ours to take, as outside
    the main thread, they do what they always do.
    """
    stop = Stop()
    before = {}

    def ask(number: int, frame: FrameType | None) -> None:
        del frame
        now = time.monotonic()
        if not stop.asked:
            stop.asked, stop.at = True, now
            name = signal.Signals(number).name
            sys.stderr.write(
                f"\n{name}: stopping after this batch; Ctrl-C once more to stop at "
                "once\n"
            )
        elif number == signal.SIGINT and now - stop.at >= _AGAIN:
            raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            # Ignored for processes in the background of a shell: left so.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
