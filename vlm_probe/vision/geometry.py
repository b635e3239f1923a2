"""Where a box of the vision model's input lies in the original picture.

Preprocessing moves pixels by resizing, cropping and padding only, so along each axis
the original position is `offset + scale * position`. Both numbers are found by
following the real transforms step by step, not from what a config says of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

from open_clip.transform import CenterCropOrPad, ResizeKeepRatio
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, Resize

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels; a picture's pixels go from 0 to its size."""

_RESIZES = (Resize, ResizeKeepRatio)
_CROPS = (CenterCrop, CenterCropOrPad)
_IN_PLACE = {
    "MaybeConvertMode",
    "MaybeToTensor",
    "Normalize",
    "ToTensor",
    "_convert_image_to_rgb",  # OpenAI's
    "_convert_to_rgb",  # open_clip's, before version 2.24
}
"""Steps that leave every pixel where it is."""


def box_in_original(
    preprocess: Callable[[Image.Image], Tensor],
    box: Box,
    original_size: tuple[int, int],
) -> Box:
    """Where a box of the preprocessed picture lies in the original.

    Interpolation looks a little past the box; what is given is the area that its
    pixels stand for.

    Args:
        preprocess: As open_clip, torchvision or OpenAI compose it.
        box: In pixels of the preprocessed picture.
        original_size: Width and height of the original, as PIL gives them.

    Returns:
        The box in pixels of the original, cut off at its borders: a box that lies in
        padding is empty.

    Raises:
        ValueError: The preprocessing has a step of which it is not known where it
            moves pixels.
    """
    width, height = original_size
    ends = []
    axes = zip(
        _placement(preprocess, (width, height)),
        (box[::2], box[1::2]),
        (width, height),
        strict=True,
    )
    for (offset, scale), edges, length in axes:
        ends.append([min(max(offset + scale * e, 0.0), float(length)) for e in edges])
    (left, right), (top, bottom) = ends
    return left, top, right, bottom


@lru_cache(maxsize=256)
def _placement(
    preprocess: Callable[[Image.Image], Tensor], size: tuple[int, int]
) -> list[tuple[float, float]]:
    """Offset and scale of each axis, horizontal and vertical."""
    axes = [(0.0, 1.0), (0.0, 1.0)]
    for step in _steps(preprocess):
        if isinstance(step, _RESIZES):
            # Asked for what it does: each kind has its own way of rounding.
            width, height = step(Image.new("L", size)).size
            after = width, height
            moved = zip(axes, size, after, strict=True)
            axes = [(offset, scale * old / new) for (offset, scale), old, new in moved]
        elif isinstance(step, _CROPS):
            height, width = step.size
            after = width, height
            moved = zip(axes, map(_margin, size, after), strict=True)
            axes = [(offset + scale * cut, scale) for (offset, scale), cut in moved]
        elif getattr(step, "__name__", type(step).__name__) in _IN_PLACE:
            continue
        else:
            known = ", ".join(sorted(kind.__name__ for kind in _RESIZES + _CROPS))
            raise ValueError(
                f"where patches lie is not known for a preprocessing with the step "
                f"{step}; expected a Compose of {known} and steps that move no pixel, "
                "as open_clip.image_transform makes it"
            )
        size = after
    return axes


def _steps(preprocess: Callable) -> Iterator[Callable]:
    if isinstance(preprocess, Compose):
        for step in preprocess.transforms:
            yield from _steps(step)
    else:
        yield preprocess


def _margin(length: int, kept: int) -> int:
    """How many pixels a center crop cuts off first; below zero, how many it pads.

    An odd number of them is halved by torchvision's rules: of padding the smaller half
    comes first, and a cut is rounded as Python does, to the even neighbor.
    """
    return round((length - kept) / 2) if length >= kept else -((kept - length) // 2)
