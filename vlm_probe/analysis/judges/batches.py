"""Questions become requests: one picture, and what is not known of it yet."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from vlm_probe.analysis.judges.answers import key_of
from vlm_probe.analysis.judges.interface import Question, example_of
from vlm_probe.analysis.judges.shown import picture_as_shown
from vlm_probe.examples import Example


@dataclass(frozen=True)
class Batch:
    """Some descriptions for one picture."""

    example: Example
    """Whose picture it is. Not the picture: there may be thousands."""
    size: tuple[int, int]
    """Width and height of the picture as it is sent, in pixels."""
    keys: tuple[str, ...]
    """The key of each question."""
    descriptions: tuple[str, ...]
    """In the same order."""


def keys_of(
    examples: Mapping[str, Example],
    questions: Sequence[Question],
    *,
    asked: str,
    side: int,
) -> tuple[list[str], dict[str, tuple[int, int]]]:
    """The key of each question, and the size of each picture as it is sent.

    A key is made of all that the answer depends on: how it is asked, the picture's
    pixels and the description. Names and addresses are not in it.

    Args:
        examples: By the key that questions name them with.
        questions: Any number of them.
        asked: Who is asked, and how.
        side: The longer side of a picture as it is sent, at most, in pixels.
    """
    pictures: dict[str, str] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for q in questions:
        if q.image not in pictures:
            shown = picture_as_shown(example_of(examples, q), side)
            pictures[q.image] = key_of(repr(shown.size), shown.tobytes())
            sizes[q.image] = shown.size
    return [key_of(asked, pictures[q.image], q.description) for q in questions], sizes


def batches(
    examples: Mapping[str, Example],
    questions: Sequence[Question],
    keys: Sequence[str],
    sizes: Mapping[str, tuple[int, int]],
    known: Container[str],
    *,
    most: int,
) -> list[Batch]:
    """Requests for what is not known, each question in one of them.

    Args:
        examples: By the key that questions name them with.
        questions: Any number of them.
        keys: Of each question.
        sizes: Of each picture.
        known: Keys that have an answer.
        most: Descriptions in one request.
    """
    by_image: dict[str, dict[str, str]] = {}
    taken: set[str] = set()
    for question, key in zip(questions, keys, strict=True):
        if key not in known and key not in taken:
            taken.add(key)
            by_image.setdefault(question.image, {})[key] = question.description
    found = []
    for image, of_image in by_image.items():
        # By key, which is as good as by chance and the same at every start: a picture's
        # own descriptions stand among those of others, and in no place of their own.
        pairs = sorted(of_image.items())
        for start in range(0, len(pairs), most):
            some_keys, descriptions = zip(*pairs[start : start + most], strict=True)
            found.append(Batch(examples[image], sizes[image], some_keys, descriptions))
    return found
