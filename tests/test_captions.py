"""Folders with captions and datasets of Hugging Face become examples."""

import io
import pickle
import re

import datasets
import pytest
from PIL import Image

from vlm_probe.examples import (
    UNREADABLE,
    Example,
    Examples,
    ExampleStream,
    read_examples,
)
from vlm_probe.probe.feed import Feed


def picture(shade=0):
    return Image.new("RGB", (6, 4), (shade, 0, 255 - shade))


def encoded(shade=0):
    file = io.BytesIO()
    picture(shade).save(file, "PNG")
    return file.getvalue()


def folder_of(folder, **texts):
    """Two pictures, one of them deeper, and files by name (two dots for a slash)."""
    (folder / "x").mkdir(parents=True)
    picture(1).save(folder / "a.png")
    picture(2).save(folder / "x" / "b.JPG")
    for name, text in texts.items():
        file = folder / name.replace("__", "/").replace("_", ".")
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def test_texts_beside_pictures(tmp_path):
    folder = folder_of(tmp_path / "p", a_txt="\ufeffa bar ☃\n", notes_md="", c_txt="c")
    found = read_examples(str(folder))
    assert isinstance(found, Examples)
    assert list(found) == [
        Example(folder / "a.png", answer="a bar ☃", caption="a bar ☃", id="a.png"),
        # Without a caption it is kept: a probe needs none, and training lists it.
        Example(folder / "x/b.JPG", id="x/b.JPG"),
    ]
    assert found[0].picture().size == (6, 4)
    (folder / "x/b.txt").write_text(" \n")
    assert found[1].answer is None
    (folder / "x/b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"the caption .*x/b\.txt is not in UTF-8: "):
        found[1]
    assert list(pickle.loads(pickle.dumps(found))[:1]) == found[:1]
    assert repr(found) == f"<2 examples of {folder}>"


JSONL = (
    '{"file_name": "x/b.JPG", "text": "blue"}\n{"file_name": "no.png", "text": null}\n'
)
CSV = '\ufefffile_name,text,n\r\nx/b.JPG,blue,1\r\n\r\nno.png,"",2\n'


@pytest.mark.parametrize("table", [{"metadata_jsonl": JSONL}, {"metadata_csv": CSV}])
@pytest.mark.parametrize("images", [None, "/pictures"])
def test_a_table_of_captions(table, images, tmp_path):
    # The rows of the table are the examples, whatever else lies in the folder.
    folder = folder_of(tmp_path / "p", a_txt="a bar", **table)
    start = folder if images is None else tmp_path / images
    found = read_examples(folder, images and tmp_path / images)
    assert list(found) == [
        Example(start / "x/b.JPG", answer="blue", caption="blue", id="x/b.JPG"),
        Example(start / "no.png", id="no.png"),
    ]
    assert list(pickle.loads(pickle.dumps(found))) == list(found)


def test_captions_over_several_lines(tmp_path):
    said = 'one, "two"\nthree ☃'
    text = f'caption,file_name\n"{said.replace(chr(34), chr(34) * 2)}",a.png\nx,b.png'
    found = read_examples(folder_of(tmp_path / "p", metadata_csv=text))
    assert [(e.id, e.answer) for e in found] == [("a.png", said), ("b.png", "x")]
    assert found[1].answer == "x"


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        (
            {"metadata_jsonl": JSONL, "metadata_csv": CSV},
            "{folder} has metadata.jsonl and metadata.csv; which one holds? Remove the",
        ),
        ({"metadata_jsonl": ""}, "{folder}/metadata.jsonl is empty: there is nothing"),
        ({"metadata_csv": ""}, "{folder}/metadata.csv is empty; expected a line with"),
        (
            {"metadata_jsonl": '{"file_name": "a.png", "label": 1}'},
            "row 0 of {folder}/metadata.jsonl has the columns ['file_name', 'label']; "
            "expected 'file_name', and 'caption' or 'text'",
        ),
        (
            {"metadata_csv": "image,text\na.png,b"},
            "row 0 of {folder}/metadata.csv has the columns ['image', 'text']; expe",
        ),
        (
            {"metadata_csv": "file_name,text\na.png,b, c"},
            "line 2 of {folder}/metadata.csv has 3 fields where its first line names 2 "
            "columns; put text with commas in double quotes",
        ),
        (
            {"metadata_csv": 'file_name,text\na.png,b\nb.png,"c'},
            "metadata.csv is no table of comma-separated values in UTF-8: unexpected "
            "end of data, in line 3; write it anew",
        ),
        (
            {"metadata_csv": b"file_name,text\na.png,\xff"},
            "metadata.csv is no table of comma-separated values in UTF-8: 'utf-8' c",
        ),
        (
            {"metadata_jsonl": '{"file_name": 7, "text": "a"}'},
            "row 0 of {folder}/metadata.jsonl: 'file_name' must be a path, given 7",
        ),
        (
            {"metadata_jsonl": '{"file_name": "a.png", "text": 7}'},
            "row 0 of {folder}/metadata.jsonl: 'text' must be text, given 7",
        ),
        (
            {"metadata_csv": "file_name,text\nhttps://example.com/a.png,b"},
            "row 0 of {folder}/metadata.csv: its picture is 'https://example.com/a.png'"
            "; pictures must be on disk",
        ),
    ],
)
def test_a_table_that_is_not_as_it_should_be(tables, words, tmp_path):
    folder = folder_of(tmp_path / "p", **tables)
    with pytest.raises(ValueError, match=re.escape(words.format(folder=folder))):
        read_examples(folder)


