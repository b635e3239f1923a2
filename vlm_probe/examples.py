"""Pictures and conversations on disk become examples."""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

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

    image: Image.Image | Path | str | None
    """A picture or the path of one; None in a text-only row of a conversation file."""
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
        in_memory = isinstance(self.image, Image.Image)
        where = "the picture in memory" if in_memory else str(self.image)
        try:
            if isinstance(self.image, Image.Image):
                return _as_seen(self.image)
            with Image.open(self.image) as opened:
                return _as_seen(opened)
        except Image.DecompressionBombError as error:
            raise OSError(
                f"{where} is too large: {error} If it can be trusted, set "
                "PIL.Image.MAX_IMAGE_PIXELS = None"
            ) from error
        except _DAMAGED as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the system's own words, such as "Permission denied: 'a.png'"
            if isinstance(error, UnidentifiedImageError) and not in_memory:
                raise UnidentifiedImageError(_unidentified(where)) from error
            said = str(error) or "its file was closed before it was read"
            raise OSError(f"{where} is cut off or damaged: {said}") from error


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


def read_examples(path: str | Path, images: str | Path | None = None) -> list[Example]:
    """Reads a conversation file in LLaVA's format.

    Each row has `id`, `image` (a path) and `conversations`: turns with `from`
    ("human" or "gpt") and `value`, `<image>` standing where the picture goes. The
    first question and answer become `prompt` and `answer`, all others `turns`. A
    `caption` may stand beside them. Pictures are not opened here.

    Args:
        path: The JSON file.
        images: The folder that image paths start from; the file's own if None.

    Raises:
        ValueError: The file is not in LLaVA's format; names the row and what is amiss.
    """
    path = Path(path)
    folder = path.parent if images is None else Path(images)
    try:
        rows = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} must hold a JSON list of rows, not a {_kind(rows)}")
    return [_row(path, i, row, folder) for i, row in enumerate(rows)]


def write_examples(examples: Iterable[Example], path: str | Path) -> None:
    """Writes examples in LLaVA's format, pictures as PNG into `images/` beside it.

    Pictures are numbered in order; an example without picture has no `image`.
    """
    path = Path(path)
    folder = path.parent / "images"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, example in enumerate(as_examples(examples)):
        row: dict[str, object] = {"id": example.id}
        if example.image is not None:
            row["image"] = f"images/{index:06d}.png"
            example.picture().save(folder / f"{index:06d}.png")
        said = [(f"<image>\n{example.prompt or ''}", example.answer or "")]
        turns = [
            {"from": who, "value": words}
            for pair in [*said, *example.turns]
            for who, words in zip(("human", "gpt"), pair, strict=True)
        ]
        row["conversations"] = turns
        if example.caption is not None:
            row["caption"] = example.caption
        rows.append(row)
    path.write_text(json.dumps(rows, indent=1))


def data_folder() -> Path:
    """The folder `data`: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "data"
    return inside if inside.is_dir() else package.parent / "data"


def _as_seen(image: Image.Image) -> Image.Image:
    """The RGB picture that a person sees: upright, on white, in 8 bits a channel."""
    if 0 in image.size:
        raise ValueError(f"its width and height are {image.size}")
    _scale_clear_shade(image)
    image.load()
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, struct.error):
        turned = 1  # as viewers show a picture whose EXIF is damaged
    image = _in_8_bits(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        seen = Image.new("RGB", image.size, "white")
        seen.paste(layer, mask=layer)
    else:
        seen = image.convert("RGB")
    # What was said of the file's pixels does not hold of these. Nor is the old EXIF to
    # be written anew, which fails where any part of it is damaged.
    seen.info.clear()
    seen.getexif()[ExifTags.Base.Orientation] = turned
    ImageOps.exif_transpose(seen, in_place=True)
    return seen


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Shades of 16 or 32 bits scaled to 8, which `convert` would cut off at 255.

    No format says what is white in 32 bits: it is taken to be the least of 1 (of
    fractions only), 255 and 65,535 that no pixel exceeds, or else the brightest pixel.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    shades = np.array(image, np.float32)
    shades[~np.isfinite(shades)] = 0
    brightest = float(shades.max())
    usual = {"I": (255, 65535), "F": (1, 255, 65535)}.get(image.mode, (65535,))
    white = next((shade for shade in usual if brightest <= shade), brightest)
    scaled = (shades / (white / 255)).round().clip(0, 255)
    if "transparency" in image.info:
        scaled[shades == image.info["transparency"]] = 255
    return Image.fromarray(scaled.astype(np.uint8))


def _scale_clear_shade(image: Image.Image) -> None:
    """Brings the shade of gray that a PNG calls transparent to 8 bits.

    Pillow does so to pixels of 2 and 4 bits, while it leaves this shade as it is.
    """
    tiles = image.tile if isinstance(image, ImageFile.ImageFile) else []
    factor = {"L;2": 85, "L;4": 17}.get(str(tiles[0].args)) if tiles else None
    if factor and "transparency" in image.info:
        image.info["transparency"] *= factor


def _unidentified(path: str) -> str:
    with Path(path).open("rb") as file:
        head = file.read(16)
    if not head:
        return f"{path} is empty: the file has 0 bytes"
    size = Path(path).stat().st_size
    return (
        f"cannot identify image file {path}: its {size} bytes begin with {head!r}; it "
        "is no picture, is cut off, or needs a plugin of Pillow, such as pillow_heif "
        "for HEIC; converted to PNG it can be read"
    )


def _row(path: Path, index: int, row: object, folder: Path) -> Example:
    where = f"row {index} of {path}"
    if not isinstance(row, dict) or not isinstance(row.get("conversations"), list):
        raise ValueError(
            f"{where} is not in LLaVA's format: expected an object with "
            "'conversations', a list of turns with 'from' and 'value'"
        )
    said = []
    for turn in row["conversations"]:
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            raise ValueError(f"{where} has a turn without 'from' or 'value': {turn!r}")
        if not isinstance(turn["value"], str):
            raise ValueError(f"{where} has a turn whose 'value' is no text: {turn!r}")
        said.append((turn["from"], turn["value"].replace("<image>", "").strip()))
    who = [speaker for speaker, _ in said]
    if not said or who != ["human", "gpt"] * (len(said) // 2) + ["human"] * (
        len(said) % 2
    ):
        raise ValueError(
            f"{where}: expected turns from 'human' and 'gpt' by turns, given {who}"
        )
    words = [value for _, value in said]
    pairs = list(zip(words[::2], words[1::2], strict=False))
    image = row.get("image")
    if not isinstance(image, str | None):
        raise ValueError(f"{where}: 'image' must be one path, given {image!r}")
    return Example(
        image=None if image is None else folder / image,
        prompt=words[0] or None,
        answer=(words[1] or None) if pairs else None,
        caption=row.get("caption"),
        id=str(row.get("id", index)),
        turns=tuple(pairs[1:]),
    )


def _kind(thing: object) -> str:
    return type(thing).__name__
