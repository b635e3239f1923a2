"""The README's code runs as it stands, top to bottom."""

import json
import re
from pathlib import Path

from vlm_probe.examples import data_folder

README = Path(__file__).parent.parent / "README.md"


def test_the_code_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert (tmp_path / "report.html").stat().st_size > 1_000_000
    assert set(names["result"].layers.condition) == {
        "model",
        "random_adapter",
        "noise",
        "shuffled_images",
    }
    assert names["again"].layers.equals(names["result"].layers)
    assert len(names["model"].saes) == 8


def test_its_pictures_are_there():
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README.read_text()):
        assert (README.parent / path).is_file(), path


def test_its_table_of_answers_is_what_was_measured():
    text = README.read_text()
    head = re.search(r"\| \| (all .*) \|\n", text)[1].split(" | ")
    stated = json.loads((data_folder() / "toy" / "figures.json").read_text())
    for name, column in (
        ("true picture", "true_right"),
        ("another picture", "shuffled_right"),
    ):
        cells = re.search(rf"\| {name} \| (.*) \|\n", text)[1].split(" | ")
        found = [f"{stated['adapter'][kind][column]:.2f}" for kind in head]
        assert cells == found