def test_a_folder_without_pictures(tmp_path):
    (tmp_path / "a.txt").write_text("a bar")
    words = (
        f"{tmp_path} has no examples: looked for metadata.jsonl and metadata.csv in it,"
        " and for pictures (.avif, .bmp, "
    )
    with pytest.raises(FileNotFoundError, match=re.escape(words)):
        read_examples(tmp_path)
    words = "images='/pictures' goes with a conversation file, or with a folder that h"
    with pytest.raises(ValueError, match=words):
        read_examples(tmp_path, "/pictures")


def test_a_table_that_has_changed(tmp_path):
    folder = folder_of(tmp_path / "p", metadata_csv=CSV)
    found = read_examples(folder)
    (folder / "metadata.csv").write_text(CSV + "c.png,d,3\n")
    with pytest.raises(RuntimeError, match="has changed since it was opened"):
        found[0]


def pictures(*shades):
    """A column of pictures as a dataset holds them."""
    made = [{"bytes": encoded(shade), "path": None} for shade in shades]
    return datasets.Dataset.from_dict({"image": made}).cast_column(
        "image", datasets.Image()
    )


def said(found):
    return [(e.prompt, e.answer, e.caption, e.id, e.turns) for e in found]


LLAVA = [
    {"from": "human", "value": "<image>\nwhat ?"},
    {"from": "gpt", "value": "a bar"},
    {"from": "human", "value": "why ?"},
    {"from": "gpt", "value": "so"},
]
MESSAGES = [
    {
        "role": "user",
        "content": [
            {"type": "image", "text": None},
            {"type": "text", "text": "what ?"},
        ],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "a bar"}]},
]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (
            {"conversations": [LLAVA], "id": [7], "source": ["x"]},
            ("what ?", "a bar", None, "7", (("why ?", "so"),)),
        ),
        ({"messages": [MESSAGES]}, ("what ?", "a bar", None, "0", ())),
        (
            {"messages": [[{"role": "user", "content": "what ?"}]], "caption": ["c"]},
            ("what ?", None, "c", "0", ()),
        ),
        (
            {"question": ["what ?"], "answer": ["a bar"], "id": ["q"]},
            ("what ?", "a bar", None, "q", ()),
        ),
        (
            {"prompt": ["<image> what ?"], "answer": [None], "caption": ["c"]},
            ("what ?", None, "c", "0", ()),
        ),
        ({"caption": [" a bar "]}, (None, "a bar", "a bar", "0", ())),
        ({"text": ["a bar"], "label": [3]}, (None, "a bar", "a bar", "0", ())),
        ({}, (None, None, None, "0", ())),
    ],
)
def test_columns_of_a_dataset(columns, expected):
    rows = pictures(9)
    for name, values in columns.items():
        rows = rows.add_column(name, values)
    found = read_examples(rows)
    assert isinstance(found, Examples)
    assert said(found) == [expected]
    assert found[-1].picture().getpixel((0, 0)) == (9, 0, 246)
    assert said(pickle.loads(pickle.dumps(found))) == [expected]
    stream = read_examples(rows.to_iterable_dataset())
    assert isinstance(stream, ExampleStream)
    assert said(stream) == said(stream) == [expected]  # as often as it is asked for
    assert next(iter(stream)).picture().size == (6, 4)


def test_a_stream_is_read_no_further_than_it_is_asked():
    taken = []

    def rows():
        for i in range(10**9):
            taken.append(i)
            yield {"text": f"{i}", "image": None}

    stream = read_examples(datasets.IterableDataset.from_generator(rows))
    assert taken == [0]  # its columns are not known before
    examples = iter(stream)
    assert [next(examples).answer for _ in range(3)] == ["0", "1", "2"]
    assert taken == [0, 0, 1, 2]


def test_a_damaged_picture_in_a_dataset_is_a_failure_with_its_id():
    made = [{"bytes": b, "path": None} for b in (encoded(1), b"no", encoded(3)[:50])]
    rows = datasets.Dataset.from_dict(
        {"image": made, "id": ["a", "b", "c"], "text": ["1", "2", "3"]}
    ).cast_column("image", datasets.Image())
    for source in (rows, rows.to_iterable_dataset()):
        (block,) = Feed(read_examples(source), 3, recognize=True).read()
        assert [item.example.id for item in block.items] == ["a"]
        assert [failure.id for failure in block.failures] == ["b", "c"]
        assert "identify the picture in memory: its 2 bytes begin with b'no'" in (
            block.failures[0].error
        )
        assert "the picture in memory is cut off or damaged" in block.failures[1].error
    other = rows.select([0]).map(lambda row: row | {"image": picture(2)})
    digests = [
        next(Feed(read_examples(r), 3, recognize=True).read()).digest
        for r in (rows.select([0]), rows.select([0]), other)
    ]
    assert digests[0] == digests[1] != digests[2]


