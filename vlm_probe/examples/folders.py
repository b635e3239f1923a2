"""A folder of pictures, with a table of captions or a text beside each picture."""

from __future__ import annotations

import json
from pathlib import Path

from vlm_probe.examples.example import Example
from vlm_probe.examples.json_rows import json_rows
from vlm_probe.examples.sequence import Examples
from vlm_probe.examples.tables import csv_fields, csv_rows
from vlm_probe.examples.turns import check_on_disk

TABLES = ("metadata.jsonl", "metadata.csv")
"""What Hugging Face's "imagefolder" calls its table."""
PICTURES = (
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jp2", ".jpeg", ".jpg", ".pgm"),
    *(".png", ".ppm", ".tif", ".tiff", ".webp"),
)
"""How files of pictures are named, in small letters or large."""
_CAPTIONS = ("caption", "text")
"""Columns that a caption may stand in, the one that counts first."""


def read_folder(folder: Path, images: Path | None = None) -> Examples:
    """The pictures of a folder.

    Args:
        folder: With `metadata.jsonl` or `metadata.csv`, whose rows are the examples:
            `file_name`, and `caption` or `text`. Else every picture in it, and in
            folders inside it, is one, its caption in a `.txt` file of the same stem.
        images: That paths in the table start from; the folder itself if None.

    Raises:
        ValueError: There are two tables, or one that is not as it should be.
        FileNotFoundError: There is no table and no picture.
    """
    tables = [folder / name for name in TABLES if (folder / name).is_file()]
    if len(tables) > 1:
        raise ValueError(
            f"{folder} has {' and '.join(TABLES)}; which one holds? Remove the other"
        )
    if tables:
        return _Table(tables[0], folder if images is None else images)
    if images is not None:
        raise ValueError(
            f"images={str(images)!r} goes with a conversation file, or with a folder "
            f"that has {' or '.join(TABLES)}, which {folder} has not"
        )
    return _Pictures(folder)


class _Pictures(Examples):
    """Every picture, and the text beside it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Names only, since a million paths would take ten times as much memory.
        self._names = sorted(
            file.relative_to(folder).as_posix()
            for file in folder.rglob("*")
            if file.suffix.lower() in PICTURES
        )
        if not self._names:
            raise FileNotFoundError(
                f"{folder} has no examples: looked for {' and '.join(TABLES)} in it, "
                f"and for pictures ({', '.join(PICTURES)}) in it and in folders inside"
            )

    def __len__(self) -> int:
        return len(self._names)

    def _at(self, place: int) -> Example:
        name = self._names[place]
        return _captioned(self._folder / name, name, self._caption(name))

    @property
    def _source(self) -> str:
        return str(self._folder)

    def _caption(self, name: str) -> str | None:
        file = (self._folder / name).with_suffix(".txt")
        try:
            return file.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            return None
        except UnicodeDecodeError as error:
            raise ValueError(
                f"the caption {file} is not in UTF-8: {error}; write it anew"
            ) from error


class _Table(Examples):
    """The rows of metadata.jsonl or metadata.csv."""

    def __init__(self, table: Path, images: Path) -> None:
        self._table = table
        self._images = images
        self._columns: list[str] | None = None
        if table.suffix == ".jsonl":
            self._rows = json_rows(table, self._check)
        else:
            self._columns, self._rows = csv_rows(table, self._check)

    def __len__(self) -> int:
        return len(self._rows)

    def _at(self, place: int) -> Example:
        text = self._rows.text(place)
        if self._columns is None:
            row = json.loads(text)
        else:
            row = dict(zip(self._columns, csv_fields(text), strict=True))
        name, caption = self._check(place, row)
        return _captioned(self._images / name, name, caption)

    @property
    def _source(self) -> str:
        return str(self._table)

    def _check(self, index: int, row: object) -> tuple[str, str | None]:
        """The picture and the caption in a row that is as it should be."""
        where = f"row {index} of {self._table}"
        given = list(row) if isinstance(row, dict) else []
        columns = [column for column in _CAPTIONS if column in given]
        if not isinstance(row, dict) or "file_name" not in row or not columns:
            raise ValueError(
                f"{where} has the columns {given}; expected 'file_name', and 'caption' "
                "or 'text'"
            )
        name, caption = row["file_name"], row[columns[0]]
        if not isinstance(name, str) or not name:
            raise ValueError(f"{where}: 'file_name' must be a path, given {name!r}")
        check_on_disk(where, name)
        if not isinstance(caption, str | None):
            raise ValueError(f"{where}: {columns[0]!r} must be text, given {caption!r}")
        return name, caption


def _captioned(picture: Path, name: str, caption: str | None) -> Example:
    said = (caption or "").strip() or None
    return Example(picture, answer=said, caption=said, id=name)
