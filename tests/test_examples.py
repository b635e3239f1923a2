"""Pictures, paths and conversation files become examples; what is none is refused."""

import json
import os
import re
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
from PIL import ExifTags, Image

from vlm_probe.examples import (
    UNREADABLE,
    Example,
    as_examples,
    read_examples,
    write_examples,
)


def picture(shade=0, mode="RGB"):
    pixels = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3) + shade
    return Image.fromarray(pixels).convert(mode)


def same(one, other):
    return one.mode == other.mode and (np.array(one) == np.array(other)).all()


def test_pictures_paths_and_examples_become_examples():
    given = Example(picture(), prompt="what ?")
    named = Example("a/b.png", id="mine")
    one, two, three, four, five = as_examples(
        [picture(), "a/b.png", Path("c.jpg"), given, named]
    )
    # The file's name where there is one, else the place in the run.
    assert [e.id for e in (one, two, three, four, five)] == [
        "0",
        "b.png",
        "c.jpg",
        "3",
        "mine",
    ]
    assert (two.image, three.image) == ("a/b.png", Path("c.jpg"))
    assert (four.prompt, four.image) == ("what ?", given.image)
    assert given.id is None  # the caller's own is left as it was
    assert five is named


def test_a_generator_is_read_one_at_a_time():
    def endless():
        while True:
            yield picture()

    examples = as_examples(endless())
    assert [next(examples).id, next(examples).id] == ["0", "1"]


@pytest.mark.parametrize(
    ("alone", "kind"),
    [
        ("a.png", "str"),
        (Path("a.png"), "PosixPath"),
        (picture(), "Image"),
        (Example("a.png"), "Example"),
    ],
)
def test_one_picture_is_no_list(alone, kind, monkeypatch):
    # The types that tests enforce refuse it in their own words; users have ours only.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    words = f"must be a list or another iterable, given one {kind}; put it in a list"
    with pytest.raises(TypeError, match=words):
        next(as_examples(alone))


def test_what_is_no_picture_is_refused_with_its_place():
    words = "image 1 is of type int; expected a PIL.Image, a path or a vlm_probe.Exam"
    with pytest.raises(TypeError, match=words):
        list(as_examples([picture(), 7]))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK"])
def test_every_picture_is_rgb(mode, tmp_path):
    assert Example(picture(mode=mode)).picture().mode == "RGB"
    file = tmp_path / "a.tif"
    picture(mode=mode).save(file)
    assert same(Example(file).picture(), picture(mode=mode).convert("RGB"))
    assert same(Example(str(file)).picture(), picture(mode=mode).convert("RGB"))


# Letters stand for shades. EXIF says at which sides the first row and the first column
# of what is stored are to be seen, for 1 to 8: top left, top right, bottom right,
# bottom left, left top, right top, right bottom, left bottom.
STORED = ["ab", "cd", "ef"]
TURNED = {
    1: ["ab", "cd", "ef"],
    2: ["ba", "dc", "fe"],
    3: ["fe", "dc", "ba"],
    4: ["ef", "cd", "ab"],
    5: ["ace", "bdf"],
    6: ["eca", "fdb"],
    7: ["fdb", "eca"],
    8: ["bdf", "ace"],
}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("form", ["jpg", "png", "webp", "tif", "memory", "unread"])
def test_a_picture_stands_upright(orientation, form, tmp_path):
    shades = np.array([[40 * "abcdef".index(c) for c in row] for row in STORED])
    given = Image.fromarray(np.kron(shades, np.ones((8, 8))).astype(np.uint8))
    given.getexif()[ExifTags.Base.Orientation] = orientation
    if form != "memory":
        file = tmp_path / f"a.{form.replace('unread', 'png')}"
        given.convert("RGB").save(file, exif=given.getexif())
        given = Image.open(file) if form == "unread" else file
    found = Example(given).picture()
    middles = np.array(found)[4::8, 4::8, 0]
    letters = ["".join("abcdef"[round(s / 40)] for s in row) for row in middles]
    assert letters == TURNED[orientation]
    assert same(Example(found).picture(), found)  # it is not turned again


def exif(*entries):
    """Tags, each with the number of its type, its count and its value or place."""
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed


ON_ITS_SIDE = (274, 3, 1, 6)  # a short integer


