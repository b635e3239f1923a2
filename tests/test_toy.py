"""The toy world is what it says, and the toy model still reaches what was measured."""

import json

import numpy as np
import pytest
import torch

from vlm_probe.examples import data_folder
from vlm_probe.toy.examples import TrainingExamples, toy_examples
from vlm_probe.toy.saes import text_activations
from vlm_probe.toy.texts import KINDS, ask, caption, document, make_tokenizer
from vlm_probe.toy.vision import patch_owner, twin
from vlm_probe.toy.world import COLORS, COLUMNS, ROWS, SIDE, draw_scene, render
from vlm_probe.training.evaluate import evaluate_adapter
from vlm_probe.training.evaluation import ARMS


def test_masks_show_the_color_they_say():
    rng = np.random.default_rng(1)
    for _ in range(30):
        scene = draw_scene(rng)
        picture, masks = render(scene, rng)
        pixels = np.asarray(picture, float)
        assert not (masks.sum(0) > 1).any()
        for thing, mask in zip(scene.things, masks, strict=True):
            shown = np.median(pixels[mask], axis=0)
            distance = {c: abs(shown - v).sum() for c, v in COLORS.items()}
            assert min(distance, key=distance.get) == thing.color
            y, x = np.argwhere(mask).mean(0) / SIDE * 3
            assert (ROWS[int(y)], COLUMNS[int(x)]) == (thing.row, thing.column)


def test_a_patch_belongs_to_what_covers_it():
    masks = np.zeros((2, 64, 64), bool)
    masks[0, 8:16, 0:8] = True  # all of the patch in row 1, column 0
    masks[1, 0:2, 8:12] = True  # 8 of 64 pixels of the patch in row 0, column 1
    masks[1, 63, 63] = True  # one pixel of the last patch: too few
    owner = patch_owner(masks).reshape(8, 8)
    assert owner[1, 0] == 0
    assert owner[0, 1] == 1
    assert (owner == -1).sum() == 62


def test_questions_have_the_answer_that_is_drawn():
    rng = np.random.default_rng(2)
    for _ in range(60):
        scene = draw_scene(rng, 2)
        things = {t.shape: t for t in scene.things}
        turn = ask(scene, "color", rng)
        assert things[turn.question.split()[-2]].color == turn.answer
        turn = ask(scene, "position", rng, by_color=False)
        thing = things[turn.question.split()[-2]]
        assert turn.answer == f"{thing.row} {thing.column}"
        turn = ask(scene, "relation", rng, by_color=False)
        words = turn.question.split()
        a, b = things[words[2]], things[words[-2]]
        across = COLUMNS.index(a.column) - COLUMNS.index(b.column)
        down = ROWS.index(a.row) - ROWS.index(b.row)
        truth = {
            "left": across < 0,
            "right": across > 0,
            "above": down < 0,
            "below": down > 0,
        }
        assert truth[turn.answer]
        turn = ask(scene, "existence", rng, by_color=False)
        assert (turn.answer == "yes") == (turn.question.split()[-2] in things)


def test_a_twin_differs_in_one_attribute():
    rng = np.random.default_rng(3)
    for _ in range(60):
        scene = draw_scene(rng)
        other = twin(scene, rng)
        changed = [
            (a, b) for a, b in zip(scene.things, other.things, strict=True) if a != b
        ]
        assert len(changed) + (scene.background != other.background) == 1
        cells = {(t.row, t.column) for t in other.things}
        assert len(cells) == len(other.things)


def test_every_word_is_in_the_vocabulary():
    tokenizer = make_tokenizer()
    rng = np.random.default_rng(4)
    words = {w for _ in range(300) for text, _ in document(rng) for w in text.split()}
    words |= set(caption(draw_scene(rng), rng).split())
    assert tokenizer.unk_token_id not in tokenizer.convert_tokens_to_ids(sorted(words))


def test_examples_are_the_same_each_time_and_never_trained_on():
    one, again = toy_examples(9), toy_examples(9)
    assert [e.kind for e in one] == list(KINDS)
    for a, b in zip(one, again, strict=True):
        assert (a.prompt, a.answer, a.caption) == (b.prompt, b.answer, b.caption)
        assert a.image.tobytes() == b.image.tobytes()
    other = toy_examples(9, seed=1)
    trained = [TrainingExamples(s, 1)[0] for s in ("captions", "answers")]
    seen = {e.image.tobytes() for e in [*other, *trained]}
    assert not seen & {e.image.tobytes() for e in one}


def test_an_unknown_kind_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="no kind of question 'smell': one of backg"):
        ask(draw_scene(rng), "smell", rng)


TOLERANCE = 0.063
"""Three standard errors of 504 answers, of which 0.67 are right: so near must be what
other pictures give, and an adapter that is trained again."""


def test_it_answers_by_what_it_sees(toy):
    """On other pictures than those behind the stated figures."""
    stated = json.loads((data_folder() / "toy" / "figures.json").read_text())["adapter"]
    found = evaluate_adapter(
        toy.vision, toy.adapter, toy.language, toy_examples(504, seed=1)
    )
    answers, by_kind = stated["answers"], found.by_kind()
    assert answers["all"]["true_image"] >= 0.65
    assert answers["all"]["shuffled_image"] <= 0.35
    for arm in ARMS:
        assert abs(by_kind[arm]["all"] - answers["all"][arm]) < TOLERANCE, arm
    for kind in ("background", "color", "size"):
        there = answers[kind]  # of 224 pictures each
        assert there["true_image"] > there["shuffled_image"] + 0.2, kind
        # 56 pictures here: the difference has a standard error of up to 0.09.
        assert by_kind.true_image[kind] > by_kind.shuffled_image[kind], kind
    nats = found.summary().set_index("arm").caption_cross_entropy
    for arm, value in stated["caption_cross_entropy"].items():
        assert abs(nats[arm] - value) < 0.1, arm


def test_saes_reconstruct_held_out_text(toy):
    texts = text_activations(toy.language, 100, [7, 7])
    for layer, x in enumerate(texts):
        x = x.float()
        codes, x_hat = toy.saes[layer].code(x)
        fvu = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
        assert fvu < 0.15
        assert 10 < codes.l0().double().mean() < 40


def test_the_shipped_weights_are_small(toy):
    size = sum(f.stat().st_size for f in (data_folder() / "toy").rglob("*"))
    assert size < 15_000_000
    assert sorted(toy.saes) == list(range(toy.language.n_layers))
    assert all(p.dtype == torch.float32 for p in toy.language.hooked.parameters())
