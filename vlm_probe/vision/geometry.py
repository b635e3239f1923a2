"""Where a box of the vision model's input lies in the original picture.

Preprocessing moves pixels by resizing, cropping and padding only, so along each axis
the original position is `offset + scale * position`. Both numbers are found by
following the real transforms step by step, not from what a config says of them.
They also tell which ends of a very long picture are cut off, and need not be resized.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Float
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
_FAR_MORE = 32
"""So many times what is kept may be resized only to be cut off: up to about 1 : 32."""


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
        original_size: Width and height of the original, as PIL gives them, after it was
            turned as its EXIF orientation says.

    Returns:
        The box in pixels of the original, cut off at its borders: a box that lies in
        padding is empty.

    Raises:
        ValueError: The preprocessing has a step of which it is not known where it
            moves pixels.
    """
    (found,) = boxes_in_original(preprocess, np.array([box]), original_size)
    left, top, right, bottom = found.tolist()
    return left, top, right, bottom


def boxes_in_original(
    preprocess: Callable[[Image.Image], Tensor],
    boxes: Float[np.ndarray, "box 4"],
    original_size: tuple[int, int],
) -> Float[np.ndarray, "box 4"]:
    """Many boxes at once, each as `box_in_original` has it."""
    found = np.empty(boxes.shape)
    placed = zip(_placement(preprocess, original_size), original_size, strict=True)
    for axis, ((offset, scale), length) in enumerate(placed):
        found[:, axis::2] = (offset + scale * boxes[:, axis::2]).clip(0, length)
    return found


def without_far_ends(
    preprocess: Callable[[Image.Image], Tensor], picture: Image.Image
) -> Image.Image:
    """The picture, or its middle if preprocessing would resize far more than it keeps.

    A picture of 1 x 5,000, its shortest side resized to 224, has 250 million pixels. Of
    such a one the middle is resized here, to the pixels that it would have had there:
    preprocessing finds nothing left to resize, and crops it at the same place.
    """
    resize, crop, *_ = (*_steps(preprocess), None, None)
    if not (isinstance(resize, _RESIZES) and isinstance(crop, _CROPS)):
        return picture
    outline = resize(_Outline(picture.size))
    width, height = outline.size
    resized, wanted = (max(1, width), max(1, height)), crop.size[::-1]
    # No shorter than its shortest side, or else the resize would enlarge it again.
    shortest = min(resized)
    kept = [min(r, max(shortest, w)) for r, w in zip(resized, wanted, strict=True)]
    if outline.size == resized and width * height <= _FAR_MORE * math.prod(kept):
        return picture
    windows = map(_window, picture.size, resized, kept, wanted)
    (left, right, start, end), (top, bottom, begin, stop) = windows
    middle = picture.crop((left, top, right, bottom))
    return middle.resize(tuple(kept), outline.resample, box=(start, begin, end, stop))


@lru_cache(maxsize=256)
def _placement(
    preprocess: Callable[[Image.Image], Tensor], size: tuple[int, int]
) -> list[tuple[float, float]]:
    """Offset and scale of each axis, horizontal and vertical."""
    axes = [(0.0, 1.0), (0.0, 1.0)]
    for step in _steps(preprocess):
        if isinstance(step, _RESIZES):
            # Asked for what it does: each kind has its own way of rounding.
            width, height = step(_Outline(size)).size
            after = max(1, width), max(1, height)
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


class _Outline(Image.Image):
    """A size without pixels, to be told what a resize would make of a picture."""

    def __init__(self, size: tuple[int, int], resample: int | None = None) -> None:
        super().__init__()
        self._mode, self._size = "RGB", size  # set so by Pillow's plugins
        self.resample = resample

    def resize(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, size: Sequence[int], resample: int | None = None
    ) -> _Outline:
        width, height = size
        return _Outline((width, height), resample)


def _steps(preprocess: Callable) -> Iterator[Callable]:
    if isinstance(preprocess, Compose):
        for step in preprocess.transforms:
            yield from _steps(step)
    else:
        yield preprocess


def _window(
    length: int, resized: int, kept: int, cropped: int
) -> tuple[int, int, float, float]:
    """Which pixels of an axis to cut out, and which part of those becomes `kept`.

    Cut out first, since Pillow takes the part in single precision, and a little wider:
    interpolation looks past it by three pixels at most, of the smaller picture.
    """
    scale = length / resized
    margin = _margin(resized, cropped) - _margin(kept, cropped)
    start, end = scale * margin, min(scale * (margin + kept), float(length))
    reach = 4 * max(1.0, scale)
    first, last = math.floor(start - reach), math.ceil(end + reach)
    first, last = max(0, first), min(length, last)
    return first, last, start - first, end - first


def _margin(length: int, kept: int) -> int:
    """How many pixels a center crop cuts off first; below zero, how many it pads.

    An odd number of them is halved by torchvision's rules: of padding the smaller half
    comes first, and a cut is rounded as Python does, to the even neighbor.
    """
    return round((length - kept) / 2) if length >= kept else -((kept - length) // 2)
