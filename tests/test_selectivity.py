"""Features ranked by how seldom they fire, and their places in the pictures."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tiny import FEATURES, LAYERS, tiny_model
from torchvision.transforms import Compose, RandomHorizontalFlip

from vlm_probe.examples import Example
from vlm_probe.probe import probe_layers, run
from vlm_probe.probe.feed import Feed
from vlm_probe.probe.reference import Fired, Reference
from vlm_probe.probe.run import Run
from vlm_probe.result import TABLES
from vlm_probe.settings import ProbeSettings
from vlm_probe.toy.examples import toy_examples

SETTINGS = {
    "rank_by": ["activation", "selectivity"],
    "replicates": 5,
    "batch_size": 2,
    "top_k": 4,
    "calibration": 3,
}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def pictures():
    """Two of them wider than high."""
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, 256, (32, width, 3), np.uint8) for width in (64, 96)]
    wide = [Example(Image.fromarray(p), "what ?", caption="sand .") for p in drawn]
    return [toy_examples(3)[0], wide[0], *toy_examples(3)[1:], wide[1]]


def probe(model, images, **changes):
    return probe_layers(model, images, progress=False, **SETTINGS | changes)


@pytest.fixture(scope="module")
def result(model, pictures):
    return probe(model, pictures, controls=["noise"])


def test_rarity_by_hand():
    fired = Fired(torch.tensor([[0, 3, 6], [0, 2, 4]]), torch.tensor([6, 4]))
    assert fired.rate().tolist() == [0, 0.5, 1]
    # s is the mean of 1/6 and 1/4, 5/24: (1 + s) / (r + s) is 29/5, 29/17 and 1.
    expected = [math.log(29 / 5), math.log(29 / 17), 0]
    assert fired.rarity().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("half", [0, 1])
def test_one_half_alone_is_the_inverse_frequency_of_its_tokens(half):
    counts, seen = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2).long()
    counts[half], seen[half] = torch.tensor([0, 4, 9]), 9
    found = Fired(counts, seen).rarity().tolist()
    assert found == pytest.approx([math.log(10 / (n + 1)) for n in (0, 4, 9)])


def test_many_tokens_of_pictures_do_not_drown_few_of_texts():
    """A feature of every word and of no patch fires half of the time."""
    fired = Fired(torch.tensor([[60, 0], [0, 256_000]]), torch.tensor([60, 256_000]))
    assert fired.rate().tolist() == [0.5, 0.5]
    assert fired.rarity()[0] == fired.rarity()[1]


def test_the_reference_equals_the_plain_codes(model, pictures, result):
    language, chat = model.language, model.language.chat
    patches = model.vision.encode([e.picture() for e in pictures[:2]])
    vectors = [*model.adapter(patches)]
    patches = model.vision.encode([e.picture() for e in pictures[2:4]])
    vectors.append(model.adapter(patches)[0])  # of three, for the calibration
    assert language.tokenizer("<bos>", add_special_tokens=False).input_ids[0] in (
        chat.special
    )
    for layer in range(LAYERS):
        sae, halves = model.saes[layer].sae, []
        texts = []
        for text in model.reference_texts:
            ids = language.tokenizer(f"<bos> {text}", add_special_tokens=False)
            _, cache = language.hooked.run_with_cache(torch.tensor([ids.input_ids]))
            texts.append(cache["resid_post", layer][0, 1:])
        halves.append((sae.encode(torch.cat(texts)) != 0).double())
        image = []
        for put in vectors:

            def put_in(embedded, hook, put=put):
                embedded[0, 1:] = put
                return embedded

            ids = torch.tensor([[chat.tokenizer.bos_token_id] + [5] * len(put)])
            with language.hooked.hooks([("hook_embed", put_in)]), torch.no_grad():
                _, cache = language.hooked.run_with_cache(ids)
            image.append(cache["resid_post", layer][0, 1:])
        halves.append((sae.encode(torch.cat(image)) != 0).double())
        rate = (halves[0].mean(0) + halves[1].mean(0)) / 2
        rows = result.features.query("layer == @layer")
        # Near a threshold rounding decides.
        off = (rows.reference_rate - rate.numpy()[rows.feature]).abs()
        assert (off < 1e-9).mean() > 0.98
        assert off.max() < 0.02
        about = result.meta["reference"]
        assert about["text_tokens"] == len(halves[0])
        assert about["image_tokens"] == len(halves[1]) == 3 * 16
    assert about["pictures"] == 3
    assert rate.std() > 0.05


def test_selectivity_is_what_the_tables_say_it_is(model, pictures):
    """Of all active features, those of the highest value times rarity."""
    result = probe(model, pictures, top_k=FEATURES)
    by = {name: rows for name, rows in result.top_features.groupby("by")}
    keys = ["layer", "group", "image", "feature"]
    assert (by["activation"].score == by["activation"].value).all()
    both = by["activation"].merge(by["selectivity"], on=keys, suffixes=("", "_rare"))
    # All that fire are in both rankings, each with the same peak at the same place.
    assert len(both) == len(by["activation"]) == len(by["selectivity"])
    same = ["value", "position", "token", "patch_row", "patch_column", "left"]
    for name in same:
        pd.testing.assert_series_equal(
            both[name], both[f"{name}_rare"], check_names=False
        )
    rates = result.features[["layer", "group", "feature", "reference_rate"]]
    both = both.merge(rates, on=["layer", "group", "feature"])
    about = result.meta["reference"]
    s = (1 / about["text_tokens"] + 1 / about["image_tokens"]) / 2
    expected = both.value * np.log((1 + s) / (both.reference_rate + s))
    np.testing.assert_allclose(both.score_rare, expected, rtol=1e-5, atol=1e-6)
    assert (both["rank"] != both.rank_rare).mean() > 0.2
    short = probe(model, pictures).top_features.query("by == 'selectivity'")
    longest = by["selectivity"].query("rank <= 4").reset_index(drop=True)
    pd.testing.assert_frame_equal(short.reset_index(drop=True), longest)
    for _, rows in longest.groupby(["layer", "group", "image"]):
        assert rows["rank"].tolist() == list(range(1, len(rows) + 1))
        assert rows.score.is_monotonic_decreasing


def test_a_second_ranking_changes_nothing_of_the_first(model, pictures, result):
    alone = probe(model, pictures, controls=["noise"], rank_by=["activation"])
    first = result.top_features.query("by == 'activation'").reset_index(drop=True)
    pd.testing.assert_frame_equal(alone.top_features, first)
    assert alone.features.reference_rate.isna().all()
    assert alone.meta["reference"] is None
    assert result.features.reference_rate.notna().all()
    pd.testing.assert_frame_equal(alone.layers, result.layers)


def test_who_does_not_ask_pays_nothing(model, pictures, monkeypatch):
    monkeypatch.setattr(run, "settle", pytest.fail)
    probe(model, pictures[:1], rank_by=["activation"], layers=[0])


def test_batches_change_no_score(model, pictures, result):
    other = probe(model, pictures, batch_size=3, controls=["noise"])
    a, b = result.top_features, other.top_features
    # But for what rounding moves over a threshold.
    assert (a.feature == b.feature).mean() > 0.98
    same = a.feature == b.feature
    np.testing.assert_allclose(a.score[same], b.score[same], rtol=0.02, atol=1e-3)


def saved(result, folder):
    result.save(folder)
    names = [*(f"{name}.parquet" for name in TABLES), "meta.json"]
    return {name: (folder / name).read_bytes() for name in names}


class StoppedError(Exception):
    pass


def test_a_run_that_goes_on_ends_with_the_same_bytes(
    model, pictures, result, tmp_path, monkeypatch
):
    def stopping():
        yield from pictures[:4]
        raise StoppedError

    kept = {"checkpoint": tmp_path / "kept", "controls": ["noise"]}
    with pytest.raises(StoppedError):
        probe(model, stopping(), **kept)
    monkeypatch.setattr("vlm_probe.probe.reference._measured", pytest.fail)
    again = probe(model, pictures, **kept)
    assert saved(again, tmp_path / "again") == saved(result, tmp_path / "whole")


def test_another_reference_is_refused(model, pictures, tmp_path):
    kept = {"checkpoint": tmp_path, "layers": [0]}
    probe(model, pictures[:2], **kept)
    words = "begun with 2 pictures in the reference of selectivity, now there are 3"
    with pytest.raises(ValueError, match=words):
        probe(model, pictures, **kept)
    with pytest.raises(
        ValueError, match=r"settings.rank_by was .*, is now .'activation"
    ):
        probe(model, pictures[:2], rank_by=["activation"], **kept)


@pytest.mark.parametrize("size", [2, 4])
def test_processes_add_up_to_the_same(model, pictures, result, size):
    settings = ProbeSettings(**SETTINGS, controls=["noise"])
    whole = Run(model, settings)
    whole.complete = True
    for rank in range(size):
        part, mine = Run(model, settings), Run(model, settings)
        feed = Feed(pictures, settings.batch_size)
        mine.prepare(feed, None)
        for block in feed.read(rank=rank, size=size):
            mine.add(block, "record")
        mine.complete = True
        part.restore(mine.state())
        whole.merge(part)
    found = whole.result({"findings": result.meta["findings"]}, {}, None)
    pd.testing.assert_frame_equal(found.top_features, result.top_features)
    pd.testing.assert_frame_equal(found.features, result.features)
    assert found.meta == result.meta


def test_a_reference_comes_back_as_it_was():
    fired = {
        n: Fired(torch.randint(9, (2, 5)), torch.tensor([9, 8 * n])) for n in (1, 7)
    }
    again = Reference.restored(Reference(fired, 4).state())
    assert again.pictures == 4
    assert again.layers.keys() == fired.keys()
    for layer, expected in fired.items():
        assert torch.equal(again.layers[layer].counts, expected.counts)
        assert torch.equal(again.layers[layer].seen, expected.seen)


def test_without_a_readable_picture_texts_alone_are_the_reference(model, pictures):
    settings = ProbeSettings(**SETTINGS, layers=[1])
    started = Run(model, settings)
    started.prepare(Feed(["nowhere.png"], 2), None)
    fired = started.reference.layers[1]
    assert fired.seen.tolist()[1] == 0
    assert fired.rate().max() == (fired.counts[0] / fired.seen[0]).max()


def test_boxes_are_those_of_the_patches_in_their_own_pictures(model, pictures, result):
    top = result.top_features
    assert (
        top.loc[top.group != "image", ["left", "top", "right", "bottom"]]
        .isna()
        .all(axis=None)
    )
    patches = top[top.group == "image"]
    assert set(patches.image) == set(range(5))
    for row in patches.itertuples():
        size = pictures[row.image].picture().size
        index = row.patch_row * 4 + row.patch_column
        box = model.vision.patch_box(int(index), size)
        assert (row.left, row.top, row.right, row.bottom) == box
    # Of a picture of 96 x 32 the middle third is seen, in four columns.
    assert patches.query("image == 4").left.isin([32, 40, 48, 56]).all()


def test_where_boxes_are_not_known_it_is_said(pictures):
    model = tiny_model()
    model.vision.preprocess = Compose(
        [RandomHorizontalFlip(0.0), model.vision.preprocess]
    )
    result = probe(model, pictures[:2], layers=[0], rank_by=["activation"])
    assert result.top_features.left.isna().all()
    assert result.top_features.query("group == 'image'").patch_row.notna().all()
    assert "where patches lie is not known" in result.meta["patch_boxes"]
