"""The loss curve, on disk while it grows."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import pandas as pd

COLUMNS = (
    "stage",
    "step",
    "loss",
    "cross_entropy",
    "fvu",
    "learning_rate",
    "gradient_norm",
    "n_conversations",
    "n_tokens",
    "seconds",
    "tokens_per_second",
)
"""A row per step: `loss` is cross-entropy (in nats) plus the SAE penalty, `fvu` that of
the SAEs at image positions (missing where none is asked), `gradient_norm` before it was
clipped, `n_tokens` the assistant's. All but the last two are the same in every run."""


class Curve:
    """A row for each step of training, in a CSV file or in memory."""

    def __init__(self, file: Path | None) -> None:
        """Starts with no row; what is in the file already waits for `restore`."""
        self._file = file
        self._rows: list[list[object]] = []
        self._open: IO[str] | None = None

    def restore(self, stage: int, step: int) -> None:
        """Goes back to the rows up to a step; those behind it come again."""
        if self._file is None or not self._file.is_file():
            return
        with self._file.open(newline="") as opened:
            rows = [
                row
                for row in list(csv.reader(opened))[1:]
                # The last one may be cut off where the run was.
                if len(row) == len(COLUMNS)
                and (int(row[0]), int(row[1])) <= (stage, step)
            ]
        beside = self._file.with_suffix(".unfinished")
        with beside.open("w", newline="") as opened:
            csv.writer(opened).writerows([COLUMNS, *rows])
        beside.replace(self._file)

    def add(self, row: Mapping[str, object]) -> None:
        """Adds a step's row; floats are written so that they can be read exactly."""
        values = [row.get(name) for name in COLUMNS]
        if self._file is None:
            self._rows.append(values)
            return
        if self._open is None:
            begun = self._file.is_file()
            self._open = self._file.open("a", newline="")
            if not begun:
                csv.writer(self._open).writerow(COLUMNS)
        csv.writer(self._open).writerow(["" if v is None else v for v in values])
        self._open.flush()

    def to_disk(self) -> None:
        """Waits until all rows lie on disk, so that none is behind a checkpoint."""
        if self._open is not None:
            os.fsync(self._open.fileno())

    def close(self) -> None:
        """Lets go of the file."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def table(self) -> pd.DataFrame:
        """All rows."""
        if self._file is None or not self._file.is_file():
            return pd.DataFrame(self._rows, columns=list(COLUMNS))
        return pd.read_csv(self._file)
