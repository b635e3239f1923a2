"""Which features are taken: the same decision whatever a group's length."""

import math
from dataclasses import FrozenInstanceError

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model

from vlm_probe.analysis.selection import Frequency, best_features
from vlm_probe.probe import probe_layers
from vlm_probe.result import ProbeResult
from vlm_probe.toy.examples import toy_examples

N_IMAGES = 4000


def run_of(lengths, rates, *, top_k=3, reference_rates=None):
    """A result of two images of one layer, as a run over many would have it.

    Args:
        lengths: Tokens that an image has in each group.
        rates: For each group, the rate per token of features 0, 1, ... All are among
            the strongest of both images, in this order.
        top_k: How many are kept.
        reference_rates: As measured, if they were.
    """
    layers, features, top = [], [], []
    for group, length in lengths.items():
        case = {"layer": 5, "group": group, "condition": "model"}
        n_tokens = length * N_IMAGES
        layers.append(case | {"n_tokens": n_tokens, "n_images": N_IMAGES})
        for feature, rate in enumerate(rates[group]):
            somewhere = -math.expm1(length * math.log1p(-rate))  # 1 - (1 - p)^L
            known = reference_rates[feature] if reference_rates else math.nan
            if rate:
                features.append(
                    case
                    | {
                        "feature": feature,
                        "rate": rate,
                        "n_images": somewhere * N_IMAGES,
                        "reference_rate": known,
                    }
                )
            if rate and feature < top_k:
                top += [
                    case
                    | {
                        "image": image,
                        "id": f"picture {image}",
                        "by": "activation",
                        "rank": feature + 1,
                        "feature": feature,
                        "value": 9.0 - feature,
                        "score": 9.0 - feature,
                    }
                    for image in (0, 1)
                ]
    return ProbeResult(
        pd.DataFrame(layers),
        pd.DataFrame(features),
        pd.DataFrame(top),
        pd.DataFrame(columns=["image", "id", "error"]),
        {"settings": {"top_k": top_k}},
    )


TWO = {"image": 256, "text_only": 60}


def taken(result, **options):
    """Features that are chosen in each group, of the first image."""
    chosen = best_features(result, image=0, **options)
    return {
        group: chosen[chosen.group == group].feature.tolist()
        for group in result.layers.group
    }


def test_by_hand():
    rates = {"image": [0.3, 0.02, 0.1, 0.01], "text_only": [0.1, 0.0, 0.1, 0.01]}
    result = run_of(TWO, rates, top_k=4)
    # On the reference 0.2, 0.01, 0.1 and 0.01; a rate at the limit is not above it.
    assert taken(result, k=2) == {"image": [1, 2], "text_only": [2, 3]}
    assert taken(result, k=1) == {"image": [1], "text_only": [2]}
    assert taken(result, k=2, max_rate=0.01) == {"image": [1, 3], "text_only": [3]}
    assert taken(result, k=4, max_rate=1.0) == {
        "image": [0, 1, 2, 3],
        "text_only": [0, 2, 3],
    }
    chosen = best_features(result, group="image", image="picture 1", k=2)
    assert chosen["rank"].tolist() == [2, 3]
    assert chosen.choice.tolist() == [1, 2]
    assert chosen.rate.tolist() == pytest.approx([0.01, 0.1])
    assert chosen.image_rate.tolist() == pytest.approx([1 - 0.98**256, 1 - 0.9**256])
    assert chosen.density.isna().all()
    assert not chosen.short.any()


@settings(max_examples=20, deadline=None)
@given(
    rate=st.floats(1e-6, 0.9),
    limit=st.floats(1e-6, 0.9),
    lengths=st.tuples(st.integers(1, 1024), st.integers(1, 1024)),
)
def test_the_same_rate_gives_the_same_decision_at_any_length(rate, limit, lengths):
    """The length law: in groups of one run, and in runs of one group each."""
    both = run_of(
        dict(zip(TWO, lengths, strict=True)),
        {group: [rate, 1e-9] for group in TWO},
    )
    found = taken(both, k=1, max_rate=limit)
    assert found["image"] == found["text_only"] == ([0] if rate <= limit else [1])
    for length in lengths:
        alone = run_of({"image": length}, {"image": [rate, 1e-9]})
        assert taken(alone, k=1, max_rate=limit)["image"] == found["image"]


@pytest.mark.parametrize(
    ("rate", "image", "text"),
    # The limits are 1 - 0.95^(1/256) = 2.003e-4 and 1 - 0.95^(1/60) = 8.545e-4.
    [(1.9e-4, 0, 0), (2.1e-4, 1, 0), (5e-4, 1, 0), (8.4e-4, 1, 0), (8.7e-4, 1, 1)],
)
def test_under_the_papers_filter_the_length_decides(rate, image, text):
    result = run_of(TWO, {group: [rate, 1e-9] for group in TWO})
    found = taken(result, k=1, convention="paper")
    assert found == {"image": [image], "text_only": [text]}
    assert taken(result, k=1) == {"image": [0], "text_only": [0]}


def test_the_papers_filter_knows_densities_too():
    rates = {group: [1e-5, 1e-5, 1e-5] for group in TWO}
    result = run_of(TWO, rates)
    density = {5: {0: 0.0051, 1: 0.005}, 6: {1: 0.9}}
    paper = Frequency(convention="paper")
    found = best_features(result, group="image", k=2, frequency=paper, density=density)
    assert found.feature.tolist() == [1, 2, 1, 2]
    assert found.density.tolist() == pytest.approx([0.005, math.nan] * 2, nan_ok=True)
    # Ours has no limit of density unless one is given, and both may be changed.
    assert taken(result, k=1, density=density)["image"] == [0]
    assert taken(result, k=1, density=density, max_density=0.001)["image"] == [2]
    assert taken(
        result, k=1, density=density, convention="paper", max_density=0.01
    ) == {"image": [0], "text_only": [0]}


