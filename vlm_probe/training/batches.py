"""Which examples a step learns from: a place in the data, and nothing else, decides."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from vlm_probe.examples import UNREADABLE, Example
from vlm_probe.language.chat import Chat
from vlm_probe.training.objective import Lesson, lesson
from vlm_probe.training.settings import Stage


@dataclass(frozen=True)
class Failure:
    """An example that cannot be learned from."""

    stage: int
    """Number of the stage, from 1."""
    index: int
    """Place in the stage's examples, from 0."""
    id: str
    """The example's own."""
    error: str
    """Why."""


@dataclass(frozen=True)
class Item:
    """An example that can be learned from."""

    index: int
    example: Example
    lesson: Lesson
    picture: Image.Image | None
    """None if it has none, or if it is read elsewhere."""


@dataclass(frozen=True)
class Batch:
    """What one process takes through the models together."""

    items: tuple[Item, ...]
    failures: tuple[Failure, ...]

    @property
    def ids(self) -> list[str]:
        """Of the examples that can be learned from."""
        return [str(item.example.id) for item in self.items]


_TOO_MANY = 1000
"""So many useless examples at the beginning are no accident."""


class Batches(Dataset):
    """The batches of one process in one stage, by number.

    Examples with a length and an index are taken in an order drawn anew each epoch;
    others as they come. Place p of the stage belongs to step p // (examples a step),
    however many processes share it, so that two processes take together what one with
    twice the batch does.
    """

    def __init__(
        self,
        examples: Iterable[Example],
        stage: Stage,
        *,
        number: int,
        seed: int,
        chat: Chat,
        n_patches: int,
        max_length: int,
        read: bool = True,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        """Counts the steps.

        Args:
            examples: Of the stage.
            stage: How many a batch, and how often.
            number: Of the stage, from 1.
            seed: Of the order.
            chat: Writes conversations.
            n_patches: How many positions a picture takes.
            max_length: Tokens of a conversation.
            read: Whether pictures are opened here.
            part: Number of this process, and how many there are.

        Raises:
            ValueError: There are no examples, or a stream without a number of steps.
        """
        self._stage, self._number, self._seed = stage, number, seed
        self._chat, self._n_patches, self._max_length = chat, n_patches, max_length
        self._read, (self._rank, self._size) = read, part
        indexed = hasattr(examples, "__len__") and hasattr(examples, "__getitem__")
        self._examples: Any = examples if indexed else _Stream(examples, number)
        self.n_examples = len(self._examples) if indexed else None
        """How many there are, if known."""
        step = stage.batch_size * stage.accumulate * self._size
        if self.n_examples == 0:
            raise ValueError(f"stage {number} has no examples; expected at least one")
        if stage.steps is not None:
            self.n_steps, self._end = stage.steps, stage.steps * step
        elif self.n_examples is None:
            raise ValueError(
                f"the examples of stage {number} are a stream, which has no length; "
                "say steps in place of epochs"
            )
        else:
            self._end = math.ceil(stage.epochs * self.n_examples)
            self.n_steps = math.ceil(self._end / step)
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.n_steps * self._stage.accumulate

    def __getitem__(self, number: int) -> Batch:
        """A batch, read from disk."""
        items, failures = [], []
        for place in self._places(number):
            index, name = self._index(place), ""
            try:
                example = self._example(index)
                name = str(example.id)
                item = Item(
                    index,
                    example,
                    lesson(self._chat, example, self._n_patches, self._max_length),
                    example.picture()
                    if self._read and example.image is not None
                    else None,
                )
                items.append(item)
            except UNREADABLE as error:
                failures.append(self.failure(index, name or str(index), error))
        return Batch(tuple(items), tuple(failures))

    def ids(self, number: int) -> list[str]:
        """Ids of a batch's examples, without reading pictures."""
        found = []
        for place in self._places(number):
            index = self._index(place)
            try:
                found.append(str(self._example(index).id))
            except UNREADABLE:
                found.append(str(index))
        return found

    def failure(self, index: int, name: str, error: Exception) -> Failure:
        """Records why an example cannot be learned from."""
        said = str(error) or type(error).__name__
        return Failure(self._number, index, name, said)

    def first(self) -> Iterator[Item]:
        """Usable examples with their pictures, from the first place on, for one epoch.

        The same for every process.
        """
        last = self._end if self.n_examples is None else self.n_examples
        found = False
        for place in range(min(last, self._end)):
            index = self._index(place)
            try:
                example = self._example(index)
                picture = example.picture()
                learned = lesson(self._chat, example, self._n_patches, self._max_length)
            except UNREADABLE as error:
                if place + 1 == _TOO_MANY and not found:
                    raise ValueError(
                        f"none of the first {_TOO_MANY} examples of stage "
                        f"{self._number} could be learned from; the last of them: "
                        f"{error}"
                    ) from error
                continue  # listed when its batch comes
            found = True
            yield Item(index, example, learned, picture)

    def _places(self, number: int) -> range:
        """Places in the stage of a batch's examples."""
        step, part = divmod(number, self._stage.accumulate)
        size = self._stage.batch_size
        before = (step * self._stage.accumulate + part) * self._size + self._rank
        return range(before * size, min((before + 1) * size, self._end))

    def _index(self, place: int) -> int:
        """Which example stands at a place of the stage."""
        if self.n_examples is None:
            return place
        epoch, within = divmod(place, self.n_examples)
        if self._order is None or self._order[0] != epoch:
            rng = np.random.default_rng([self._seed, self._number, epoch])
            self._order = epoch, rng.permutation(self.n_examples)
        return int(self._order[1][within])

    def _example(self, index: int) -> Example:
        example = self._examples[index]
        if not isinstance(example, Example):
            raise TypeError(
                f"example {index} of stage {self._number} is of type "
                f"{type(example).__name__}; expected a vlm_probe.Example with prompt "
                "and answer, as read_examples gives them"
            )
        if example.id is None:
            # By its place, so that it can be found again.
            example = replace(example, id=str(index))
        return example


class RanOutError(RuntimeError):
    """A stream that gives no more; no fault of any one example."""


class _Stream:
    """Examples that come one after the other, by the number of their coming."""

    def __init__(self, examples: Iterable[Example], number: int) -> None:
        self._source, self._number = examples, number
        self._running: Iterator[object] = iter(())
        self._next = 0
        self._last: tuple[int, object] | None = None

    def __getitem__(self, index: int) -> object:  # not known yet to be an Example
        if self._last is not None and self._last[0] == index:
            return self._last[1]
        if index < self._next:
            self._begin_again(index)
        while self._next <= index:
            example = next(self._running, None)
            if example is None:
                self._running = iter(self._source)
                example = next(self._running, None)
            if example is None:
                raise RanOutError(
                    f"stage {self._number} ran out of examples after {self._next}; "
                    "give more of them, or fewer steps"
                )
            self._last = self._next, example
            self._next += 1
        return example  # pyright: ignore[reportPossiblyUnboundVariable]

    def _begin_again(self, index: int) -> None:
        self._running = iter(self._source)
        if self._running is self._source:
            raise RanOutError(
                f"the examples of stage {self._number} can be read only once, and "
                f"example {index} is asked for again; give an object that can be read "
                "again, such as a list, or what read_examples gives"
            )
        self._next = 0


def as_stages(
    stages: Sequence[tuple[Iterable[Example], Stage]],
) -> list[tuple[Iterable[Example], Stage]]:
    """Pairs of examples and settings, checked.

    Raises:
        TypeError: Something else was given.
        ValueError: No stage.
    """
    for number, given in enumerate(stages, 1):
        if not (
            isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], Stage)
        ):
            raise TypeError(
                f"stage {number} must be a pair of examples and a Stage, given "
                f"{type(given).__name__}"
            )
    if not stages:
        raise ValueError("no stage of training given; expected at least one")
    return list(stages)
