"""Conversation files are read row by row, whatever is in them and however long."""

import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_probe.examples import Example, Examples, read_examples, write_examples
from vlm_probe.examples.json_rows import json_rows


def say(*words):
    who = ["human", "gpt"] * len(words)
    return [{"from": w, "value": said} for w, said in zip(who, words, strict=False)]


def written(folder, content, name="talk.json"):
    file = Path(folder) / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def anything(index, row):
    """A check that lets all pass."""


def texts(file, chunk=1 << 20):
    rows = json_rows(file, anything, chunk=chunk)
    return [rows.text(i) for i in range(len(rows))]


def test_bytes_of_rows_by_hand(tmp_path):
    #        0123456789
    file = written(tmp_path, '[ {"a":1},\n{"b":"é"} ]\n')
    rows = json_rows(file, anything)
    # The letter with an accent is two bytes.
    assert rows.spans.tolist() == [[2, 9], [11, 21]]
    assert [rows.text(0), rows.text(1)] == ['{"a":1}', '{"b":"é"}']
    file = written(tmp_path, '{"a":1}\n\n {"b":"é"}', "talk.jsonl")
    assert json_rows(file, anything).spans.tolist() == [[0, 7], [10, 20]]


ROWS = [
    {"id": 7, "image": "1.jpg", "conversations": say("what ?\n<image>", "so")},
    {"conversations": say("hello ☃ \u2028", "yes", "why ?", "no", "left")},
    {"id": None, "image": "2.jpg", "conversations": say("<image>")},
]


@pytest.mark.parametrize("name", ["talk.json", "talk.jsonl"])
@pytest.mark.parametrize("ascii", [False, True])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_and_lines_say_the_same(name, ascii, indent, tmp_path):
    said = [json.dumps(row, ensure_ascii=ascii, indent=indent) for row in ROWS]
    lines = name == "talk.jsonl"
    text = "\r\n".join(said) if lines else f"[{','.join(said)}]"
    found = read_examples(written(tmp_path, text, name), tmp_path)
    assert list(found) == [
        Example(tmp_path / "1.jpg", "what ?", "so", id="7"),
        Example(None, "hello ☃", "yes", id="1", turns=(("why ?", "no"),)),
        # Nobody answers, and the picture is not there: kept, for training to list.
        Example(tmp_path / "2.jpg", id="2"),
    ]


def test_examples_are_a_sequence(tmp_path):
    found = read_examples(written(tmp_path, json.dumps(ROWS)))
    assert isinstance(found, Examples)
    assert len(found) == 3
    every = list(found)
    assert [found[i] for i in (0, 1, 2, -1, -3)] == [*every, every[2], every[0]]
    assert found[1:] == every[1:]
    assert found[::-1] == every[::-1]
    assert found[5:] == []
    assert every[1] in found
    assert list(found) == every  # again
    for wrong in (3, -4):
        with pytest.raises(IndexError, match=f"example {wrong} of 3: there is none"):
            found[wrong]
    assert repr(found) == f"<3 examples of {tmp_path / 'talk.json'}>"
    assert list(read_examples(written(tmp_path, "[]"))) == []


def test_workers_read_the_same(tmp_path):
    rows = [{"id": i, "conversations": say(str(i) * 99, "so")} for i in range(200)]
    found = read_examples(written(tmp_path, json.dumps(rows)))
    every = list(found)
    assert list(pickle.loads(pickle.dumps(found))) == every
    seen = [[] for _ in range(4)]

    def read(into):
        into.extend(found)

    threads = [threading.Thread(target=read, args=[into]) for into in seen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(part == every for part in seen)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inside: st.lists(inside) | st.dictionaries(st.text(), inside),
    max_leaves=5,
)
space = st.text(" \t\r\n", max_size=3)
rows_and_space = st.tuples(st.dictionaries(st.text(), json_values), space, space)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(rows_and_space, max_size=5),
    st.booleans(),
    st.sampled_from([None, 0, 3]),
    st.integers(1, 64),
    st.booleans(),
)
def test_any_rows_are_read_back(rows, ascii, indent, chunk, lines):
    said = []
    for row, before, after in rows:
        row = row | {"conversations": []}
        said.append(before + _dumped(row, ascii, indent) + after)
    text = "\n".join(said) + "\n" if lines else f" [{','.join(said)}] "
    if lines and not said:
        return
    with tempfile.TemporaryDirectory() as folder:
        file = written(folder, text, "rows.jsonl")
        found = texts(file, chunk)
    assert found == [row.strip(" \t\r\n") for row in said]
    expected = [row | {"conversations": []} for row, _, _ in rows]
    assert [json.loads(row) for row in found] == expected


