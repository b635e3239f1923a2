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
from jaxtyping import Float, Int, Int8
from scipy import sparse, stats

from vlm_probe.analysis.pairing import CASE

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
        for name in ("permutations", "replicates"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, given {getattr(self, name)}"
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
        rows.append(named | _row(chosen, verdicts, counting, rng))
    return pd.DataFrame(rows)


class Verdicts:
    """What was answered, found by picture and description."""

    def __init__(self, answers: pd.DataFrame) -> None:
        """Takes columns `image`, `description` and `verdict`."""
        self._images = pd.Index(answers["image"].unique())
        self._descriptions = pd.Index(answers["description"].unique())
        keys = self._keys(
            self._images.get_indexer(answers["image"]),
            self._descriptions.get_indexer(answers["description"]),
        )
        order = np.argsort(keys)
        verdict = answers["verdict"].astype("Int8").fillna(-1).to_numpy(np.int8)
        self._sorted, self._verdict = keys[order], verdict[order]

    def _keys(self, image: np.ndarray, description: np.ndarray) -> np.ndarray:
        return image.astype(np.int64) * len(self._descriptions) + description

    def of(
        self, images: np.ndarray, descriptions: pd.Series
    ) -> Int8[np.ndarray, "image description"]:
        """1 for yes, 0 for no, -1 where the judge had no answer.

        Raises:
            ValueError: A pair was not judged.
        """
        image = self._images.get_indexer(images)
        description = self._descriptions.get_indexer(descriptions)
        keys = self._keys(image[:, None], description[None, :])
        place = np.searchsorted(self._sorted, keys)
        place = place.clip(max=max(len(self._sorted) - 1, 0))
        unknown = (image < 0).any() or (description < 0).any()
        if keys.size and (unknown or (self._sorted[place] != keys).any()):
            raise ValueError(
                "some pictures were not judged with some descriptions of their block; "
                "give the answers that belong to these judgements"
            )
        return self._verdict[place] if keys.size else np.zeros(keys.shape, np.int8)


HITS, JUDGED, ANY_HITS, ANY_JUDGED = range(4)


def _table(
    chosen: pd.DataFrame, verdicts: Verdicts
) -> Int[np.ndarray, "count picture picture"]:
    """What each picture's features (second axis) reach on each picture (third).

    Four counts: descriptions that match, and that were answered; whether any of them
    matches, and whether that is known. If none is known to match and some have no
    answer, it is not.
    """
    images = chosen["image"].unique()
    named = chosen[chosen["description"].notna()]
    owner = pd.Index(images).get_indexer(named["image"])
    place = (owner, np.arange(len(named)))
    shape = (len(images), len(named))
    belongs = sparse.csr_array((np.ones(len(named), np.int32), place), shape=shape)
    verdict = verdicts.of(images, named["description"])
    hits = belongs @ (verdict == 1).T.astype(np.int32)
    unanswered = belongs @ (verdict == -1).T.astype(np.int32)
    asked = np.bincount(owner, minlength=len(images))[:, None]
    any_hits = hits > 0
    any_judged = any_hits | ((unanswered == 0) & (asked > 0))
    return np.stack([hits, asked - unanswered, any_hits, any_judged]).astype(np.int32)


def _row(
    chosen: pd.DataFrame,
    verdicts: Verdicts,
    counting: Counting,
    rng: np.random.Generator,
) -> dict[str, object]:
    tables = [_table(part, verdicts) for _, part in chosen.groupby("block")]
    own = np.concatenate([np.einsum("cii->ci", table) for table in tables], axis=1)
    n_features = int(chosen["description"].notna().sum())
    hits, judged, any_hits, any_judged = (int(total) for total in own.sum(axis=1))
    permuted = _permuted(tables, counting.permutations, rng)
    foreign = _foreign(tables)
    row: dict[str, object] = {
        "n_images": chosen["image"].nunique(),
        "n_features": n_features,
        "n_undescribed": len(chosen) - n_features,
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


def _share(part: float, whole: float) -> float:
    return part / whole if whole else _NAN