@pytest.mark.parametrize(
    ("damaged", "size"),
    [
        # Pillow warns of the first two, which is an error here.
        (exif(ON_ITS_SIDE, (271, 2, 90, 999))[:-3], (10, 20)),
        (exif(ON_ITS_SIDE, (271, 2, 90, 999)), (10, 20)),
        # The picture's width as text: it can be read, and not written again.
        (exif(ON_ITS_SIDE, (256, 2, 2, 65)), (10, 20)),
        (b"Exif\0\0is this a joke ?", (20, 10)),
        (b"Exif\0\0II*\0\x08\0\0\0\x01", (20, 10)),
    ],
)
@pytest.mark.parametrize("form", ["jpg", "png", "webp"])
def test_a_picture_with_damaged_exif_is_seen(damaged, size, form, tmp_path):
    file = tmp_path / f"a.{form}"
    Image.new("RGB", (20, 10), "red").save(file, exif=damaged)
    assert Example(file).picture().size == size


def test_what_is_transparent_is_white():
    # Colors that nobody sees are behind it. Half of black, 128 of 255, on white is 127.
    colors = [(9, 8, 7, 255), (9, 8, 7, 0), (0, 0, 0, 128)]
    shown = [[[9, 8, 7], [255] * 3, [127] * 3]]
    full = Image.fromarray(np.array([colors], np.uint8))
    assert seen(full) == shown
    gray_and_alpha = Image.fromarray(np.array([[(9, 255), (9, 0), (0, 128)]], np.uint8))
    assert gray_and_alpha.mode == "LA"
    assert seen(gray_and_alpha) == [shades(9, 255, 127)]
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    palette.putpalette([9, 8, 7, 9, 8, 7, 0, 0, 0])
    for clear in (1, b"\xff\x00"):
        palette.info["transparency"] = clear
        assert seen(palette) == [[[9, 8, 7], [255] * 3, [0] * 3]]
    palette.info["transparency"] = bytes([255, 0, 128])
    assert seen(palette) == shown


def shades(*values):
    return [[value] * 3 for value in values]


def seen(source):
    """The colors of what is read, row by row."""
    found = Example(source).picture()
    assert found.mode == "RGB"
    return np.array(found).tolist()


def png(file, kind, bits, size, row, **chunks):
    """A PNG of equal rows, written by hand as its standard says."""
    parts = {
        "IHDR": struct.pack(">IIBBBBB", *size, bits, kind, 0, 0, 0),
        **chunks,
        "IDAT": zlib.compress((b"\0" + row) * size[1]),
        "IEND": b"",
    }
    file.write_bytes(b"\x89PNG\r\n\x1a\n")
    with file.open("ab") as opened:
        for name, data in parts.items():
            whole = name.encode() + data
            opened.write(struct.pack(">I", len(data)) + whole)
            opened.write(struct.pack(">I", zlib.crc32(whole)))
    return file


GRAY, COLOR, PALETTE = 0, 2, 3


def test_a_png_may_name_a_shade_that_is_transparent(tmp_path):
    file, red, blue = tmp_path / "a.png", [255, 0, 0], [0, 0, 255]
    # Shades of 1 bit are 255 apart, of 2 bits 85, of 4 bits 17; of 16 bits 1 / 257.
    for bits, row, clear, expected in [
        (1, b"\x50", 0, (255, 255, 255, 255)),
        (2, b"\x1b", 1, (0, 255, 170, 255)),
        (4, b"\x03\xf3", 3, (0, 255, 255, 255)),
        (4, b"\x03\xf3", 0, (255, 51, 255, 51)),
        (8, b"\x07\x08\x09\x07", 7, (255, 8, 9, 255)),
        (16, struct.pack(">4H", 700, 257, 65535, 771), 700, (255, 1, 255, 3)),
    ]:
        png(file, GRAY, bits, (4, 1), row, tRNS=struct.pack(">H", clear))
        assert seen(file) == [shades(*expected)], bits
        with Image.open(file) as opened:
            assert seen(opened) == seen(opened) == [shades(*expected)]
    png(file, COLOR, 8, (2, 1), bytes(red + blue), tRNS=struct.pack(">3H", *red))
    assert seen(file) == [[[255] * 3, blue]]
    png(file, PALETTE, 1, (2, 1), b"\x40", PLTE=bytes(red + blue), tRNS=b"\0")
    assert seen(file) == [[[255] * 3, blue]]


