"""The rows of a file of comma-separated values."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from vlm_probe.examples.rows import Rows


def csv_rows(
    path: Path, check: Callable[[int, dict[str, str]], object]
) -> tuple[list[str], Rows]:
    """Finds the rows of a table.

    Args:
        path: The file, in UTF-8.
        check: Is called with each row's number and its fields by column, and raises
            if they are not what is expected.

    Returns:
        The names of its columns, and the rows below them; `csv_fields` reads one.

    Raises:
        ValueError: The file is empty, not in UTF-8 or no such table; says which.
    """
    with path.open("rb") as file:
        lines = _Lines(file)
        reader = csv.reader(lines, strict=True)
        try:
            header = next(reader, [])
            if not header:
                raise ValueError(
                    f"{path} is empty; expected a line with the names of columns"
                )
            header[0] = header[0].removeprefix("\ufeff")  # spreadsheets put it there
            rows = Rows.of(file, path, _spans(path, lines, reader, header, check))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path} is no table of comma-separated values in UTF-8: {error}, in "
                f"line {lines.number}; write it anew"
            ) from error
    return header, rows


def csv_fields(text: str) -> list[str]:
    """The fields of one row."""
    return next(csv.reader(io.StringIO(text, newline=""), strict=True))


class _Lines:
    """A file's lines, counted as they are taken."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.number = 0
        self.end = 0
        """Byte behind the last line that was taken."""

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            self.number += 1
            self.end += len(line)
            yield line.decode()


def _spans(
    path: Path,
    lines: _Lines,
    reader: Iterator[list[str]],
    columns: list[str],
    check: Callable[[int, dict[str, str]], object],
) -> Iterator[tuple[int, int]]:
    index, begin = 0, lines.end
    for row in reader:  # which takes the lines of one row, and none ahead of it
        if row and len(row) != len(columns):
            raise ValueError(
                f"line {lines.number} of {path} has {len(row)} fields where its first "
                f"line names {len(columns)} columns; put text with commas in double "
                "quotes"
            )
        if row:  # an empty line is none
            check(index, dict(zip(columns, row, strict=True)))
            yield begin, lines.end
            index += 1
        begin = lines.end
