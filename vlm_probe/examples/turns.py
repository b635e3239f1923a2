"""Who says what in turn, in the ways that conversations are written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_ELSEWHERE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def words_of_llava(where: str, turns: Iterable) -> list[str]:
    """What is said in turns with `from` and `value`, first by the user.

    `<image>`, which stands where the picture goes, is left out.

    Args:
        where: The conversation is found, for messages.
        turns: As they are written.

    Raises:
        ValueError: They are written otherwise, or one speaks twice in a row.
    """
    said = []
    for turn in turns:
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            raise ValueError(f"{where} has a turn without 'from' or 'value': {turn!r}")
        if not isinstance(turn["value"], str):
            raise ValueError(f"{where} has a turn whose 'value' is no text: {turn!r}")
        said.append((turn["from"], turn["value"].replace("<image>", "").strip()))
    return _by_turns(where, said, ("human", "gpt"))


def words_of_messages(where: str, messages: Iterable) -> list[str]:
    """What is said in messages with `role` and `content`, first by the user.

    Content is text, or a list of parts of the types "text" and "image", of which
    there may be one in all.

    Args:
        where: The conversation is found, for messages.
        messages: As they are written.

    Raises:
        ValueError: They are written otherwise, there are several pictures, or one
            speaks twice in a row.
    """
    said, n_images = [], 0
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(
                f"{where} has a message without 'role' or 'content': {message!r}"
            )
        content = message["content"]
        parts = [{"type": "text", "text": content}]
        if isinstance(content, list):
            parts = content
        texts = []
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                texts.append(part["text"].replace("<image>", "").strip())
            elif kind == "image":
                n_images += 1
            else:
                raise ValueError(
                    f"{where} has a message whose content is neither text nor a list "
                    "of {'type': 'text', 'text': ...} and {'type': 'image'}: "
                    f"{message!r}"
                )
        said.append((message["role"], "\n".join(texts).strip()))
    if n_images > 1:
        raise ValueError(
            f"{where} speaks of {n_images} pictures; an example has one, or none"
        )
    return _by_turns(where, said, ("user", "assistant"))


def paired(
    words: Sequence[str],
) -> tuple[str | None, str | None, tuple[tuple[str, str], ...]]:
    """First question and answer, None where nothing is said, and all pairs after it.

    A question left open at the end has no answer to train on, and is left out.
    """
    pairs = tuple(zip(words[::2], words[1::2], strict=False))
    answer = pairs[0][1] if pairs else None
    return words[0] or None, answer or None, pairs[1:]


def check_on_disk(where: str, image: str) -> None:
    """That a picture is named by a path.

    Raises:
        ValueError: It is a URL.
    """
    if _ELSEWHERE.match(image):
        raise ValueError(
            f"{where}: its picture is {image!r}; pictures must be on disk: download "
            "it, and give its path"
        )


def _by_turns(
    where: str, said: Sequence[tuple[str, str]], names: tuple[str, str]
) -> list[str]:
    who = [speaker for speaker, _ in said]
    first, then = names
    if not said or who != [*names] * (len(said) // 2) + [first] * (len(said) % 2):
        raise ValueError(
            f"{where}: expected turns from {first!r} and {then!r} by turns, given {who}"
        )
    return [words for _, words in said]
