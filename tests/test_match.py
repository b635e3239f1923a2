"""Match rates: done by hand, uniform where there is nothing to find, in the toy."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from tiny import tiny_model

from vlm_probe.analysis.chance import Counting, rates
from vlm_probe.analysis.judges.interface import Estimate
from vlm_probe.analysis.judges.truth import TruthJudge
from vlm_probe.analysis.match import MatchResult, match_rate
from vlm_probe.analysis.pairing import plan
from vlm_probe.examples import Example
from vlm_probe.probe import probe_layers
from vlm_probe.toy.examples import toy_examples
from vlm_probe.toy.world import COLORS


class Words:
    """Descriptions from a list: feature 3 is the third word, whatever the layer."""

    name = "words"

    def __init__(self, *words):
        self.words = words

    def of(self, layer, features):
        return {f: self.words[f] for f in features}


class Counted(TruthJudge):
    """Remembers what it was asked."""

    def __init__(self, truth, *, free=True):
        super().__init__(truth)
        self.free = free
        self.asked = []

    def ask(self, examples, questions):
        self.asked.append(list(questions))
        return super().ask(examples, questions)


def in_caption(example, description):
    return description in example.caption.split()


def table(features, **columns):
    """`top_features` with these features for each image, or none."""
    rows = [
        {"image": image, "id": str(image), "rank": rank, "feature": feature}
        for image, of_image in enumerate(features)
        for rank, feature in enumerate(of_image, 1)
    ]
    case = {"layer": 0, "group": "image", "condition": "model"} | columns
    return pd.DataFrame([case | row for row in rows])


THREE = [Example(None, caption=words) for words in ("red circle", "red bar", "bar sun")]
WORDS = Words("red", "circle", "bar", "night", "sun", None)
#        a: both match      b: one of two       c: one, the other undescribed
CHOSEN = table([(0, 1), (2, 3), (4, 5)])
JUDGE = TruthJudge(in_caption)


def test_three_pictures_by_hand():
    row = match_rate(CHOSEN, WORDS, JUDGE, THREE).rates.iloc[0]
    assert (row.layer, row.group, row.condition) == (0, "image", "model")
    assert (row.n_images, row.n_features, row.n_undescribed) == (3, 5, 1)
    assert (row.n_unanswered, row.n_matches, row.rate) == (0, 4, 4 / 5)
    # On others' pictures: a's match b by "red", not c; b's match c by "bar", not a;
    # c's match none. Of each picture's features a mean over two others: 1/2, 1/2, 0.
    assert row.rate_chance == pytest.approx((0.5 + 0.5 + 0) / 5)
    assert (row.n_any_images, row.n_any_matches, row.any_rate) == (3, 3, 1)
    assert row.any_rate_chance == pytest.approx((0.5 + 0.5 + 0) / 3)
    # Wilson at 3 of 3: from 3 / (3 + 1.96^2) to 1.
    assert row.any_rate_low == pytest.approx(3 / (3 + 1.959964**2), abs=1e-6)
    assert row.any_rate_high == pytest.approx(1)
    # Wilson at 4 of 5: center (4 + z^2 / 2) / (5 + z^2), half width
    # z sqrt(4 * 1 / 5 + z^2 / 4) / (5 + z^2).
    z2 = 1.959964**2
    half = np.sqrt(z2 * (4 / 5 + z2 / 4)) / (5 + z2)
    center = (4 + z2 / 2) / (5 + z2)
    assert row.rate_wilson_low == pytest.approx(center - half, abs=1e-6)
    assert row.rate_wilson_high == pytest.approx(center + half, abs=1e-6)
    # Redrawn: b alone three times gives 1/2, a or c alone gives 1.
    assert (row.rate_low, row.rate_high) == (0.5, 1)


def test_the_p_value_is_that_of_scipy():
    row = match_rate(CHOSEN, WORDS, JUDGE, THREE, permutations=20_000).rates.iloc[0]
    hits = np.array([[2, 1, 0], [0, 1, 1], [0, 0, 1]])
    exact = stats.permutation_test(
        (np.arange(3),),
        lambda order: hits[np.arange(3), order].sum(),
        permutation_type="pairings",
        alternative="greater",
    )
    assert exact.pvalue == pytest.approx(1 / 6)  # no other order reaches four matches
    assert row.rate_p == pytest.approx(exact.pvalue, abs=0.01)
    assert (row.rate_chance_low, row.rate_chance_high) == (0, 4 / 5)


def test_no_answer_is_neither_yes_nor_no():
    def unsure(example, description):
        known = description not in ("night", "sun")
        return in_caption(example, description) if known else None

    result = match_rate(CHOSEN, WORDS, TruthJudge(unsure), THREE)
    row = result.rates.iloc[0]
    # b has "bar", a yes, beside one unknown: any is known. c has nothing known.
    assert (row.n_features, row.n_unanswered, row.n_matches) == (5, 2, 3)
    assert (row.rate, row.n_any_images, row.any_rate) == (1, 2, 1)
    verdicts = result.judgements.set_index(["image", "feature"])["verdict"]
    assert verdicts[0, 1] and pd.isna(verdicts[1, 3]) and pd.isna(verdicts[2, 5])
    assert result.meta["n_unanswered"] == 6  # two descriptions on three pictures

    # One no beside one unknown: it may be that any matches.
    bars = table([(2, 3), (2, 3), (2, 3)])
    row = match_rate(bars, WORDS, TruthJudge(unsure), THREE).rates.iloc[0]
    assert (row.n_any_images, row.n_any_matches) == (2, 2)


def test_what_cannot_be_told_is_missing():
    row = match_rate(CHOSEN[:2], WORDS, JUDGE, THREE).rates.iloc[0]
    assert (row.n_images, row.rate, row.any_rate) == (1, 1, 1)
    untold = ["rate_low", "rate_high", "rate_chance", "rate_p", "any_rate_chance"]
    assert row[untold].isna().all()
    mute = match_rate(CHOSEN, Words(*[None] * 6), JUDGE, THREE)
    row = mute.rates.iloc[0]
    assert (row.n_images, row.n_features, row.n_undescribed) == (3, 0, 6)
    told = [c for c in mute.rates if c.startswith(("rate", "any_rate"))]
    assert len(told) == 16 and row[told].isna().all()
    assert len(mute.answers) == 0 and mute.judgements["verdict"].isna().all()


def test_a_blank_description_is_none():
    row = match_rate(CHOSEN, Words("red", " ", "", *WORDS.words[3:]), JUDGE, THREE)
    assert row.rates.iloc[0].n_undescribed == 3


def test_half_a_character_in_a_description():
    words = Words("red\ud83d", *WORDS.words[1:])
    result = match_rate(CHOSEN, words, JUDGE, THREE)
    assert "red?" in set(result.judgements["description"])


def test_k_takes_the_best_ranks():
    chosen = CHOSEN.sample(frac=1, random_state=0)
    result = match_rate(chosen, WORDS, JUDGE, THREE, k=1)
    assert list(result.judgements["feature"]) == [0, 2, 4]
    # A missing description is not made up for by the next rank.
    chosen["rank"] = 3 - chosen["rank"]
    row = match_rate(chosen, WORDS, JUDGE, THREE, k=1).rates.iloc[0]
    assert (row.n_features, row.n_undescribed) == (2, 1)


N_RUNS, N_IMAGES, POOL = 120, 16, 10


class Own:
    """Each layer has words of its own, so that each is a run of its own."""

    name = "own"

    def of(self, layer, features):
        return {f: f"{layer} {f}" for f in features}


def runs(seed, weight=0, n=N_RUNS, **settings):
    """Many runs, as layers: three of ten features each, verdicts by picture.

    `weight` says how much features that are true of a picture are preferred for it.
    """
    rng = np.random.default_rng(seed)
    easy = rng.uniform(0.1, 0.6, size=(n, N_IMAGES, 1))
    true = rng.uniform(size=(n, N_IMAGES, POOL)) < easy
    order = rng.uniform(size=true.shape) - weight * true
    features = order.argsort(-1)[..., :3]
    layer, image, rank = (axis.ravel() for axis in np.indices(features.shape))
    chosen = pd.DataFrame(
        {
            "layer": layer,
            "group": "image",
            "condition": "model",
            "image": image,
            "id": image.astype(str),
            "rank": rank + 1,
            "feature": features.ravel(),
        }
    )

    def truth(example, description):
        layer, feature = description.split()
        return true[int(layer), int(example.id), int(feature)]

    pictures = [Example(None) for _ in range(N_IMAGES)]
    settings = {"permutations": 99, "replicates": 2, "seed": seed} | settings
    return match_rate(chosen, Own(), TruthJudge(truth), pictures, **settings).rates


@pytest.mark.parametrize("chance_pairs", [None, 2])
def test_p_values_are_uniform_where_there_is_nothing_to_find(chance_pairs):
    found = runs(1, ties="random", chance_pairs=chance_pairs)
    assert len(found) == N_RUNS
    for name in ("rate", "any_rate"):
        assert stats.kstest(found[f"{name}_p"], "uniform").pvalue > 0.05
        # Rates are around their chance levels, and within the bounds of chance.
        gap = found[name] - found[f"{name}_chance"]
        assert abs(gap.mean()) < 3 * gap.std() / np.sqrt(len(gap))
        low, high = found[f"{name}_chance_low"], found[f"{name}_chance_high"]
        assert found[name].between(low, high).mean() > 0.91  # of 0.95


def test_conservative_p_values_are_never_too_small():
    found = runs(2, chance_pairs=2)
    for name in ("rate_p", "any_rate_p"):
        for alpha in (0.02, 0.05, 0.1, 0.3, 0.5):
            error = np.sqrt(alpha * (1 - alpha) / len(found))
            assert (found[name] <= alpha).mean() <= alpha + 2.5 * error
        assert found[name].max() > 0.95
        # They are not useless either.
        assert found[name].mean() < 0.7


def test_p_values_are_small_where_there_is_something():
    found = runs(3, weight=0.5, n=40, chance_pairs=4)
    assert (found["rate_p"] <= 0.05).mean() > 0.9
    assert (found["rate"] > found["rate_chance"]).all()


def test_the_toy_world():
    pictures = toy_examples(24)
    colors = list(COLORS)
    chosen = table(
        [[colors.index(t.color) for t in example.scene.things] for example in pictures]
    )
    chosen["id"] = [pictures[i].id for i in chosen["image"]]

    def true_of(example, description):
        return any(thing.color == description for thing in example.scene.things)

    row = match_rate(chosen, Words(*colors), TruthJudge(true_of), pictures).rates.iloc[
        0
    ]
    assert (row.rate, row.any_rate) == (1, 1)
    # Chance: the share of other pictures with the color, over the features.
    expected = np.mean(
        [
            np.mean([true_of(p, colors[f]) for j, p in enumerate(pictures) if j != i])
            for i, f in zip(chosen["image"], chosen["feature"], strict=True)
        ]
    )
    assert row.rate_chance == pytest.approx(expected)
    assert 0.05 < row.rate_chance < row.any_rate_chance < 0.6
    assert row.rate_p == row.any_rate_p == 1 / 1001


def test_a_real_result():
    pictures = toy_examples(3)
    probed = probe_layers(tiny_model(), pictures, replicates=2, progress=False)
    words = Words(*(["red", "a circle", None, "grass"] * 16))
    result = match_rate(probed.top_features, words, JUDGE, pictures, permutations=50)
    assert len(result.rates) == len(probed.layers)
    assert list(result.rates["layer"]) == sorted(result.rates["layer"])
    n = result.rates["n_features"] + result.rates["n_undescribed"]
    assert (n == 9).all()
    assert {"value", "patch_row", "token"} <= set(result.judgements)


def test_the_order_of_rows_and_other_cases_change_nothing():
    other = CHOSEN.assign(group="text_only")
    both = pd.concat([CHOSEN, CHOSEN.assign(layer=1), other])
    alone = match_rate(other, WORDS, JUDGE, THREE).rates
    among = match_rate(both.sample(frac=1), WORDS, JUDGE, THREE).rates
    assert len(among) == 3
    same = among[among.group == "text_only"].reset_index(drop=True)
    pd.testing.assert_frame_equal(same, alone)


def test_each_question_once_and_as_few_as_asked_for():
    twelve = [Example(None, caption=f"w{i} x") for i in range(12)]
    words = Words(*(f"w{i}" for i in range(12)), "x")
    features = [(i, 12) for i in range(12)]
    chosen = pd.concat([table(features), table(features, layer=3)])
    free = Counted(in_caption)
    whole = match_rate(chosen, words, free, twelve)
    (asked,) = free.asked
    assert len(asked) == len(set(asked)) == 12 * 13  # every word on every picture
    assert whole.rates["rate_chance"].tolist() == [0.5, 0.5]
    for free, given, least in ((True, 2, 3), (False, None, 5), (False, 12, 12)):
        judge = Counted(in_caption, free=free)
        result = match_rate(chosen, words, judge, twelve, chance_pairs=given)
        (asked,) = judge.asked
        sizes = result.judgements.groupby("block")["image"].nunique()
        assert sizes.min() >= least and sizes.sum() == 12
        # In a block of n, each picture is asked about n words of its own and "x".
        assert len(asked) == len(set(asked)) == sum(n * (n + 1) for n in sizes)
        assert result.rates["rate_chance"].tolist() == [0.5, 0.5]
        again = Counted(in_caption, free=free)
        match_rate(chosen, words, again, twelve, chance_pairs=given)
        assert again.asked == judge.asked


def test_many_questions_are_put_in_parts(monkeypatch):
    judge = Counted(in_caption)
    monkeypatch.setattr("vlm_probe.analysis.match._AT_ONCE", 4)
    result = match_rate(CHOSEN, WORDS, judge, THREE)
    assert [len(part) for part in judge.asked] == [4, 4, 4, 3]
    whole = match_rate(CHOSEN, WORDS, JUDGE, THREE)
    pd.testing.assert_frame_equal(result.rates, whole.rates)


def test_pictures_of_one_name_are_kept_apart():
    alike = [Example(None, caption=e.caption, id="cat.png") for e in THREE]
    result = match_rate(CHOSEN.assign(id="cat.png"), WORDS, JUDGE, alike)
    whole = match_rate(CHOSEN, WORDS, JUDGE, THREE)
    pd.testing.assert_frame_equal(result.rates, whole.rates)


def test_what_it_takes_is_shown_before_it_starts(capsys):
    class Paid(Counted):
        def estimate(self, examples, questions):
            assert len(questions) == 15 and not self.asked
            return Estimate(15, 3, 3, 4, 1000, 50, cost=1.5)

    judge = Paid(in_caption, free=False)
    match_rate(CHOSEN, WORDS, judge, THREE)
    assert capsys.readouterr().err == (
        "15 questions, 3 answered already; 4 requests with 3 pictures, about 1000 "
        "tokens sent and 50 back; cost: about 1.50\n"
    )

    def too_dear(estimate):
        raise KeyboardInterrupt

    judge = Paid(in_caption, free=False)
    with pytest.raises(KeyboardInterrupt):
        match_rate(CHOSEN, WORDS, judge, THREE, before=too_dear)
    assert not judge.asked
    match_rate(CHOSEN, WORDS, JUDGE, THREE)
    assert capsys.readouterr().err == ""


def test_what_is_saved_is_loaded_and_gives_the_rates_again(tmp_path):
    result = match_rate(CHOSEN, WORDS, JUDGE, THREE, ties="random", seed=4)
    loaded = MatchResult.load(str(result.save(tmp_path / "deep" / "match")))
    for name in ("rates", "judgements", "answers"):
        pd.testing.assert_frame_equal(
            getattr(loaded, name), getattr(result, name), check_exact=True
        )
    assert loaded.meta == json.loads(json.dumps(result.meta))
    settings = dict(loaded.meta["settings"])
    assert (settings.pop("k"), settings.pop("chance_pairs")) == (3, None)
    again = rates(loaded.judgements, loaded.answers, Counting(**settings))
    pd.testing.assert_frame_equal(again, result.rates)
    with pytest.raises(ValueError, match="were not judged with some descriptions"):
        rates(loaded.judgements, loaded.answers[1:], Counting())
    (tmp_path / "deep" / "match" / "answers.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"answers\.parquet missing; expected"):
        MatchResult.load(tmp_path / "deep" / "match")


@pytest.mark.parametrize(
    ("chosen", "examples", "words"),
    [
        (CHOSEN, THREE[::-1][:2], "the table has image 2, '2', but only 2 examples"),
        (
            CHOSEN.assign(id="cat.png"),
            THREE,
            "image 0 is 'cat.png' in the table, but example 0 is '0'; give the",
        ),
        (
            CHOSEN.assign(id=[*"01", *"1122"]),
            THREE,
            "image 0 has two ids in the table, '0' and '1'",
        ),
        (CHOSEN.drop(columns=["rank", "id"]), THREE, "features lacks id, rank; give"),
        (CHOSEN[:0], THREE, "no feature was chosen"),
        (
            CHOSEN.assign(by=["activation", "selectivity"] * 3),
            THREE,
            "mixes features chosen by activation and selectivity; give those of one",
        ),
        (
            CHOSEN.assign(feature=7),
            THREE,
            "feature 7 of layer 0 stands twice for the picture '0' (image, model)",
        ),
    ],
)
def test_a_wrong_table_is_refused(chosen, examples, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        match_rate(chosen, WORDS, JUDGE, examples)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"k": 0}, "k must be at least 1, given 0"),
        ({"chance_pairs": 0}, "chance_pairs must be at least 1, given 0"),
        ({"permutations": 0}, "permutations must be at least 1, given 0"),
        ({"replicates": 1}, "replicates must be at least 2, given 1"),
        ({"level": 1.0}, "level is between 0 and 1, given 1.0"),
        ({"ties": "none"}, "unknown ties 'none'; valid: conservative, random"),
    ],
)
def test_wrong_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        match_rate(CHOSEN, WORDS, JUDGE, THREE, **settings)


def test_a_judge_that_leaves_answers_out_is_refused():
    class Short(TruthJudge):
        def ask(self, examples, questions):
            return [True]

    with pytest.raises(ValueError, match="truth gave 1 answers to 15 questions"):
        match_rate(CHOSEN, WORDS, Short(in_caption), THREE)


def test_questions_can_be_had_without_asking():
    planned = plan(CHOSEN, WORDS, THREE, chance_pairs=1)
    questions = planned.questions()
    assert len(questions) == len(planned.pairs) == 15  # three cannot make two blocks
    assert {q.image for q in questions} == set(planned.examples) == {"0", "1", "2"}
