"""The one door through which examples are read, whatever they are kept in."""

from __future__ import annotations

from pathlib import Path
from typing import overload

from vlm_probe.examples.conversations import Conversations
from vlm_probe.examples.datasets import is_dataset, read_dataset, read_saved
from vlm_probe.examples.folders import TABLES, read_folder
from vlm_probe.examples.sequence import Examples, ExampleStream


@overload
def read_examples(source: str | Path, images: str | Path | None = None) -> Examples: ...


@overload
def read_examples(
    source: object, images: str | Path | None = None
) -> Examples | ExampleStream: ...


def read_examples(
    source: object, images: str | Path | None = None
) -> Examples | ExampleStream:
    """Reads examples one by one, as they are asked for.

    What memory they take does not grow with what they say. Pictures are not opened
    here, nor looked for.

    Args:
        source: One of

            - a conversation file in LLaVA's format, a JSON list or JSON Lines. Each
              row has `id`, `image` (a path) and `conversations`: turns with `from`
              ("human" or "gpt") and `value`, `<image>` standing where the picture
              goes. The first question and answer become `prompt` and `answer`, all
              others `turns`. A `caption` may stand beside them.
            - a folder of pictures with captions, which become `answer` and `caption`:
              in `metadata.jsonl` or `metadata.csv` (columns `file_name`, and `caption`
              or `text`), whose rows are the examples, or in a `.txt` file beside each
              picture.
            - a Hugging Face `datasets` dataset with a column `image`, and
              `conversations` (LLaVA's), `messages` (`role` and `content`), `prompt` or
              `question` and `answer`, or `caption` or `text`; `id` if it is there; or
              the folder of one that was saved by `save_to_disk`.
        images: The folder that image paths start from; the file's own if None.

    Returns:
        Examples by number; of a dataset without length, as those that are streamed,
        examples in order only.

    Raises:
        FileNotFoundError: There is nothing, or no picture in the folder.
        ValueError: It is in none of these formats; names the row and what is amiss.
        TypeError: The source is none of these.
    """
    folder = None if images is None else Path(images)
    if isinstance(source, str | Path):
        path = Path(source)
        if path.is_dir():
            saved = read_saved(path, folder)
            return read_folder(path, folder) if saved is None else saved
        if not path.exists():
            raise FileNotFoundError(
                f"no examples at {path}: there is no such file or folder; expected a "
                "conversation file in LLaVA's format, or a folder of pictures with "
                f"{' or '.join(TABLES)} or captions in .txt files"
            )
        return Conversations(path, path.parent if folder is None else folder)
    if not is_dataset(source):
        raise TypeError(
            f"examples cannot be read from a {type(source).__name__}; expected the "
            "path of a conversation file or of a folder of pictures, or a dataset of "
            "Hugging Face; a list of pictures, paths or examples needs no reading"
        )
    return read_dataset(source, folder)
