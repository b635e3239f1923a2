"""Where the patches of top features lie in the pictures that they are of."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int

from vlm_probe.vision import VisionModel

Size = tuple[int, int]
"""Width and height of a picture as a person sees it, in pixels."""

SIDES = ("left", "top", "right", "bottom")


def why_unknown(vision: VisionModel) -> str | None:
    """Why it is not known where patches lie; None if it is."""
    try:
        vision.patch_boxes(np.array([0]), (64, 64))
    except ValueError as error:
        return str(error)
    return None


def boxes_of(
    vision: VisionModel,
    images: Int[np.ndarray, " peak"],
    patches: Int[np.ndarray, " peak"],
    sizes: Mapping[int, Size],
) -> Float[np.ndarray, "peak 4"]:
    """Left, top, right and bottom of patches, each in pixels of its own picture.

    Args:
        vision: Whose patches they are.
        images: Place in the run of the picture that each is of.
        patches: Below zero for what is no patch, whose box is not a number.
        sizes: Of the pictures.
    """
    found = np.full((len(patches), 4), np.nan)
    (patched,) = np.nonzero(patches >= 0)
    if not len(patched):
        return found
    pictures, picture = np.unique(images[patched], return_inverse=True)
    # A size at a time: a run has many pictures, of few sizes.
    size_of = np.array([sizes[image] for image in pictures.tolist()])
    distinct, of_picture = np.unique(size_of, axis=0, return_inverse=True)
    which = of_picture.reshape(-1)[picture]
    order = np.argsort(which, kind="stable")
    ends = np.searchsorted(which[order], np.arange(len(distinct) + 1))
    for n, (width, height) in enumerate(distinct.tolist()):
        here = patched[order[ends[n] : ends[n + 1]]]
        found[here] = vision.patch_boxes(patches[here], (width, height))
    return found
