"""Examples of the toy world: pictures, questions, captions, and the truth."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from vlm_probe.examples import Example
from vlm_probe.toy.texts import DESCRIBE, KINDS, Turn, ask, ask_any, caption
from vlm_probe.toy.world import Scene, draw_scene, render

HELD_OUT = 20_000_000
"""Seeds from here on are never trained on."""


@dataclass(frozen=True)
class ToyExample(Example):
    """An example with everything that is true of its picture."""

    kind: str = "caption"
    """The kind of question."""
    scene: Scene | None = None
    """What was drawn."""
    masks: Bool[np.ndarray, "thing row column"] | None = None
    """The pixels of each object of the scene."""


def toy_examples(
    n: int, *, seed: int = 0, kinds: tuple[str, ...] = KINDS
) -> list[ToyExample]:
    """Held-out examples, the kinds of question in equal parts.

    Args:
        n: How many.
        seed: Another seed gives other pictures; none was ever trained on.
        kinds: The kinds of question to ask in turn.
    """
    found = []
    for i in range(n):
        rng = np.random.default_rng([HELD_OUT, seed, i])
        kind = kinds[i % len(kinds)]
        scene = draw_scene(rng, 2 if kind == "relation" else _count(rng))
        found.append(_example(f"toy-{seed}-{i}", scene, [ask(scene, kind, rng)], rng))
    return found


def training_examples(stage: str, *, seed: int = 0) -> Iterator[ToyExample]:
    """Endless examples to train the adapter on.

    Args:
        stage: "captions", or "answers" with five questions to a picture.
        seed: Of pictures and words.
    """
    for i in itertools.count():
        rng = np.random.default_rng([seed, i, stage == "answers"])
        scene = draw_scene(rng, _count(rng))
        turns = (
            [ask_any(scene, rng) for _ in range(5)]
            if stage == "answers"
            else [Turn("caption", DESCRIBE, caption(scene, rng))]
        )
        yield _example(f"{stage}-{seed}-{i}", scene, turns, rng)


def _count(rng: np.random.Generator) -> int:
    """How many objects: half of the pictures have one, a fifth have three."""
    return int(rng.choice([1, 2, 3], p=[0.5, 0.3, 0.2]))


def _example(
    name: str, scene: Scene, turns: list[Turn], rng: np.random.Generator
) -> ToyExample:
    picture, masks = render(scene, rng)
    return ToyExample(
        image=picture,
        prompt=turns[0].question,
        answer=turns[0].answer,
        caption=caption(scene, rng),
        id=name,
        turns=tuple((turn.question, turn.answer) for turn in turns[1:]),
        kind=turns[0].kind,
        scene=scene,
        masks=masks,
    )