def test_pictures_of_a_dataset_in_files(tmp_path):
    picture(5).save(tmp_path / "a.png")
    whole = str(tmp_path / "a.png")
    by_path = datasets.Dataset.from_dict({"image": ["a.png", None], "text": ["a", "b"]})
    one, none = read_examples(by_path, tmp_path)
    assert (one.image, none.image) == (tmp_path / "a.png", None)
    lazy = datasets.Dataset.from_dict({"image": [whole], "text": ["a"]})
    (one,) = read_examples(lazy.cast_column("image", datasets.Image()))
    assert one.picture().getpixel((0, 0)) == (5, 0, 250)
    several = datasets.Dataset.from_dict({"images": [[whole], []], "text": ["a", "b"]})
    features = datasets.List(datasets.Image())
    one, none = read_examples(several.cast_column("images", features))
    assert one.picture().getpixel((0, 0)) == (5, 0, 250)
    assert none.image is None


def test_a_list_in_each_column_is_a_list_of_turns():
    turns = {"from": ["human", "gpt"], "value": ["what ?", "a bar"]}
    rows = datasets.Dataset.from_dict({"conversations": [turns]})
    assert said(read_examples(rows)) == [("what ?", "a bar", None, "0", ())]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (
            {"pixels": [1], "beschreibung": ["a"]},
            "the dataset has 'pixels', 'beschreibung'; understood are 'image' (or",
        ),
        (
            {"image": ["a.png"], "label": [1]},
            "select_columns('image') to take pictures",
        ),
        ({}, "the dataset has no column; understood are"),
    ],
)
def test_columns_that_are_not_understood(columns, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        read_examples(datasets.Dataset.from_dict(columns))


def test_a_dataset_that_was_saved_to_disk(tmp_path):
    rows = datasets.Dataset.from_dict(
        {"image": ["a.png", "b.png"], "text": ["a dog", "a bar"]}
    )
    rows.save_to_disk(tmp_path / "one")
    found = read_examples(tmp_path / "one", tmp_path)
    assert [e.caption for e in found] == ["a dog", "a bar"]
    assert [e.image for e in found] == [tmp_path / "a.png", tmp_path / "b.png"]
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match=r"holds the splits 'test', 'train' of a data"):
        read_examples(tmp_path / "two")
    found = read_examples(tmp_path / "two" / "train")
    assert len(found) == 2


def test_splits_are_not_one_dataset():
    rows = datasets.Dataset.from_dict({"text": ["a"]})
    both = datasets.DatasetDict({"test": rows, "train": rows})
    words = "the dataset has the splits 'test', 'train'; give one of them, such as data"
    with pytest.raises(ValueError, match=words):
        read_examples(both)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (
            {"image": ["http://a.b/c.png"], "text": ["a"]},
            "row 0 of the dataset: its pi",
        ),
        (
            {"image": [7], "text": ["a"]},
            "'image' is of type int; expected a picture of PIL or",
        ),
        ({"images": [["a", "b"]], "text": ["a"]}, "has 2 pictures; an example has one"),
        ({"text": [7]}, "row 0 of the dataset: 'text' must be text, given 7"),
        (
            {"conversations": ["a"]},
            "'conversations' must be a list of turns, given 'a'",
        ),
        ({"conversations": [[{"a": "b"}]]}, "has a turn without 'from' or 'value'"),
        ({"messages": [[{"a": "b"}]]}, "has a message without 'role' or 'content'"),
        (
            {"messages": [[{"role": "system", "content": "a"}]]},
            "expected turns from 'user' and 'assistant' by turns, given ['system']",
        ),
        (
            {"messages": [[{"role": "user", "content": [{"type": "video"}]}]]},
            "has a message whose content is neither text nor a list",
        ),
        (
            {"messages": [[{"role": "user", "content": [{"type": "image"}] * 2}]]},
            "row 0 of the dataset speaks of 2 pictures; an example has one, or none",
        ),
    ],
)
def test_a_row_that_is_not_as_it_should_be(columns, words):
    found = read_examples(datasets.Dataset.from_dict(columns))
    with pytest.raises(ValueError, match=re.escape(words)):
        found[0]


def test_a_picture_as_it_stands_in_its_file():
    assert Example(encoded(7)).picture().getpixel((0, 0)) == (7, 0, 248)
    for content, words in [
        (b"", "the picture in memory is empty: the file has 0 bytes"),
        (encoded()[:50], "the picture in memory is cut off or damaged: "),
    ]:
        with pytest.raises(UNREADABLE, match=words):
            Example(content).picture()
