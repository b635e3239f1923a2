"""Match rates from verdicts, beside what chance alone would reach.

Under the null hypothesis pictures and the features chosen for them have nothing to do
with each other, so that features may be exchanged between the pictures of a block
without changing the distribution of anything. The p-value of a rate is its place among
the rates after such exchanges, (1 + those at least as high) / (1 + all).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy import stats

from vlm_probe.analysis.pairing import CASE
from vlm_probe.analysis.verdicts import (
    ANY_HITS,
    ANY_JUDGED,
    HITS,
    JUDGED,
    Verdicts,
    tables_of,
)

TIES = ("conservative", "random")
"""What a permutation that reaches exactly the same rate counts: as higher, so that a
true null falls below p in at most a share p of cases; or a random part of it, so that
it does in exactly that share."""

_NAN = float("nan")


@dataclass(frozen=True)
class Counting:
    """How rates are told; the arguments of `match_rate` of the same names."""

    permutations: int = 1000
    """Exchanges behind p-values and the bounds of chance levels."""
    replicates: int = 1000
    """Redrawings of pictures behind the bounds of the rate of features."""
    seed: int = 0
    """Of exchanges, redrawings and ties."""
    level: float = 0.95
    """Confidence of all bounds."""
    ties: str = "conservative"
    """One of `TIES`."""

    def __post_init__(self) -> None:
        for name, least in (("permutations", 1), ("replicates", 2)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name} must be at least {least}, given {getattr(self, name)}"
                )
        if not 0 < self.level < 1:
            raise ValueError(f"level is between 0 and 1, given {self.level}")
        if self.ties not in TIES:
            raise ValueError(f"unknown ties {self.ties!r}; valid: {', '.join(TIES)}")


def rates(
    judgements: pd.DataFrame, answers: pd.DataFrame, counting: Counting
) -> pd.DataFrame:
    """A row per layer, group and condition; see `MatchResult.rates` for its columns.

    Args:
        judgements: Chosen features with `description` and `block`.
        answers: `image`, `description` and `verdict` of all that was judged.
        counting: How rates are told.
    """
    verdicts = Verdicts(answers)
    rows = []
    for case, chosen in judgements.groupby(CASE, sort=False):
        named = dict(zip(CASE, case, strict=True))
        # Of the case alone: what other cases there are does not change its numbers.
        code = zlib.crc32("/".join(str(part) for part in case).encode())
        rng = np.random.default_rng([counting.seed, code])
        tables = tables_of(chosen, verdicts)
        n_features = int(chosen["description"].notna().sum())
        rows.append(named | _row(tables, len(chosen), n_features, counting, rng))
    return pd.DataFrame(rows)


def _row(
    tables: list[np.ndarray],
    n_chosen: int,
    n_features: int,
    counting: Counting,
    rng: np.random.Generator,
) -> dict[str, object]:
    own = np.concatenate([np.einsum("cii->ci", table) for table in tables], axis=1)
    hits, judged, any_hits, any_judged = (int(total) for total in own.sum(axis=1))
    permuted = _permuted(tables, counting.permutations, rng)
    foreign = _foreign(tables)
    row: dict[str, object] = {
        "n_images": own.shape[1],
        "n_features": n_features,
        "n_undescribed": n_chosen - n_features,
        "n_unanswered": n_features - judged,
        "n_matches": hits,
        "rate": _share(hits, judged),
    }
    row |= _bounds("rate", _resampled(own[HITS], own[JUDGED], counting, rng))
    row |= _bounds("rate_wilson", _wilson(hits, judged, counting.level))
    pair = [HITS, JUDGED]
    row |= _chance("rate", own[pair], foreign[pair], permuted[pair], counting, rng)
    row |= {
        "n_any_images": any_judged,
        "n_any_matches": any_hits,
        "any_rate": _share(any_hits, any_judged),
    }
    row |= _bounds("any_rate", _wilson(any_hits, any_judged, counting.level))
    pair = [ANY_HITS, ANY_JUDGED]
    row |= _chance("any_rate", own[pair], foreign[pair], permuted[pair], counting, rng)
    return row


def _permuted(
    tables: list[np.ndarray], permutations: int, rng: np.random.Generator
) -> Int[np.ndarray, "count permutation"]:
    """The counts after each of some random exchanges within blocks."""
    totals = np.zeros((4, permutations), dtype=np.int64)
    for table in tables:
        n = table.shape[1]
        order = rng.permuted(np.tile(np.arange(n), (permutations, 1)), axis=1)
        for count in range(4):
            totals[count] += table[count][np.arange(n), order].sum(axis=1)
    return totals


def _foreign(tables: list[np.ndarray]) -> Float[np.ndarray, " count"]:
    """The counts to expect if each picture is replaced by another one of its block.

    A picture that is alone in its block has no other, and takes no part.
    """
    total = np.zeros(4)
    for table in tables:
        n = table.shape[1]
        if n > 1:
            own = np.einsum("cii->c", table)
            total += (table.sum(axis=(1, 2)) - own) / (n - 1)
    return total


def _chance(
    name: str,
    own: Int[np.ndarray, "part picture"],
    foreign: Float[np.ndarray, " part"],
    permuted: Int[np.ndarray, "part permutation"],
    counting: Counting,
    rng: np.random.Generator,
) -> dict[str, float]:
    """The chance level of a rate, the bounds of chance, and the p-value."""
    hits, judged = (int(total) for total in own.sum(axis=1))
    chance = _share(float(foreign[0]), float(foreign[1]))
    # Without another picture to exchange with there is no chance level, nor a test.
    if not judged or np.isnan(chance):
        return dict.fromkeys(
            [f"{name}_{what}" for what in ("chance", "chance_low", "chance_high", "p")],
            _NAN,
        )
    told = permuted[1] > 0
    reached = permuted[0][told] / permuted[1][told]
    tail = (1 - counting.level) / 2
    low, high = np.quantile(reached, [tail, 1 - tail]) if told.any() else (_NAN, _NAN)
    observed = hits / judged
    # Where nothing was answered after an exchange, it counts against the finding.
    higher = int((reached > observed).sum()) + int((~told).sum())
    equal = 1 + int((reached == observed).sum())
    part = 1.0 if counting.ties == "conservative" else float(rng.uniform())
    return {
        f"{name}_chance": chance,
        f"{name}_chance_low": float(low),
        f"{name}_chance_high": float(high),
        f"{name}_p": (higher + part * equal) / (1 + counting.permutations),
    }


def _resampled(
    hits: np.ndarray, judged: np.ndarray, counting: Counting, rng: np.random.Generator
) -> tuple[float, float]:
    """Bounds of hits / judged by redrawing pictures, features of each together."""
    there = judged > 0
    if there.sum() < 2:
        return _NAN, _NAN
    found = stats.bootstrap(
        (hits[there], judged[there]),
        lambda hits, judged, axis: hits.sum(axis=axis) / judged.sum(axis=axis),
        n_resamples=counting.replicates,
        confidence_level=counting.level,
        method="percentile",
        paired=True,
        vectorized=True,
        rng=rng,
    ).confidence_interval
    return float(found.low), float(found.high)


def _wilson(hits: int, n: int, level: float) -> tuple[float, float]:
    if not n:
        return _NAN, _NAN
    found = stats.binomtest(hits, n).proportion_ci(level, method="wilson")
    return float(found.low), float(found.high)


def _bounds(name: str, bounds: tuple[float, float]) -> dict[str, float]:
    return {f"{name}_low": bounds[0], f"{name}_high": bounds[1]}


def _share(part: int | float, whole: int | float) -> float:
    return part / whole if whole else _NAN
