"""Which descriptions are judged on which pictures: a picture's own, and others'.

A match rate means nothing without its chance level: what descriptions reach on pictures
they were not chosen for. Pictures are divided at random into blocks, and within a block
every picture is judged with every picture's descriptions. So whatever is exchanged
within blocks has been judged, and the test by permutation is exact, however few
pictures a block has: with a judge that costs nothing there is one block of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import pandas as pd
from jaxtyping import Int

from vlm_probe.analysis.judges.interface import Question, valid
from vlm_probe.examples import Example, as_examples

CASE = ["layer", "group", "condition"]
"""What a match rate is told for."""

_NEEDED = (*CASE, "image", "id", "rank", "feature")


@runtime_checkable
class Describes(Protocol):
    """A source of descriptions."""

    name: str

    def of(self, layer: int, features: Sequence[int]) -> dict[int, str | None]:
        """What each feature of a layer is said to mean; None if nothing is said."""
        ...


@dataclass(frozen=True)
class Plan:
    """All that is to be judged."""

    judgements: pd.DataFrame
    """A row per case, picture and chosen feature: those of the table given, and
    `description` (missing if there is none) and `block`, the number of its picture's
    block."""
    images: Int[np.ndarray, " image"]
    """The pictures' places in the run, ascending."""
    descriptions: list[str]
    """The different descriptions, in the order of the alphabet."""
    pairs: Int[np.ndarray, " question"]
    """The questions, each once, ascending: place in `images` times the number of
    descriptions, plus place in `descriptions`."""
    keys: dict[int, str]
    """What questions call each picture: its id, made different where two are alike."""
    examples: dict[str, Example]
    """The pictures by that name."""

    def questions(self, start: int = 0, stop: int | None = None) -> list[Question]:
        """The questions, or some of them."""
        image, description = self.indices(start, stop)
        return [
            Question(self.keys[int(self.images[i])], self.descriptions[d])
            for i, d in zip(image, description, strict=True)
        ]

    def indices(
        self, start: int = 0, stop: int | None = None
    ) -> tuple[Int[np.ndarray, " question"], Int[np.ndarray, " question"]]:
        """Places of pictures and descriptions that questions are made of."""
        image, description = np.divmod(
            self.pairs[start:stop], max(len(self.descriptions), 1)
        )
        return image, description


def plan(
    chosen: pd.DataFrame,
    descriptions: Describes,
    examples: Iterable,
    *,
    k: int = 3,
    chance_pairs: int | None = None,
    seed: int = 0,
) -> Plan:
    """Looks up descriptions, and pairs them with pictures.

    Args:
        chosen: Rows of a result's `top_features`.
        descriptions: What features mean.
        examples: Those of the run, in its order.
        k: Features of a picture that are judged, those of the best ranks. A feature
            without description is one of them, and is not made up for.
        chance_pairs: How many other pictures, at least, each picture's descriptions
            are judged on; all if None.
        seed: Of the blocks, which depend on nothing else but the pictures.

    Raises:
        ValueError: The table lacks columns, mixes ways to choose, names a feature of a
            picture twice, or is not of these examples.
    """
    _check(chosen, k, chance_pairs)
    judgements = chosen.sort_values([*CASE, "image", "rank"], kind="stable")
    judgements = judgements.groupby([*CASE, "image"]).head(k).reset_index(drop=True)
    judgements["description"] = _looked_up(judgements, descriptions)
    images = np.unique(judgements["image"].to_numpy(np.int64))
    block = _blocks(len(images), chance_pairs, seed)
    place = np.searchsorted(images, judgements["image"].to_numpy(np.int64))
    judgements["block"] = block[place]
    different = sorted(judgements["description"].dropna().unique())
    keys, named = _pictures(judgements, examples)
    return Plan(
        judgements=judgements,
        images=images,
        descriptions=different,
        pairs=_pairs(judgements, images, different),
        keys=keys,
        examples=named,
    )


