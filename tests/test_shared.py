"""An image's features and its caption's: what is shared beyond what all share."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csc_array
from tiny import LAYERS, tiny_model

from vlm_probe.analysis import shared
from vlm_probe.analysis.shared import overlaps, shared_features
from vlm_probe.probe import probe_layers
from vlm_probe.result import ProbeResult
from vlm_probe.toy.examples import toy_examples


def run_of(pictures, captions, *, layer=2, instead=None):
    """A result of one layer, from each image's features and values in both groups."""
    rows = [
        {
            "layer": layer,
            "group": group,
            "condition": "model",
            "image": image,
            "by": "activation",
            "feature": feature,
            "value": float(value),
            "score": float(value) ** 2,
        }
        for group, sets in (("image", pictures), ("text_only", captions))
        for image, features in enumerate(sets)
        for feature, value in features.items()
    ]
    none = pd.DataFrame()
    words = {"captions": len(captions), "reference texts": 0}
    meta = {"text_only_words": words if instead is None else instead}
    return ProbeResult(none, none, pd.DataFrame(rows), none, meta)


def row_of(result, **options):
    (row,) = shared_features(result, **options).to_dict("records")
    return row


PICTURES = [{1: 6, 2: 2}, {1: 1, 3: 3}, {5: 4}]
CAPTIONS = [{1: 1, 4: 1}, {3: 9}, {1: 5, 2: 5}]
# In shares: 3/4 1/4, 1/4 3/4, 1 against 1/2 1/2, 1, 1/2 1/2. The smaller of each pair
# summed, m, gives m / (2 - m).
#          caption 0    1      2
BY_HAND = [
    [0.5 / 1.5, 0, 0.75 / 1.25],
    [0.25 / 1.75, 0.75 / 1.25, 0.25 / 1.75],
    [0, 0, 0],
]


def test_by_hand():
    row = row_of(run_of(PICTURES, CAPTIONS))
    assert (row["layer"], row["n_images"], row["n_empty"]) == (2, 3, 0)
    assert row["overlap"] == pytest.approx((1 / 3 + 0.6 + 0) / 3)
    assert row["shuffled"] == pytest.approx((0.6 + 2 / 14 + 2 / 14) / 6)
    # Image 0 is nearer to caption 2, image 1 to its own, image 2 equally to all.
    assert row["to_caption"] == pytest.approx((0 + 1 + 1 / 3) / 3)
    # Caption 0 to its image, 1 to its own, 2 to image 0.
    assert row["to_image"] == pytest.approx(2 / 3)
    assert row["chance"] == pytest.approx(1 / 3)
    assert row["overlap_low"] <= row["overlap"] <= row["overlap_high"]
    # Of the six pairings this one has 0.933 in all, and one has more: 0.6 twice.
    assert row["p_value"] == pytest.approx(1 / 3, abs=0.05)


@pytest.mark.parametrize("block", [1, 3, 7, 2**22])
def test_overlaps_by_hand_in_blocks_of_any_size(monkeypatch, block):
    monkeypatch.setattr(shared, "_BLOCK", block)
    left = csc_array([[0.75, 0.25, 0, 0], [0.25, 0, 0.75, 0], [0, 0, 0, 1]])
    right = csc_array([[0.5, 0, 0, 0, 0.5], [0, 0, 1, 0, 0], [0.5, 0.5, 0, 0, 0]])
    found = np.concatenate([part for _, part in overlaps(left, right)])
    np.testing.assert_allclose(found, BY_HAND)
    assert row_of(run_of(PICTURES, CAPTIONS)) == row_of(run_of(PICTURES, CAPTIONS))


def test_blocks_change_nothing(monkeypatch):
    result = run_of(*random_sets(30, shared_by_all=2))
    whole = row_of(result)
    monkeypatch.setattr(shared, "_BLOCK", 100)
    assert row_of(result) == pytest.approx(whole, rel=1e-12)


def random_sets(n, *, own=0, shared_by_all=0, seed=0):
    """Sets of random features of 400, some of which an image has with its caption."""
    rng = np.random.default_rng(seed)
    sets = []
    for _ in range(n):
        common = rng.choice(400, own, replace=False)
        pair = []
        for group in (0, 1):
            features = [*common, *rng.choice(400, 6 - own, replace=False)]
            values = rng.uniform(1, 2, len(features)) * (1 + 50 * group)
            found = dict(zip(map(int, features), values, strict=True))
            found |= {1000 + j: 5.0 * (1 + 50 * group) for j in range(shared_by_all)}
            pair.append(found)
        sets.append(pair)
    return [a for a, _ in sets], [b for _, b in sets]


def test_the_same_sets_overlap_wholly_whatever_their_size():
    pictures, _ = random_sets(12)
    captions = [{f: 37 * v for f, v in s.items()} for s in pictures]
    row = row_of(run_of(pictures, captions), permutations=200)
    assert row["overlap"] == pytest.approx(1)
    assert row["shuffled"] < 0.1
    assert (row["to_caption"], row["to_image"]) == (1, 1)
    assert row["p_value"] == 1 / 201


