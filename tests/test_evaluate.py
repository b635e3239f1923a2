"""What an adapter is worth: by hand, and beside a picture that is another's."""

import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from learning import LANGUAGE, VISION, examples, train
from tiny import D_MODEL, D_VISION

from vlm_probe.adapter import LinearAdapter
from vlm_probe.training.evaluate import evaluate_adapter
from vlm_probe.training.evaluation import ARMS, AdapterEvaluation
from vlm_probe.training.objective import lesson, surprise
from vlm_probe.training.settings import Stage


def evaluated(adapter, pictures, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of what it is not worth
        return evaluate_adapter(VISION, adapter, LANGUAGE, pictures, **more)


@pytest.fixture(scope="module")
def trained():
    stage = Stage(epochs=12.0, batch_size=6, learning_rate=2e-2)
    return train(stages=[(examples(48), stage)]).adapter


def by_hand(right, captions):
    """An evaluation with ten rows."""
    table = pd.DataFrame({"id": list("abcdefghij"), "kind": "", "answer": "red"})
    for arm in ARMS:
        table[arm] = "red"
        table[f"{arm}_right"] = right[arm]
        table[f"{arm}_caption"] = captions[arm]
    return AdapterEvaluation(table, pd.DataFrame(columns=["id", "error"]))


def test_the_summary_by_hand():
    eight, two = [True] * 8 + [False] * 2, [True] * 2 + [False] * 8
    nats = np.arange(10.0)
    found = by_hand(
        {"true_image": eight, "shuffled_image": two, "no_image": two},
        {"true_image": nats, "shuffled_image": nats + 1.0, "no_image": [None] * 10},
    )
    rows = found.summary().set_index("arm")
    true = rows.loc["true_image"]
    assert (true.n_answers, true.accuracy) == (10, 0.8)
    # Wilson's interval for 8 of 10, as tables have it.
    assert true.accuracy_low == pytest.approx(0.4902, abs=1e-4)
    assert true.accuracy_high == pytest.approx(0.9433, abs=1e-4)
    assert true.caption_cross_entropy == 4.5
    half = 2.2622 * nats.std(ddof=1) / np.sqrt(10)
    assert true.caption_cross_entropy_high == pytest.approx(4.5 + half, abs=1e-3)
    assert rows.loc["no_image"].n_captions == 0
    assert np.isnan(rows.loc["no_image"].caption_cross_entropy)
    # Six won and none lost: one in 2^6; ten gains of ten: one in 2^10.
    assert found.p_values() == pytest.approx({"answers": 2**-6, "captions": 2**-10})
    assert found.verdict == (
        "the adapter beats the shuffled image in answers (p = 0.016) and beats the "
        "shuffled image in captions (p = 0.00098)"
    )


def test_no_difference_is_no_advantage():
    half = [True, False] * 5
    found = by_hand(dict.fromkeys(ARMS, half), dict.fromkeys(ARMS, np.ones(10)))
    assert found.p_values() == {"answers": 1.0, "captions": 1.0}
    assert "does not beat the shuffled image in answers (p = 1)" in found.verdict


def test_a_trained_adapter_beats_the_shuffled_image(trained):
    found = evaluate_adapter(VISION, trained, LANGUAGE, examples(24), batch_size=5)
    rows = found.summary().set_index("arm")
    assert rows.accuracy["true_image"] > rows.accuracy["shuffled_image"] + 0.3
    assert found.by_kind().loc["all", "true_image"] == rows.accuracy["true_image"]
    assert max(found.p_values().values()) < 0.05
    assert found.failures.empty


def test_an_untrained_one_does_not_and_says_so():
    torch.manual_seed(0)
    untrained = LinearAdapter(D_VISION, D_MODEL).requires_grad_(False)
    with pytest.warns(UserWarning, match="does not beat the shuffled image in answers"):
        evaluate_adapter(VISION, untrained, LANGUAGE, examples(12))


def test_each_arm_is_what_its_name_says(trained):
    """Said and scored again, one example at a time."""
    pictures = examples(7)
    found = evaluated(trained, pictures, batch_size=3).examples
    vectors = trained(VISION.encode([e.picture() for e in pictures]))
    chat = LANGUAGE.chat
    for i, example in enumerate(pictures):
        arms = dict(zip(ARMS, (vectors[i], vectors[i - 1], None), strict=True))
        for arm, put in arms.items():
            put = None if put is None else put[None]
            n_patches = 0 if put is None else put.shape[1]
            prompt = chat.image_prompt(example.prompt, n_patches)
            (said,) = LANGUAGE.generate([prompt], put, max_new_tokens=3)
            assert found[arm][i] == said.strip(" ."), (i, arm)
            assert found[f"{arm}_right"][i] == (said.strip() == example.answer)
            caption = replace(example, prompt=None, answer=example.caption, turns=())
            with torch.no_grad():
                nats, _ = surprise(
                    LANGUAGE, [lesson(chat, caption, n_patches, 96)], put
                )
            assert found[f"{arm}_caption"][i] == pytest.approx(
                float(nats.mean()), rel=1e-4
            )
    assert found.id.tolist() == [e.id for e in pictures]


def test_its_vectors_enter_where_it_says(trained):
    later = LinearAdapter(D_VISION, D_MODEL, manifest={"inject_layer": 2})
    later.load_state_dict(trained.state_dict())
    later.requires_grad_(False)
    here, there = (
        evaluated(a, examples(6)).examples.true_image_caption for a in (trained, later)
    )
    assert (here - there).abs().min() > 1e-3
    none = [
        evaluated(a, examples(6)).examples.no_image_caption for a in (trained, later)
    ]
    assert none[0].tolist() == none[1].tolist()


def test_captions_alone_answers_alone_and_what_cannot_be_used(trained):
    pictures = examples(8, broken=(2,))
    pictures[1] = replace(pictures[1], answer=None, prompt=None)
    pictures[3] = replace(pictures[3], caption=None)
    pictures[4] = replace(pictures[4], caption=None, answer=None)
    pictures[5] = replace(pictures[5], image=None)
    found = evaluated(trained, pictures)
    assert found.examples.id.tolist() == ["e0", "e1", "e3", "e6", "e7"]
    failed = found.failures.set_index("id").error
    assert failed.index.tolist() == ["e2", "e4", "e5"]
    assert "nowhere.png" in failed["e2"]
    assert "neither answer nor caption" in failed["e4"]
    rows = found.summary().set_index("arm")
    assert rows.n_answers.tolist() == rows.n_captions.tolist() == [4, 4, 4]
    with pytest.raises(
        ValueError, match="1 of 2 examples can be used, expected at lea"
    ):
        evaluated(trained, pictures[1:3])


def test_rows_of_one_picture_are_shuffled_with_another(trained):
    """Four questions to each picture in a row, as conversation files have them."""
    pictures = [
        replace(example, id=f"{example.id}-{n}")
        for example in examples(6)
        for n in range(4)
    ]
    found = evaluated(trained, pictures, batch_size=5).examples
    alone = evaluated(trained, examples(6)).examples
    for arm in ARMS:
        assert found[arm].tolist() == [a for a in alone[arm] for _ in range(4)], arm
    with pytest.raises(ValueError, match="show the same picture; give others, for wha"):
        evaluated(trained, pictures[:4])


def test_one_long_prompt_ends_nothing(trained):
    pictures = examples(6)
    pictures[2] = replace(pictures[2], prompt="what color ? " * 40)
    pictures[3] = replace(pictures[3], caption=" ")
    found = evaluated(trained, pictures)
    failed = found.failures.set_index("id").error
    assert "of the 96 that the language model is run with" in failed["e2"]
    assert "the assistant says nothing in turn 1" in failed["e3"]
    assert len(found.examples) == 4


def test_numbers_that_are_none_are_no_missing_captions():
    broken = LinearAdapter(D_VISION, D_MODEL).requires_grad_(False)
    broken.linear.bias.fill_(float("nan"))
    with pytest.raises(
        ValueError, match="cross-entropy of example 'e0' is nan; look a"
    ):
        evaluated(broken, examples(4))
