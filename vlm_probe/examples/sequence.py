"""Examples are read when they are asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import index as as_index
from typing import overload

from vlm_probe.examples.example import Example


class Examples(Sequence, ABC):
    """Examples by number, each read anew when it is asked for.

    They can be pickled and read by several threads and processes at once.
    """

    # No Sequence[Example]: what checks types at run time would read one at each call.

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _at(self, place: int) -> Example:
        """The example of this number, which there is."""

    @overload
    def __getitem__(self, place: int) -> Example: ...

    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...

    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        """An example, or a list of those in a slice.

        Raises:
            IndexError: There is no such example.
        """
        if isinstance(place, slice):
            return [self._at(i) for i in range(len(self))[place]]
        wanted = as_index(place)
        if not -len(self) <= wanted < len(self):
            raise IndexError(f"example {wanted} of {len(self)}: there is none")
        return self._at(wanted % len(self))

    def __iter__(self) -> Iterator[Example]:
        # Not Sequence's own, which takes any IndexError for the end.
        return map(self._at, range(len(self)))

    def __repr__(self) -> str:
        return f"<{len(self)} examples of {self._source}>"

    @property
    @abstractmethod
    def _source(self) -> str:
        """Where they come from, in words."""


class ExampleStream(Iterable):
    """Examples in order only, as often as they are asked for."""

    def __init__(
        self, rows: Iterable, to_example: Callable[[int, dict], Example]
    ) -> None:
        """Takes nothing yet.

        Args:
            rows: Can be gone through more than once.
            to_example: Makes an example of a row and its number.
        """
        self._rows = rows
        self._to_example = to_example

    def __iter__(self) -> Iterator[Example]:
        for index, row in enumerate(self._rows):
            yield self._to_example(index, row)
