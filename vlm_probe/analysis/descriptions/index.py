"""The descriptions of an export's sources, indexed once.

A source is read again when one of its files has another size or date than when it was
indexed, or when there are other files. What is written of a source is written whole.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from vlm_probe.analysis.descriptions.database import (
    cache_folder,
    database,
    rows_of,
    transaction,
)
from vlm_probe.analysis.descriptions.explanations import (
    Explanation,
    best,
    entries,
    source_of,
)
from vlm_probe.analysis.descriptions.sources import Source

_KIND = 0x56504458
_SCHEMA = (
    # What the first entry of a file says; empty in files that are no export.
    "CREATE TABLE looked_at (file TEXT PRIMARY KEY, stamp TEXT, model TEXT, id TEXT)",
    "CREATE TABLE sources (source TEXT PRIMARY KEY, stamp TEXT, n_described INTEGER,"
    " n_duplicates INTEGER, n_contradictions INTEGER, highest INTEGER)",
    "CREATE TABLE descriptions (source TEXT, feature INTEGER, description TEXT,"
    " PRIMARY KEY (source, feature)) WITHOUT ROWID",
)


@dataclass(frozen=True)
class Indexed:
    """What was counted as a source was indexed."""

    n_described: int
    """Features with a description."""
    n_duplicates: int
    """Explanations that repeat feature and explainer of an earlier one."""
    n_contradictions: int
    """Of these, how many say something else."""
    highest: int
    """The highest number of a feature that is named; -1 if none is."""


class DescriptionIndex:
    """A SQLite file with the descriptions of an export."""

    def __init__(self, path: Path, root: Path) -> None:
        """Names the file; it is made when it is needed.

        Args:
            path: Of the index.
            root: Of the export; files are remembered by their place in it.
        """
        self.path = path
        self._root = root

    def source_of(self, file: Path) -> Source | None:
        """Of which source a file is; None if it is no export."""
        key, stamp = self._key(file), _stamp([file])
        with database(self.path, _KIND, _SCHEMA) as opened:
            row = opened.execute(
                "SELECT model, id FROM looked_at WHERE file = ? AND stamp = ?",
                (key, stamp),
            ).fetchone()
            if row is None:
                found = source_of(file)
                row = (found.model, found.id) if found else (None, None)
                opened.execute(
                    "INSERT OR REPLACE INTO looked_at VALUES (?, ?, ?, ?)",
                    (key, stamp, *row),
                )
        return None if row[0] is None else Source(*row)

    def take(self, source: Source, files: Sequence[Path]) -> Indexed:
        """Indexes a source, unless it is indexed as it is.

        Raises:
            ValueError: A file is damaged, or has entries of another source.
        """
        stamp = _stamp(files, self._root)
        with database(self.path, _KIND, _SCHEMA) as opened:
            counts = opened.execute(
                "SELECT n_described, n_duplicates, n_contradictions, highest"
                " FROM sources WHERE source = ? AND stamp = ?",
                (str(source), stamp),
            ).fetchone()
            if counts is not None:
                return Indexed(*counts)
            told, counted = _read(source, files)
            with transaction(opened):
                opened.execute(
                    "DELETE FROM descriptions WHERE source = ?", (str(source),)
                )
                opened.executemany(
                    "INSERT INTO descriptions VALUES (?, ?, ?)",
                    ((str(source), *row) for row in told.items()),
                )
                opened.execute(
                    "INSERT OR REPLACE INTO sources VALUES (?, ?, ?, ?, ?, ?)",
                    (str(source), stamp, *astuple(counted)),
                )
        return counted

    def of(self, source: Source, features: Sequence[int]) -> dict[int, str]:
        """Those of the features that have a description."""
        query = (
            "SELECT feature, description FROM descriptions WHERE source = ?"
            " AND feature IN"
        )
        with database(self.path, _KIND, _SCHEMA) as opened:
            return dict(rows_of(opened, query, (str(source),), features))

    def described(self, source: Source) -> tuple[int, ...]:
        """All features that have a description, in order."""
        query = "SELECT feature FROM descriptions WHERE source = ? ORDER BY feature"
        with database(self.path, _KIND, _SCHEMA) as opened:
            return tuple(f for (f,) in opened.execute(query, (str(source),)))

    def _key(self, file: Path) -> str:
        return file.relative_to(self._root).as_posix()


def index_beside(folder: Path) -> Path:
    """Where the index of an export goes: into its folder, else among the caches."""
    if os.access(folder, os.W_OK):
        return folder / ".vlm_probe_descriptions.sqlite"
    place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return cache_folder() / "exports" / f"{place}.sqlite"


def _stamp(files: Sequence[Path], root: Path | None = None) -> str:
    """What changes when one of the files does."""
    told = [
        (str(file.relative_to(root) if root else ""), stat.st_size, stat.st_mtime_ns)
        for file in files
        for stat in [file.stat()]
    ]
    return hashlib.sha256(repr(told).encode()).hexdigest()


def _read(source: Source, files: Sequence[Path]) -> tuple[dict[int, str], Indexed]:
    """The description of each feature that has one, and what was counted."""
    said: dict[int, list[Explanation]] = {}
    highest, n_duplicates, n_contradictions = -1, 0, 0
    for file in files:
        for where, entry in entries(file):
            if entry.source != source and not entry.source.same_as(source):
                raise ValueError(
                    f"{where} of {file} is of {entry.source}, what comes before it of "
                    f"{source}; keep one source in each folder"
                )
            highest = max(highest, entry.feature)
            earlier = said.setdefault(entry.feature, [])
            for new in entry.explanations:
                same = [old for old in earlier if old.explainer == new.explainer]
                if same:
                    n_duplicates += 1
                    n_contradictions += new.description not in {
                        old.description for old in same
                    }
                earlier.append(new)
    chosen = {feature: best(each) for feature, each in sorted(said.items())}
    told = {
        feature: one.description
        for feature, one in chosen.items()
        if one is not None and one.description is not None
    }
    return told, Indexed(len(told), n_duplicates, n_contradictions, highest)
