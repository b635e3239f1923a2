"""Pictures and conversations on disk become examples."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises for a picture that cannot be read."""


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
        """The picture, read and converted to RGB.

        Raises:
            ValueError: The example has no picture.
            OSError: The file is not there or is no picture.
        """
        if self.image is None:
            raise ValueError("the example has no picture")
        if isinstance(self.image, Image.Image):
            return self.image.convert("RGB")
        with Image.open(self.image) as opened:
            return opened.convert("RGB")


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
