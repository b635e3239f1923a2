"""Examples of the toy world: pictures, questions, captions, and the truth."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from vlm_probe.examples import Example
from vlm_probe.tokens import check_names
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
    check_names("kind of question", kinds, KINDS)
    return [_held_out(seed, i, kinds[i % len(kinds)]) for i in range(n)]


def examples_named(ids: Iterable[str]) -> list[ToyExample]:
    """The held-out examples of some ids, made again with all that is true of them.

    Args:
        ids: As `toy_examples` gave them: seed and number, and the kind of question
            where it is not the one of the number's turn.

    Raises:
        ValueError: An id that is of no held-out toy picture.
    """
    found = []
    for name in ids:
        told = re.fullmatch(r"toy-(\d+)-(\d+)(?:-([a-z]+))?", name)
        kind = told and (told[3] or KINDS[int(told[2]) % len(KINDS)])
        if not told or kind not in KINDS:
            raise ValueError(
                f"{name!r} is no id of a toy picture; expected one that toy_examples "
                "gave, such as 'toy-0-17'"
            )
        found.append(_held_out(int(told[1]), int(told[2]), kind))
    return found


def _held_out(seed: int, i: int, kind: str) -> ToyExample:
    rng = np.random.default_rng([HELD_OUT, seed, i])
    scene = draw_scene(rng, 2 if kind == "relation" else _count(rng))
    name = f"toy-{seed}-{i}"
    if kind != KINDS[i % len(KINDS)]:
        name += f"-{kind}"
    return _example(name, scene, [ask(scene, kind, rng)], rng)


class TrainingExamples(Sequence[ToyExample]):
    """Examples to train the adapter on, each drawn when it is asked for."""

    def __init__(self, stage: str, n: int, *, seed: int = 0) -> None:
        """Draws none yet.

        Args:
            stage: "captions", or "answers" with five questions to a picture.
            n: How many.
            seed: Of pictures and words.
        """
        check_names("stage", [stage], ("captions", "answers"))
        self._stage, self._n, self._seed = stage, n, seed

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, i: int) -> ToyExample:  # pyright: ignore -- no slices
        if not 0 <= i < self._n:
            raise IndexError(f"example {i} of {self._n}")
        rng = np.random.default_rng([self._seed, i, self._stage == "answers"])
        scene = draw_scene(rng, _count(rng))
        turns = (
            [ask_any(scene, rng) for _ in range(5)]
            if self._stage == "answers"
            else [Turn("caption", DESCRIBE, caption(scene, rng))]
        )
        return _example(f"{self._stage}-{self._seed}-{i}", scene, turns, rng)


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
