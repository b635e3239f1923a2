"""The loss: that of Hugging Face with masked labels, and its terms by hand."""

from dataclasses import replace

import hub
import pytest
import torch
from tiny import D_MODEL, tiny_language, tiny_sae

from vlm_probe.examples import Example
from vlm_probe.language import LanguageModel
from vlm_probe.training.objective import lesson, loss, surprise

PATCHES = 5
TALKS = [
    Example("a.png", "what color is it?", "a large red circle", id="a"),
    Example(
        "b.png",
        "look",
        "the dog",
        id="b",
        turns=(("and the fox?", "the quick brown fox jumps"), ("why", "lazy")),
    ),
    Example(None, "describe the dog", "the lazy dog jumps over grass", id="text"),
]
# How each family's template opens and ends what the assistant says.
SPOKEN = {
    "gemma2": ("<start_of_turn>model\n", "<end_of_turn>\n"),
    "llama": ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
}


@pytest.fixture(scope="module", params=SPOKEN)
def family(request, tmp_path_factory):
    """A family, Hugging Face's model, and ours of the same files."""
    folder = tmp_path_factory.mktemp("hub") / request.param
    hf = hub.write_language(folder, request.param)
    return request.param, hf, LanguageModel.load(folder)


def labels(language, prompt, opened, ended):
    """Ids of what the assistant says, -100 elsewhere: found in the text, not by us."""
    tokenizer = language.tokenizer
    open_ids, end_ids = (
        tokenizer(mark, add_special_tokens=False).input_ids for mark in (opened, ended)
    )
    ids, found, inside, at = list(prompt.ids), [-100] * len(prompt.ids), False, 0
    while at < len(ids):
        if not inside and ids[at : at + len(open_ids)] == open_ids:
            inside, at = True, at + len(open_ids)
        elif inside and ids[at : at + len(end_ids)] == end_ids:
            found[at : at + len(end_ids)] = end_ids
            inside, at = False, at + len(end_ids)
        else:
            found[at] = ids[at] if inside else -100
            at += 1
    return found


def lessons_of(language, talks=TALKS, **changes):
    room = {"n_patches": PATCHES, "max_length": 128} | changes
    return [lesson(language.chat, talk, **room) for talk in talks]


def test_it_is_hugging_faces_loss_with_masked_labels(family):
    """Of a whole batch: pictures, several turns, a row of text alone, padding."""
    name, hf, language = family
    lessons = lessons_of(language)
    vectors = torch.randn(2, PATCHES, 32)
    with torch.no_grad():
        found = loss(language, lessons, vectors)
    length = max(len(lesson.prompt.ids) for lesson in lessons)
    inputs = torch.zeros(3, length, 32)
    mask = torch.zeros(3, length, dtype=torch.long)
    said = torch.full((3, length), -100)
    for row, taught in enumerate(lessons):
        ids = taught.prompt.ids
        inputs[row, : len(ids)] = hf.get_input_embeddings()(torch.tensor(ids)).detach()
        if taught.prompt.image:
            inputs[row, list(taught.prompt.image)] = vectors[row]
        mask[row, : len(ids)] = 1
        said[row, : len(ids)] = torch.tensor(
            labels(language, taught.prompt, *SPOKEN[name])
        )
    with torch.no_grad():
        expected = hf(inputs_embeds=inputs, attention_mask=mask, labels=said).loss
    n_tokens = sum(len(lesson.said) for lesson in lessons)
    assert n_tokens == int((said != -100).sum())
    assert abs(float(found.cross_entropy) / n_tokens - float(expected)) < 1e-5
    assert float(expected) > 1


def test_the_soft_cap_is_in_it(family):
    name, hf, language = family
    if name != "gemma2":
        pytest.skip("only Gemma-2 has one")
    lessons = lessons_of(language)
    vectors = torch.randn(2, PATCHES, 32)
    with torch.no_grad():
        nats, _ = surprise(language, lessons, vectors)
        language.hooked.cfg.output_logits_soft_cap = -1.0
        try:
            uncapped, _ = surprise(language, lessons, vectors)
        finally:
            language.hooked.cfg.output_logits_soft_cap = (
                hf.config.final_logit_softcapping
            )
    assert (nats - uncapped).abs().max() > 1e-3


@pytest.fixture(scope="module")
def small():
    return tiny_language()


TOY = Example(
    "a.png", "what color ?", "red", turns=(("where ?", "top left of the picture"),)
)


