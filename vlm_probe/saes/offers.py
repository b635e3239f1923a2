"""Which autoencoders there are to be had, and which of them is meant."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup

from vlm_probe.tokens import HOOK_POINTS, ranges


@dataclass(frozen=True)
class Offer:
    """An autoencoder that can be had, before its weights are read."""

    name: str
    """Path inside its folder, or id inside its release."""
    layer: int
    """Number of the block, from 0."""
    hook_point: str | None
    """One of `HOOK_POINTS`, or another place of a model; None if nothing says."""
    width: int | None
    """Number of features, if known."""
    l0: float | None
    """How many features are non-zero at a token, if known."""

    def __str__(self) -> str:
        known = [f"{self.width} features"] if self.width else []
        known += [f"L0 {self.l0:g}"] if self.l0 else []
        return f"{self.name} ({', '.join(known)})" if known else self.name


def place(hook_name: str | None) -> tuple[int | None, str | None]:
    """Layer and hook point that a hook's name means; outside the blocks, no layer.

    `blocks.3.hook_resid_pre` as TransformerLens has it, or a module of Hugging Face:
    the output of `model.layers.3` (`gpt_neox.layers.3`, `h.3`) is `resid_post`.
    """
    inside = r"(?:.*?\.)?(?:blocks|layers|h)\.(\d+)(?:\.(.+))?"
    found = re.fullmatch(inside, hook_name or "")
    if found is None:
        return None, hook_name
    point = (found[2] or "output").removeprefix("hook_")
    usual = {"output": "resid_post", "out": "resid_post", "in": "resid_pre"}
    return int(found[1]), usual.get(point, point)


def features(width: int | str) -> int:
    """The number that a width such as 16k, 65k, 1m or 16384 means.

    16k is 16384, and 65k is 65536: published names round powers of two either way.

    Raises:
        ValueError: It is no width.
    """
    found = re.fullmatch(r"(\d+)([km]?)", str(width).lower())
    if found is None or not int(found[1]):
        raise ValueError(f"width {width!r}: expected a number such as 16384, or 16k")
    count, power = int(found[1]), {"": 0, "k": 1, "m": 2}[found[2]]
    whole = count * 1024**power
    binary = 1 << whole.bit_length() - 1
    return binary if binary // 1000**power == count else whole


def release_offers(release: PretrainedSAELookup) -> list[Offer]:
    """What a release of SAELens has, as far as its list tells.

    Ids that say no layer are left out: embeddings, and what is not of one layer.
    """
    found = []
    for sae_id, path in release.saes_map.items():
        words = f"{sae_id} {path} {release.repo_id}"
        layer = re.search(r"(?:blocks\.|layer_?|\bl)(\d+)", f"{sae_id} {path}", re.I)
        if layer is None:
            continue
        width = re.search(r"width_(\d+[km])|resid_(?:pre|mid|post)_(\d+)", words)
        average = re.search(r"average_l0_(\d+)", path)
        # The list says 0 where it does not know.
        l0 = release.expected_l0[sae_id] or (average and average[1])
        point = next(name for name, said in _SAID if re.search(said, words, re.I))
        number = features(width[1] or width[2]) if width else None
        found.append(
            Offer(sae_id, int(layer[1]), point, number, float(l0) if l0 else None)
        )
    return found


# The first that is said anywhere in id, path or repository. Llama Scope's ids say it
# in one letter (l5r_8x), Qwen's and Goodfire's repositories alone.
_SAID = (
    ("resid_pre", r"resid_pre"),
    ("resid_mid", r"resid_mid"),
    ("transcoder", r"transcoder|clt"),
    ("attn_out", r"attn_out|hook_z|-att\b|\bl\d+a_"),
    ("mlp_out", r"mlp_out|-mlp\b|\bl\d+m_"),
    ("resid_post", r"resid_post|-res\b|SAE-Res|SAE-l\d|\bl\d+r_"),
    (None, r""),
)


def choose(
    offers: Sequence[Offer],
    what: str,
    *,
    layers: Sequence[int] | None = None,
    width: int | None = None,
    l0: float | None = None,
    hook_point: str | None = None,
) -> list[Offer]:
    """One offer for each layer, all at one hook point.

    Args:
        offers: All there are.
        what: Who offers them, for messages.
        layers: Which are wanted; all that have what is asked for if not given.
        width: Number of features.
        l0: Of those that differ in L0 alone, the nearest to this, and of two equally
            near the sparser.
        hook_point: One of `HOOK_POINTS`. If not given, the only one there is, else
            `resid_post` if it has all the layers.

    Raises:
        ValueError: What is asked for is not there, or is there more than once; says
            what there is.
    """
    if hook_point not in (None, *HOOK_POINTS):
        raise ValueError(
            f"unknown hook point {hook_point!r}; valid: {', '.join(HOOK_POINTS)}"
        )
    # What does not say its place is taken at its user's word.
    silent = hook_point or "resid_post"
    offers = [replace(o, hook_point=o.hook_point or silent) for o in offers]
    usable = [o for o in offers if o.hook_point in HOOK_POINTS]
    if not usable:
        raise ValueError(
            f"{what} has no SAE of a residual stream ({', '.join(HOOK_POINTS)}), it "
            f"has {_by('hook_point', offers)}"
        )
    asked = {o.layer for o in usable} if layers is None else set(layers)
    point = hook_point or _usual_point(usable, what, asked)
    here = [o for o in usable if o.hook_point == point]
    missing = set() if layers is None else asked - {o.layer for o in here}
    if missing or not here:
        raise ValueError(
            f"{what} has no SAE of {point}"
            + (f" for {_named(missing)}" if missing else "")
            + f", it has {_by('hook_point', usable)}"
        )
    asked &= {o.layer for o in here}
    if width is not None:
        # Where nothing tells the width beforehand, it is compared after loading.
        right = [o for o in here if o.width in (None, width)]
        lacking = asked - {o.layer for o in right}
        if lacking and (layers is not None or not right):
            raise ValueError(
                f"{what} has no SAE of {width} features for {_named(lacking)}, it has "
                f"{_by('width', here)}"
            )
        here, asked = right, asked - lacking
    return [_one([o for o in here if o.layer == n], what, l0) for n in sorted(asked)]


def _usual_point(usable: Sequence[Offer], what: str, asked: set[int]) -> str:
    points: dict[str, set[int]] = {}
    for offer in usable:
        if offer.layer in asked:
            points.setdefault(str(offer.hook_point), set()).add(offer.layer)
    if len(points) == 1:
        return next(iter(points))
    if not points or points.get("resid_post") == asked:
        return "resid_post"
    raise ValueError(
        f"{what} has SAEs of {_by('hook_point', usable)}; choose one with hook_point="
    )


def _one(offers: Sequence[Offer], what: str, l0: float | None) -> Offer:
    """The offer for a layer."""
    widths = {o.width for o in offers}
    known = [o.l0 for o in offers if o.l0]
    if l0 is not None and len(widths) == 1 and known:
        nearest = min(known, key=lambda other: (abs(other - l0), other))
        offers = [o for o in offers if o.l0 == nearest]
    if len(offers) == 1:
        return offers[0]
    ways = ["width"] if len(widths) > 1 else []
    ways += ["l0"] if len({(o.width, o.l0) for o in offers}) > len(widths) else []
    remedy = "they differ in neither width nor L0; give a folder that has one of them"
    if ways:
        remedy = "choose with {} (in vlm_probe.load {}, on the command line {})".format(
            *(
                " and ".join(form.format(way) for way in ways)
                for form in ("{}=", "sae_{}=", "--sae-{}")
            )
        )
    listed = ", ".join(map(str, offers[:12]))
    more = f" and {len(offers) - 12} more" if len(offers) > 12 else ""
    raise ValueError(
        f"{what} has {len(offers)} SAEs for layer {offers[0].layer}: {listed}{more}; "
        f"{remedy}"
    )


def _by(what: str, offers: Sequence[Offer]) -> str:
    """Which layers there are for each width or hook point."""
    groups: dict[object, set[int]] = {}
    for offer in offers:
        groups.setdefault(getattr(offer, what) or "unknown", set()).add(offer.layer)
    return ", ".join(
        f"{key} ({_named(groups[key])})"
        for key in sorted(groups, key=lambda key: (isinstance(key, str), key))
    )


def _named(layers: Iterable[int]) -> str:
    """`layers 0-5, 11` for 0, 1, 2, 3, 4, 5, 11."""
    said = ranges(layers)
    return f"layer {said}" if said.isdecimal() else f"layers {said}"
