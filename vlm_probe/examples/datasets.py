"""The rows of a dataset of Hugging Face's library `datasets` become examples.

The library itself is imported only to read a dataset from disk: one in memory is known
by what it can do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from vlm_probe.examples.example import Example
from vlm_probe.examples.sequence import Examples, ExampleStream
from vlm_probe.examples.turns import (
    check_on_disk,
    paired,
    words_of_llava,
    words_of_messages,
)

_TALK = (
    ("conversations",),
    ("messages",),
    ("prompt", "question", "answer"),
    ("caption", "text"),
)
"""Columns in which something is said; of the first group that is there."""
_UNDERSTOOD = (
    "'image' (or 'images' with one in each row), and 'conversations' (LLaVA's), "
    "'messages' ('role' and 'content'), 'prompt' or 'question' and 'answer', or "
    "'caption' or 'text'; 'id' if it is there"
)


def is_dataset(source: object) -> bool:
    """Whether this is a dataset, or several of them in splits."""
    return hasattr(source, "column_names") and isinstance(source, Iterable)


def read_dataset(source: Any, images: Path | None = None) -> Examples | ExampleStream:  # noqa: ANN401 -- not imported
    """Examples of a dataset.

    Args:
        source: With rows by number, or in order only.
        images: That paths start from; where Python was started if None.

    Raises:
        ValueError: There are several splits, or nothing is known of its columns.
    """
    columns = source.column_names
    if isinstance(columns, Mapping):
        raise ValueError(
            f"the dataset has the splits {', '.join(map(repr, columns))}; give one of "
            f"them, such as dataset[{next(iter(columns), 'train')!r}]"
        )
    if columns is None:  # of a stream nobody has looked at yet
        columns = list(next(iter(source), {}))
    reader = _Reader(columns, images)
    source = _undecoded(source, reader.picture)
    if hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        return _Dataset(source, reader)
    return ExampleStream(source, reader)


_SPLITS = "dataset_dict.json"
_SAVED = ("dataset_info.json", "state.json")
"""Files that `save_to_disk` writes, of several splits and of one."""


def read_saved(folder: Path, images: Path | None = None) -> Examples | None:
    """Examples of a dataset that was saved to disk; None if the folder is none.

    Raises:
        ValueError: There are several splits, or nothing is known of its columns.
    """
    if (folder / _SPLITS).is_file():
        splits = sorted(f.name for f in folder.iterdir() if f.is_dir())
        raise ValueError(
            f"{folder} holds the splits {', '.join(map(repr, splits))} of a dataset; "
            f"give the folder of one of them, such as {folder / splits[0]}"
        )
    if not all((folder / name).is_file() for name in _SAVED):
        return None
    import datasets

    found = read_dataset(datasets.load_from_disk(folder), images)
    return found if isinstance(found, Examples) else None


class _Dataset(Examples):
    """The rows of a dataset."""

    def __init__(self, rows: Any, reader: _Reader) -> None:  # noqa: ANN401
        self._rows = rows
        self._reader = reader

    def __len__(self) -> int:
        return len(self._rows)

    def _at(self, place: int) -> Example:
        return self._reader(place, self._rows[place])

    @property
    def _source(self) -> str:
        return f"a dataset with {self._reader}"


class _Reader:
    """Makes an example of a row."""

    def __init__(self, columns: Sequence[str], images: Path | None) -> None:
        self.picture = next((c for c in ("image", "images") if c in columns), None)
        kinds = ([c for c in group if c in columns] for group in _TALK)
        self._talk = next(filter(None, kinds), [])
        alone = self.picture is not None and set(columns) <= {self.picture, "id"}
        if not self._talk and not alone:
            given = ", ".join(map(repr, columns)) or "no column"
            raise ValueError(
                f"the dataset has {given}; understood are {_UNDERSTOOD}; call its "
                "rename_column for one that is named otherwise, or "
                "select_columns('image') to take pictures with nothing said of them"
            )
        self._images = images

    def __repr__(self) -> str:
        return " and ".join(filter(None, [self.picture, *self._talk]))

    def __call__(self, index: int, row: Mapping) -> Example:
        """The example of a row and its number."""
        where = f"row {index} of the dataset"
        name = row.get("id")
        image = self._image(where, row)
        prompt, answer, caption, turns = self._said(where, row)
        return Example(
            image=image,
            prompt=prompt,
            answer=answer,
            caption=caption,
            id=str(index if name is None else name),
            turns=turns,
        )

    def _image(self, where: str, row: Mapping) -> Image.Image | Path | bytes | None:
        image = None if self.picture is None else row[self.picture]
        if self.picture == "images" and isinstance(image, list):
            if len(image) > 1:
                raise ValueError(
                    f"{where} has {len(image)} pictures; an example has one, or none"
                )
            image = image[0] if image else None
        if isinstance(image, Mapping):  # as files are that nobody has decoded
            image = image.get("bytes") or image.get("path")
        if isinstance(image, str):
            check_on_disk(where, image)
            return Path(image) if self._images is None else self._images / image
        if not isinstance(image, Image.Image | bytes | None):
            raise ValueError(
                f"{where}: {self.picture!r} is of type {type(image).__name__}; "
                "expected a picture of PIL or a path"
            )
        return image

    def _said(
        self, where: str, row: Mapping
    ) -> tuple[str | None, str | None, str | None, tuple[tuple[str, str], ...]]:
        """Prompt, answer, caption and further turns."""
        caption = _text(where, row, "caption")
        kind = self._talk[0] if self._talk else None
        if kind in ("conversations", "messages"):
            read = words_of_llava if kind == "conversations" else words_of_messages
            said = read(where, _listed(where, kind, row[kind]))
            prompt, answer, turns = paired(said)
            return prompt, answer, caption, turns
        if kind in ("prompt", "question", "answer"):
            asked = "prompt" if "prompt" in self._talk else "question"
            prompt, answer = _text(where, row, asked), _text(where, row, "answer")
            return prompt, answer, caption, ()
        if kind == "text":
            caption = _text(where, row, "text")
        return None, caption, caption, ()


def _text(where: str, row: Mapping, column: str) -> str | None:
    """What stands in a column; None if there is no such column, or nothing in it."""
    value = row.get(column)
    if not isinstance(value, str | None):
        raise ValueError(f"{where}: {column!r} must be text, given {value!r}")
    return (value or "").replace("<image>", "").strip() or None


def _listed(where: str, column: str, value: object) -> list:
    """A list of turns; a table with a list in each column is turned into one."""
    if isinstance(value, Mapping) and all(isinstance(v, list) for v in value.values()):
        turns = zip(*value.values(), strict=True)
        return [dict(zip(value, turn, strict=True)) for turn in turns]
    if not isinstance(value, list):
        raise ValueError(
            f"{where}: {column!r} must be a list of turns, given {value!r}"
        )
    return value


def _undecoded(source: Any, column: str | None) -> Any:  # noqa: ANN401 -- not imported
    """The dataset with pictures as they stand in their files.

    Decoded with its row, a damaged picture would take away the row, and with it the
    name under which it is to be listed.
    """
    feature = (getattr(source, "features", None) or {}).get(column)
    inside = getattr(feature, "feature", None)  # of the pictures in a list
    if isinstance(getattr(feature, "decode", None), bool):
        return source.cast_column(column, replace(feature, decode=False))
    if isinstance(getattr(inside, "decode", None), bool):
        inside = replace(inside, decode=False)
        return source.cast_column(column, replace(feature, feature=inside))
    return source