def test_turns_count_alike_if_asked(small):
    """By hand: means of 2 and of 6 tokens, end of turn included."""
    (taught,) = lessons_of(small, [TOY])
    assert taught.turn == (0,) * 2 + (1,) * 6
    vectors = torch.randn(1, PATCHES, D_MODEL)
    with torch.no_grad():
        nats, rows = surprise(small, [taught], vectors)
        by_turns = loss(small, [taught], vectors, average="turns")
        by_tokens = loss(small, [taught], vectors)
    assert rows.tolist() == [0] * 8
    assert sum(taught.weights("turns")) == pytest.approx(2)
    expected = float(nats[:2].mean() + nats[2:].mean())
    assert float(by_turns.cross_entropy) == pytest.approx(expected, rel=1e-6)
    assert float(by_tokens.cross_entropy) == pytest.approx(float(nats.sum()), rel=1e-6)


def test_parts_of_a_batch_add_up_to_its_loss(small):
    lessons = lessons_of(small, [TOY, replace(TOY, turns=()), TOY])
    vectors = torch.randn(3, PATCHES, D_MODEL)
    with torch.no_grad():
        whole = loss(small, lessons, vectors, average="turns")
        parts = [
            loss(small, lessons[s], vectors[s], average="turns")
            for s in (slice(0, 1), slice(1, 3))
        ]
    total = sum(float(part.cross_entropy) for part in parts)
    assert float(whole.cross_entropy) == pytest.approx(total, rel=1e-5)


def test_the_penalty_is_the_fvu_at_image_positions(small):
    lessons = lessons_of(small, [TOY, replace(TOY, image=None), TOY])
    vectors = torch.randn(2, PATCHES, D_MODEL, requires_grad=True)
    saes = {1: tiny_sae(1), 2: tiny_sae(2)}
    asked = {"saes": saes, "layers": [1, 2]}
    found = loss(small, lessons, vectors, penalized=True, **asked)
    seen = {}
    pictured = [lessons[0].prompt, lessons[2].prompt]
    small.read(
        pictured,
        vectors.detach(),
        [1, 2],
        lambda n, x: seen.update({n: x[:, list(pictured[0].image)].flatten(0, 1)}),
    )
    by_hand = []
    for layer, x in seen.items():
        x_hat = saes[layer].sae(x)
        spread = (x - x.mean(0)).square().sum()
        by_hand.append(float((x - x_hat).square().sum() / spread))
    # Two pictures: a mean that adds up with those of other batches.
    assert float(found.fvu.detach()) / 2 == pytest.approx(sum(by_hand) / 2, rel=1e-4)
    # It pulls on the vectors if it is asked to, and only then.
    (pull,) = torch.autograd.grad(found.fvu, vectors, retain_graph=True)
    step = 1e-2 * pull / pull.norm()
    with torch.no_grad():
        up, down = (
            loss(small, lessons, vectors + sign * step, **asked).fvu for sign in (1, -1)
        )
    assert float(up - down) == pytest.approx(2e-2 * float(pull.norm()), rel=0.05)
    plain = loss(small, lessons, vectors, **asked)
    assert not plain.fvu.requires_grad
    assert float(plain.fvu) == pytest.approx(float(found.fvu.detach()))
    assert loss(small, lessons[1:2], None, **asked).fvu is None


def test_what_is_too_long_is_cut_off(small):
    (whole,) = lessons_of(small, [TOY])
    n = len(whole.prompt.ids)
    (cut,) = lessons_of(small, [TOY], max_length=n - 2)
    assert cut.prompt.ids == whole.prompt.ids[:-2]
    assert cut.said == whole.said[:-2]
    vectors = torch.randn(1, PATCHES, D_MODEL)
    with torch.no_grad():
        nats, _ = surprise(small, [whole], vectors)
        fewer, _ = surprise(small, [cut], vectors)
    torch.testing.assert_close(fewer, nats[:-2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("example", "max_length", "words"),
    [
        (replace(TOY, answer=None), 99, "has no turn of the assistant, so there is"),
        (replace(TOY, turns=(("why", " "),)), 99, "the assistant says nothing in tur"),
        (TOY, 11, "the assistant's first word is token 12, beyond max_length 11; rai"),
        (TOY, 4, "beyond max_length 4"),
    ],
)
def test_nothing_to_learn_from(small, example, max_length, words):
    with pytest.raises(ValueError, match=words):
        lessons_of(small, [example], max_length=max_length)
