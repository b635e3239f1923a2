"""Whether a feature fires where something is.

Maps of a feature are judged against masks of the thing that it is said to mean, in two
ways. AUROC asks whether patches of the thing have higher values than others, over the
whole map. The pointing game (Zhang et al. 2016, arXiv 1608.00507) asks only whether the
strongest patch is one of the thing's, beside what a patch drawn at random would do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Float64
from PIL import Image
from scipy.stats import rankdata
from statsmodels.stats.proportion import proportion_confint

from vlm_probe.analysis.places import PatchMaps
from vlm_probe.sums import bootstrap_weights
from vlm_probe.tokens import check_names

Mask = Bool[np.ndarray, "_row _column"] | Image.Image
"""Which pixels of a picture, as a person sees it, belong to a thing. Of a PIL image
those that are not black."""


def localize(
    maps: PatchMaps,
    masks: Sequence[Mask],
    *,
    layer: int | None = None,
    feature: int | None = None,
    cover: float = 0.5,
    replicates: int = 400,
    seed: int = 0,
) -> pd.DataFrame:
    """How well the maps of features fit masks.

    A patch is the thing's if the mask covers at least `cover` of its box in the
    picture, and not the thing's if it covers nothing of it. What lies between is
    neither, and is left out of AUROC; in the pointing game it is a miss. Patches of
    padding are left out of everything.

    Args:
        maps: Of `patch_maps`.
        masks: Of the thing, one for each picture, with the picture's own height and
            width; a thing that is not there has a mask without pixels.
        layer: Only of this layer.
        feature: Only this feature.
        cover: From which share of a patch's area on it is the thing's.
        replicates: Redrawings of the bootstrap over images behind the 95 % bounds of
            AUROC.
        seed: Of the bootstrap.

    Returns:
        A row for each layer and feature:

        - `n_images`; `n_silent`, in how many of those with the thing the feature fires
          nowhere; `n_without`, how many have no patch that is the thing's;
        - `n_inside`, `n_outside`: patches that are the thing's, or not; `n_between`,
          those that are neither;
        - `auroc` over the patches of all images, with bounds: the chance that a patch
          of the thing has a higher value than another, ties counted half;
        - `image_auroc`: the mean of each image's own, over the `n_scored` images that
          have both kinds of patches. An image where the feature is silent has 0.5;
        - `pointing`: the share of `n_pointed` images whose strongest patch is the
          thing's, with Wilson bounds (images are independent), and `chance`, the same
          for a patch drawn at random. Images without the thing, or where the feature is
          silent, cannot be counted and are in `n_without` and `n_silent`.

    Raises:
        ValueError: Masks that do not fit the pictures, or something that was not asked
            of `patch_maps`.
    """
    if not 0 < cover <= 1:
        raise ValueError(f"cover is a share of a patch, above 0 to 1, given {cover}")
    truth = _Truth.of(maps, masks, cover)
    weights = bootstrap_weights([*range(len(maps.ids))], replicates, seed)
    if layer is not None:
        check_names("layer", [str(layer)], [str(n) for n in sorted(maps.features)])
    cases = [
        (number, one)
        for number in (sorted(maps.features) if layer is None else [layer])
        for one in (maps.features[number] if feature is None else [feature])
    ]
    flat = {(n, one): maps.of(n, one).reshape(len(maps.ids), -1) for n, one in cases}
    return pd.DataFrame(
        [
            {"layer": n, "feature": one} | _fit(values, truth, weights)
            for (n, one), values in flat.items()
        ]
    )


def covered(
    mask: Bool[np.ndarray, "row column"],
    boxes: Float[np.ndarray, "patch_row patch_column 4"],
) -> Float64[np.ndarray, "patch_row patch_column"]:
    """The share of each patch's box that a mask covers; NaN where there is no box.

    Args:
        mask: In pixels of the picture.
        boxes: Of a grid: those of a column have the same left and right, those of a
            row the same top and bottom.
    """
    height, width = mask.shape
    across = _overlap(boxes[0, :, 0], boxes[0, :, 2], width)
    down = _overlap(boxes[:, 0, 1], boxes[:, 0, 3], height)
    area = np.outer(down.sum(1), across.sum(1))
    inside = down @ mask.astype(float) @ across.T
    return np.divide(inside, area, out=np.full(area.shape, np.nan), where=area > 0)


def _overlap(
    starts: Float[np.ndarray, " box"], stops: Float[np.ndarray, " box"], length: int
) -> Float64[np.ndarray, "box pixel"]:
    """How much of each pixel of an axis lies in each box."""
    pixels = np.arange(length)
    stop = np.minimum(stops[:, None], pixels + 1)
    return (stop - np.maximum(starts[:, None], pixels)).clip(0)


@dataclass(frozen=True)
class _Truth:
    """What the masks say of every patch."""

    inside: Bool[np.ndarray, "image patch"]
    outside: Bool[np.ndarray, "image patch"]
    seen: Bool[np.ndarray, "image patch"]
    """Whether it is a patch of the picture, and not of padding."""

    @classmethod
    def of(cls, maps: PatchMaps, masks: Sequence[Mask], cover: float) -> _Truth:
        if len(masks) != len(maps.ids):
            raise ValueError(
                f"{len(masks)} masks for {len(maps.ids)} pictures; give one for each, "
                "without pixels where the thing is not there"
            )
        shares = []
        for mask, size, name, boxes in zip(
            masks, maps.sizes, maps.ids, maps.boxes, strict=True
        ):
            pixels = np.asarray(mask.convert("L") if _is_picture(mask) else mask)
            if pixels.shape != size[::-1]:
                raise ValueError(
                    f"the mask of {name!r} has rows and columns {pixels.shape}, its "
                    f"picture {size[::-1]}; give it in pixels of the picture as a "
                    "person sees it, turned as its EXIF orientation says"
                )
            shares.append(covered(pixels > 0, boxes).reshape(-1))
        share = np.stack(shares)
        # A hair less: shares are sums of parts of pixels.
        return cls(share >= cover - 1e-9, share == 0, ~np.isnan(share))


def _is_picture(mask: Mask) -> bool:
    return isinstance(mask, Image.Image)


def _fit(
    values: Float[np.ndarray, "image patch"],
    truth: _Truth,
    weights: Float[np.ndarray, "replicate image"],
) -> dict[str, int | float]:
    """One feature's row."""
    judged = truth.inside | truth.outside
    there = truth.inside.any(1)
    peak = np.where(truth.seen, values, -np.inf).max(1)
    fires = (truth.seen & (values != 0)).any(1)
    pointed = there & fires
    strongest = truth.seen & (values == peak[:, None])
    # Of patches that tie, the share that is the thing's.
    hits = (strongest & truth.inside).sum(1) / strongest.sum(1).clip(1)
    chance = truth.inside.sum(1) / truth.seen.sum(1).clip(1)
    n_pointed = int(pointed.sum())
    hit = float(hits[pointed].sum())
    low, high = (
        proportion_confint(hit, n_pointed, method="wilson")
        if n_pointed
        else (np.nan, np.nan)
    )
    image = np.nonzero(judged)[0]
    pooled = weighted_auroc(values[judged], truth.inside[judged], weights[:, image])
    scored = np.flatnonzero(there & truth.outside.any(1))
    own = np.array(
        [_auroc(values[i][judged[i]], truth.inside[i][judged[i]]) for i in scored]
    )
    of_each = _means(own, weights[:, scored])
    return {
        "n_images": len(values),
        "n_silent": int((there & ~fires).sum()),
        "n_without": int((~there).sum()),
        "n_inside": int(truth.inside.sum()),
        "n_outside": int(truth.outside.sum()),
        "n_between": int((truth.seen & ~judged).sum()),
        **_bounded(
            "auroc",
            _auroc(values[judged], truth.inside[judged]),
            pooled,
            len(np.unique(image)),
        ),
        "n_scored": len(scored),
        **_bounded("image_auroc", float(of_each[0]), of_each, len(scored)),
        "n_pointed": n_pointed,
        "pointing": hit / n_pointed if n_pointed else np.nan,
        "pointing_low": low,
        "pointing_high": high,
        "chance": float(chance[pointed].mean()) if n_pointed else np.nan,
    }


