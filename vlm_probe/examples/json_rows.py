"""The rows of a JSON list, or of a file with a JSON object a line."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from vlm_probe.examples.rows import Rows

_CHUNK = 1 << 20
"""Bytes that are read at once while rows are looked for."""
_SOMETHING = re.compile(r"[^ \t\n\r]")
_DECODER = json.JSONDecoder()
_LONGEST = 16
"""Characters that a word or an escape may take up before it makes sense."""
_WORDS = ("", "null", "true", "false", "NaN", "Infinity", "-Infinity")
"""What a value without quotes may be, but for numbers."""
_REMEDY = "repair it there, or write or download the file again"


def json_rows(
    path: Path, check: Callable[[int, object], object], *, chunk: int = _CHUNK
) -> Rows:
    """Finds the rows of a file, reading it once and not keeping it.

    Args:
        path: The file, in UTF-8.
        check: Is called with each row's number and what is in it, and raises if that
            is not what is expected. Each byte of a letter beyond ASCII is a character
            of its own there, unless it is called again to say what is amiss.
        chunk: Bytes that are read at once.

    Raises:
        ValueError: The file is empty, cut off, no JSON, or neither list nor lines;
            says which and at what byte.
        RuntimeError: The file is written to meanwhile.
    """
    with path.open("rb") as file:
        text = _Text(path, file, chunk)
        head = text.skip_space()
        if not head:
            raise ValueError(
                f"{path} is empty: there is nothing in its {text.place} bytes; "
                "expected a JSON list of rows, or a JSON object a line"
            )
        if head not in "[{":
            # A number, a word or a text is JSON too, but a list of nothing.
            said = text.text[text.at :][:16].encode("latin-1")
            raise ValueError(
                f"{path} is not JSON as expected: at byte {text.place} it begins with "
                f"{said!r}; it must hold a JSON list of rows ('[' ...), or a JSON "
                "object a line ('{' ...), in UTF-8 and not compressed"
            )
        found = _of_list(text) if head == "[" else _of_lines(text)
        return Rows.of(file, path, _checked(path, found, check))


def _checked(
    path: Path,
    found: Iterator[tuple[int, int, object]],
    check: Callable[[int, object], object],
) -> Iterator[tuple[int, int]]:
    for index, (begin, end, row) in enumerate(found):
        try:
            check(index, row)
        except ValueError:
            with path.open("rb") as file:
                file.seek(begin)
                check(index, json.loads(file.read(end - begin)))
            raise
        yield begin, end


class _Text:
    """A file's text from some byte on; what was read is let go, and more is taken.

    As Latin-1 bytes and characters are one to one, so that places are exact. Nothing
    that JSON is made of looks otherwise in UTF-8.
    """

    def __init__(self, path: Path, file: BinaryIO, chunk: int) -> None:
        self.path, self._file, self._chunk = path, file, chunk
        self.text = ""
        self.at = 0
        """Of what is in hand, the character that comes next."""
        self._begin = 0
        """The byte of the file that is the first in hand."""
        self._utf8 = codecs.getincrementaldecoder("utf-8")()

    @property
    def place(self) -> int:
        """The byte of the file that comes next."""
        return self._begin + self.at

    def more(self) -> bool:
        """Takes in more of the file, or says that there is none.

        At least as much as is in hand, lest a long row be looked through in vain again
        and again.
        """
        part = self._file.read(max(self._chunk, len(self.text) - self.at))
        self._check_utf8(part)
        self._begin += self.at
        self.text, self.at = self.text[self.at :] + part.decode("latin-1"), 0
        return bool(part)

    def skip_space(self) -> str:
        """The next character that is no white space; empty at the end of the file."""
        while True:
            found = _SOMETHING.search(self.text, self.at)
            self.at = found.start() if found else len(self.text)
            if found:
                return found[0]
            if not self.more():
                return ""

    def value(self, row: int) -> object:
        """The value that comes next.

        Args:
            row: Its number, for messages.
        """
        while True:
            try:
                value, self.at = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                place, rest = self._begin + error.pos, self.text[error.pos :]
                what = error.msg.removesuffix(" at")
                open_text = what.startswith("Unterminated string")
                if (open_text or len(rest) <= _LONGEST) and self.more():
                    continue
                raise self.wrong(
                    f"{what} at byte {place}, in row {row}",
                    ended=open_text or _may_go_on(rest),
                ) from error
            except (RecursionError, ValueError) as error:
                raise self.wrong(
                    f"row {row}, at byte {self.place}, cannot be read: {error}"
                ) from error
            return value

    def wrong(self, what: str, *, ended: bool = False) -> ValueError:
        """The error for something that is no JSON.

        Args:
            what: Is wrong, and where.
            ended: Whether it is so because nothing comes after it.
        """
        remedy = _REMEDY
        if ended:
            remedy = "the file ends there: it was cut off, copy or download it again"
        return ValueError(f"{self.path} is not JSON: {what}; {remedy}")

    def _check_utf8(self, part: bytes) -> None:
        if not self.place and part.startswith((b"\xff\xfe", b"\xfe\xff")):
            self._refuse_mark("UTF-16")
        try:
            begins = self._utf8.decode(part, final=not part)[:1]
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.path} is not in UTF-8: {error.reason} near byte "
                f"{self._file.tell() - len(part) + error.start}; {_REMEDY}"
            ) from error
        if begins == "\ufeff" and not self.text and not self._begin:
            self._refuse_mark("UTF-8")

    def _refuse_mark(self, encoding: str) -> None:
        raise ValueError(
            f"{self.path} begins with a byte order mark of {encoding}; save it as "
            "UTF-8 without one (without BOM)"
        )


def _of_list(text: _Text) -> Iterator[tuple[int, int, object]]:
    """Where rows begin and end, and what is in them."""
    text.at += 1  # the bracket
    n_rows = 0
    then = text.skip_space()
    while then != "]":
        begin = text.place
        row = text.value(n_rows)
        yield begin, text.place, row
        then = text.skip_space()
        if then not in (",", "]"):
            raise text.wrong(
                f"expected ',' or ']' at byte {text.place}, behind row {n_rows}",
                ended=not then,
            )
        if then == ",":
            comma = text.place
            text.at += 1
            then = text.skip_space()
            if then == "]":
                raise text.wrong(
                    f"a comma at byte {comma} stands behind the last row, {n_rows}"
                )
        n_rows += 1
    text.at += 1
    if text.skip_space():
        raise text.wrong(
            f"there is more at byte {text.place}, behind the end of the list"
        )


def _of_lines(text: _Text) -> Iterator[tuple[int, int, object]]:
    n_rows = 0
    while text.skip_space():
        begin = text.place
        row = text.value(n_rows)
        end = text.place
        then = text.skip_space()
        if not n_rows and not then and text.path.suffix == ".json":
            raise ValueError(
                f"{text.path} must hold a JSON list of rows, not a dict; put its row "
                "or rows in [ ], or name it .jsonl if there is to be one in a line"
            )
        yield begin, end, row
        if then not in ("", "{"):
            raise text.wrong(
                f"expected a JSON object at byte {text.place}, in the line behind row "
                f"{n_rows}; rows of a list are put in [ ]"
            )
        n_rows += 1


def _may_go_on(rest: str) -> bool:
    """Whether the end of a file is the beginning of something that makes sense."""
    rest = rest.strip()
    begun = re.fullmatch(r"\\?u?[0-9a-fA-F]{0,4}", rest)
    return bool(begun) or any(word.startswith(rest) for word in _WORDS)
