"""What can be said about a scene: captions, questions with answers, and a corpus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vlm_probe.toy.world import (
    BACKGROUNDS,
    COLORS,
    COLUMNS,
    ROWS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    draw_scene,
)

KINDS = (
    "background",
    "color",
    "shape",
    "size",
    "position",
    "cell",
    "count",
    "existence",
    "relation",
)
"""The nine kinds of question."""

DESCRIBE = "describe the picture"
T = TypeVar("T")
_COMMON = """
a and are at background color describe find here how in is it like list look many map
nothing of on or over picture row see shape size tags the there thing things walks what
where with , . ? :
"""
NUMBERS = ("zero", "one", "two", "three")
"""How many objects there are, from none."""
_NAMES = ("anna", "tom", "mia", "ben")


@dataclass(frozen=True)
class Turn:
    """A question about a scene and its one right answer."""

    kind: str
    """One of `KINDS`, or `"caption"`."""
    question: str
    """Words with spaces between them, punctuation too."""
    answer: str
    """One word; two for a position."""


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A sentence that says everything about the scene, worded at random."""
    phrases = [_phrase(t, rng) for t in _shuffled(scene.things, rng)]
    body = " and ".join(phrases) if rng.random() < 0.5 else " , ".join(phrases)
    return _pick(
        rng,
        f"{body} on {scene.background} .",
        f"on {scene.background} there is {body} .",
        f"a picture of {body} , the background is {scene.background} .",
    )


def ask(
    scene: Scene, kind: str, rng: np.random.Generator, *, by_color: bool | None = None
) -> Turn:
    """One question of a kind.

    Args:
        scene: What it is about.
        kind: One of `KINDS`. `"relation"` needs two objects.
        rng: Chooses the object and the wording.
        by_color: Whether objects are named by color ("the red thing") or by
            shape ("the circle"); at random if not given.
    """
    thing = scene.things[int(rng.integers(len(scene.things)))]
    named_by_color = rng.random() < 0.5 if by_color is None else by_color
    name = f"the {thing.color} thing" if named_by_color else f"the {thing.shape}"
    if kind == "background":
        question, answer = "what is the background ?", scene.background
    elif kind == "color":
        question, answer = f"what color is the {thing.shape} ?", thing.color
    elif kind == "shape":
        question, answer = f"what shape is the {thing.color} thing ?", thing.shape
    elif kind == "size":
        question, answer = f"what size is {name} ?", thing.size
    elif kind == "position":
        question, answer = f"where is {name} ?", f"{thing.row} {thing.column}"
    elif kind == "cell":
        question = f"what shape is at the {thing.row} {thing.column} ?"
        answer = thing.shape
    elif kind == "count":
        question, answer = "how many things are there ?", NUMBERS[len(scene.things)]
    elif kind == "existence":
        question, answer = _existence(scene, thing, rng, named_by_color)
    elif kind == "relation":
        question, answer = _relation(scene, rng, named_by_color)
    else:
        raise ValueError(f"no kind of question {kind!r}: one of {', '.join(KINDS)}")
    return Turn(kind, question, answer)


def ask_any(scene: Scene, rng: np.random.Generator) -> Turn:
    """A question of a random kind that fits the scene."""
    kinds = KINDS if len(scene.things) > 1 else KINDS[:-1]
    return ask(scene, str(rng.choice(kinds)), rng)


