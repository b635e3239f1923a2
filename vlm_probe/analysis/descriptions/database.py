"""A small SQLite file of our own, opened for one use and closed again."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from platformdirs import user_cache_path

_AT_ONCE = 500
"""How many rows one query asks for; SQLite takes a limited number of parameters."""
_WAIT = 60.0
"""Seconds that another process may write before we give up."""


def cache_folder() -> Path:
    """Where caches go: `XDG_CACHE_HOME`/vlm_probe on Linux, its like elsewhere."""
    return user_cache_path("vlm_probe", appauthor=False)


@contextmanager
def database(
    path: Path, kind: int, schema: Sequence[str]
) -> Iterator[sqlite3.Connection]:
    """Opens the file, which is made if it is not there.

    Args:
        path: The file; its folder is made too.
        kind: A number that is written into files of this kind.
        schema: What makes its tables.

    Raises:
        ValueError: The file is there, and is none of this kind.
        OSError: It cannot be written or read.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(
            sqlite3.connect(path, timeout=_WAIT, isolation_level=None)
        ) as opened:
            _prepare(opened, path, kind, schema)
            yield opened
    except sqlite3.OperationalError as error:
        raise OSError(
            f"the cache {path} cannot be used ({error}); give another place for it"
        ) from error
    except sqlite3.DatabaseError as error:
        raise ValueError(
            f"{path} is damaged, or no cache of descriptions ({error}); delete it, "
            "for it is made anew, or give another place"
        ) from error


@contextmanager
def transaction(opened: sqlite3.Connection) -> Iterator[None]:
    """All that is written inside is there afterwards, or nothing of it."""
    opened.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        opened.execute("ROLLBACK")
        raise
    opened.execute("COMMIT")


def rows_of(
    opened: sqlite3.Connection, query: str, fixed: Sequence, features: Sequence[int]
) -> Iterator[tuple]:
    """Rows of a query that ends in `IN`, whatever the number of features."""
    for start in range(0, len(features), _AT_ONCE):
        some = features[start : start + _AT_ONCE]
        marks = ",".join("?" * len(some))
        yield from opened.execute(f"{query} ({marks})", (*fixed, *some))


def _prepare(
    opened: sqlite3.Connection, path: Path, kind: int, schema: Sequence[str]
) -> None:
    (found,) = opened.execute("PRAGMA application_id").fetchone()
    if found == kind:
        return
    with transaction(opened):
        (found,) = opened.execute("PRAGMA application_id").fetchone()
        if found == kind:  # another process was faster
            return
        (tables,) = opened.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if found or tables:
            raise ValueError(
                f"{path} is a database of something else; give another place"
            )
        for statement in schema:
            opened.execute(statement)
        opened.execute(f"PRAGMA application_id = {kind}")
