"""A file's rows are found once, and read again one at a time.

Of each row nothing is kept but the bytes at which it begins and ends, so that memory
does not grow with what stands in the file.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Int64


@dataclass(frozen=True, eq=False)
class Rows:
    """Where each row of a file begins and ends."""

    path: Path
    spans: Int64[np.ndarray, "row 2"]
    """First byte of each row, and the byte behind its last one."""
    stamp: tuple[int, int]
    """Size in bytes and time of change in nanoseconds, when the rows were found."""

    @classmethod
    def of(cls, file: BinaryIO, path: Path, spans: Iterable[tuple[int, int]]) -> Rows:
        """Takes the rows from what finds them while it reads the open file.

        Raises:
            RuntimeError: The file is written to meanwhile.
        """
        stamp, found = _stamp(file), array("q")
        for span in spans:
            found.extend(span)
        rows = cls(path, np.array(found, np.int64).reshape(-1, 2), stamp)
        rows._check_unchanged(file)
        return rows

    def __len__(self) -> int:
        return len(self.spans)

    def text(self, index: int) -> str:
        """What a row says.

        The file is opened anew each time: threads and processes share no place in it.

        Raises:
            RuntimeError: The file is no longer the one in which rows were found.
        """
        begin, end = self.spans[index].tolist()
        with self.path.open("rb") as file:
            self._check_unchanged(file)
            file.seek(begin)
            return file.read(end - begin).decode()

    def _check_unchanged(self, file: BinaryIO) -> None:
        now = _stamp(file)
        if now != self.stamp:
            raise RuntimeError(
                f"{self.path} has changed since it was opened: it had {self.stamp[0]} "
                f"bytes and has {now[0]}, or was written again; its rows are no longer "
                "where they were; read it again with read_examples"
            )


def _stamp(file: BinaryIO) -> tuple[int, int]:
    about = os.fstat(file.fileno())
    return about.st_size, about.st_mtime_ns
