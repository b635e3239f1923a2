"""What was answered, as tables of each picture's features on each picture."""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Int, Int8


class Verdicts:
    """What was answered, found by picture and description."""

    def __init__(self, answers: pd.DataFrame) -> None:
        """Takes columns `image`, `description` and `verdict`."""
        self.images = pd.Index(answers["image"].unique())
        self.descriptions = pd.Index(answers["description"].unique())
        keys = self._keys(
            self.images.get_indexer(answers["image"]),
            self.descriptions.get_indexer(answers["description"]),
        )
        order = np.argsort(keys)
        verdict = answers["verdict"].astype("Int8").fillna(-1).to_numpy(np.int8)
        self._sorted, self._verdict = keys[order], verdict[order]

    def _keys(self, image: np.ndarray, description: np.ndarray) -> np.ndarray:
        return image.astype(np.int64) * len(self.descriptions) + description

    def of(
        self,
        image: Int[np.ndarray, " image"],
        description: Int[np.ndarray, " description"],
    ) -> Int8[np.ndarray, "description image"]:
        """1 for yes, 0 for no, -1 where the judge had no answer.

        Args:
            image: Places in `images`; -1 where a picture is not there.
            description: Places in `descriptions`; likewise.

        Raises:
            ValueError: A pair was not judged.
        """
        keys = self._keys(image[None, :], description[:, None])
        if keys.size == 0:
            return np.zeros(keys.shape, np.int8)
        place = np.searchsorted(self._sorted, keys).clip(max=len(self._sorted) - 1)
        there = image.min() >= 0 and description.min() >= 0
        if not there or (self._sorted[place] != keys).any():
            raise ValueError(
                "some pictures were not judged with some descriptions of their block; "
                "give the answers that belong to these judgements"
            )
        return self._verdict[place]


HITS, JUDGED, ANY_HITS, ANY_JUDGED = range(4)
"""The counts of a table."""


def tables_of(chosen: pd.DataFrame, verdicts: Verdicts) -> list[np.ndarray]:
    """The table of each block of a case, as `_table` makes it.

    Args:
        chosen: Features of the case, with `image`, `description` and `block`.
        verdicts: What was answered.
    """
    image = verdicts.images.get_indexer(chosen["image"])
    # Pictures without any answer are told apart by their number all the same.
    _, picture = np.unique(chosen["image"].to_numpy(np.int64), return_inverse=True)
    described = chosen["description"].notna().to_numpy()
    description = verdicts.descriptions.get_indexer(chosen["description"])
    block = chosen["block"].to_numpy(np.int64)
    order = np.lexsort((picture, block))
    cuts = np.flatnonzero(np.diff(block[order])) + 1
    tables = []
    for rows in np.split(order, cuts):
        _, first, owner = np.unique(
            picture[rows], return_index=True, return_inverse=True
        )
        named = described[rows]
        verdict = verdicts.of(image[rows][first], description[rows][named])
        tables.append(_table(owner[named], verdict))
    return tables


def _table(
    owner: Int[np.ndarray, " description"],
    verdict: Int8[np.ndarray, "description image"],
) -> Int[np.ndarray, "count image image"]:
    """What each picture's features (second axis) reach on each picture (third).

    Four counts: descriptions that match, and that were answered; whether any of them
    matches, and whether that is known. If none is known to match and some have no
    answer, it is not.

    Args:
        owner: The picture that each description's feature was chosen for, ascending.
        verdict: As `Verdicts.of` gives it.
    """
    n = verdict.shape[1]
    table = np.zeros((4, n, n), dtype=np.int32)
    if len(owner):
        owners, starts, asked = np.unique(owner, return_index=True, return_counts=True)
        hits, unanswered = (
            np.add.reduceat(verdict == value, starts, axis=0, dtype=np.int32)
            for value in (1, -1)
        )
        table[HITS, owners] = hits
        table[JUDGED, owners] = asked[:, None] - unanswered
        table[ANY_HITS, owners] = hits > 0
        table[ANY_JUDGED, owners] = (hits > 0) | (unanswered == 0)
    return table