@pytest.mark.parametrize("form", ["png", "tif", "pgm"])
def test_shades_of_16_bits_by_hand(form, tmp_path):
    # 257 of 65,535 are one of 255; 12,978 are 50.498 of them, and 12,979 are 50.502.
    deep = np.array([[0, 257, 12978, 12979, 25700, 65535]], np.uint16)
    file = tmp_path / f"a.{form}"
    Image.fromarray(deep).save(file)
    assert seen(file) == [shades(0, 1, 50, 51, 100, 255)]
    dark = np.array([[0, 100, 257]], np.uint16)
    assert seen(Image.fromarray(dark)) == [shades(0, 0, 1)]
    assert Image.fromarray(dark.astype(">u2")).mode == "I;16B"
    assert seen(Image.fromarray(dark.astype(">u2"))) == [shades(0, 0, 1)]


@pytest.mark.parametrize(
    ("mode", "deep", "expected"),
    [
        ("I", [0, 7, 255], (0, 7, 255)),
        ("I", [0, 7, 256], (0, 0, 1)),
        ("I", [-5, 257, 65535], (0, 1, 255)),
        ("I", [0, 500_000, 1_000_000], (0, 128, 255)),
        ("F", [0, 0.2, 1], (0, 51, 255)),
        ("F", [0, 7, 254.6], (0, 7, 255)),
        ("F", [-1, 25700, 300], (0, 100, 1)),
        ("F", [np.nan, np.inf, 0.6], (0, 0, 153)),
        ("F", [0, 0, 0], (0, 0, 0)),
    ],
)
@pytest.mark.parametrize("form", ["tif", "memory"])
def test_shades_of_32_bits_by_hand(mode, deep, expected, form, tmp_path):
    kind = np.int32 if mode == "I" else np.float32
    given = Image.fromarray(np.array([deep]).astype(kind))
    assert given.mode == mode
    if form == "tif":
        given.save(tmp_path / "a.tif")
        given = tmp_path / "a.tif"
    assert seen(given) == [shades(*expected)]


def test_two_shades_and_inks_by_hand(tmp_path):
    png(tmp_path / "a.png", GRAY, 1, (3, 1), b"\xa0")
    assert seen(tmp_path / "a.png") == [shades(255, 0, 255)]
    # Cyan takes red away, magenta green and yellow blue; black takes its share of all.
    inks = [(0, 255, 255, 0), (255, 0, 0, 0), (0, 0, 0, 255), (0, 0, 0, 0)]
    expected = [[255, 0, 0], [0, 255, 255], [0, 0, 0], [255, 255, 255]]
    for ink, color in zip(inks, expected, strict=True):
        for form in ("tif", "jpg"):  # a JPEG holds them inverted, as Adobe does
            Image.new("CMYK", (8, 8), ink).save(tmp_path / f"a.{form}")
            found = np.array(seen(tmp_path / f"a.{form}"))
            assert abs(found - color).max() <= (form == "jpg") * 3


@pytest.mark.parametrize("form", ["gif", "png", "webp"])
def test_of_an_animation_the_first_frame_is_seen(form, tmp_path):
    red, blue = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    file = tmp_path / f"a.{form}"
    red.save(file, save_all=True, append_images=[blue], lossless=True)
    with Image.open(file) as opened:
        assert opened.n_frames == 2
    assert seen(file) == [[[255, 0, 0]] * 8] * 8


def test_an_animation_may_begin_transparent(tmp_path):
    first, then = (Image.new("P", (8, 8), index) for index in (0, 1))
    for frame in (first, then):
        frame.putpalette([255, 0, 0, 0, 0, 255])
    first.putpixel((3, 0), 1)
    file = tmp_path / "a.gif"
    first.save(file, save_all=True, append_images=[then], transparency=0)
    colors = [[[255] * 3] * 8] * 8
    colors[0] = [[255] * 3] * 3 + [[0, 0, 255]] + [[255] * 3] * 4
    assert seen(file) == colors


