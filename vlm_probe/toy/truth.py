"""Which words of the toy world are true of a scene, and of what is said at a token."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Bool

from vlm_probe.examples import Example
from vlm_probe.toy.examples import ToyExample
from vlm_probe.toy.texts import NUMBERS
from vlm_probe.toy.world import (
    BACKGROUNDS,
    COLORS,
    COLUMNS,
    ROWS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
)

RELATIONS = ("above", "below")
"""True of a picture with one object higher than another. Left and right are of columns,
which pictures of one object have as well."""
KINDS_OF_CONCEPTS = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "row": ROWS,
    "column": COLUMNS,
    "background": BACKGROUNDS,
    "count": NUMBERS,
    "relation": RELATIONS,
}
"""All words of the world that can be true of a picture."""
CONCEPTS = tuple(word for words in KINDS_OF_CONCEPTS.values() for word in words)
OF_SCENES = {*BACKGROUNDS, *NUMBERS, *RELATIONS}
"""Those that are true of a scene; the others are true of an object."""
READINGS = ("word", "context")
"""Where a concept is there in a text: where its word stands, or at every token that is
about an object, or a scene, that it is true of."""


def describes(example: Example, description: str) -> bool | None:
    """Whether a description is true of a toy picture.

    Args:
        example: One that knows its scene.
        description: Words of `CONCEPTS`. Those of objects must be true of one and the
            same: "red circle" is not true of a red square and a blue circle.

    Returns:
        None if the description has other words, for nothing is known of those.

    Raises:
        TypeError: The example does not know its scene.
    """
    if not isinstance(example, ToyExample) or example.scene is None:
        raise TypeError(
            f"nothing is known to be true of example {example.id!r}: it is of type "
            f"{type(example).__name__}; expected a ToyExample with its scene, such as "
            "those of toy_examples"
        )
    words = description.split()
    if not words or not set(words) <= set(CONCEPTS):
        return None
    scene = example.scene
    of_thing, of_scene = set(words) - OF_SCENES, set(words) & OF_SCENES
    return of_scene <= _true_of_scene(scene) and any(
        of_thing <= set(words_of(thing)) for thing in scene.things
    )


def words_of(thing: Thing) -> tuple[str, ...]:
    """The concepts that are true of an object."""
    return thing.color, thing.shape, thing.size, thing.row, thing.column


def _true_of_scene(scene: Scene) -> set[str]:
    several_rows = len({thing.row for thing in scene.things}) > 1
    true = {scene.background, NUMBERS[len(scene.things)]}
    return true | set(RELATIONS if several_rows else ())


def at_tokens(
    words: Sequence[str], scene: Scene
) -> Bool[np.ndarray, "reading token concept"]:
    """Which concepts are there at each word of a text about a scene.

    Read as a word, a concept is there where its word stands. Read as context, it is
    where the object that is talked about has it, or the scene. No relation is anywhere
    but as a word, for it is of two objects.

    Args:
        words: The text, special tokens included.
        scene: What it is about.
    """
    found = np.zeros((2, len(words), len(CONCEPTS)), bool)
    for place, word in enumerate(words):
        if word in _INDEX:
            found[0, place, _INDEX[word]] = True
    of_scene = [_INDEX[scene.background], _INDEX[NUMBERS[len(scene.things)]]]
    found[1][:, of_scene] = True
    for place, thing in enumerate(talked_about(words, scene)):
        if thing is not None:
            found[1, place, [_INDEX[word] for word in words_of(thing)]] = True
    return found


_INDEX = {word: index for index, word in enumerate(CONCEPTS)}
_ENDS = (".", "<end>")


def talked_about(words: Sequence[str], scene: Scene) -> list[Thing | None]:
    """The object that each word of a text is about; None where it is about none.

    A color, a shape, or a row with a column names the one object that has it. A word
    is about the next one named in its sentence, or the last if none comes any more; a
    question is one sentence with its answer. So the words before an object's name are
    about it already: a language model that has read of it knows which name comes.
    Where an object's words end with its size, as some tags do, that one is taken for
    the next object's.
    """
    named = _named(words, scene)
    found: list[Thing | None] = list(named)
    coming = None
    for place in reversed(range(len(words))):
        coming = None if words[place] in _ENDS else coming
        coming = found[place] = named[place] or coming
    last = None
    for place, word in enumerate(words):
        last = named[place] or last
        found[place] = found[place] or last
        last = None if word in _ENDS else last
    return found


def _named(words: Sequence[str], scene: Scene) -> list[Thing | None]:
    """The object that a word names by itself, or with the one beside it."""
    by_word = {word: t for t in scene.things for word in (t.color, t.shape)}
    by_cell = {(t.row, t.column): t for t in scene.things}
    named = [by_word.get(word) for word in words]
    for place, cell in enumerate(pairwise(words)):
        if cell in by_cell:
            named[place] = named[place + 1] = by_cell[cell]
    return named