def document(
    rng: np.random.Generator, scene: Scene | None = None
) -> list[tuple[str, str | None]]:
    """One text of the corpus: what is said of a scene, then a conversation on it.

    The language model learns from these alone; it never meets a picture.

    Args:
        rng: Chooses what is said, and the wording.
        scene: What it is about; a random one if not given.

    Returns:
        Pieces of text in order, each with the kind of answer that it is (of
        `KINDS`, or `"caption"`), None for what is not an answer.
    """
    scene = draw_scene(rng) if scene is None else scene
    forms = [_listing, _tags, _grid, _story, caption]
    times = int(rng.choice([1, 2, 3], p=[0.55, 0.35, 0.1]))
    pieces: list[tuple[str, str | None]] = [
        (_pick(rng, *forms)(scene, rng), None) for _ in range(times)
    ]
    turns = [ask_any(scene, rng) for _ in range(int(rng.integers(3, 7)))]
    if rng.random() < 0.15:
        said = Turn("caption", DESCRIBE, caption(scene, rng))
        turns[int(rng.integers(len(turns)))] = said
    for turn in turns:
        pieces.append((f"<user> {turn.question} <assistant>", None))
        pieces.append((f"{turn.answer} <end>", turn.kind))
    return pieces


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer of the world, with its chat template."""
    words = {w for names in (COLORS, SHAPES, SIZES, ROWS, COLUMNS) for w in names}
    words |= {*BACKGROUNDS, *NUMBERS, *_NAMES, "yes", "no", "above", "below"}
    words |= set(_COMMON.split())
    special = ["<pad>", "<bos>", "<unk>", "<user>", "<assistant>", "<end>", "<image>"]
    vocabulary = {w: i for i, w in enumerate([*special, *sorted(words)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        unk_token="<unk>",
        eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>", "<image>"],
    )
    tokenizer.chat_template = (
        "{{ bos_token }} {% for m in messages %}"
        "{% if m.role == 'user' %}<user> {{ m.content }} "
        "{% else %}<assistant> {{ m.content }} <end> {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


def _pick(rng: np.random.Generator, *choices: T) -> T:
    return choices[int(rng.integers(len(choices)))]


def _shuffled(things: tuple[Thing, ...], rng: np.random.Generator) -> list[Thing]:
    return [things[i] for i in rng.permutation(len(things))]


def _phrase(t: Thing, rng: np.random.Generator) -> str:
    return _pick(
        rng,
        f"a {t.size} {t.color} {t.shape} at the {t.row} {t.column}",
        f"at the {t.row} {t.column} a {t.size} {t.color} {t.shape}",
        f"a {t.color} {t.shape} , {t.size} , in the {t.row} {t.column}",
    )


def _listing(scene: Scene, rng: np.random.Generator) -> str:
    items = [
        f"{t.shape} : {t.color} , {t.size} , {t.row} {t.column} ."
        if rng.random() < 0.5
        else f"{t.color} : {t.size} {t.shape} , {t.row} {t.column} ."
        for t in _shuffled(scene.things, rng)
    ]
    items.insert(
        int(rng.integers(len(items) + 1)), f"background : {scene.background} ."
    )
    return "list : " + " ".join(items)


def _tags(scene: Scene, rng: np.random.Generator) -> str:
    tags = [[scene.background] for _ in range(int(rng.integers(1, 6)))]
    for t in scene.things:
        for _ in range(int(rng.integers(1, 4))):
            words = [t.size, t.color, t.shape, f"{t.row} {t.column}"]
            tags.append([words[i] for i in rng.permutation(4)])
    order = rng.permutation(len(tags))
    return "tags : " + " , ".join(" ".join(tags[i]) for i in order) + " ."


def _grid(scene: Scene, rng: np.random.Generator) -> str:
    there = {(t.row, t.column): f"{t.size} {t.color} {t.shape}" for t in scene.things}
    empty = _pick(rng, "nothing", scene.background)
    rows = [
        f"{row} : " + " , ".join(there.get((row, column), empty) for column in COLUMNS)
        for row in ROWS
    ]
    return f"map of {scene.background} . " + " . ".join(rows) + " ."


def _story(scene: Scene, rng: np.random.Generator) -> str:
    who = _pick(rng, *_NAMES)
    parts = [f"{who} walks over {scene.background} ."]
    for t in _shuffled(scene.things, rng):
        parts.append(
            _pick(
                rng,
                f"here is a {t.shape} . it is {t.color} and {t.size} , "
                f"at the {t.row} {t.column} .",
                f"look , a {t.size} {t.color} thing in the {t.row} {t.column} . "
                f"it is a {t.shape} .",
            )
        )
    return " ".join(parts)


def _existence(
    scene: Scene, thing: Thing, rng: np.random.Generator, by_color: bool
) -> tuple[str, str]:
    yes = rng.random() < 0.5
    if by_color:
        absent = [c for c in COLORS if c not in {t.color for t in scene.things}]
        word = thing.color if yes else _pick(rng, *absent)
        return f"is there a {word} thing ?", "yes" if yes else "no"
    absent = [s for s in SHAPES if s not in {t.shape for t in scene.things}]
    word = thing.shape if yes else _pick(rng, *absent)
    return f"is there a {word} ?", "yes" if yes else "no"


def _relation(
    scene: Scene, rng: np.random.Generator, by_color: bool
) -> tuple[str, str]:
    if len(scene.things) < 2:
        raise ValueError("a relation needs a scene of two objects; this one has one")
    first, second = _shuffled(scene.things, rng)[:2]
    a, b = (
        f"the {t.color} thing" if by_color else f"the {t.shape}"
        for t in (first, second)
    )
    across = COLUMNS.index(first.column) - COLUMNS.index(second.column)
    down = ROWS.index(first.row) - ROWS.index(second.row)
    if across and (not down or rng.random() < 0.5):
        return f"is {a} left or right of {b} ?", "left" if across < 0 else "right"
    return f"is {a} above or below {b} ?", "above" if down < 0 else "below"
