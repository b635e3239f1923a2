"""The page says what the result says, trusts no text in it, and needs no network."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from vlm_probe.report import READING, write_report
from vlm_probe.result import ProbeResult
from vlm_probe.tokens import METRICS

EVIL = '"><script>document.title = "broken in"</script><img src=http://x.test/i.png>'
BROWSERS = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")


def layers(n_layers=3, n_images=4):
    rows = []
    for layer in range(n_layers):
        for group, condition in (
            ("image", "model"),
            ("image", "noise"),
            ("text_only", "model"),
        ):
            row = {"layer": layer, "group": group, "condition": condition}
            row |= {"n_tokens": 1200 * n_images, "n_images": n_images}
            for place, metric in enumerate(METRICS):
                value = 0.25 + place + layer + 10 * (condition == "noise")
                half = 0.125 if n_images > 1 else np.nan
                row |= {metric: value, f"{metric}_low": value - half}
                row |= {f"{metric}_high": value + half}
            rows.append(row)
    return pd.DataFrame(rows)


def top_features(ids, features):
    """Of layer 0: for each image its features from the strongest, values 9, 8, ..."""
    rows = [
        {
            "layer": 0,
            "group": group,
            "condition": "model",
            "image": image,
            "id": name,
            "rank": rank + 1,
            "feature": feature,
            "value": 9.0 - rank + image / 10,
            "position": 7,
            "token": " <i>red" if group == "text_only" else None,
            "patch_row": 2 if group == "image" else None,
            "patch_column": 5 if group == "image" else None,
        }
        for group in ("image", "text_only")
        for image, (name, strongest) in enumerate(zip(ids, features, strict=True))
        for rank, feature in enumerate(strongest)
    ]
    patch = {"patch_row": "Int64", "patch_column": "Int64", "token": "str"}
    return pd.DataFrame(rows).astype(patch)


def features():
    case = {"layer": 0, "group": "image", "condition": "model"}
    return pd.DataFrame([case | {"feature": 77, "rate": 0.0625}])


def result(**other):
    tables = {
        "layers": layers(),
        "features": features(),
        "top_features": top_features(
            ["cat", "dog", EVIL, "owl"], [[77, 5], [77, 6], [77, 5], [8, 77]]
        ),
        "failures": pd.DataFrame([{"image": 4, "id": EVIL, "error": f"bad {EVIL}"}]),
        "meta": {
            "model": f"toy {EVIL}",
            "parts": {
                "language": {"name": "small words", "sha256": "ab" * 32},
                "sae of layer 0": {"name": "sae-zero", "sha256": "cd" * 32},
            },
            "settings": {"convention": "pooled", "seed": 17, "replicates": 200},
            "hook_point": "resid_post",
            "n_images": 4,
            "text_only_words": {"captions": 4},
            "note": EVIL,
        },
    }
    return ProbeResult(**(tables | other))


@pytest.fixture(scope="module")
def page_path(tmp_path_factory):
    return write_report(result(), tmp_path_factory.mktemp("report") / "page.html")


@pytest.fixture(scope="module")
def page(page_path):
    return without_plotly(page_path.read_text(encoding="utf-8"))


def without_plotly(text):
    """The page less plotly.js, which is 4.8 of its 5 MB."""
    whole = re.findall(r"<script[^>]*>.*?</script>", text, flags=re.DOTALL)
    (library,) = [script for script in whole if len(script) > 1_000_000]
    return text.replace(library, "")


class Tags(HTMLParser):
    """Every tag with its attributes, and the text of table cells by row."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows, self.cell = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.cell = None

    def handle_data(self, data):
        if self.cell:
            self.rows[-1][-1] += data


def rows(text, head):
    """Rows of the table whose first columns these are."""
    found = Tags(text).rows
    start = next(i for i, row in enumerate(found) if row[: len(head)] == head)
    width = len(found[start])
    body = []
    for row in found[start + 1 :]:
        if len(row) != width or row[0] in ("layer", "image", "metric"):
            break
        body.append(row)
    return body


def test_a_part_says_so_before_all_else(tmp_path, page):
    meta = {"partial": f"stopped after 2 of 3 images {EVIL}"}
    text = write_report(result(meta=meta), tmp_path / "part.html").read_text()
    said = 'role="alert">A partial result: stopped after 2 of 3 images &quot;&gt;'
    assert said in text
    assert text.index(said) < text.index("<nav>")
    assert 'role="alert"' not in page


