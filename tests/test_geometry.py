"""Boxes are mapped back through what preprocessing really does to the pixels."""

import itertools
import re

import numpy as np
import open_clip
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import (
    CenterCrop,
    Compose,
    Normalize,
    RandomHorizontalFlip,
    Resize,
    ToTensor,
)

from vlm_probe.vision.geometry import box_in_original, without_far_ends


def test_a_crop_by_hand():
    # 10 x 6 doubled is 20 x 12; a crop of 9 leaves out round(5.5) = 6 columns and
    # round(1.5) = 2 rows: halves go to the even number.
    preprocess = Compose([Resize((12, 20)), CenterCrop(9)])
    box = box_in_original(preprocess, (0.0, 0.0, 9.0, 9.0), (10, 6))
    assert box == (3, 1, 7.5, 5.5)
    box = box_in_original(preprocess, (2.0, 4.0, 4.0, 5.0), (10, 6))
    assert box == (4, 3, 5, 3.5)


def test_padding_by_hand():
    # 20 x 5 becomes 8 x 2, with 3 rows of padding above and below.
    preprocess = open_clip.image_transform(8, is_train=False, resize_mode="longest")
    assert box_in_original(preprocess, (0.0, 0.0, 4.0, 3.0), (20, 5)) == (0, 0, 10, 0)
    assert box_in_original(preprocess, (4.0, 2.0, 8.0, 4.0), (20, 5)) == (
        10,
        0,
        20,
        2.5,
    )
    assert box_in_original(preprocess, (0.0, 5.0, 4.0, 8.0), (20, 5)) == (0, 5, 10, 5)


def seen_at(preprocess, size, row, column):
    """Which point of the original a pixel of the preprocessed picture shows.

    In a picture whose value is its own coordinate, since interpolation keeps straight
    lines straight: the value is exact as far as the borders do not reach.
    """
    found = []
    for axis in range(2):
        width, height = size
        x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
        picture = Image.fromarray((x, y)[axis].astype(np.float32))
        for step in preprocess.transforms[:-3]:  # without RGB, tensor, normalizing
            picture = step(picture)
        found.append(np.asarray(picture)[row, column])
    return found


@settings(max_examples=150, deadline=None)
@given(
    mode=st.sampled_from(["shortest", "squash", "longest"]),
    size=st.tuples(st.integers(32, 300), st.integers(32, 300)),
    target=st.one_of(
        st.integers(24, 40), st.tuples(st.integers(24, 40), st.integers(24, 40))
    ),
)
def test_a_pixel_shows_the_middle_of_its_box(mode, size, target):
    preprocess = open_clip.image_transform(target, is_train=False, resize_mode=mode)
    height, width = (target, target) if isinstance(target, int) else target
    row, column = height // 2 - 1, width // 2 - 1
    one = (float(column), float(row), column + 1.0, row + 1.0)
    left, top, right, bottom = box_in_original(preprocess, one, size)
    # Where less than ten pixels of the picture are left, its borders reach the middle.
    if min(size[0] / (right - left), size[1] / (bottom - top)) > 10:
        x, y = seen_at(preprocess, size, row, column)
        assert x == pytest.approx((left + right) / 2, abs=0.05 * (right - left))
        assert y == pytest.approx((top + bottom) / 2, abs=0.05 * (bottom - top))


@settings(max_examples=50, deadline=None)
@given(
    mode=st.sampled_from(["shortest", "squash", "longest"]),
    size=st.tuples(st.integers(8, 300), st.integers(8, 300)),
)
def test_boxes_tile_what_is_left_of_the_picture(mode, size):
    preprocess = open_clip.image_transform(32, is_train=False, resize_mode=mode)
    whole = box_in_original(preprocess, (0.0, 0.0, 32.0, 32.0), size)
    if mode != "shortest":
        assert whole == pytest.approx((0, 0, *size))
    assert 0 <= whole[0] < whole[2] <= size[0]
    assert 0 <= whole[1] < whole[3] <= size[1]
    edges = [
        box_in_original(preprocess, (x, x, x + 8, x + 8), size)
        for x in (0.0, 8.0, 16.0, 24.0)
    ]
    for before, after in itertools.pairwise(edges):
        assert before[2:] == pytest.approx(after[:2])
    assert edges[0][:2] == whole[:2]
    assert edges[-1][2:] == whole[2:]


def _convert_image_to_rgb(image):
    return image.convert("RGB")


def test_openais_own_preprocessing_is_known():
    theirs = Compose(
        [
            Resize(32),
            CenterCrop(32),
            _convert_image_to_rgb,
            ToTensor(),
            Normalize((0.5,) * 3, (0.25,) * 3),
        ]
    )
    ours = open_clip.image_transform(32, is_train=False)
    box = (3.0, 5.0, 11.0, 13.0)
    for size in [(81, 50), (50, 81)]:
        assert box_in_original(theirs, box, size) == box_in_original(ours, box, size)


