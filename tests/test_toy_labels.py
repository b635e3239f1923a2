"""What the toy's features mean: by hand, where nothing is to be found, as shipped."""

import numpy as np
import pytest
import torch

from vlm_probe.analysis.judges import Question, TruthJudge
from vlm_probe.codes import SparseCodes
from vlm_probe.examples import Example
from vlm_probe.toy.examples import examples_named, toy_examples
from vlm_probe.toy.labels import (
    Label,
    LayerLabels,
    Sums,
    add_up,
    choose,
    measure_labels,
    read_labels,
    toy_labels,
    write_labels,
)
from vlm_probe.toy.texts import document
from vlm_probe.toy.truth import CONCEPTS, READINGS, at_tokens, describes, talked_about
from vlm_probe.toy.world import Scene, Thing, draw_scene

RED = Thing("red", "circle", "small", "top", "left")
BLUE = Thing("blue", "bar", "large", "middle", "right")
SCENE = Scene((RED, BLUE), "grass")


def said(text):
    """The color of what each word is about, or a dash."""
    about = talked_about(text.split(), SCENE)
    return " ".join("-" if thing is None else thing.color for thing in about)


@pytest.mark.parametrize(
    ("text", "about"),
    [
        ("a red circle and a large bar .", "red red red blue blue blue blue blue"),
        # The place comes first, and says already whose it is.
        ("at the middle right a large bar .", "blue " * 8),
        # Left alone is no place of an object.
        ("is the red thing left ?", "red " * 6),
        # A question is one sentence with its answer, and the next is another.
        (
            "what color is the bar ? <assistant> blue <end> how many ?",
            "blue " * 9 + "- - -",
        ),
        ("background : grass . circle", "- - - - red"),
        # Something that is not there.
        ("is there a green thing ? <assistant> no <end>", "- " * 9),
    ],
)
def test_what_a_word_is_about(text, about):
    assert said(text) == about.strip()


def test_what_is_there_at_a_word():
    words = ["a", "small", "red", "circle", "on", "grass", "."]
    word, context = at_tokens(words, SCENE)
    there = [{CONCEPTS[i] for i in np.flatnonzero(row)} for row in word]
    assert there == [set(), {"small"}, {"red"}, {"circle"}, set(), {"grass"}, set()]
    about = {CONCEPTS[i] for i in np.flatnonzero(context[0])}
    assert about == {"red", "circle", "small", "top", "left", "grass", "two"}


def test_every_scene_is_what_its_document_says():
    """Sizes name no object, and are of the one that is talked about."""
    n_sizes = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        scene = draw_scene(np.random.default_rng(seed + 100))
        pieces = [text for text, _ in document(rng, scene)]
        for text in pieces:
            if text.startswith(("tags", "<user>", "small", "large")):
                continue  # tags may end with the size; answers stand alone
            words = text.split()
            for word, thing in zip(words, talked_about(words, scene), strict=True):
                if word in ("small", "large"):
                    n_sizes += 1
                    assert thing is not None
                    assert thing.size == word
    assert n_sizes > 100


def test_a_document_of_a_drawn_scene_is_as_before():
    again = np.random.default_rng(3)
    assert document(np.random.default_rng(3)) == document(again, draw_scene(again))


@pytest.mark.parametrize(
    ("description", "true"),
    [
        ("red", True),
        ("green", False),
        ("small red circle", True),
        ("large red", False),  # each is true, of another object
        ("top left", True),
        ("top right", False),
        ("grass", True),
        ("two", True),
        ("one", False),
        ("above", True),
        ("red grass", True),
        ("", None),
        ("the word red", None),
        ("yes", None),
    ],
)
def test_what_is_true_of_a_picture(description, true):
    (example,) = toy_examples(1)
    object.__setattr__(example, "scene", SCENE)
    assert describes(example, description) is true
    judge = TruthJudge(describes)
    assert judge.ask({"a": example}, [Question("a", description)]) == [true]


def test_nothing_is_known_of_other_pictures():
    with pytest.raises(TypeError, match=r"'cat.png': it is of type Example; expect"):
        describes(Example(None, id="cat.png"), "red")


CASES = len(READINGS) * len(CONCEPTS)


