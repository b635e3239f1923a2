"""Which of an image's strongest features are taken, and which fire too often to be.

A filter by frequency must treat groups alike. The paper drops what fires anywhere in
more than 5 % of a group's samples. At a rate of p a token, a sample of L tokens has
the feature with chance 1 - (1 - p)^L, so the limit is p = 2.0e-4 for an image of 256
tokens and 8.5e-4 for a text of 60: what is dropped from one group is kept in the other,
and their match rates cannot be compared. Here a feature's frequency is its rate per
token on a reference that is the same for all groups, and so is the decision.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import pandas as pd

from vlm_probe.result import ProbeResult
from vlm_probe.settings import CONVENTIONS
from vlm_probe.tokens import CONDITIONS, GROUPS, RANKINGS, check_names

REFERENCES = ("run", "measured")

_LIMITS = {
    # More than 10 % of tokens is where Rajamanoharan et al. 2024 (arXiv 2407.14435, in
    # their comparison of SAEs by how often features fire) draw the same line.
    "pooled": {"max_rate": 0.1, "max_image_rate": 1.0, "max_density": 1.0},
    "paper": {"max_rate": 1.0, "max_image_rate": 0.05, "max_density": 0.005},
}
"""Of each convention; no share is above 1, which therefore drops nothing."""


@dataclass(frozen=True)
class Frequency:
    """From where on a feature fires too often to say anything of an image."""

    convention: str = "pooled"
    """Which limits hold where none are given: "pooled", by the rate per token on a
    reference that is the same for all groups; "paper", by the share of the group's own
    images and by Neuronpedia's density, as arXiv 2506.11976 does."""
    max_rate: float | None = None
    """Share of the reference's tokens; 0.1 if not given, and no limit for "paper"."""
    max_image_rate: float | None = None
    """Share of the group's images, at any of an image's tokens. It grows with the
    tokens an image has, so groups differ in it; no limit if not given, and 0.05 for
    "paper"."""
    max_density: float | None = None
    """Share of the tokens of a text corpus, where densities are given; no limit if not
    given, and 0.005 for "paper"."""
    reference: str = "run"
    """Whose tokens the rate is of: "run", the tokens of this run under the condition
    `model`, each of its groups counted alike; "measured", the texts and pictures of
    `reference_rate`, which runs that are ranked by selectivity have."""

    def __post_init__(self) -> None:
        check_names("convention", [self.convention], CONVENTIONS)
        check_names("reference", [self.reference], REFERENCES)
        for name, limit in _LIMITS[self.convention].items():
            given = getattr(self, name)
            if given is None:
                object.__setattr__(self, name, limit)
            elif not 0 <= given <= 1:
                raise ValueError(f"{name} is a share, from 0 to 1, given {given}")


def best_features(
    result: ProbeResult,
    *,
    by: str = "activation",
    k: int = 3,
    layer: int | None = None,
    group: str | None = None,
    image: int | str | None = None,
    condition: str = "model",
    frequency: Frequency | None = None,
    density: Mapping[int, Mapping[int, float]] | None = None,
    **changes: object,
) -> pd.DataFrame:
    """The strongest features of images that do not fire too often.

    Args:
        result: Of a probe.
        by: Which ranking: "activation" or "selectivity".
        k: How many features of each layer, group and image.
        layer: Only of this layer.
        group: Only of this group.
        image: Only of this image, by its place in the run or its id.
        condition: Of which condition. Frequencies are the model's own, whichever it is,
            but for `image_rate`.
        frequency: What is too often; the defaults if None.
        density: By layer and feature, the share of a corpus' tokens that fire it. A
            feature that is not in it is not dropped for it.
        **changes: Fields of `Frequency`, over `frequency`, for instance
            `max_rate=0.02`, `convention="paper"`.

    Returns:
        Rows of `top_features`, with `rate` on the reference, `image_rate`, `density`
        (missing where not given), `choice` from 1, and `short`: whether its image has
        fewer than k.

    Raises:
        TypeError: An unknown option.
        ValueError: A ranking, layer, group, image or condition that the result does
            not have, or more features than were kept.

    Warns:
        UserWarning: Of some images fewer than k are left although more may have fired
            than the run kept; or none is left.
    """
    wanted = _frequency(frequency, changes)
    top = _rows(result, by, layer, group, image, condition)
    kept = _kept(result, top)
    if not 1 <= k <= kept:
        raise ValueError(
            f"k is {k}, and the run kept {kept} features of each image; expected 1 to "
            f"{kept}, or probe again with top_k above {max(k, kept)}"
        )
    top = top.assign(
        rate=_rates(result, top, wanted.reference),
        image_rate=_image_rates(result, top),
        density=_densities(top, density),
    )
    too_often = (
        (top["rate"] > wanted.max_rate)
        | (top["image_rate"] > wanted.max_image_rate)
        | (top["density"] > wanted.max_density)
    )
    chosen = top[~too_often].sort_values([*_CASE, "image", "rank"])
    place = chosen.groupby([*_CASE, "image"]).cumcount() + 1
    chosen = chosen.assign(choice=place)[place <= k]
    found = chosen.groupby([*_CASE, "image"])["choice"].transform("size")
    _say_if_cut_short(top, chosen, k, kept)
    return chosen.assign(short=found < k).reset_index(drop=True)