def _check(chosen: pd.DataFrame, k: int, chance_pairs: int | None) -> None:
    for name, given in (("k", k), ("chance_pairs", chance_pairs)):
        if given is not None and given < 1:
            raise ValueError(f"{name} must be at least 1, given {given}")
    missing = [name for name in _NEEDED if name not in chosen.columns]
    if missing:
        raise ValueError(
            f"the table of chosen features lacks {', '.join(missing)}; give rows of a "
            "result's top_features"
        )
    if len(chosen) == 0:
        raise ValueError(
            "no feature was chosen, so nothing can match; choose less strictly"
        )
    ways = sorted(chosen["by"].unique()) if "by" in chosen.columns else []
    if len(ways) > 1:
        raise ValueError(
            f"the table mixes features chosen by {' and '.join(ways)}; give those of "
            "one way at a time"
        )
    twice = chosen[chosen.duplicated([*CASE, "image", "feature"])]
    if len(twice):
        row = twice.iloc[0]
        raise ValueError(
            f"feature {row.feature} of layer {row.layer} stands twice for the picture "
            f"{row.id!r} ({row.group}, {row.condition}); give each feature of a "
            "picture once"
        )


def _looked_up(judgements: pd.DataFrame, descriptions: Describes) -> pd.Series:
    """The description of each row's feature; missing where there is none."""
    rows = [
        (int(layer), int(feature))
        for layer, feature in zip(
            judgements["layer"], judgements["feature"], strict=True
        )
    ]
    features: dict[int, set[int]] = {}
    for layer, feature in rows:
        features.setdefault(layer, set()).add(feature)
    said = {layer: descriptions.of(layer, sorted(of)) for layer, of in features.items()}
    words = [
        valid(said[layer].get(feature) or "").strip() or None for layer, feature in rows
    ]
    return pd.Series(pd.array(words, dtype="str"), index=judgements.index)


def _blocks(n: int, chance_pairs: int | None, seed: int) -> np.ndarray:
    """The block of each of n pictures, of at least `chance_pairs + 1` if there are."""
    block = np.zeros(n, dtype=np.int64)
    if chance_pairs is not None:
        order = np.random.default_rng(seed).permutation(n)
        parts = np.array_split(order, max(1, n // (chance_pairs + 1)))
        for number, part in enumerate(parts):
            block[part] = number
    return block


def _pairs(
    judgements: pd.DataFrame, images: np.ndarray, different: list[str]
) -> np.ndarray:
    """Every picture of a case with the descriptions of its block there."""
    place = np.searchsorted(images, judgements["image"].to_numpy(np.int64))
    code = pd.Index(different, dtype="str").get_indexer(judgements["description"])
    code = np.where(judgements["description"].isna(), -1, code)
    case = judgements.groupby(CASE).ngroup().to_numpy(np.int64)
    part = case * (judgements["block"].max() + 1) + judgements["block"].to_numpy()
    order = np.argsort(part, kind="stable")
    wanted = []
    for rows in np.split(order, np.flatnonzero(np.diff(part[order])) + 1):
        codes = np.unique(code[rows][code[rows] >= 0])
        pairs = np.unique(place[rows])[:, None] * len(different) + codes
        wanted.append(pairs.ravel())
        if len(wanted) > 1000:  # cases ask much the same: keep what is new
            wanted = [np.unique(np.concatenate(wanted))]
    return np.unique(np.concatenate(wanted)).astype(np.int64)


def _pictures(
    judgements: pd.DataFrame, examples: Iterable
) -> tuple[dict[int, str], dict[str, Example]]:
    """The name of each picture, and the pictures by name."""
    ids = judgements.drop_duplicates(["image", "id"])
    if ids["image"].duplicated().any():
        image = ids["image"][ids["image"].duplicated()].iloc[0]
        both = " and ".join(repr(name) for name in ids["id"][ids["image"] == image])
        raise ValueError(
            f"image {image} has two ids in the table, {both}; give the chosen "
            "features of one run"
        )
    wanted: Mapping[int, str] = dict(
        zip(ids["image"].astype(int), ids["id"].astype(str), strict=True)
    )
    found: dict[int, Example] = {}
    n_seen = 0
    for index, example in enumerate(as_examples(examples)):
        n_seen = index + 1
        if index not in wanted:
            continue
        if example.id != wanted[index]:
            raise ValueError(
                f"image {index} is {wanted[index]!r} in the table, but example "
                f"{index} is {example.id!r}; give the examples of the run, in its order"
            )
        found[index] = example
    beyond = sorted(set(wanted) - set(found))
    if beyond:
        raise ValueError(
            f"the table has image {beyond[0]}, {wanted[beyond[0]]!r}, but only "
            f"{n_seen} examples were given; give the examples of the run, in its order"
        )
    alike = ids["id"][ids["id"].duplicated(keep=False)]
    keys = {
        image: f"{name} ({image})" if name in set(alike) else name
        for image, name in wanted.items()
    }
    return keys, {keys[image]: example for image, example in found.items()}