def _dumped(row, ascii, indent):
    # Half of a pair of surrogates has no UTF-8 of its own, and is always escaped.
    text = json.dumps(row, ensure_ascii=ascii, indent=indent)
    return re.sub("[\ud800-\udfff]", lambda m: f"\\u{ord(m[0]):04x}", text)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 64))
def test_a_file_that_is_cut_off_is_refused_wherever_it_is(data, chunk):
    whole = json.dumps(ROWS, ensure_ascii=False).encode()
    kept = data.draw(st.integers(1, len(whole) - 1))
    with tempfile.TemporaryDirectory() as folder:
        file = written(folder, whole[:kept])
        with pytest.raises(ValueError, match=r"not JSON: .* was cut off|not in UTF-8"):
            json_rows(file, anything, chunk=chunk)


GOOD = json.dumps({"conversations": say("a", "b")})
LONG = len(GOOD)
CUT = "the file ends there: it was cut off, copy or download it again"
REPAIR = "repair it there, or write or download the file again"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "{file} is empty: there is nothing in its 0 bytes; expected a JSON list"),
        (" \n\n", "{file} is empty: there is nothing in its 3 bytes"),
        (
            "hello",
            "{file} is not JSON as expected: at byte 0 it begins with b'hello'; it must"
            " hold a JSON list of rows ('[' ...), or a JSON object a line ('{{' ...)",
        ),
        ('"text"', "it begins with b'\"text\"'; it must hold a JSON list of rows"),
        (b"\x1f\x8b\x08\0", "{file} is not in UTF-8: invalid start byte near byte 1; "),
        (b'["\xff"]', "{file} is not in UTF-8: invalid start byte near byte 2; "),
        (GOOD, "{file} must hold a JSON list of rows, not a dict; put its row or rows"),
        (
            b"\xef\xbb\xbf[]",
            "{file} begins with a byte order mark of UTF-8; save it as UTF-8 without",
        ),
        ("[]".encode("utf-16"), "begins with a byte order mark of UTF-16; save it as"),
        (
            f"[{GOOD}",
            f"not JSON: expected ',' or ']' at byte {LONG + 1}, behind row 0; {CUT}",
        ),
        (
            f"[{GOOD},]",
            f"not JSON: a comma at byte {LONG + 1} stands behind the last row, 0; "
            f"{REPAIR}",
        ),
        (
            f"[{GOOD} {GOOD}]",
            f"expected ',' or ']' at byte {LONG + 2}, behind row 0; {REPAIR}",
        ),
        (
            f"[{GOOD}] []",
            f"there is more at byte {LONG + 3}, behind the end of the list",
        ),
        (
            '[{"a": "b',
            f"{{file}} is not JSON: Unterminated string starting at byte 7, in row 0; "
            f"{CUT}",
        ),
        (
            f'[{GOOD}, {{"a": tru}}]',
            f"not JSON: Expecting value at byte {LONG + 9}, in row 1; {REPAIR}",
        ),
        ('[{"a": "\n"}]', "Invalid control character at byte 8, in row 0"),
        ("[" * 100_000, "row 0, at byte 1, cannot be read: maximum recursion depth"),
        (
            f"{GOOD}\n{GOOD},\n{GOOD}",
            f"expected a JSON object at byte {2 * LONG + 1}, in the line behind row 1; "
            "rows of a list are put in [ ]",
        ),
        (
            f'{GOOD}\n{{"a"',
            f"Expecting ':' delimiter at byte {LONG + 5}, in row 1; {CUT}",
        ),
        (
            f'{GOOD}\n{{"a": 1}}',
            "row 1 of {file} is not in LLaVA's format: expected an object",
        ),
    ],
)
def test_what_is_no_conversation_file(content, words, tmp_path):
    file = written(tmp_path, content)
    with pytest.raises(ValueError, match=re.escape(words.format(file=file))):
        read_examples(file)


def test_one_line_is_a_file_of_lines(tmp_path):
    assert len(read_examples(written(tmp_path, GOOD, "talk.jsonl"))) == 1


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"image": ["a.jpg"]}, "row 1 of {file}: 'image' must be one path, given ['a."),
        (
            {"image": "https://example.com/a.jpg"},
            "row 1 of {file}: its picture is 'https://example.com/a.jpg'; pictures must"
            " be on disk: download it, and give its path",
        ),
        ({"caption": 7}, "row 1 of {file}: 'caption' must be text, given 7"),
        (
            {"conversations": [{"from": "human", "value": 7}]},
            "row 1 of {file} has a turn whose 'value' is no text: {{'from': 'human', ",
        ),
        # What is said is shown as it stands there, not byte by byte.
        (
            {"conversations": [{"von": "Jörg ☃"}]},
            "row 1 of {file} has a turn without 'from' or 'value': {{'von': 'Jörg ☃'}}",
        ),
    ],
)
@pytest.mark.parametrize("ascii", [False, True])
def test_a_row_that_is_not_as_it_should_be(row, words, ascii, tmp_path):
    row = {"conversations": say("a", "b")} | row
    text = f"[{GOOD}, {json.dumps(row, ensure_ascii=ascii)}]"
    file = written(tmp_path, text)
    with pytest.raises(ValueError, match=re.escape(words.format(file=file))):
        read_examples(file)


