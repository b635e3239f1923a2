"""Pictures, paths and conversation files become examples; what is none is refused."""

import json
import re
from dataclasses import replace
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
from PIL import Image

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
