"""Answers on disk: what was once answered is not asked again."""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

_TABLE = """
CREATE TABLE IF NOT EXISTS judge_answers (
    key TEXT PRIMARY KEY,
    verdict INTEGER,
    model TEXT NOT NULL,
    prompt_version TEXT NOT NULL,
    description TEXT NOT NULL,
    reply TEXT
)
"""
_BUSY = 30.0
"""How long one process waits for another that writes, in seconds."""
_AT_ONCE = 500
"""Keys in one query; SQLite of old allows 999."""


def key_of(*parts: str | bytes) -> str:
    """SHA-256 of the parts, each behind its length so that none runs into the next."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


class Answers:
    """A file of answers, by key. Threads and processes may share one.

    Every answer is committed as it comes: a process that is killed has lost none that
    `keep` returned for.
    """

    def __init__(self, path: str | Path) -> None:
        """Opens or makes the file, and the folder it is in.

        Raises:
            ValueError: The file is there and holds something else.
        """
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._file = sqlite3.connect(self.path, timeout=_BUSY, check_same_thread=False)
        try:
            with self._file:
                self._file.execute(_TABLE)
            self._file.execute("SELECT key, verdict, reply FROM judge_answers LIMIT 0")
        except sqlite3.DatabaseError as error:
            self._file.close()
            raise ValueError(
                f"{self.path} cannot be used to keep answers ({error}); give the file "
                "of an earlier judge, or a path where there is none"
            ) from error

    def __enter__(self) -> Answers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def known(self, keys: Iterable[str]) -> dict[str, bool | None]:
        """The answers there are, by key; None for one that could not be used."""
        wanted = list(dict.fromkeys(keys))
        found: dict[str, bool | None] = {}
        for start in range(0, len(wanted), _AT_ONCE):
            some = wanted[start : start + _AT_ONCE]
            marks = ",".join("?" * len(some))
            with self._lock:
                rows = self._file.execute(
                    f"SELECT key, verdict FROM judge_answers WHERE key IN ({marks})",
                    some,
                ).fetchall()
            found.update((key, None if v is None else bool(v)) for key, v in rows)
        return found

    def keep(
        self,
        keys: Sequence[str],
        verdicts: Sequence[bool | None],
        *,
        model: str,
        prompt_version: str,
        descriptions: Sequence[str],
        reply: str | None,
    ) -> None:
        """Writes the answers to what one request asked, all of them or none."""
        rows = [
            (key, None if v is None else int(v), model, prompt_version, words, reply)
            for key, v, words in zip(keys, verdicts, descriptions, strict=True)
        ]
        with self._lock, self._file:
            self._file.executemany(
                "INSERT OR REPLACE INTO judge_answers VALUES (?, ?, ?, ?, ?, ?)", rows
            )

    def forget_unusable(self) -> int:
        """Drops answers that could not be used, so that they are asked once more.

        Returns:
            How many there were.
        """
        with self._lock, self._file:
            gone = self._file.execute("DELETE FROM judge_answers WHERE verdict IS NULL")
            return gone.rowcount