def test_what_all_images_share_is_no_evidence():
    """However large the overlap."""
    row = row_of(run_of(*random_sets(60, shared_by_all=4)))
    assert row["overlap"] > 0.5
    assert row["overlap"] == pytest.approx(row["shuffled"], rel=0.05)
    assert row["p_value"] > 0.02
    assert row["to_caption_low"] < row["chance"] < row["to_caption_high"]
    with_own = row_of(run_of(*random_sets(60, shared_by_all=4, own=2)))
    assert with_own["overlap_low"] > with_own["shuffled"]
    assert with_own["p_value"] == 1 / 1001
    assert with_own["to_caption_low"] > 0.5
    assert with_own["to_image_low"] > 0.5


def test_p_values_under_the_null_are_spread_evenly():
    found = [
        row_of(
            run_of(*random_sets(10, shared_by_all=1, seed=seed)),
            permutations=99,
            replicates=0,
            seed=seed,
        )["p_value"]
        for seed in range(60)
    ]
    assert min(found) >= 0.01
    # Of sixty about as many below 0.25 and 0.5 as there should be.
    assert 6 <= np.sum(np.array(found) <= 0.25) <= 25
    assert 19 <= np.sum(np.array(found) <= 0.5) <= 41


def test_weights():
    pictures, captions = [{1: 1, 2: 3}, {7: 1}], [{1: 1, 2: 1}, {8: 1}]
    result = run_of(pictures, captions)
    # Shares 1/4 3/4 against 1/2 1/2; squared 1/10 9/10; equal ones.
    for weights, m in (("value", 0.75), ("score", 0.6), ("equal", 1)):
        row = row_of(result, weights=weights)
        assert row["overlap"] == pytest.approx(m / (2 - m) / 2)


def test_a_set_without_features_overlaps_with_nothing():
    row = row_of(run_of([{1: 1}, {2: 1}, {}], [{1: 1}, {}, {3: 1}]))
    assert (row["n_images"], row["n_empty"]) == (3, 2)
    assert row["overlap"] == pytest.approx(1 / 3)
    assert row["to_caption"] == pytest.approx((1 + 1 / 3 + 1 / 3) / 3)


def test_layers_without_image_tokens_are_missing():
    one = run_of(PICTURES, CAPTIONS, layer=0)
    words = one.top_features.query("group == 'text_only'")
    other = run_of(PICTURES, CAPTIONS, layer=1)
    both = replace(other, top_features=pd.concat([words, other.top_features]))
    assert shared_features(both).layer.tolist() == [1]


@pytest.mark.parametrize(
    ("result", "options", "words"),
    [
        (
            run_of(PICTURES, CAPTIONS, instead={"captions": 2, "reference texts": 1}),
            {},
            "1 of 3 images had no caption: in text_only reference texts stood in their "
            "places, which say nothing of them; give every example a caption",
        ),
        (
            run_of(PICTURES, CAPTIONS, instead={}),
            {},
            "does not say which words stood in",
        ),
        (
            run_of(PICTURES, []),
            {},
            "no top features by activation of text_only in this result; probe the",
        ),
        (
            run_of(PICTURES, CAPTIONS),
            {"by": "selectivity"},
            "no top features by selectivity of image and text_only in this result",
        ),
        (run_of(PICTURES[:1], CAPTIONS[:1]), {}, "one image has no other's caption to"),
        (run_of(PICTURES, CAPTIONS), {"by": "value"}, "unknown ranking 'value'; valid"),
        (
            run_of(PICTURES, CAPTIONS),
            {"weights": "rank"},
            "unknown weights 'rank'; val",
        ),
        (
            run_of([{1: -1}, {2: 1}], CAPTIONS[:2]),
            {},
            "some features are active below z",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(result, options, words):
    with pytest.raises(ValueError, match=words):
        shared_features(result, **options)


def test_of_a_run():
    model, examples = tiny_model(), toy_examples(5)
    settings = {"replicates": 2, "progress": False, "top_k": 16}
    result = probe_layers(model, examples, groups=["image", "text_only"], **settings)
    found = result.shared_features(permutations=50)
    assert found.layer.tolist() == [*range(LAYERS)]
    assert (found.n_images == 5).all()
    # Written out for one layer.
    top = result.top_features.query("layer == 1")
    sets = {
        (group, image): (rows.set_index("feature").value / rows.value.sum())
        for (group, image), rows in top.groupby(["group", "image"])
    }
    own = []
    for image in range(5):
        pair = [sets[group, image] for group in ("image", "text_only")]
        pair = pd.concat(pair, axis=1).fillna(0.0)
        own.append(pair.min(axis=1).sum() / pair.max(axis=1).sum())
    assert found.overlap[1] == pytest.approx(np.mean(own), rel=1e-5)
    bare = [replace(example, caption=None) for example in examples]
    with_texts = probe_layers(model, bare, layers=[0], **settings)
    with pytest.raises(ValueError, match="5 of 5 images had no caption"):
        with_texts.shared_features()