def test_a_score_by_hand():
    """3 of 4 of its activation lies where red is, which is at 1 of 4 tokens."""
    sums = Sums.none(2)
    truth = np.zeros((8, CASES), bool)
    truth[[0, 4], 0] = True
    codes = SparseCodes(
        torch.tensor([0, 1, 4]),
        torch.tensor([0, 0, 0]),
        torch.tensor([3.0, 1.0, 5.0]),
        8,
        2,
    )
    sums.add(codes, truth, np.array([0, 0, 0, 0, 1, 1, 1, 1]))
    choosing, measuring = sums.scores(0), sums.scores(1)
    assert choosing[0, 0] == pytest.approx((3 / 4 - 1 / 4) / (3 / 4))
    assert measuring[0, 0] == 1
    assert (choosing[1] == -1).all()  # silent
    assert (choosing[:, 1:] == -1).all()  # never there
    assert sums.fired.tolist() == [[2, 0], [1, 0]]


def test_where_nothing_is_to_be_found_the_held_out_score_is_none():
    """The best of many is above zero where it is chosen, not where it is measured."""
    rng = np.random.default_rng(0)
    n, width = 4000, 200
    truth = rng.random((n, CASES)) < rng.uniform(0.05, 0.5, CASES)
    token, feature = np.nonzero(rng.random((n, width)) < 0.05)
    sums = Sums.none(width)
    sums.add(
        SparseCodes(
            torch.from_numpy(token),
            torch.from_numpy(feature),
            torch.from_numpy(rng.random(len(token)).astype(np.float32)),
            n,
            width,
        ),
        truth,
        np.arange(n) % 2,
    )
    labels = choose(sums, 0.0).values()
    assert len(labels) > 100
    assert np.mean([label.chosen for label in labels]) > 0.1
    scores = [label.score for label in labels]
    assert abs(np.mean(scores)) < 3 * np.std(scores) / len(scores) ** 0.5
    assert not choose(sums, 0.5)


def test_few_firings_make_no_label():
    sums = Sums.none(1)
    sums.value[:, 0, 0] = sums.total[:, 0] = 1.0
    sums.there[:, 0], sums.seen[:] = 10, 100
    sums.fired[:] = [[50], [1]]
    assert choose(sums, 0.5) == {0: Label(CONCEPTS[0], "word", 1.0, 1.0)}
    sums.fired[0] = 49
    assert choose(sums, 0.5) == {}


def test_labels_come_back_as_they_were(tmp_path):
    labels = {
        0: LayerLabels("ab", 8, 5, {3: Label("red", "word", 0.9, 0.8)}),
        1: LayerLabels("cd", 8, 0, {}),
    }
    write_labels(labels, tmp_path / "labels.json")
    assert read_labels(tmp_path / "labels.json") == labels


def test_shipped_labels_are_what_is_measured(toy):
    """On other texts they score what they are said to."""
    shipped = toy_labels()
    assert set(shipped) == set(toy.saes)
    sums = add_up(toy.language, {0: toy.saes[0]}, 48, 1)[0]
    scores = sums.scores(0)
    stated, found = [], []
    for feature, label in shipped[0].labels.items():
        if sums.fired[0, feature] >= 20:
            case = READINGS.index(label.reading) * len(CONCEPTS)
            found.append(scores[feature, case + CONCEPTS.index(label.concept)])
            stated.append(label.score)
    assert len(found) > 20
    assert abs(np.mean(found) - np.mean(stated)) < 0.06
    assert np.mean(stated) > 0.6


def test_labels_are_of_the_weights_they_were_measured_on(toy):
    found = measure_labels(toy.language, {0: toy.saes[0]}, documents=2, bound=0.9)[0]
    assert (
        found.sae == toy_labels()[0].sae == toy.identities()["sae of layer 0"]["sha256"]
    )
    assert found.width == 1024
    assert found.labels == {}  # two texts are too few


@pytest.mark.parametrize("kinds", [("relation",), ("color", "relation")])
def test_examples_are_made_again_from_their_ids(kinds):
    for examples in (toy_examples(11, seed=2), toy_examples(4, seed=5, kinds=kinds)):
        again = examples_named([example.id for example in examples])
        for a, b in zip(examples, again, strict=True):
            assert (a.id, a.scene, a.prompt, a.caption) == (
                b.id,
                b.scene,
                b.prompt,
                b.caption,
            )
            assert np.array_equal(a.picture(), b.picture())


def test_another_id_is_refused():
    with pytest.raises(ValueError, match=r"'cat.png' is no id of a toy picture; expec"):
        examples_named(["toy-0-1", "cat.png"])
    with pytest.raises(ValueError, match="unknown kind of question 'smell'"):
        toy_examples(1, kinds=("smell",))