def test_a_callers_picture_stays_as_it_is():
    given = picture(mode="RGBA")
    given.getexif()[ExifTags.Base.Orientation] = 6
    given.putalpha(0)
    before = given.copy()
    found = Example(given).picture()
    found.putpixel((0, 0), (1, 2, 3))
    assert same(given, before)
    plain = picture()
    Example(plain).picture().putpixel((0, 0), (1, 2, 3))
    assert same(plain, picture())


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0"
SVG = b"<svg xmlns='http://www.w3.org/2000/svg'/>"


@pytest.mark.parametrize(
    ("written", "words"),
    [
        (b"", "UnidentifiedImageError: {file} is empty: the file has 0 bytes"),
        (
            b"no picture",
            "UnidentifiedImageError: cannot identify image file {file}: its 10 bytes "
            "begin with b'no picture'; it is no picture, is cut off, or needs a plugin "
            "of Pillow, such as pillow_heif for HEIC; converted to PNG it can be read",
        ),
        (
            HEIC,
            "image file {file}: its 16 bytes begin with b'\\x00\\x00\\x00\\x18ftyph",
        ),
        (SVG, "image file {file}: its 41 bytes begin with b'<svg xmlns=\"htt"),
    ],
)
def test_why_a_file_cannot_be_read(written, words, tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(written)
    assert words.replace('"', "'").format(file=file) in why(file).replace('"', "'")


def why(source):
    """The reason as a probe lists it."""
    with pytest.raises(UNREADABLE) as raised:
        Example(source).picture()
    return f"{raised.type.__name__}: {raised.value}"


@pytest.mark.parametrize("form", ["png", "jpg", "gif", "webp", "tif", "bmp"])
def test_a_file_that_is_cut_off_says_so(form, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = tmp_path / f"a.{form}"
    Image.fromarray(noise).save(file)
    whole = file.read_bytes()
    for length in (len(whole) * 9 // 10, len(whole) // 2):
        file.write_bytes(whole[:length])
        assert re.match(f"OSError: {file} is cut off or damaged: .{{9}}", why(file))
    file.write_bytes(whole[:18])  # not even a header
    assert re.match(f"\\w+: .*{file}.* is cut off", why(file))


def test_damage_of_any_kind_is_found_out(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    n_broken = 0
    for form in ("png", "jpg", "gif", "webp", "tif", "avif", "jp2", "dds", "ico"):
        file = tmp_path / f"a.{form}"
        Image.fromarray(noise).save(file)
        whole = np.frombuffer(file.read_bytes(), np.uint8)
        for _ in range(60):
            hurt = whole.copy()
            at = rng.integers(0, min(len(hurt), 200), 5)
            hurt[at] = rng.integers(0, 256, 5)
            file.write_bytes(hurt.tobytes())
            try:
                assert Example(file).picture().mode == "RGB"
            except UNREADABLE as error:
                assert str(file) in str(error)
                n_broken += 1
    assert n_broken > 200


def test_what_is_no_file_is_told(tmp_path):
    assert f"IsADirectoryError: [Errno 21] Is a directory: '{tmp_path}'" == why(
        tmp_path
    )
    words = (
        f"FileNotFoundError: [Errno 2] No such file or directory: '{tmp_path}/a.png'"
    )
    assert words == why(tmp_path / "a.png")
    assert "embedded null byte" in why("a\0.png")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may open any file")
def test_a_file_that_may_not_be_opened(tmp_path):
    file = tmp_path / "a.png"
    picture().save(file)
    file.chmod(0)
    assert why(file) == f"PermissionError: [Errno 13] Permission denied: '{file}'"


def test_a_picture_far_too_large_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "a.png"
    Image.new("1", (100, 40)).save(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3999)  # Pillow only warns of this
    assert Example(file).picture().size == (100, 40)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1999)  # and refuses twice as much
    assert why(file) == (
        f"OSError: {file} is too large: Image size (4000 pixels) exceeds limit of 3998 "
        "pixels, could be decompression bomb DOS attack. If it can be trusted, set "
        "PIL.Image.MAX_IMAGE_PIXELS = None"
    )


def test_a_picture_without_pixels_or_file_is_refused(tmp_path):
    file = tmp_path / "a.png"
    memory = "OSError: the picture in memory is cut off or damaged: "
    assert why(Image.new("RGB", (0, 5))) == f"{memory}its width and height are (0, 5)"
    picture().resize((64, 64)).save(file)
    with Image.open(file) as opened:
        pass
    assert why(opened) == f"{memory}its file was closed before it was read"
    file.write_bytes(file.read_bytes()[:-40])
    with Image.open(file) as opened:
        assert why(opened) == f"{memory}image file is truncated"


def test_what_cannot_be_read_is_found_out_inside_picture(tmp_path):
    text, cut = tmp_path / "text.png", tmp_path / "cut.png"
    text.write_text("no picture")
    picture().resize((64, 64)).save(cut)
    cut.write_bytes(cut.read_bytes()[:-40])  # the header says all is well
    for path in (text, cut, tmp_path / "nowhere.png"):
        (example,) = as_examples([path])  # nothing is opened here
        with pytest.raises(UNREADABLE):
            example.picture()
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        Example(tmp_path / "nowhere.png").picture()
    with pytest.raises(OSError, match=r"cannot identify image file .*text\.png"):
        Example(text).picture()
    with pytest.raises(ValueError, match="the example has no picture"):
        Example(None).picture()


def test_what_is_written_is_read_again(tmp_path):
    given = [
        Example(picture(), "what ?", "a bar", "a bar on sand .", "one"),
        Example(
            picture(9), "how ?", "so", id="two", turns=(("why ?", "yes"), ("no ?", ""))
        ),
        Example(picture(5), id="bare"),
    ]
    file = tmp_path / "new" / "talk.json"
    write_examples(given, file)
    found = read_examples(file)
    for old, new in zip(given, found, strict=True):
        assert same(new.picture(), old.picture())
        assert replace(new, image=None) == replace(old, image=None)
    rows = json.loads(file.read_text())
    assert rows[0]["image"] == "images/000000.png"
    assert rows[0]["conversations"] == [
        {"from": "human", "value": "<image>\nwhat ?"},
        {"from": "gpt", "value": "a bar"},
    ]


def say(*words):
    speakers = ["human", "gpt"] * len(words)
    return [
        {"from": who, "value": said} for who, said in zip(speakers, words, strict=False)
    ]


def written(folder, rows):
    file = folder / "talk.json"
    file.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return file


def test_llava_rows_by_hand(tmp_path):
    rows = [
        {"id": 7, "image": "x/1.jpg", "conversations": say("what ?\n<image>", "so")},
        {"conversations": say("hello", "yes", "why ?", "no", "left")},
        {
            "id": "c",
            "image": "2.jpg",
            "caption": "a bar",
            "conversations": say("<image>"),
        },
    ]
    one, text_only, asked = read_examples(written(tmp_path, rows), "/pictures")
    assert one == Example(Path("/pictures/x/1.jpg"), "what ?", "so", id="7")
    # A question left open at the end has no answer to train on.
    assert text_only == Example(None, "hello", "yes", id="1", turns=(("why ?", "no"),))
    assert asked == Example(Path("/pictures/2.jpg"), caption="a bar", id="c")
    # Without a folder, paths start from the file's own.
    assert read_examples(tmp_path / "talk.json")[0].image == tmp_path / "x/1.jpg"


GOOD = {"conversations": say("a", "b")}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("[{", "{file} is not JSON: Expecting property name"),
        ({"rows": []}, "{file} must hold a JSON list of rows, not a dict"),
        ([GOOD, "a"], "row 1 of {file} is not in LLaVA's format: expected an object"),
        ([{"id": "a"}], "row 0 of {file} is not in LLaVA's format: expected an object"),
        (
            [GOOD, GOOD, {"conversations": [{"from": "human"}]}],
            "row 2 of {file} has a turn without 'from' or 'value': {{'from': 'human'}}",
        ),
        (
            [GOOD, {"conversations": []}],
            "row 1 of {file}: expected turns from 'human' and 'gpt' by turns, given []",
        ),
        (
            [{"conversations": say("a", "b")[::-1]}],
            "row 0 of {file}: expected turns from 'human' and 'gpt' by turns, given "
            "['gpt', 'human']",
        ),
    ],
)
def test_a_file_of_another_format_is_refused(rows, words, tmp_path):
    file = written(tmp_path, rows)
    with pytest.raises(ValueError, match=re.escape(words.format(file=file))):
        read_examples(file)
