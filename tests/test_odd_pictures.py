"""A run over many pictures ends, whatever a twentieth of them is like.

Ten ways to be broken or odd, ten pictures of each. What a person would see in an odd
one is built here by other means than the package's: as an array, from what was written.
"""

import io
import re

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import ExifTags, Image
from tiny import tiny_model

from vlm_probe import probe_layers
from vlm_probe.examples import Example

SIDE = 32
BROKEN = {
    "truncated": r"OSError: .* is cut off or damaged: .+",
    "empty": r"UnidentifiedImageError: .* is empty: the file has 0 bytes",
    "no image": r"UnidentifiedImageError: cannot identify image file .*: its \d+ bytes "
    r"begin with b'.+'; it is no picture, .*",
}


def noise(seed, *shape):
    shape = shape or (SIDE, SIDE, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def truncated(number):
    form = ("PNG", "JPEG", "GIF", "WEBP", "BMP")[number % 5]
    whole = encoded(Image.fromarray(noise(number)), form)
    return whole[: len(whole) * (3 + number // 5) // 5], None


def empty(number):
    return b"", None


def no_image(number):
    kinds = [b"<html>not found</html>", b"%PDF-1.7", b"<svg/>", b"\0" * 40, b"PK\3\4"]
    return kinds[number % 5] * (1 + number // 5), None


def one_pixel(number):
    color = noise(number, 1, 1, 3)
    return encoded(Image.fromarray(color), "PNG"), np.tile(color, (SIDE, SIDE, 1))


def very_long(number):
    """Noise around a middle of one color, which is all that a center crop keeps."""
    color, long = noise(number, 3), noise(number, 5000, 1, 3)
    long[2490:2510] = color
    picture = Image.fromarray(long if number % 2 else long.swapaxes(0, 1))
    return encoded(picture, "PNG"), np.tile(color, (SIDE, SIDE, 1))


def inks(number):
    """Each color is white less its ink, less the share that black takes of it."""
    paper = noise(number, SIDE, SIDE, 4)
    paper[..., 3] = 255 * (number % 2)  # all or no black, lest rounding be in question
    picture = Image.frombytes("CMYK", (SIDE, SIDE), paper.tobytes())
    color = (255 - paper[..., :3]) * (1 - number % 2)
    return encoded(picture, "TIFF"), color.astype(np.uint8)


def deep(number):
    """Of 65,535 shades one in 257 is one of 255; those about it are rounded to it."""
    shade, about = noise(number, SIDE, SIDE), noise(number + 100, SIDE, SIDE)
    fine = shade.astype(int) * 257 + about - 128
    fine = fine.clip(0, 65535).astype(np.uint16)
    form = ("PNG", "TIFF", "PPM")[number % 3]
    return encoded(Image.fromarray(fine), form), np.stack([shade] * 3, -1)


def transparent(number):
    """Some colors are hidden, and all white is what a person sees of them."""
    if number % 2:
        picture = noise(number, SIDE, SIDE, 4)
        picture[..., 3] = np.where(picture[..., 3] < 128, 0, 255)
        color = np.where(picture[..., 3:] == 0, 255, picture[..., :3])
        return encoded(Image.fromarray(picture), "PNG"), color
    index, colors = noise(number, SIDE, SIDE) % 16, noise(number + 100, 16, 3)
    picture = Image.fromarray(index)
    picture.putpalette(colors.tobytes())
    clear = bytes(0 if i % 3 == 0 else 255 for i in range(16))
    color = np.where((index % 3 == 0)[..., None], 255, colors[index])
    return encoded(picture, "PNG", transparency=clear), color.astype(np.uint8)


def animated(number):
    frames, colors = [], noise(number, 16, 3)
    indices = [noise(seed, SIDE, SIDE) % 16 for seed in (number, number + 100)]
    for index in indices:
        frame = Image.fromarray(index)
        frame.putpalette(colors.tobytes())
        frames.append(frame)
    first, others = colors[indices[0]], frames[1:]
    return encoded(frames[0], "GIF", save_all=True, append_images=others), first


TURNS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


def rotated(number):
    orientation = 1 + number % 8
    form, options = [("PNG", {}), ("JPEG", {}), ("WEBP", {"lossless": True})][
        number % 3
    ]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture = Image.fromarray(noise(number, SIDE, SIDE + 8, 3))
    plain = np.array(Image.open(io.BytesIO(encoded(picture, form, **options))))
    turned = np.ascontiguousarray(TURNS[orientation](plain))
    return encoded(picture, form, exif=exif, **options), turned


WAYS = {
    "truncated": truncated,
    "empty": empty,
    "no image": no_image,
    "one pixel": one_pixel,
    "very long": very_long,
    "inks": inks,
    "deep": deep,
    "transparent": transparent,
    "animated": animated,
    "rotated": rotated,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """2,000 files, of which each twentieth is broken or odd; and what is to be seen."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for index in range(2000):
        way, number = "plain", index
        if index % 20 == 7:
            number, place = divmod(index // 20, len(WAYS))
            way = list(WAYS)[place]
            written, expected = WAYS[way](number)
        else:
            expected = noise(index)
            written = encoded(Image.fromarray(expected), "PNG", compress_level=1)
        file = folder / f"{index:04}.png"  # what it is, is not to be told by its name
        file.write_bytes(written)
        rows.append((way, file, expected))
    return pd.DataFrame(rows, columns=["way", "file", "expected"])


def probed(model, images):
    return probe_layers(
        model,
        images,
        groups=["image"],
        layers=[0],
        replicates=0,
        batch_size=64,
        top_k=2,
        progress=False,
    )


def numbers(result):
    """The one row of the table, without the bounds, which are not asked for."""
    (row,) = result.layers.select_dtypes("number").dropna(axis=1).to_dict("records")
    return row


@pytest.fixture(scope="module")
def model():
    """The tiny model, on one thread: two would wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tiny_model()
    torch.set_num_threads(before)


def test_a_run_with_broken_and_odd_pictures_ends_and_is_right(pictures, model):
    assert pictures.way.value_counts().drop("plain").tolist() == [10] * 10
    result = probed(model, pictures.file)
    assert result.layers.n_images.tolist() == [1970]
    broken = pictures[pictures.way.isin(BROKEN)]
    assert result.meta["n_failures"] == len(result.failures) == 30
    assert result.failures.image.tolist() == broken.index.tolist()
    assert result.failures.id.tolist() == [file.name for file in broken.file]
    for way, file, said in zip(
        broken.way, broken.file, result.failures.error, strict=True
    ):
        assert re.fullmatch(BROKEN[way], said, re.DOTALL), said
        assert str(file) in said
    shown = [Image.fromarray(e) for e in pictures.expected if e is not None]
    assert numbers(result) == pytest.approx(numbers(probed(model, shown)), rel=1e-5)


@pytest.mark.parametrize("way", [way for way in WAYS if way not in BROKEN])
def test_numbers_are_those_of_what_a_person_sees(way, pictures, model):
    odd = pictures[pictures.way == way]
    shown = [Image.fromarray(expected) for expected in odd.expected]
    found, expected = (numbers(probed(model, them)) for them in (odd.file, shown))
    assert found == pytest.approx(expected, rel=1e-5)
    assert {"mse", "fvu", "nmse", "cosine", "l0", "norm"} <= found.keys()
    assert found["n_images"] == 10


def test_pixels_are_those_that_a_person_sees(pictures):
    for way, file, expected in pictures[pictures.way != "plain"].itertuples(
        index=False
    ):
        if way not in {*BROKEN, "one pixel", "very long"}:  # those are of other sizes
            assert np.array_equal(Example(file).picture(), expected), (way, file)
