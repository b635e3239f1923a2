"""What is kept of each layer, group and condition while images pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from vlm_probe.codes import FeatureSums
from vlm_probe.probe.boxes import SIDES
from vlm_probe.sums import LayerSums
from vlm_probe.tokens import RANKINGS

Case = tuple[int, str, str]
"""Layer, group and condition."""

TOP = np.dtype(
    [
        ("image", np.int64),
        ("by", np.int32),
        ("rank", np.int32),
        ("feature", np.int32),
        ("value", np.float32),
        ("score", np.float32),
        ("position", np.int32),
        ("word", np.int32),
        ("patch", np.int32),
    ]
)
"""A row of `top_features` while it is kept: its place among `RANKINGS`, and the word's
id or the patch, else -1."""


class Tally:
    """What is kept of one layer, group and condition."""

    def __init__(self, sums: LayerSums, features: FeatureSums) -> None:
        self.sums = sums
        self.features = features
        self._top: list[np.ndarray] = []

    def add_top(self, rows: np.ndarray) -> None:
        """Keeps rows of the dtype `TOP`."""
        self._top.append(rows)

    def top(self) -> np.ndarray:
        """All rows, by image, then ranking, then rank."""
        if len(self._top) != 1:
            self._top = [np.concatenate([np.zeros(0, TOP), *self._top])]
        (rows,) = self._top
        return rows[np.argsort(rows["image"], kind="stable")]

    def merge(self, other: Tally) -> None:
        """Adds what was kept of other images."""
        self.sums.merge(other.sums)
        self.features.merge(other.features)
        self._top += other._top

    def state(self) -> dict[str, Tensor]:
        """Everything in it, by name."""
        rows = torch.from_numpy(self.top().view(np.uint8).copy())
        return {
            **{f"sums.{name}": t for name, t in self.sums.state().items()},
            **{f"features.{name}": t for name, t in self.features.state().items()},
            "top": rows,
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Takes what `state` gave."""
        parts: dict[str, dict[str, Tensor]] = {"sums": {}, "features": {}}
        for name, tensor in state.items():
            part, _, rest = name.partition(".")
            if rest:
                parts[part][rest] = tensor
        self.sums.restore(parts["sums"])
        self.features.restore(parts["features"])
        self._top = [state["top"].numpy().view(TOP)]


class Tallies:
    """A tally for each layer, group and condition that was met."""

    def __init__(self, make: Callable[[int], Tally]) -> None:
        """Starts empty.

        Args:
            make: Gives an empty tally for a layer.
        """
        self._make = make
        self._of: dict[Case, Tally] = {}

    def of(self, case: Case) -> Tally:
        """The tally of a case, which is empty at first."""
        if case not in self._of:
            self._of[case] = self._make(case[0])
        return self._of[case]

    def merge(self, other: Tallies) -> None:
        """Adds what was kept of other images."""
        for case, tally in other._of.items():
            self.of(case).merge(tally)

    def state(self) -> dict[str, Tensor]:
        """Everything in it, by name."""
        return {
            "/".join(map(str, (*case, name))): tensor
            for case, tally in self._of.items()
            for name, tensor in tally.state().items()
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Takes what `state` gave."""
        cases: dict[Case, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            layer, group, condition, part = name.split("/")
            cases.setdefault((int(layer), group, condition), {})[part] = tensor
        for case, parts in cases.items():
            self.of(case).restore(parts)

    def tables(
        self,
        names: Mapping[int, str],
        n_columns: int,
        words: Callable[[int], str],
        boxes: Callable[[np.ndarray], np.ndarray],
        rates: Callable[[int], np.ndarray | None],
    ) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
        """The tables `layers`, `features` and `top_features` of a result.

        Args:
            names: Id of each image.
            n_columns: Of the grid of patches.
            words: The word of a token id.
            boxes: Where the patches of rows of the dtype `TOP` lie.
            rates: How often each feature of a layer fires on the reference; None where
                that was not measured.
        """
        ordered = sorted(self._of, key=lambda c: (c[2] != "model", c[2], c))
        cases = {case: self._of[case] for case in ordered}
        layers = [_named(case) | tally.sums.row() for case, tally in cases.items()]
        features = [
            pd.DataFrame(_named(case) | _with_rates(tally, rates(case[0])))
            for case, tally in cases.items()
        ]
        tops = {case: tally.top() for case, tally in cases.items()}
        said = {
            int(word): words(int(word))
            for word in np.unique(np.concatenate([t["word"] for t in tops.values()]))
            if word >= 0
        }
        # Of all cases together, for a picture's patches are those of each.
        found = boxes(np.concatenate(list(tops.values())))
        of_case = np.split(found, np.cumsum([len(rows) for rows in tops.values()])[:-1])
        top = [
            pd.DataFrame(
                _named(case)
                | _columns(rows, names, n_columns, said)
                | dict(zip(SIDES, here.T, strict=True))
            )
            for (case, rows), here in zip(tops.items(), of_case, strict=True)
        ]
        return (
            pd.DataFrame(layers),
            pd.concat(features, ignore_index=True),
            pd.concat(top, ignore_index=True),
        )


def _named(case: Case) -> dict[str, object]:
    return dict(zip(("layer", "group", "condition"), case, strict=True))


def _with_rates(
    tally: Tally, rates: Float[np.ndarray, " feature"] | None
) -> dict[str, np.ndarray]:
    """Columns of `features`."""
    found = tally.features.columns()
    known = np.nan if rates is None else rates[found["feature"]]
    return found | {"reference_rate": np.broadcast_to(known, found["feature"].shape)}


def _columns(
    rows: np.ndarray,
    names: Mapping[int, str],
    n_columns: int,
    said: Mapping[int, str],
) -> dict[str, object]:
    """Columns of `top_features`."""
    place = np.maximum(rows["patch"], 0)
    return {
        "image": rows["image"],
        "id": [names[image] for image in rows["image"].tolist()],
        "by": pd.array(np.array(RANKINGS, object)[rows["by"]], dtype="str"),
        "rank": rows["rank"].astype(np.int64),
        "feature": rows["feature"].astype(np.int64),
        "value": rows["value"],
        "score": rows["score"],
        "position": rows["position"].astype(np.int64),
        "token": pd.array(
            [said.get(word) for word in rows["word"].tolist()], dtype="str"
        ),
        "patch_row": _missing(place // n_columns, rows["patch"] < 0),
        "patch_column": _missing(place % n_columns, rows["patch"] < 0),
    }


def _missing(values: np.ndarray, where: np.ndarray) -> pd.arrays.IntegerArray:
    return pd.arrays.IntegerArray(values.astype(np.int64), where)