def test_an_image_rate_can_be_asked_of_ours():
    result = run_of(TWO, {group: [5e-4, 1e-9] for group in TWO})
    found = taken(result, k=1, max_image_rate=0.05)
    assert found == {"image": [1], "text_only": [0]}


def test_the_measured_reference():
    rates = {"image": [0.3, 0.001], "text_only": [0.3, 0.001]}
    result = run_of(TWO, rates, reference_rates=[0.01, 0.2])
    assert taken(result, k=1, reference="measured")["image"] == [0]
    assert taken(result, k=1)["image"] == [1]
    with pytest.raises(ValueError, match="has no reference_rate; probe again with sel"):
        taken(run_of(TWO, rates), k=1, reference="measured")


def test_too_few_are_never_passed_over_in_silence():
    result = run_of(TWO, {group: [0.5, 0.5, 0.3] for group in TWO})
    words = (
        r"^4 of 4 images .by layer and group. have fewer than 2 features left, since "
        "the others among the 3 that were kept fire too often; probe again with a "
        "larger top_k, or raise the limit"
    )
    with pytest.warns(UserWarning, match=words):
        chosen = best_features(result, k=2, max_rate=0.4)
    assert chosen.feature.tolist() == [2] * 4
    assert chosen.short.all()
    none = r"^4 of 4 images .by layer and group. have no feature left and no row: all"
    with pytest.warns(UserWarning, match=words), pytest.warns(match=none):
        assert len(best_features(result, k=2, max_rate=0.2)) == 0
    few = run_of(TWO, {group: [0.5] for group in TWO})
    with pytest.warns(UserWarning, match=none):
        assert len(best_features(few, k=2)) == 0


def test_where_fewer_fired_than_were_kept_there_is_nothing_to_warn_of():
    rates = {"image": [0.5, 0.01], "text_only": [0.5, 0.01]}
    chosen = best_features(run_of(TWO, rates, top_k=8), k=3, max_rate=0.1)
    assert chosen.feature.tolist() == [1] * 4
    assert chosen.short.all()


RESULT = run_of(TWO, {group: [0.01, 0.01] for group in TWO}, top_k=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"by": "selectivity"}, "no ranking by selectivity, only by activation; probe"),
        ({"by": "value"}, "unknown ranking 'value'; valid: activation, selectivity"),
        (
            {"k": 3},
            "k is 3, and the run kept 2 features of each image; expected 1 to 2",
        ),
        ({"k": 0}, "k is 0, and the run kept 2"),
        ({"layer": 4}, "no top features of layer 4 in this result; it has 5"),
        ({"group": "text"}, "unknown group 'text'; valid: image,"),
        ({"group": "text_after_image"}, "of group 'text_after_image' in this result"),
        ({"image": 7}, "no top features of image 7 in this result; it has 0, 1"),
        ({"image": "x"}, "no top features of id 'x' in this result; it has picture 0"),
        ({"condition": "noise"}, "no top features of condition 'noise' in this result"),
        ({"condition": "none"}, "unknown condition 'none'; valid: model"),
        ({"max_rate": 1.5}, "max_rate is a share, from 0 to 1, given 1.5"),
        ({"convention": "ours"}, "unknown convention 'ours'; valid: pooled, paper"),
        ({"reference": "text"}, "unknown reference 'text'; valid: run, measured"),
    ],
)
def test_what_is_not_there_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        best_features(RESULT, **{"k": 1} | options)


def test_an_unknown_option_is_refused():
    with pytest.raises(
        TypeError, match="unknown option 'rate'; valid: convention, max_"
    ):
        best_features(RESULT, rate=0.1)
    with pytest.raises(FrozenInstanceError):
        Frequency().max_rate = 0.2


def test_of_a_run(tmp_path):
    """Every choice by hand from the tables, and the same after saving and loading."""
    result = probe_layers(
        tiny_model(),
        toy_examples(4),
        controls=["noise"],
        rank_by=["activation", "selectivity"],
        layers=[0, 2],
        replicates=2,
        top_k=65,  # one more than there are
        progress=False,
    )
    for by in ("activation", "selectivity"):
        for condition in ("model", "noise"):
            chosen = result.best_features(by=by, k=5, condition=condition, max_rate=0.5)
            keys = ["layer", "group", "image"]
            assert len(chosen.groupby(keys)) == 2 * 4 * (3 - (condition == "noise"))
            for (layer, group, image), rows in chosen.groupby(keys):
                of = result.features
                of = of[(of.condition == "model") & (of.layer == layer)]
                rate = of.groupby("feature").rate.sum() / 3
                top = result.top_features
                top = top[(top.by == by) & (top.condition == condition)]
                top = top[(top.layer == layer) & (top.group == group)]
                top = top[top.image == image]
                passes = top.feature.map(rate).fillna(0) <= 0.5
                assert rows.feature.tolist() == top.feature[passes].tolist()[:5]
                assert rows.choice.tolist() == list(range(1, len(rows) + 1))
    again = ProbeResult.load(result.save(tmp_path)).best_features(k=2, max_rate=0.5)
    pd.testing.assert_frame_equal(again, result.best_features(k=2, max_rate=0.5))
    places = ["left", "top", "right", "bottom"]
    assert again[again.group == "image"][places].notna().all(axis=None)
    assert np.isfinite(again.value).all()