def _auroc(
    value: Float[np.ndarray, " patch"], inside: Bool[np.ndarray, " patch"]
) -> float:
    """The chance that one of the inside is above one of the outside, ties half."""
    n_inside, n_outside = int(inside.sum()), int((~inside).sum())
    if not (n_inside and n_outside):
        return float("nan")
    above = rankdata(value)[inside].sum() - n_inside * (n_inside + 1) / 2
    return float(above / (n_inside * n_outside))


def weighted_auroc(
    value: Float[np.ndarray, " patch"],
    inside: Bool[np.ndarray, " patch"],
    weights: Float[np.ndarray, "replicate patch"],
) -> Float64[np.ndarray, " replicate"]:
    """AUROC of patches that each redrawing holds so many times; NaN without both kinds.

    Args:
        value: Of each patch.
        inside: Whether it is the thing's.
        weights: How often each redrawing holds it.
    """
    if not len(value):
        return np.full(len(weights), np.nan)
    order = np.argsort(value, kind="stable")
    ordered = value[order]
    ties = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    found = []
    for drawn in weights:  # one at a time: a run has a million patches
        w = drawn[order]
        ins = np.add.reduceat(w * inside[order], ties)
        out = np.add.reduceat(w * ~inside[order], ties)
        above = (ins * (out.cumsum() - out / 2)).sum()
        pairs = ins.sum() * out.sum()
        found.append(above / pairs if pairs else np.nan)
    return np.array(found, float)


def _means(
    values: Float[np.ndarray, " image"], weights: Float[np.ndarray, "replicate image"]
) -> Float64[np.ndarray, " replicate"]:
    """The mean, then that of each redrawing; NaN where it holds no image."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weights @ values) / weights.sum(1)


def _bounded(
    name: str, value: float, drawn: Float[np.ndarray, " replicate"], n_units: int
) -> dict[str, float]:
    """A number with 95 % bounds by its redrawings; none for fewer than two images."""
    # The first is the estimate itself.
    drawn = drawn[1:][np.isfinite(drawn[1:])]
    bounded = n_units > 1 and len(drawn) > 0
    low, high = np.percentile(drawn, [2.5, 97.5]) if bounded else (np.nan, np.nan)
    return {name: value, f"{name}_low": float(low), f"{name}_high": float(high)}
