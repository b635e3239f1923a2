"""Conversations in LLaVA's format, in a JSON list or in JSON Lines."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from vlm_probe.examples.example import Example, as_examples
from vlm_probe.examples.json_rows import json_rows
from vlm_probe.examples.sequence import Examples
from vlm_probe.examples.turns import check_on_disk, paired, words_of_llava


class Conversations(Examples):
    """The rows of a conversation file."""

    def __init__(self, path: Path, folder: Path) -> None:
        """Finds and checks the rows.

        Args:
            path: The file.
            folder: That image paths start from.

        Raises:
            ValueError: The file is not in LLaVA's format; names the row and what is
                amiss.
        """
        self._path = path
        self._folder = folder
        self._rows = json_rows(path, self._check)

    def __len__(self) -> int:
        return len(self._rows)

    def _at(self, place: int) -> Example:
        row = json.loads(self._rows.text(place))
        prompt, answer, turns = paired(self._check(place, row))
        image, name = row.get("image"), row.get("id")
        return Example(
            image=None if image is None else self._folder / image,
            prompt=prompt,
            answer=answer,
            caption=row.get("caption"),
            id=str(place if name is None else name),
            turns=turns,
        )

    @property
    def _source(self) -> str:
        return str(self._path)

    def _check(self, index: int, row: object) -> list[str]:
        """What is said by turns in a row that is as it should be."""
        where = f"row {index} of {self._path}"
        if not isinstance(row, dict) or not isinstance(row.get("conversations"), list):
            raise ValueError(
                f"{where} is not in LLaVA's format: expected an object with "
                "'conversations', a list of turns with 'from' and 'value'"
            )
        image, caption = row.get("image"), row.get("caption")
        if not isinstance(image, str | None):
            raise ValueError(f"{where}: 'image' must be one path, given {image!r}")
        if image is not None:
            check_on_disk(where, image)
        if not isinstance(caption, str | None):
            raise ValueError(f"{where}: 'caption' must be text, given {caption!r}")
        return words_of_llava(where, row["conversations"])


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
        place = ""
        if example.image is not None:
            row["image"] = f"images/{index:06d}.png"
            example.picture().save(folder / f"{index:06d}.png")
            place = "<image>\n"
        said = [(f"{place}{example.prompt or ''}", example.answer or "")]
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
