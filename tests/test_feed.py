"""Blocks of examples: what is in them depends on nothing but their place."""

import io
import itertools
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from vlm_probe.examples import Example
from vlm_probe.probe.feed import Feed


def examples(n, missing=()):
    picture = Image.new("RGB", (4, 4))
    return [
        Example("nowhere.png" if i in missing else picture, id=f"e{i}")
        for i in range(n)
    ]


def feed(images):
    return Feed(images, 3, recognize=True)


def places(block):
    return [index for index, _ in block.examples]


def test_blocks_are_runs_of_places_whatever_can_be_read():
    blocks = list(Feed(examples(7, missing=[0, 1, 4]), 3).read())
    assert [places(b) for b in blocks] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [[i.index for i in b.items] for b in blocks] == [[2], [3, 5], [6]]
    failures = [f for b in blocks for f in b.failures]
    assert [(f.image, f.id) for f in failures] == [(0, "e0"), (1, "e1"), (4, "e4")]
    assert "No such file" in failures[0].error


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_processes_take_blocks_by_turns_and_leave_none(size):
    parts = [
        [b.number for b in Feed(examples(10), 3).read(rank=rank, size=size)]
        for rank in range(size)
    ]
    assert sorted(itertools.chain(*parts)) == [0, 1, 2, 3]
    assert all(n % size == rank for rank, part in enumerate(parts) for n in part)


def test_what_others_take_comes_with_the_block_behind_it():
    blocks = list(Feed(examples(12), 2).read(rank=2, size=3))
    assert [b.number for b in blocks] == [2, 5]
    assert [[s.number for s in b.skipped] for b in blocks] == [[0, 1], [3, 4]]


def test_going_on_from_a_block():
    whole = list(feed(examples(10)).read())
    rest = list(feed(examples(10)).read(2, whole[1].digest))
    assert [places(b) for b in rest] == [places(b) for b in whole[2:]]
    assert [b.digest for b in rest] == [b.digest for b in whole[2:]]
    rest = list(feed(examples(10)).read(3, whole[2].digest, rank=1, size=2))
    assert [b.number for b in rest] == [3]


def test_other_examples_are_refused():
    after = list(feed(examples(10)).read())[1].digest
    painted = [replace(e, image=Image.new("RGB", (4, 4), "red")) for e in examples(10)]
    for other in (examples(10)[1:], examples(4), examples(0), painted):
        with pytest.raises(ValueError, match="the images are not those that the check"):
            list(feed(other).read(2, after))


def test_an_error_of_the_source_comes_behind_what_it_gave():
    def broken():
        yield from examples(5)
        raise LookupError("no more")

    blocks = Feed(broken(), 2).read()
    assert [places(next(blocks)), places(next(blocks))] == [[0, 1], [2, 3]]
    with pytest.raises(LookupError, match="no more"):
        next(blocks)


def test_looking_ahead_takes_nothing():
    feed = Feed(iter(examples(7, missing=[1])), 3)
    ahead = feed.ahead()
    assert [i.index for i in next(ahead).items] == [0, 2]
    assert [i.index for i in next(ahead).items] == [3, 4, 5]
    assert [places(b) for b in feed.ahead()] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [places(b) for b in feed.read()] == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(feed.ahead()) == []


def damaged_in_memory():
    """A picture that is opened, and comes apart when it is read."""
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    broken = bytearray(file.getvalue())
    broken[len(broken) // 2] ^= 255
    return Image.open(io.BytesIO(bytes(broken)))


@pytest.mark.parametrize("recognize", [False, True])
@pytest.mark.parametrize("look", [False, True])
def test_a_damaged_picture_in_memory_stays_a_failure(recognize, look):
    """Read a second time, Pillow would give half of it, and no error."""
    given = [*examples(2), Example(damaged_in_memory(), id="damaged")]
    fed = Feed(given, 3, recognize=recognize)
    if look:
        assert [f.id for b in fed.ahead() for f in b.failures] == ["damaged"]
    blocks = list(fed.read())
    assert [f.id for b in blocks for f in b.failures] == ["damaged"]
    assert [i.index for b in blocks for i in b.items] == [0, 1]


def test_pictures_are_known_by_what_is_in_them(tmp_path):
    def digest(image):
        (block,) = Feed([image], 1, recognize=True).read()
        return block.digest

    frames = [Image.new("RGB", (9, 9), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    content = (tmp_path / "a.gif").read_bytes()

    def opened():
        return Image.open(io.BytesIO(content))

    second, changed, palette = opened(), opened(), opened()
    second.seek(1)
    changed.putpixel((0, 0), 1)
    palette.load()
    other = palette.copy()
    other.putpalette([9, 9, 9] * 256)
    found = [
        digest(opened()),
        *map(digest, (second, changed, palette.copy(), other, tmp_path / "a.gif")),
        digest("x" * 5000),  # no file can have such a name
        digest(frames[0]),
    ]
    assert len(set(found)) == len(found)
    assert digest(opened()) == found[0]
    assert digest(Image.new("RGB", (9, 9), "red")) == found[-1]


def test_only_the_next_block_is_read_meanwhile():
    taken = []

    def watched():
        for example in examples(20):
            taken.append(example.id)
            yield example

    blocks = Feed(watched(), 2).read()
    next(blocks)
    assert len(taken) == 4
    next(blocks)
    assert len(taken) == 6
    blocks.close()
    assert len(taken) == 6
