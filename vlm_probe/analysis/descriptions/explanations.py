"""What Neuronpedia says of features, as its files and its API write it.

A line of `explanations/batch-*.jsonl.gz`, and an entry of `explanations-only/*.json`,
is an explanation with its `modelId`, `layer` (the source's id), `index`, `description`,
`typeName` and `explanationModelName`. An entry of the older files of 128 features, and
an answer of the API, is a feature with a list of `explanations`, each with its `scores`
and `createdAt`.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from vlm_probe.analysis.descriptions.sources import Source


class Explanation(NamedTuple):
    """One thing that one explainer says of a feature."""

    description: str | None
    """None if it says nothing."""
    explainer: str
    """Method and model that wrote it."""
    score: float | None
    """The mean of its scores, if it has any."""
    created: str
    """When it was written, ISO 8601; empty if that is not told."""


class Entry(NamedTuple):
    """What one line or entry says of a feature."""

    source: Source
    feature: int
    explanations: tuple[Explanation, ...]


def entries(file: Path) -> Iterator[tuple[str, Entry]]:
    """Each entry of an export's file, with its place for messages.

    Raises:
        ValueError: The file is damaged or no export; names it and the line.
    """
    for where, record in _records(file):
        if not is_entry(record):
            raise ValueError(
                f"{where} of {file} is no explanation or feature of Neuronpedia: "
                f"expected modelId, layer, index and description, got {_short(record)}"
            )
        yield where, entry(record, f"{where} of {file}")


def source_of(file: Path) -> Source | None:
    """Of which source a file is, by its first entry; None if it is no export.

    Raises:
        ValueError: The file is damaged.
    """
    for where, record in _records(file, strict=False):
        return entry(record, f"{where} of {file}").source if is_entry(record) else None
    return None


def is_entry(record: object) -> bool:
    """Whether this looks like a feature or an explanation of Neuronpedia."""
    return (
        isinstance(record, dict)
        and {"modelId", "layer", "index"} <= set(record)
        and ("description" in record or isinstance(record.get("explanations"), list))
    )


def entry(record: dict, where: str) -> Entry:
    """What a record says.

    Raises:
        ValueError: Its index is none, or its explanations are of another form.
    """
    index = str(record["index"])
    if not (index.isascii() and index.isdecimal() and len(index) < 10):
        raise ValueError(f"{where}: index {record['index']!r} is no feature's number")
    if isinstance(record.get("explanations"), list):
        found = record["explanations"]
    else:
        found = [record]
    return Entry(
        _source(str(record["modelId"]), str(record["layer"])),
        int(index),
        tuple(_explanation(each, where) for each in found),
    )


# All entries of a file name the same one.
_source = lru_cache(64)(Source)


def best(explanations: Iterable[Explanation]) -> Explanation | None:
    """The one that is shown, of several.

    That with the highest score; those without any come behind. Of equal ones the
    latest, and of those the first that is written.
    """
    said = [each for each in explanations if each.description is not None]
    return max(
        said,
        key=lambda each: (
            each.score is not None,
            each.score or 0.0,
            each.created,
        ),
        default=None,
    )


def _explanation(record: object, where: str) -> Explanation:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: an explanation is {_short(record)}, no object")
    text = record.get("description")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{where}: the description is {_short(text)}, no text")
    scores = [
        float(score["value"])
        for score in record.get("scores") or ()
        if isinstance(score, dict)
        and isinstance(score.get("value"), int | float)
        and math.isfinite(score["value"])
    ]
    return Explanation(
        sound(text) if text and text.strip() else None,
        f"{record.get('typeName')} by {record.get('explanationModelName')}",
        sum(scores) / len(scores) if scores else None,
        str(record.get("createdAt") or ""),
    )


def sound(text: str) -> str:
    """The text without halves of surrogate pairs, which no file can hold as UTF-8."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _records(file: Path, *, strict: bool = True) -> Iterator[tuple[str, object]]:
    """Each record of a file, and its place in it.

    Args:
        file: Of JSON lines or JSON, as it is or packed by gzip.
        strict: Whether JSON that is no list of records is an error, or just empty.
    """
    opened = gzip.open if file.suffix == ".gz" else open
    by_line = ".jsonl" in file.suffixes
    try:
        with opened(file, "rb") as lines:
            if by_line:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield f"line {number}", _parse(line, file, number)
                return
            whole = _parse(lines.read(), file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{file} is cut off or damaged ({error}); download it again"
        ) from error
    found = whole.get("features") if isinstance(whole, dict) else whole
    if isinstance(found, list):
        yield from ((f"entry {n}", record) for n, record in enumerate(found, 1))
    elif strict:
        raise ValueError(
            f"{file} holds {_short(whole)}; expected a list of features or explanations"
        )


def _parse(text: bytes, file: Path, line: int | None = None) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        number, said = line or error.lineno, error.msg
    except UnicodeDecodeError as error:
        number, said = line or text[: error.start].count(b"\n") + 1, "no UTF-8"
    raise ValueError(
        f"line {number} of {file} is no JSON ({said}); download the file again"
    )


def _short(value: object) -> str:
    said = json.dumps(value, default=str)
    return said if len(said) <= 80 else f"{said[:77]}..."