_CASE = ["layer", "group", "condition"]


def _frequency(frequency: Frequency | None, changes: dict[str, object]) -> Frequency:
    valid = [field.name for field in fields(Frequency)]
    if unknown := [name for name in changes if name not in valid]:
        raise TypeError(
            f"unknown option {', '.join(map(repr, unknown))}; valid: "
            f"{', '.join(valid)}, and those of best_features"
        )
    if frequency is None:
        return Frequency(**changes)
    return replace(frequency, **changes)


def _rows(
    result: ProbeResult,
    by: str,
    layer: int | None,
    group: str | None,
    image: int | str | None,
    condition: str,
) -> pd.DataFrame:
    """Rows of `top_features` that are asked for, each of which must be there."""
    top = result.top_features
    if by in RANKINGS and by not in set(top["by"]):
        raise ValueError(
            f"the run has no ranking by {by}, only by "
            f"{', '.join(sorted(set(top['by']))) or 'nothing'}; probe again with "
            f"rank_by=[{by!r}] and top_k of 1 or more"
        )
    check_names("ranking", [by], RANKINGS)
    check_names("condition", [condition], CONDITIONS)
    if group is not None:
        check_names("group", [group], GROUPS)
    id_or_place = "id" if isinstance(image, str) else "image"
    asked = {"by": by, "condition": condition, "layer": layer, "group": group}
    for name, value in (asked | {id_or_place: image}).items():
        if value is None:
            continue
        there = top[name].unique().tolist()
        if value not in there:
            shown = ", ".join(map(str, there[:20])) + (", ..." * (len(there) > 20))
            raise ValueError(
                f"no top features of {name} {value!r} in this result; it has {shown}"
            )
        top = top[top[name] == value]
    return top


def _kept(result: ProbeResult, top: pd.DataFrame) -> int:
    """How many features the run kept of each image."""
    settings = result.meta.get("settings") or {}
    return int(settings.get("top_k", top["rank"].max()))


def _rates(result: ProbeResult, top: pd.DataFrame, reference: str) -> pd.Series:
    """How often each row's feature fires per token, the same for all groups."""
    features = result.features
    features = features[features["condition"] == "model"]
    if reference == "measured":
        known = features.dropna(subset="reference_rate")
        if known.empty:
            raise ValueError(
                "this run has no reference_rate; probe again with selectivity among "
                'rank_by, or take reference="run"'
            )
        # Of all conditions, for one may fire what the model does not.
        rates = result.features.groupby(["layer", "feature"])["reference_rate"].first()
    else:
        layers = result.layers
        n_groups = layers[layers["condition"] == "model"].groupby("layer").size()
        summed = features.groupby(["layer", "feature"])["rate"].sum()
        # Where a group has no row for the feature, it did not fire there.
        rates = summed / n_groups.reindex(summed.index.get_level_values(0)).to_numpy()
    return _looked_up(rates, top, ["layer", "feature"]).fillna(0.0)


def _image_rates(result: ProbeResult, top: pd.DataFrame) -> pd.Series:
    """In which share of its own group's images each row's feature fires."""
    keys = [*_CASE, "feature"]
    fired = _looked_up(result.features.set_index(keys)["n_images"], top, keys)
    images = _looked_up(result.layers.set_index(_CASE)["n_images"], top, _CASE)
    return fired / images


def _densities(
    top: pd.DataFrame, density: Mapping[int, Mapping[int, float]] | None
) -> pd.Series:
    given = density or {}
    pairs = zip(top["layer"].tolist(), top["feature"].tolist(), strict=True)
    found = [given.get(layer, {}).get(feature) for layer, feature in pairs]
    return pd.Series(found, index=top.index, dtype=float)


def _looked_up(values: pd.Series, rows: pd.DataFrame, keys: list[str]) -> pd.Series:
    """The value that belongs to each row; missing where there is none."""
    wanted = pd.MultiIndex.from_frame(rows[keys])
    return pd.Series(values.reindex(wanted).to_numpy(), index=rows.index)


def _say_if_cut_short(
    top: pd.DataFrame, chosen: pd.DataFrame, k: int, kept: int
) -> None:
    """Warns of images whose further features the run did not keep."""
    keys = [*_CASE, "image"]
    there = top.groupby(keys).size()
    left = chosen.groupby(keys).size().reindex(there.index, fill_value=0)
    # Where fewer than top_k were kept, those are all that fired.
    cut = (left < k) & (there >= kept)
    if cut.any():
        warnings.warn(
            f"{int(cut.sum())} of {len(there)} images (by layer and group) have fewer "
            f"than {k} features left, since the others among the {kept} that were kept "
            "fire too often; probe again with a larger top_k, or raise the limit",
            stacklevel=3,
        )
    if (left == 0).any():
        warnings.warn(
            f"{int((left == 0).sum())} of {len(there)} images (by layer and group) "
            "have no feature left and no row: all that were kept fire too often",
            stacklevel=3,
        )
