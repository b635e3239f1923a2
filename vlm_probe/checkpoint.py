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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

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
        """Finds or makes the folder.

        Args:
            folder: Of the run; every process of it has a file of its own there.
            configuration: What must be the same for a run to go on, JSON only.
            part: Number of this process, and how many there are.

        Raises:
            ValueError: The folder holds a run of another number of processes.
        """
        rank, size = part
        self.folder = Path(folder)
        # Through JSON, as it is when it is read again.
        self.configuration = json.loads(json.dumps(configuration))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / f"checkpoint-{rank}-of-{size}.safetensors"
        others = sorted(
            {f.stem.partition("-of-")[2] for f in self.folder.glob("checkpoint-*-of-*")}
            - {str(size)}
        )
        if others:
            raise ValueError(
                f"{self.folder} holds the checkpoint of a run by {others[0]} "
                f"processes, not {size}; start as many, or give another folder"
            )

    def load(self) -> State | None:
        """What was saved; None if nothing was.

        Raises:
            ValueError: The checkpoint is of another configuration; names each
                difference.
        """
        if not self.file.is_file():
            return None
        tensors, metadata = read_weights(self.file)
        kept = json_object(metadata.get("configuration", "{}"), str(self.file))
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
        return State(tensors, json_object(metadata["record"], str(self.file)))

    def save(self, state: State) -> None:
        """Writes the state; the one before is there until this one is whole."""
        unfinished = self.file.with_suffix(".unfinished")
        tensors = {name: t.cpu().contiguous() for name, t in state.tensors.items()}
        metadata = {
            "configuration": json.dumps(self.configuration),
            "record": json.dumps(state.record),
        }
        save_file(tensors, unfinished, metadata=metadata)
        _to_disk(unfinished)
        unfinished.replace(self.file)
        _to_disk(self.folder)


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


class Stop:
    """Whether someone asked the run to stop."""

    def __init__(self) -> None:
        self.asked = False


@contextlib.contextmanager
def stoppable() -> Iterator[Stop]:
    """Lets Ctrl-C, or a scheduler's SIGTERM, stop the run after its batch.

    The second time, or where the signals are not ours to take, as outside the main
    thread, it stops at once, as always.
    """
    stop = Stop()
    before = {}

    def ask(number: int, frame: FrameType | None) -> None:
        del frame
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        sys.stderr.write(
            f"\n{signal.Signals(number).name}: stopping after this batch; once more "
            "to stop at once\n"
        )

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