def test_the_path(tmp_path):
    path = write_report(result(), str(tmp_path / "new" / "deep" / "page.html"))
    assert path == tmp_path / "new" / "deep" / "page.html"
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    first = path.stat().st_size
    assert write_report(result(), path).stat().st_size == first


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"is a folder; .*report\.html"):
        write_report(result(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_loaded_from_anywhere(page):
    for tag, attributes in Tags(page).tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert not {"src", "srcset", "data", "action"} & set(attributes)
        if "href" in attributes:
            assert attributes["href"].startswith("#")
    assert "default-src 'none'" in page
    assert not re.search(r"url\(|@import|fetch\(|XMLHttp", page)


def test_one_copy_of_plotly(page_path):
    text = page_path.read_text(encoding="utf-8")
    assert text.count("Plotly.newPlot(") == 1 + text.count("=Plotly.newPlot(")
    assert len(text) < 6_000_000


def test_text_from_data_is_no_markup(page):
    assert EVIL not in page
    assert "<script>document" not in page
    assert "<i>red" not in page
    scripts = [tag for tag, _ in Tags(page).tags if tag == "script"]
    # Two of the figure and the page's own; plotly.js was cut.
    assert len(scripts) == 3
    assert page.count("&quot;&gt;&lt;script&gt;document.title") >= 5


def test_what_was_run(page):
    for words in (
        "small words, sha256 abababababab",
        "sae-zero",
        "0, 1, 2 (resid_post)",
        "4 read, 1 failed",
        "image, text_only",
        "model, noise",
        "<dd>pooled</dd>",
        "<dt>Seed</dt><dd>17</dd>",
        "200 redrawings",
        "4 captions",
    ):
        assert words in page


def test_the_layer_table(page):
    head = ["layer", "group", "condition", "n_tokens", "n_images", "mse", "fvu"]
    body = rows(page, head)
    assert len(body) == 9
    assert body[0][:7] == [
        *("0", "image", "model", "4,800", "4"),
        *("0.25000.125 to 0.375", "1.2501.12 to 1.38"),
    ]
    assert [row[:3] for row in body[:4]] == [
        ["0", "image", "model"],
        ["0", "image", "noise"],
        ["0", "text_only", "model"],
        ["1", "image", "model"],
    ]


def test_one_image_has_no_bounds(tmp_path):
    path = write_report(result(layers=layers(n_images=1)), tmp_path / "page.html")
    body = rows(without_plotly(path.read_text(encoding="utf-8")), ["layer", "group"])
    assert body[0][5] == "0.2500"
    assert "nan" not in " ".join(cell for row in body for cell in row)


def test_the_top_features(page):
    body = rows(page, ["layer", "group", "condition", "feature"])
    # 77 is among the strongest of all four images, with 9, 9.1, 9.2 and 8.3.
    assert body[0][:8] == [
        *("0", "image", "model", "77", "4 of 4", "0.06250", "8.900", "9.200"),
    ]
    assert body[0][8] == EVIL + "patch row 2, column 5"
    # 5 is among those of two, 8 and 6 of one each, 8 with the higher value.
    assert [row[3] for row in body[:4]] == ["77", "5", "8", "6"]
    text_only = next(row for row in body if row[1] == "text_only")
    assert text_only[5] == "n/a"
    assert text_only[8] == EVIL + "' <i>red', position 7"


def test_the_failures(page, tmp_path):
    assert rows(page, ["image", "id", "error"]) == [["4", EVIL, f"bad {EVIL}"]]
    none = result(failures=pd.DataFrame(columns=["image", "id", "error"]))
    text = write_report(none, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "None: every image was read." in text


def test_how_to_read_it(page):
    assert set(READING) == set(METRICS)
    body = rows(page, ["metric", "formula", "unit", "direction"])
    assert [row[:2] for row in body] == [list(item) for item in METRICS.items()]
    assert all(row[2] and row[3] for row in body)


def test_all_of_meta_is_there(page):
    class Pre(HTMLParser):
        inside, text = False, ""

        def handle_starttag(self, tag, attributes):
            self.inside = self.inside or tag == "pre"

        def handle_endtag(self, tag):
            self.inside = self.inside and tag != "pre"

        def handle_data(self, data):
            self.text += data * self.inside

    reader = Pre()
    reader.feed(page)
    assert json.loads(reader.text) == result().meta


def test_a_bare_result(tmp_path):
    """No meta, no features: what is not known is left out, not made up."""
    bare = result(meta={}, top_features=pd.DataFrame())
    text = write_report(bare, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Layer probe of a model" in text
    assert "<dt>Seed</dt>" not in text
    assert "None were kept." in text


# Sorts the layer table by fvu, highest first, then shows the image group only.
CLICKS = """<script>
const table = document.querySelector("table.data");
const fvu = [...table.querySelectorAll("th button")].find(b => b.innerText === "fvu");
fvu.click();
fvu.click();
const group = table.parentElement.previousElementSibling.querySelectorAll("select")[1];
group.value = "image";
group.dispatchEvent(new Event("change"));
const cells = [...table.tBodies[0].rows].filter(r => !r.hidden).map(r => r.cells[6]);
document.body.dataset.fvu = cells.map(cell => cell.dataset.value).join(" ");
</script>"""


def test_a_browser_draws_it(page_path, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    clicked = tmp_path / "clicked.html"
    clicked.write_text(page_path.read_text(encoding="utf-8") + CLICKS, "utf-8")
    done = subprocess.run(
        [
            browser,
            *("--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *("--virtual-time-budget=8000", "--enable-logging=stderr"),
            f"--user-data-dir={tmp_path / 'user'}",
            clicked.as_uri(),
        ],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    # Errors, warnings, and anything the page may have tried to load.
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert console == []
    title = re.search(r"<title>(.*?)</title>", done.stdout).group(1)
    assert title.startswith("Layer probe of toy")
    # Six panels of three lines, each with a band; in the last of a row two labels.
    layer = re.findall(r'class="scatterlayer[^"]*"', done.stdout)
    assert len(layer) == 6
    assert len(re.findall(r'class="trace scatter trace', done.stdout)) == 6 * 6 + 4
    drawn = re.findall(r'class="js-line"[^>]* d="M[^"]{20,}"', done.stdout)
    assert len(drawn) >= 18
    assert "6 of 9 rows" in done.stdout
    fvu = re.search(r'data-fvu="([^"]*)"', done.stdout).group(1)
    assert fvu == "13.25 12.25 11.25 3.25 2.25 1.25"
