"""A result: kept whole on disk, and shown without inventing anything."""

import json
import re
from dataclasses import replace

import pandas as pd
import pytest
from tiny import LAYERS, tiny_model

from vlm_probe.probe import probe_layers
from vlm_probe.result import TABLES, ProbeResult
from vlm_probe.toy.examples import toy_examples

FILES = [*(f"{name}.parquet" for name in TABLES), "meta.json"]


@pytest.fixture(scope="module")
def result():
    """Four toy pictures and one that is none, through the tiny model."""
    return probe_layers(
        tiny_model(),
        [*toy_examples(4), "nowhere.png"],
        controls=["noise", "shuffled_images"],
        replicates=20,
        progress=False,
    )


def test_what_is_saved_is_loaded(result, tmp_path):
    folder = tmp_path / "deep" / "run"
    assert result.save(folder) == folder
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*FILES, "timing.json"]
    )
    loaded = ProbeResult.load(str(folder))
    for name in TABLES:
        table = getattr(result, name)
        assert len(table) > 0
        pd.testing.assert_frame_equal(getattr(loaded, name), table, check_exact=True)
    assert loaded.meta == json.loads(json.dumps(result.meta))
    # A second journey changes nothing any more, meta's types included.
    again = ProbeResult.load(loaded.save(tmp_path / "again"))
    assert again.meta == loaded.meta


def test_a_result_without_failures_is_kept_too(result, tmp_path):
    none = ProbeResult(
        result.layers,
        result.features,
        result.top_features[:0],
        pd.DataFrame([], columns=["image", "id", "error"]),
        {},
    )
    loaded = ProbeResult.load(none.save(tmp_path))
    assert list(loaded.failures.columns) == ["image", "id", "error"]
    assert (len(loaded.failures), len(loaded.top_features)) == (0, 0)
    pd.testing.assert_frame_equal(loaded.top_features, none.top_features)


def test_tables_of_an_older_version_get_the_columns_that_came_later(result, tmp_path):
    later = ["by", "score", "left", "top", "right", "bottom"]
    old = replace(
        result,
        top_features=result.top_features.drop(columns=later),
        features=result.features.drop(columns="reference_rate"),
    )
    loaded = ProbeResult.load(old.save(tmp_path))
    places = ["left", "top", "right", "bottom"]
    pd.testing.assert_frame_equal(
        loaded.top_features.drop(columns=places),
        result.top_features.drop(columns=places),
    )
    assert loaded.top_features.columns.equals(result.top_features.columns)
    assert loaded.top_features[places].isna().all(axis=None)
    pd.testing.assert_frame_equal(loaded.features, result.features)


@pytest.mark.parametrize("gone", FILES)
def test_an_incomplete_folder_is_refused(result, tmp_path, gone):
    result.save(tmp_path)
    (tmp_path / gone).unlink()
    words = f"no whole result in {tmp_path}: {gone} missing; expected a folder written"
    with pytest.raises(FileNotFoundError, match=re.escape(words)):
        ProbeResult.load(tmp_path)


def test_every_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f": {', '.join(FILES)} missing"):
        ProbeResult.load(tmp_path / "nowhere")


def test_table_by_hand(result):
    whole = result.table()
    columns = ["layer", "group", "condition", "n_tokens", "mse", "fvu", "cosine", "l0"]
    assert list(whole.columns) == columns
    # Three groups of the model, and two of each control arm: none has words alone.
    assert len(whole) == LAYERS * (3 + 2 * 2)
    some = result.table(["norm"], groups=["image"], conditions=["model", "noise"])
    assert list(some.columns) == ["layer", "group", "condition", "n_tokens", "norm"]
    assert list(some.condition) == ["model"] * LAYERS + ["noise"] * LAYERS
    assert set(some.n_tokens) == {4 * 16}
    assert list(some.index) == list(range(2 * LAYERS))
    row = result.layers.query(
        "layer == 2 and group == 'image' and condition == 'noise'"
    )
    assert some.norm.iloc[-1] == row.norm.item()


def test_an_arm_that_was_not_run_is_a_missing_row(result):
    assert len(result.table(conditions=["random_adapter"])) == 0
    assert len(result.table(groups=["text_only"], conditions=["noise"])) == 0


def test_beside_by_hand(result):
    wide = result.beside(["fvu", "l0"])
    assert list(wide.columns) == [
        (metric, condition)
        for metric in ("fvu", "l0")
        for condition in ("model", "noise", "shuffled_images")
    ]
    assert list(wide.index) == [
        (group, layer)
        for group in ("image", "text_after_image", "text_only")
        for layer in range(LAYERS)
    ]
    for case in result.layers.itertuples():
        cell = wide.loc[(case.group, case.layer)]
        assert cell["fvu", case.condition] == case.fvu
        assert cell["l0", case.condition] == case.l0
    # Words alone have no control arm; a hole, and never a zero.
    alone = wide.loc["text_only"]
    assert alone["fvu", "model"].notna().all()
    assert alone["fvu"][["noise", "shuffled_images"]].isna().all(axis=None)


METRICS = "valid: mse, fvu, nmse, cosine, l0, l0_share, norm"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda r: r.table(["r2"]), f"unknown metric 'r2'; {METRICS}$"),
        (lambda r: r.beside(["fvu", "l1"]), f"unknown metric 'l1'; {METRICS}$"),
        (
            lambda r: r.table(groups=["text"]),
            "unknown group 'text'; valid: image, text_after_image, text_only$",
        ),
        (
            lambda r: r.table(conditions=["blank"]),
            "unknown condition 'blank'; valid: model, random_adapter, noise, shuffled",
        ),
    ],
)
def test_an_unknown_name_is_refused_with_the_valid_ones(result, call, words):
    with pytest.raises(ValueError, match=words):
        call(result)
