"""The benchmark at a size that says nothing: that it measures, and what it refuses."""

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch

from benchmarks import contenders, scaling
from benchmarks.__main__ import main
from benchmarks.compare import DisagreementError, Found, agree, same_count
from benchmarks.measure import measured, processor
from benchmarks.workload import GROUPS, SMALL, make_workload

REQUIRED = {
    "contender",
    "seconds",
    "ratio_to_limit",
    "peak_mb",
    "threads",
    "processor",
}


def run(tmp_path, *arguments):
    """Exit code and lines of a run that changes no thread count."""
    output = tmp_path / "lines.jsonl"
    threads = str(torch.get_num_threads())
    asked = ["--small", "--rounds", "1", "--images", "5", "--threads", threads]
    code = main([*arguments, *asked, "--output", str(output)])
    return code, [json.loads(line) for line in output.read_text().splitlines()]


@pytest.fixture(scope="module")
def workload():
    return make_workload(SMALL, 5)


@pytest.fixture(scope="module")
def reference(workload):
    with torch.no_grad():
        return contenders.library(workload)


def test_every_contender_gives_a_line(tmp_path, capsys):
    code, lines = run(tmp_path, "contenders", "trace")
    assert code == 0
    by_name = {line["contender"]: line for line in lines}
    assert {"limit", "limit (reused buffer)", "library", "paper"} <= set(by_name)
    assert any(name.startswith("probe_layers") for name in by_name)
    assert {"trace hooks", "trace nnsight"} <= set(by_name)
    for line in lines:
        assert line.keys() >= REQUIRED
        assert line["seconds"] > 0
        assert line["processor"] == processor()
        assert line["threads"] == torch.get_num_threads()
    limit = by_name["limit"]
    assert limit["ratio_to_limit"] == 1
    assert by_name["paper"]["ratio_to_limit"] == pytest.approx(
        by_name["paper"]["seconds"] / limit["seconds"]
    )
    table = capsys.readouterr().out
    assert all(name in table for name in by_name)


def test_what_the_paper_writes_is_what_its_arrays_hold(workload):
    with torch.no_grad():
        found = contenders.paper(workload)
    tokens = SMALL.patches + SMALL.words
    numbers = SMALL.layers * tokens * (2 * SMALL.d_model + SMALL.features)
    headers = SMALL.layers * len(GROUPS) * 3 * 128
    assert found.more["written_mb_per_image"] * 1e6 == numbers * 4 + headers


def test_thresholds_are_set_by_l0(reference):
    # Of eight pictures, of which these are five.
    assert reference.l0("text_after_image").mean() == pytest.approx(SMALL.l0, rel=0.1)


def test_the_products_of_the_limit_are_those_of_the_codes(workload, reference):
    with torch.no_grad():
        batches = [workload.batch(examples) for examples in workload.pictures()]
        count = contenders.values_over_threshold(workload, batches)
        expected = (
            reference.l0("image").mean() * SMALL.patches
            + reference.l0("text_after_image").mean() * SMALL.words
        ) / (SMALL.patches + SMALL.words)
        assert len(batches[-1].tokens) != len(batches[0].tokens)
        same_count("limit", count, "library", expected)
        with pytest.raises(DisagreementError, match="values a token over the threshol"):
            same_count("limit", count * 1.01, "library", expected)


@pytest.mark.parametrize("metric", ["mse", "fvu", "nmse", "cosine", "l0", "norm"])
def test_a_wrong_number_is_noticed(reference, metric):
    disturbed = reference.layers.copy()
    disturbed.loc[(1, "image"), metric] *= 1.002
    wrong = replace(reference, layers=disturbed)
    agree("itself", reference, "library", reference)
    with pytest.raises(DisagreementError, match=f"{metric} of layer 1, image: wrong"):
        agree("wrong", wrong, "library", reference)


def test_a_wrong_strongest_feature_is_noticed(reference):
    case = (0, "text_after_image", 2)
    best, *_ = reference.top[case]
    others = {f: v for f, v in reference.top[case].items() if f != best}
    missing = next(f for f in range(SMALL.features) if f not in reference.top[case])
    for wrong in (
        others,
        others | {missing: reference.top[case][best]},
        reference.top[case] | {best: reference.top[case][best] * 1.001},
    ):
        found = replace(reference, top=reference.top | {case: wrong})
        with pytest.raises(DisagreementError, match="layer 0, text_after_image, image"):
            agree("wrong", found, "library", reference)


def test_of_features_of_equal_strength_either_may_be_named():
    layers = pd.DataFrame(
        {"l0": [2.0]}, index=pd.MultiIndex.from_tuples([(0, "image")])
    )
    one, other = (
        Found(layers, {(0, "image", 0): {5: 3.0, last: 1.0}}) for last in (7, 8)
    )
    agree("one", one, "other", other)


def test_a_disagreement_ends_in_exit_code_1(tmp_path, capsys, monkeypatch):
    probe = contenders.probe

    def wrong(workload, **settings):
        found = probe(workload, **settings)
        return replace(found, layers=found.layers * 1.01)

    monkeypatch.setattr(contenders, "probe", wrong)
    code, lines = run(tmp_path, "contenders")
    assert (code, lines) == (1, [])
    assert "probe_layers" in capsys.readouterr().err


def test_tables_of_two_runs_are_compared_number_by_number():
    keys = {"layer": [0], "group": ["image"], "condition": ["model"]}
    one, other = (pd.DataFrame(keys | {"mse": [v]}) for v in (2.0, 2.5))
    assert scaling._difference(one, one) == 0
    assert scaling._difference(other, one) == 0.25


def test_memory_is_that_of_the_run_alone():
    held = measured(lambda: torch.ones(25_000_000).sum().item())
    after = measured(lambda: None)
    if held.peak_mb is None:
        pytest.skip("this system does not say how much memory a process holds")
    assert held.result == 25_000_000
    assert held.added_mb == pytest.approx(100, abs=5)
    assert after.added_mb < 5


def test_an_unknown_part_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "contender")
    assert "unknown part contender; of contenders, " in capsys.readouterr().err