def test_garbage_is_found_without_reading_on(tmp_path):
    file = written(tmp_path, f"[{GOOD}, nonsense, {', '.join([GOOD] * 2000)}]")
    taken = []

    class Counted(type(file)):
        def open(self, mode):
            opened = super().open(mode)
            read = opened.read

            class File:
                def read(self, n):
                    taken.append(n)
                    return read(n)

                def __getattr__(self, name):
                    return getattr(opened, name)

                def __enter__(self):
                    return self

                def __exit__(self, *error):
                    opened.close()

            return File()

    with pytest.raises(ValueError, match=f"Expecting value at byte {LONG + 3}, in"):
        json_rows(Counted(file), anything, chunk=128)
    assert sum(taken) < 1000


def test_a_file_that_has_changed_is_not_read_on(tmp_path):
    file = written(tmp_path, json.dumps(ROWS))
    size = file.stat().st_size
    found = read_examples(file)
    file.write_text(json.dumps(ROWS[::-1]))
    os.utime(file, ns=(0, 0))
    words = f"{file} has changed since it was opened: it had {size} bytes and has"
    with pytest.raises(RuntimeError, match=re.escape(words)):
        found[0]
    found = read_examples(file)
    with file.open("a") as opened:
        opened.write(" ")
    with pytest.raises(RuntimeError, match="read it again with read_examples"):
        found[0]
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"talk\.json"):
        found[0]


def test_a_file_that_is_written_to_while_rows_are_found(tmp_path):
    file = written(tmp_path, json.dumps(ROWS))

    def interrupted(index, row):
        with file.open("a") as opened:
            opened.write(" ")

    with pytest.raises(RuntimeError, match="has changed since it was opened"):
        json_rows(file, interrupted)


def test_there_is_no_such_file(tmp_path):
    words = f"no examples at {tmp_path}/a.json: there is no such file or folder; expec"
    with pytest.raises(FileNotFoundError, match=re.escape(words)):
        read_examples(tmp_path / "a.json")


@pytest.mark.parametrize("source", [7, None, ["a.png"], {"a": 1}])
def test_what_examples_cannot_be_read_from(source):
    words = (
        f"cannot be read from a {type(source).__name__}; expected the path of a conv"
    )
    with pytest.raises(TypeError, match=words):
        read_examples(source)


def test_text_alone_is_written_without_a_picture(tmp_path):
    given = [Example(None, "hello", "yes", id="a")]
    file = tmp_path / "talk.json"
    write_examples(given, file)
    assert "image" not in json.loads(file.read_text())[0]
    assert "<image>" not in file.read_text()
    assert list(read_examples(file)) == given


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="no peak of memory to read"
)
def test_memory_does_not_grow_with_the_file(tmp_path):
    n_rows = 200_000
    file = tmp_path / "talk.json"
    words = "a bar on sand . " * 6
    with file.open("w") as opened:
        for i in range(n_rows):
            row = (
                f'{{"id": "{i}", "image": "{i:09d}.jpg", "conversations": [{{"from": '
                f'"human", "value": "<image>\\nwhat ?"}}, {{"from": "gpt", "value": '
                f'"{words}"}}]}}'
            )
            opened.write(f"{',' if i else '['}\n{row}")
        opened.write("]")
    assert file.stat().st_size > 40e6
    found = run_python(READING, file)
    # 16 bytes a row, while they are counted and once more in the end, and the window.
    assert found["reading"] < file.stat().st_size / 3
    assert found["pickled"] < 17 * n_rows
    # The measure sees what a file takes up that is held as a whole.
    assert found["loading"] > file.stat().st_size / 2


READING = """
import json, pickle, re, sys
from pathlib import Path
from vlm_probe.examples import read_examples

def peak():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024

file = Path(sys.argv[1])
before = peak()
found = read_examples(file)
for place in range(0, len(found), 997):
    assert found[place].id == str(place)
reading = peak()
whole = file.read_bytes()
print(json.dumps({
    "reading": reading - before,
    "pickled": len(pickle.dumps(found)),
    "loading": peak() - reading,
}))
"""


def run_python(code, *arguments):
    """What the code prints, in an interpreter where no types are enforced."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_an_error_while_reading_is_not_the_end():
    class Faulty(Examples):
        _source = "nowhere"

        def __len__(self):
            return 3

        def _at(self, place):
            return [Example(None)][place]

    with pytest.raises(IndexError):
        list(Faulty())
