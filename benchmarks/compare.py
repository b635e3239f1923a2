"""Contenders must find the same numbers, or how long they took means nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

VALUES = ("mse", "fvu", "nmse", "cosine", "norm")
"""Metrics that agree but for rounding."""

_RELATIVE = {**dict.fromkeys(VALUES, 1e-4), "l0": 1e-3}
"""By how much of its value each metric may differ. A feature within rounding of its
threshold fires for one contender and not for the other, which shows in `l0`."""
_TOP = 1e-4
"""By how much of its value the strength of a feature may differ."""


class DisagreementError(Exception):
    """Two contenders found different numbers."""


@dataclass(frozen=True)
class Found:
    """What a contender found."""

    layers: pd.DataFrame
    """Metrics by `layer` and `group`, the index; those that it computes."""
    top: dict[tuple[int, str, int], dict[int, float]]
    """Strongest features with their values by layer, group and image."""
    more: dict[str, float] = field(default_factory=dict)
    """Other numbers, for its line."""

    def l0(self, group: str) -> pd.Series:
        """Mean count of active features of a group's tokens, by layer."""
        return self.layers["l0"].xs(group, level="group")


def agree(name: str, found: Found, reference_name: str, reference: Found) -> None:
    """Compares what two contenders found, as far as both computed it.

    Raises:
        DisagreementError: Names the first number that differs, with both values.
    """
    if not found.layers.index.equals(reference.layers.index):
        raise DisagreementError(
            f"{name} and {reference_name} have other layers or groups"
        )
    for metric, relative in _RELATIVE.items():
        if metric not in found.layers:
            continue
        pairs = zip(found.layers[metric], reference.layers[metric], strict=True)
        for case, (a, b) in zip(found.layers.index, pairs, strict=True):
            if not np.isclose(a, b, rtol=relative, atol=0):
                raise DisagreementError(
                    f"{metric} of layer {case[0]}, {case[1]}: {name} found {a!r}, "
                    f"{reference_name} {b!r}, which differ by more than {relative:g} "
                    "of it"
                )
    if found.top.keys() != reference.top.keys():
        raise DisagreementError(
            f"{name} and {reference_name} have strongest features of other images"
        )
    for case, ours in found.top.items():
        if not _same_top(ours, reference.top[case]):
            raise DisagreementError(
                f"strongest features of layer {case[0]}, {case[1]}, image {case[2]}: "
                f"{name} found {ours}, {reference_name} {reference.top[case]}"
            )


def same_count(name: str, count: float, reference_name: str, expected: float) -> None:
    """Compares how many features fire at a token.

    Raises:
        DisagreementError: They differ by more than rounding makes them.
    """
    if not np.isclose(count, expected, rtol=_RELATIVE["l0"], atol=0):
        raise DisagreementError(
            f"{name} has {count!r} values a token over the threshold, "
            f"{reference_name} {expected!r}"
        )


def _same_top(ours: dict[int, float], theirs: dict[int, float]) -> bool:
    """The same features with the same values; of equal ones the last may differ."""
    if len(ours) != len(theirs):
        return False
    if not ours:
        return True
    last = min(theirs.values())
    return all(
        np.isclose(
            ours.get(feature, last), theirs.get(feature, last), rtol=_TOP, atol=0
        )
        for feature in ours.keys() | theirs.keys()
    )
