"""Examples come in blocks, their pictures read one block ahead.

A block is a run of examples by their place, whatever is wrong with some of them. So
what is in one block never depends on another: a run that is resumed, or shared by
several processes, computes the very batches of one that goes straight through.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from vlm_probe.examples import UNREADABLE, Example, as_examples


@dataclass(frozen=True)
class Item:
    """An example whose picture could be read."""

    index: int
    """Place in the run, from 0."""
    example: Example
    picture: Image.Image


@dataclass(frozen=True)
class Failure:
    """An example that could not be used."""

    image: int
    """Place in the run, from 0."""
    id: str
    error: str
    """Why not, with the kind of error in front."""

    @classmethod
    def of(cls, index: int, example: Example, error: Exception) -> Failure:
        """What an error says of an example."""
        return cls(index, str(example.id), f"{type(error).__name__}: {error}")


@dataclass(frozen=True)
class Block:
    """Some examples in a row, and their pictures once they are read."""

    number: int
    """Place among the blocks, from 0."""
    examples: list[tuple[int, Example]]
    """With their places in the run."""
    digest: str
    """Of all examples up to the end of the block; empty if nobody will ask."""
    items: list[Item] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    skipped: list[Block] = field(default_factory=list)
    """Unread blocks between this one and the one that was given before it."""

    def read(self) -> Block:
        """The block with its pictures, or why there are none."""
        items, failures = [], []
        known = {failure.image: failure for failure in self.failures}
        for index, example in self.examples:
            if index in known:
                failures.append(known[index])
                continue
            try:
                items.append(Item(index, example, example.picture()))
            except UNREADABLE as error:
                failures.append(Failure.of(index, example, error))
        return replace(self, items=items, failures=failures)


class Feed:
    """The examples of a run, in blocks."""

    def __init__(self, images: Iterable, size: int, *, recognize: bool = False) -> None:
        """Takes nothing yet.

        Args:
            images: Pictures, paths or examples.
            size: Examples in a block.
            recognize: Whether blocks get a digest, by which a run that goes on knows
                its images again.
        """
        self._recognize = recognize
        self.n_images = len(images) if hasattr(images, "__len__") else None
        self._coming = self._blocks(as_examples(images), size)
        self._looked_at: deque[Block] = deque()

    def __iter__(self) -> Iterator[Block]:
        """Blocks that have not been taken, unread."""
        while (block := self._next()) is not None:
            yield block

    def ahead(self) -> Iterator[Block]:
        """The blocks that come next, read, without taking them."""
        for place in itertools.count():
            if place == len(self._looked_at):
                block = next(self._coming, None)
                if block is None:
                    return
                self._looked_at.append(block)
            found = self._looked_at[place].read()
            # What has failed is not tried again: a picture in memory may come apart.
            self._looked_at[place] = replace(found, items=[])
            yield found

    def read(
        self, start: int = 0, after: str = "", *, rank: int = 0, size: int = 1
    ) -> Iterator[Block]:
        """Blocks with their pictures; the next one is read meanwhile.

        Args:
            start: The first block that is wanted.
            after: Digest of the one before it, if there is one.
            rank: Of `size` processes that take blocks by turns, which this is.
            size: How many there are.

        Raises:
            ValueError: What comes before `start` is not what it was.
        """
        wanted = self._wanted(start, after, rank, size)
        with ThreadPoolExecutor(1, thread_name_prefix="pictures") as reader:
            waiting: Future[Block] | None = None
            while True:
                trouble = block = None
                try:
                    block = next(wanted, None)
                except Exception as error:  # raised behind the block that is in hand
                    trouble = error
                reading = None if block is None else reader.submit(block.read)
                if waiting is not None:
                    yield waiting.result()
                if trouble is not None:
                    raise trouble
                if reading is None:
                    return
                waiting = reading

    def _wanted(self, start: int, after: str, rank: int, size: int) -> Iterator[Block]:
        """This process' blocks from the start on, with those between them."""
        skipped: list[Block] = []
        before = ""
        for block in self:
            if block.number < start:
                before = block.digest
                continue
            _check_same(before, after)
            if block.number % size == rank:
                yield replace(block, skipped=skipped)
                skipped = []
            else:
                skipped.append(block)
        _check_same(before, after)

    def _next(self) -> Block | None:
        if self._looked_at:
            return self._looked_at.popleft()
        return next(self._coming, None)

    def _blocks(self, examples: Iterator[Example], size: int) -> Iterator[Block]:
        said = hashlib.sha256()
        numbered = enumerate(examples)
        for number in itertools.count():
            block = list(itertools.islice(numbered, size))
            if not block:
                return
            if self._recognize:
                for _, e in block:
                    said.update(repr((e.id, e.prompt, e.caption)).encode())
                    said.update(_picture(e.image))
            yield Block(number, block, said.hexdigest() if self._recognize else "")


def _picture(image: Image.Image | Path | str | bytes | None) -> bytes:
    """What tells a picture from others: of files their size, else all there is of it.

    A picture that is still to be read from its file is not read here: Pillow, if it
    fails at that once, gives half a picture the next time, and no error.
    """
    if isinstance(image, bytes):
        return f"{len(image)} bytes ".encode() + image
    if not isinstance(image, Image.Image):
        try:
            size = Path(str(image)).stat().st_size
        except (OSError, ValueError):  # it will be among the failures, with its reason
            size = -1
        return repr((str(image), size)).encode()
    about = repr((image.mode, image.size, image.tell())).encode()
    if not getattr(image, "tile", None):
        return about + repr(image.getpalette()).encode() + image.tobytes()
    file = image.fp
    if file is None or not file.seekable():
        return about
    place = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(place)
    return about + content


def _check_same(before: str, after: str) -> None:
    if before != after:
        raise ValueError(
            "the images are not those that the checkpoint is of, by their paths and "
            "sizes (or pixels, if they are not files), ids, prompts and captions; give "
            "the same images in the same order, or another folder for the checkpoint"
        )