@pytest.mark.parametrize(
    ("preprocess", "step"),
    [
        (Compose([Resize(8), RandomHorizontalFlip()]), "RandomHorizontalFlip(p=0.5)"),
        (lambda image: image, "<function"),
    ],
)
def test_a_step_that_is_not_known_is_refused(preprocess, step):
    words = f"not known for a preprocessing with the step {step}"
    with pytest.raises(ValueError, match=re.escape(words)) as raised:
        box_in_original(preprocess, (0.0, 0.0, 8.0, 8.0), (10, 10))
    assert "expected a Compose of CenterCrop, CenterCropOrPad, Resize" in str(
        raised.value
    )


LEVELS = {"mean": (0,) * 3, "std": (1 / 255,) * 3}  # pixels from 0 to 255


def noise(width, height):
    """Not of all shades: interpolation would leave the range, and be cut off there.

    Whether that happens along the rows or the columns first, Pillow decides by size.
    """
    rng = np.random.default_rng(width + height)
    return Image.fromarray(rng.integers(64, 192, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("target", [32, 31, (24, 40), (40, 24)])
@pytest.mark.parametrize(
    "size",
    [(20, 1500), (1500, 20), (21, 1501), (7, 1778), (1, 301), (50, 3333), (100, 9001)],
)
def test_a_very_long_picture_gives_the_same_pixels(size, target, interpolation):
    preprocess = open_clip.image_transform(
        target, is_train=False, interpolation=interpolation, **LEVELS
    )
    picture = noise(*size)
    middle = without_far_ends(preprocess, picture)
    assert max(middle.size) <= 40  # and nothing is left to resize
    assert (preprocess(middle) - preprocess(picture)).abs().max() < 1.001  # of 255


def test_the_crop_is_at_the_same_place_whatever_is_odd():
    # Halves are rounded to the even neighbor, so that the middle may move by a pixel.
    preprocess = open_clip.image_transform(16, is_train=False, **LEVELS)
    for size in itertools.product((15, 16, 17), range(1200, 1216)):
        picture = noise(*size)
        middle = without_far_ends(preprocess, picture)
        assert middle.size == (16, 16)
        assert (preprocess(middle) - preprocess(picture)).abs().max() < 1.001, size
    # A crop smaller than the shortest side, as timm has it.
    preprocess = Compose([Resize(20), CenterCrop(15), ToTensor()])
    for length in range(1200, 1216):
        picture = noise(20, length)
        middle = without_far_ends(preprocess, picture)
        assert middle.size == (20, 20)
        assert (preprocess(middle) - preprocess(picture)).abs().max() == 0


def test_a_picture_that_is_not_very_long_is_left_alone():
    shortest, squash, longest = (
        open_clip.image_transform(32, is_train=False, resize_mode=mode)
        for mode in ("shortest", "squash", "longest")
    )
    for preprocess in (shortest, squash, longest):
        for size in [(1, 1), (32, 32), (640, 480), (20, 600)]:
            picture = noise(*size)
            assert without_far_ends(preprocess, picture) is picture
    long = noise(1, 5000)
    assert without_far_ends(squash, long) is long
    for unknown in (
        Compose([RandomHorizontalFlip(), Resize(8)]),
        Compose([]),
        np.array,
    ):
        assert without_far_ends(unknown, long) is long


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 20_000_000)])
def test_a_very_long_picture_takes_little_memory(size, monkeypatch):
    made, resize = [], Image.Image.resize

    def spy(self, size, *given, **named):
        made.append(size[0] * size[1])
        return resize(self, size, *given, **named)

    monkeypatch.setattr(Image.Image, "resize", spy)
    preprocess = open_clip.image_transform(224, is_train=False, **LEVELS)
    width, height = size
    picture = Image.new("L", size)
    middle = (width // 2, height // 2)
    picture.paste(
        200, tuple(max(0, at - 9) for at in middle) + tuple(at + 9 for at in middle)
    )
    pixels = preprocess(without_far_ends(preprocess, picture))
    assert pixels.unique().tolist() == [pytest.approx(200)]
    assert made == [224 * 224]
    box = box_in_original(preprocess, (0.0, 0.0, 224.0, 224.0), size)
    edges = [(at - 0.5, at + 0.5) if at else (0, 1) for at in middle]
    assert np.array(box).reshape(2, 2).T.tolist() == np.array(edges).tolist()
    assert made == [224 * 224]


def test_a_side_that_would_vanish_is_kept_at_one_pixel():
    # 1 x 300 at most 32 long is 32 x 0.1, rounded to none; the rest is padding.
    preprocess = open_clip.image_transform(
        32, is_train=False, resize_mode="longest", **LEVELS
    )
    picture = Image.new("RGB", (300, 1), (10, 20, 30))
    with pytest.raises(ValueError, match="must be > 0"):
        preprocess(picture)
    pixels = preprocess(without_far_ends(preprocess, picture))
    assert pixels[0].sum(1).tolist() == pytest.approx([0] * 15 + [320] + [0] * 16)
    box = box_in_original(preprocess, (0.0, 15.0, 32.0, 16.0), (300, 1))
    assert box == (0, 0, 300, 1)
