"""An example is a picture, and what is said about it."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from vlm_probe.examples.pixels import as_seen

UNREADABLE = (OSError, ValueError)
"""What `Example.picture` raises if there is no picture, or it cannot be read."""

_DAMAGED = (
    OSError,
    ValueError,
    SyntaxError,
    RuntimeError,
    TypeError,
    LookupError,
    EOFError,
    AssertionError,
    struct.error,
)
"""What Pillow's readers raise for a damaged file or a closed one; each has its own."""


@dataclass(frozen=True)
class Example:
    """A picture, and what is said about it."""

    image: Image.Image | Path | str | bytes | None
    """A picture, the path of one, or what stands in its file; None in a text-only row
    of a conversation file."""
    prompt: str | None = None
    """What the user asks; the language model's default prompt if None."""
    answer: str | None = None
    """What the assistant should say. Never part of a probe's prompt."""
    caption: str | None = None
    """The picture in words, put in the picture's place in the group `text_only`."""
    id: str | None = None
    """A name for tables; the file's name or the position in the run if None."""
    turns: tuple[tuple[str, str], ...] = ()
    """Further questions and answers on the same picture, to train on."""

    def picture(self) -> Image.Image:
        """The picture in RGB, as a person sees it.

        Turned as its EXIF orientation says, so that all that is said of places in a
        picture, by `vision.patch_box` too, counts pixels of the turned one. On white
        where it is transparent. Shades of 16 or 32 bits are scaled to 8. Of an
        animation, the first frame.

        Raises:
            ValueError: The example has no picture.
            OSError: The file is not there, is no picture or is damaged; the words name
                it and say which.
        """
        try:
            return self._read()
        except Warning:
            # Where warnings are errors, a picture that can be seen is still seen.
            # Elsewhere filters stay untouched: they are shared between threads.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return self._read()

    def _read(self) -> Image.Image:
        if self.image is None:
            raise ValueError("the example has no picture")
        in_memory = isinstance(self.image, Image.Image | bytes)
        where = "the picture in memory" if in_memory else str(self.image)
        try:
            if isinstance(self.image, Image.Image):
                return as_seen(self.image)
            encoded = isinstance(self.image, bytes)
            with Image.open(
                io.BytesIO(self.image) if encoded else self.image
            ) as opened:
                return as_seen(opened)
        except Image.DecompressionBombError as error:
            raise OSError(
                f"{where} is too large: {error} If it can be trusted, set "
                "PIL.Image.MAX_IMAGE_PIXELS = None"
            ) from error
        except _DAMAGED as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the system's own words, such as "Permission denied: 'a.png'"
            named = not isinstance(self.image, Image.Image)
            if named and isinstance(error, UnidentifiedImageError):
                raise UnidentifiedImageError(self._unidentified(where)) from error
            said = str(error) or "its file was closed before it was read"
            raise OSError(f"{where} is cut off or damaged: {said}") from error

    def _unidentified(self, where: str) -> str:
        if isinstance(self.image, bytes):
            head, size, what = self.image[:16], len(self.image), where
        else:
            what = f"image file {where}"
            with Path(where).open("rb") as file:
                head = file.read(16)
            size = Path(where).stat().st_size
        if not head:
            return f"{where} is empty: the file has 0 bytes"
        return (
            f"cannot identify {what}: its {size} bytes begin with {head!r}; it is no "
            "picture, is cut off, or needs a plugin of Pillow, such as pillow_heif for "
            "HEIC; converted to PNG it can be read"
        )


def as_examples(images: Iterable) -> Iterator[Example]:
    """Examples from pictures, paths and examples, one at a time, each with an id.

    Raises:
        TypeError: `images` is a single picture or path, or holds something else.
    """
    if isinstance(images, str | Path | Image.Image | Example):
        raise TypeError(
            f"images must be a list or another iterable, given one {_kind(images)}; "
            "put it in a list"
        )
    for index, item in enumerate(images):
        if isinstance(item, Example):
            example = item
        elif isinstance(item, str | Path | Image.Image):
            example = Example(item)
        else:
            raise TypeError(
                f"image {index} is of type {_kind(item)}; expected a PIL.Image, a path "
                "or a vlm_probe.Example"
            )
        if example.id is None:
            named = isinstance(example.image, str | Path)
            name = Path(example.image).name if named else str(index)
            example = replace(example, id=name)
        yield example


def _kind(thing: object) -> str:
    return type(thing).__name__
