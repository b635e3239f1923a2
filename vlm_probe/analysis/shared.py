"""Whether an image's features are those of its own caption.

At each layer the strongest features of an image's tokens are laid beside the strongest
of its caption's, read without the image. That they overlap says little by itself, for
some features are strong everywhere: it has to be more than they overlap with other
images' captions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float64, Int
from scipy.sparse import csc_array
from statsmodels.stats.proportion import proportion_confint

from vlm_probe.result import ProbeResult
from vlm_probe.sums import bootstrap_weights
from vlm_probe.tokens import RANKINGS, check_names

WEIGHTS = ("value", "score", "equal")

_BLOCK = 2**22
"""Overlaps that are held at a time."""


def shared_features(
    result: ProbeResult,
    *,
    by: str = "activation",
    weights: str = "value",
    permutations: int = 1000,
    replicates: int = 400,
    seed: int = 0,
) -> pd.DataFrame:
    """How much an image's features are its caption's, beside other images' captions.

    The overlap of two sets of weighted features is their weighted Jaccard index: the
    sum over features of the smaller weight, over that of the larger. The weights of
    each set are first divided by their sum, since activations of image tokens are of
    another size than those of words, and the larger set would decide alone. 1 is the
    same features in the same proportions, 0 none in common. A set holds the top_k
    features that the run kept, which for `text_only` are those of the caption and of
    the question's words.

    Args:
        result: Of a probe of the groups image and text_only, each image with a caption.
        by: Which ranking's features: "activation" or "selectivity".
        weights: Of a feature: "value", its activation; "score", that of the ranking;
            "equal", the same for all.
        permutations: Random pairings of images and captions behind the p-value.
        replicates: Redrawings of the bootstrap over images behind the bounds.
        seed: Of both.

    Returns:
        A row for each layer that has both groups:

        - `n_images`, `n_empty`: how many there are, and in how many of them one of the
          two has no feature, which overlaps with nothing;
        - `overlap`, the mean over images with their own caption, with 95 % bounds by a
          bootstrap over images; `shuffled`, the mean over all pairs of an image and
          another's caption;
        - `p_value`: the share of random pairings, this one among them, whose mean
          overlap is at least as large;
        - `to_caption`, how often an image's own caption is the nearest of all n, and
          `to_image`, how often a caption's own image is, each with Wilson bounds; where
          t are equally near, one of them the right one, it counts 1/t. `chance`, 1/n.

    Raises:
        ValueError: Without a group or a ranking, with fewer than two images, or where
            reference texts stood in for captions.
    """
    check_names("ranking", [by], RANKINGS)
    check_names("weights", [weights], WEIGHTS)
    _check_captions(result)
    top = result.top_features
    top = top[(top["condition"] == "model") & (top["by"] == by)]
    top = top[top["group"].isin(_PAIR)]
    there = top.groupby("group")["layer"].unique()
    if missing := [group for group in _PAIR if group not in there]:
        raise ValueError(
            f"no top features by {by} of {' and '.join(missing)} in this result; probe "
            f"the groups {' and '.join(_PAIR)} with rank_by=[{by!r}] and top_k of 1 or "
            "more"
        )
    images = np.sort(top["image"].unique())
    if len(images) < 2:
        raise ValueError(
            "one image has no other's caption to compare; give at least two"
        )
    rng = np.random.default_rng(seed)
    pairings = np.stack([rng.permutation(len(images)) for _ in range(permutations)])
    drawn = bootstrap_weights(images.tolist(), replicates, seed)
    rows = []
    for layer in sorted(set(there["image"]) & set(there["text_only"])):
        here = top[top["layer"] == layer]
        sets = [_weighted(here[here["group"] == g], images, weights) for g in _PAIR]
        rows.append({"layer": layer} | _compare(*sets, pairings, drawn))
    return pd.DataFrame(rows)


_PAIR = ("image", "text_only")


def _check_captions(result: ProbeResult) -> None:
    words = result.meta.get("text_only_words") or {}
    if not words:
        raise ValueError(
            "this result does not say which words stood in the pictures' places "
            '(meta["text_only_words"]); only captions can be compared'
        )
    if others := words.get("reference texts", 0):
        raise ValueError(
            f"{others} of {others + words.get('captions', 0)} images had no caption: "
            "in text_only reference texts stood in their places, which say nothing of "
            "them; give every example a caption (Example(..., caption=...), or "
            "'caption' in the conversation file), and probe again"
        )


def _weighted(
    rows: pd.DataFrame, images: Int[np.ndarray, " image"], weights: str
) -> csc_array:
    """Each image's features with weights that sum to 1; none where it has none."""
    weight = np.ones(len(rows)) if weights == "equal" else rows[weights].to_numpy(float)
    if (weight < 0).any():
        raise ValueError(
            "some features are active below zero, and a weighted Jaccard index is of "
            'positive weights; take weights="equal"'
        )
    place = np.searchsorted(images, rows["image"])
    total = np.bincount(place, weight, len(images))[place]
    share = np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)
    feature = rows["feature"].to_numpy()
    found = csc_array(
        (share, (place, feature)), (len(images), int(feature.max(initial=0)) + 1)
    )
    found.eliminate_zeros()
    return found


