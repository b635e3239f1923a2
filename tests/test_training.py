"""The adapter learns through frozen parts, and they stay as they were."""

from dataclasses import replace
from itertools import islice

import pytest
import torch
from tiny import tiny_language, tiny_vision

from vlm_probe.toy.examples import toy_examples, training_examples
from vlm_probe.training.adapter import AdapterTraining, _Whitened, train_adapter
from vlm_probe.training.evaluate import evaluate_adapter

SHORT = AdapterTraining(steps=30, batch_size=4, calibration=8)


def one_answer(n):
    """The same short answer to every picture: learnable by a bias alone."""
    for example in islice(training_examples("answers"), n):
        yield replace(example, prompt="what color ?", answer="red", turns=())


def test_it_learns_and_nothing_else_changes(toy):
    before = toy.identities()
    settings = replace(SHORT, steps=24, learning_rate=3e-2)
    untrained, trained = (
        train_adapter(
            toy.vision,
            toy.language,
            [(one_answer(100), replace(settings, steps=steps))],
            manifest={"of": "me"},
        )
        for steps in (0, settings.steps)
    )
    assert toy.identities() == before
    asked = [replace(e, prompt="what color ?", answer="red") for e in toy_examples(12)]
    right = [
        evaluate_adapter(toy.vision, adapter, toy.language, asked).true_right.mean()
        for adapter in (untrained, trained)
    ]
    assert right[0] < 0.5
    assert right[1] > right[0] + 0.5
    assert trained.manifest["of"] == "me"
    assert trained.manifest["stages"][0]["steps"] == 24
    assert not any(p.requires_grad for p in trained.parameters())


def test_the_folded_map_is_the_one_that_was_learned():
    vision, language = tiny_vision(), tiny_language()
    examples = toy_examples(10)
    learned = _Whitened(vision, language, examples, seed=0)
    patches = vision.encode([e.picture() for e in examples])
    with torch.no_grad():
        expected = learned(patches)
    torch.testing.assert_close(
        learned.folded({})(patches), expected, rtol=1e-3, atol=1e-3
    )
    norm = language.hooked.W_E.norm(dim=1).mean()
    mean_square = expected.square().sum(-1).mean().sqrt()
    assert mean_square <= 1.01 * norm  # less where a direction hardly varies


def test_what_cannot_be_trained_on_is_named():
    vision, language = tiny_vision(), tiny_language()
    with pytest.raises(ValueError, match="no stage of training given"):
        train_adapter(vision, language, [])
    with pytest.raises(ValueError, match="stage 1 ran out of examples at step 2 of 30"):
        train_adapter(vision, language, [(one_answer(9), SHORT)])
    mute = [replace(e, answer=None, id="mute") for e in toy_examples(8)]
    with pytest.raises(ValueError, match="example 'mute' has no answer"):
        train_adapter(vision, language, [(mute, SHORT)])