def overlaps(
    left: csc_array, right: csc_array
) -> Iterator[tuple[slice, Float64[np.ndarray, "left right"]]]:
    """Weighted Jaccard indices of all pairs, some rows at a time.

    Args:
        left: A row a set, a column a feature; weights of a set sum to 1, or it is
            empty.
        right: The same.
    """
    (n, width), (n_right, right_width) = np.shape(left), np.shape(right)
    step = max(1, _BLOCK // n_right)
    common = min(width, right_width)
    full = [np.asarray(side.sum(axis=1)).round() for side in (left, right)]
    for start in range(0, n, step):
        rows = slice(start, min(n, start + step))
        block = csc_array(left[rows])
        least = np.zeros((rows.stop - rows.start, n_right))
        for feature in np.flatnonzero(np.diff(block.indptr[: common + 1])):
            a, b = (
                slice(*side.indptr[feature : feature + 2]) for side in (block, right)
            )
            pairs = np.ix_(block.indices[a], right.indices[b])
            least[pairs] += np.minimum.outer(block.data[a], right.data[b])
        # The larger of two weights is their sum less the smaller.
        most = full[0][rows, None] + full[1] - least
        yield rows, np.divide(least, most, out=np.zeros_like(least), where=most > 0)


@dataclass
class _Nearest:
    """Of each set, how near the nearest others are, and how many are."""

    best: Float64[np.ndarray, " set"]
    ties: Int[np.ndarray, " set"]

    def see(self, found: Float64[np.ndarray, "other set"]) -> None:
        """Looks at some more others."""
        best = found.max(0)
        ties = (found == best).sum(0)
        self.ties = np.where(
            best > self.best, ties, self.ties + ties * (best == self.best)
        )
        self.best = np.maximum(best, self.best)

    def hits(self, own: Float64[np.ndarray, " set"]) -> Float64[np.ndarray, " set"]:
        """1 where the own is the nearest, less where others are as near."""
        return (own == self.best) / self.ties


def _compare(
    pictures: csc_array,
    captions: csc_array,
    pairings: Int[np.ndarray, "permutation image"],
    drawn: Float64[np.ndarray, "replicate image"],
) -> dict[str, int | float]:
    """One layer's row."""
    n = len(drawn[0])
    own, to_caption = np.zeros(n), np.zeros(n)
    paired, total = np.zeros(len(pairings)), 0.0
    images = _Nearest(np.full(n, -1.0), np.zeros(n, np.int64))
    for rows, found in overlaps(pictures, captions):
        place = np.arange(n)[rows]
        own[rows] = found[place - rows.start, place]
        nearest = found.max(1)
        ties = (found == nearest[:, None]).sum(1)
        to_caption[rows] = (own[rows] == nearest) / ties
        images.see(found)
        total += found.sum()
        paired += found[place - rows.start, pairings[:, rows]].sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        redrawn = (drawn @ own / drawn.sum(1))[1:]
    redrawn = redrawn[np.isfinite(redrawn)]
    low, high = np.percentile(redrawn, [2.5, 97.5]) if len(redrawn) else [np.nan] * 2
    # A hair less: the same pairs may be added up in another order.
    as_large = (paired >= own.sum() - 1e-9).sum()
    sizes = [np.diff(side.tocsr().indptr) for side in (pictures, captions)]
    return {
        "n_images": n,
        "n_empty": int(((sizes[0] == 0) | (sizes[1] == 0)).sum()),
        "overlap": own.mean(),
        "overlap_low": low,
        "overlap_high": high,
        "shuffled": (total - own.sum()) / (n * (n - 1)),
        "p_value": (1 + as_large) / (1 + len(pairings)),
        **_accuracy("to_caption", to_caption),
        **_accuracy("to_image", images.hits(own)),
        "chance": 1 / n,
    }


def _accuracy(name: str, hits: Float64[np.ndarray, " image"]) -> dict[str, float]:
    low, high = proportion_confint(hits.sum(), len(hits), method="wilson")
    return {name: hits.mean(), f"{name}_low": low, f"{name}_high": high}
