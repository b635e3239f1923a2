"""The pass: in everything equal to plain TransformerLens hooks."""

import re
from dataclasses import replace

import pytest
import torch
from tiny import D_MODEL, LAYERS, tiny_language

from vlm_probe.tokens import Prompt

PATCHES = 3
QUESTIONS = ("what color ?", "where is the red bar ? is it at the top left ?", "look")


def precise():
    """The tiny model in float64, so that what should be equal is equal to 1e-9."""
    language = tiny_language()
    language.hooked.double().cfg.dtype = torch.float64
    return language


@pytest.fixture(scope="module")
def language():
    return precise()


@pytest.fixture(scope="module")
def prompts(language):
    """Ragged, with a picture each."""
    return [language.chat.image_prompt(question, PATCHES) for question in QUESTIONS]


@pytest.fixture
def vectors():
    return torch.randn(len(QUESTIONS), PATCHES, D_MODEL, dtype=torch.float64) * 5


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def read(language, prompts, vectors, layers=range(LAYERS)):
    """Copies of what each layer's visitor is given."""
    seen = {}
    language.read(prompts, vectors, layers, lambda n, x: seen.update({n: x.clone()}))
    return seen


def plain(language, prompt, vectors):
    """One prompt through plain TransformerLens hooks: logits and residuals."""

    def put(embedded, hook):
        where = torch.arange(len(prompt.image)) + prompt.image.start
        return embedded.index_copy(1, where, vectors[None])

    hooks = [("hook_embed", put)] if prompt.image else []
    with language.hooked.hooks(fwd_hooks=hooks):
        logits, cache = language.hooked.run_with_cache(torch.tensor([prompt.ids]))
    return logits[0], [cache["resid_post", n][0] for n in range(LAYERS)]


def test_every_layer_equals_plain_hooks(language, prompts, vectors):
    seen = read(language, prompts, vectors)
    logits = language.logits(prompts, vectors)
    assert len({len(prompt.ids) for prompt in prompts}) == 3  # ragged indeed
    for row, prompt in enumerate(prompts):
        n = len(prompt.ids)
        expected, residuals = plain(language, prompt, vectors[row])
        assert_equal(logits[row, :n], expected)
        for layer in range(LAYERS):
            found = seen[layer][row, :n]
            assert_equal(found, residuals[layer])
    # The layers differ, and the vectors matter: the test could tell.
    assert (seen[0] - seen[2]).abs().max() > 1
    without = read(language, prompts, vectors * 0)
    assert (without[2] - seen[2]).abs().max() > 1


def test_a_batch_gives_what_each_prompt_gives_alone(language, prompts, vectors):
    together = read(language, prompts, vectors)
    logits = language.logits(prompts, vectors)
    for row, prompt in enumerate(prompts):
        alone = read(language, [prompt], vectors[[row]])
        n = len(prompt.ids)
        for layer in range(LAYERS):
            found = together[layer][row, :n]
            assert_equal(found, alone[layer][0])
        own = language.logits([prompt], vectors[[row]])[0]
        assert_equal(logits[row, :n], own)


def test_prompts_in_words_equal_plain_transformer_lens(language):
    told = [language.chat.text_prompt(q, "a red bar") for q in QUESTIONS]
    seen = read(language, told, None)
    for row, prompt in enumerate(told):
        _, residuals = plain(language, prompt, None)
        for layer in range(LAYERS):
            found = seen[layer][row, : len(prompt.ids)]
            assert_equal(found, residuals[layer])


def test_what_stands_in_the_pictures_place_is_never_looked_at(language, vectors):
    prompt = language.chat.image_prompt("what color ?", PATCHES)
    ids = list(prompt.ids)
    ids[1:4] = [language.tokenizer.pad_token_id, 70, language.tokenizer.eos_token_id]
    other = replace(prompt, ids=tuple(ids))
    longer = language.chat.image_prompt(
        "what color is the bar ?", PATCHES
    )  # pads the other
    one = read(language, [prompt, longer], vectors[:2])
    two = read(language, [other, longer], vectors[:2])
    for layer in range(LAYERS):
        assert torch.equal(one[layer], two[layer])


def test_nor_by_a_model_with_a_tokenizer_that_pads_on_the_left(language, vectors):
    # TransformerLens then takes leading padding for no token at all.
    ids, pad = (70, 70, 70, 3, 80, 10, 4), language.tokenizer.pad_token_id
    prompt = Prompt(ids, range(PATCHES), language.chat.special)
    _, expected = plain(language, prompt, vectors[0])
    other = precise()
    other.hooked.tokenizer = other.tokenizer
    other.tokenizer.padding_side = "left"
    padded = replace(prompt, ids=(pad,) * PATCHES + ids[PATCHES:])
    seen = read(other, [padded], vectors[:1])
    logits = other.logits([padded], vectors[:1])
    assert_equal(seen[2][0], expected[2])
    assert_equal(logits[0], plain(language, prompt, vectors[0])[0])


def test_nothing_after_the_last_layer_is_run(language, prompts, vectors):
    hooked, ran = language.hooked, []
    parts = {
        **{f"block {n}": block for n, block in enumerate(hooked.blocks)},
        "ln_final": hooked.ln_final,
        "unembed": hooked.unembed,
    }
    handles = [
        part.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        for name, part in parts.items()
    ]
    visited = []
    language.read(prompts, vectors, [1, 0, 1], lambda n, x: visited.append(n))
    assert visited == [0, 1]  # once each, in rising order
    assert ran == ["block 0", "block 1"]
    ran.clear()
    language.logits(prompts, vectors)
    assert ran == [*(f"block {n}" for n in range(LAYERS)), "ln_final", "unembed"]
    for handle in handles:
        handle.remove()


def test_gradients_reach_the_vectors_and_nothing_else(language, prompts, vectors):
    weights = torch.randn(3, 7, len(language.tokenizer), dtype=torch.float64) / 100

    def loss(vectors):  # over the first 7 positions, which every prompt has
        return (language.logits(prompts, vectors)[:, :7] * weights).sum()

    vectors.requires_grad_()
    loss(vectors).backward()
    expected = vectors.detach().clone().requires_grad_()
    for row, prompt in enumerate(prompts):
        logits, _ = plain(language, prompt, expected[row])
        (logits[:7] * weights[row]).sum().backward()
    assert_equal(vectors.grad, expected.grad)
    assert all(p.grad is None for p in language.hooked.parameters())
    for place in [(0, 0, 0), (1, 2, 5), (2, 1, D_MODEL - 1)]:
        step = torch.zeros_like(vectors)
        step[place] = 1e-5
        with torch.no_grad():
            slope = (loss(vectors + step) - loss(vectors - step)) / 2e-5
        assert vectors.grad[place].item() == pytest.approx(slope.item(), rel=1e-5)


def greedy(language, prompt, vectors, longest):
    """Answer ids by a plain loop, one prompt at a time."""
    end, said = language.tokenizer.eos_token_id, []
    while len(said) < longest and end not in said:
        grown = replace(prompt, ids=(*prompt.ids, *said))
        logits, _ = plain(language, grown, vectors)
        said.append(int(logits[-1].argmax()))
    return said


def test_generate_equals_a_plain_greedy_loop_and_stops_at_the_end_of_turn(
    prompts, vectors
):
    language = precise()
    end = language.tokenizer.eos_token_id
    language.hooked.unembed.b_U[end] = 36
    answers = [greedy(language, p, v, 9) for p, v in zip(prompts, vectors, strict=True)]
    # One is not done in time, and two are done at different steps.
    assert [a.index(end) + 1 if end in a else None for a in answers] == [8, 4, None]
    expected = [
        language.tokenizer.decode(answer, skip_special_tokens=True)
        for answer in answers
    ]
    assert language.generate(prompts, vectors, max_new_tokens=9) == expected


def test_generate_answers_prompts_in_words_too(language):
    told = [language.chat.text_prompt(question, "a bar") for question in QUESTIONS[:2]]
    answers = language.generate(told, None, max_new_tokens=3)
    expected = [greedy(language, prompt, None, 3) for prompt in told]
    assert answers == language.tokenizer.batch_decode(
        expected, skip_special_tokens=True
    )


def test_what_a_visitor_raises_comes_out_as_it_is(language, prompts, vectors):
    def refuse(layer, residual):
        raise ValueError(f"no number in layer {layer}")

    with pytest.raises(ValueError, match="no number in layer 1"):
        language.read(prompts, vectors, [1, 2], refuse)
    assert set(read(language, prompts, vectors)) == {0, 1, 2}  # and all goes on


@pytest.mark.parametrize("layers", [[0, LAYERS], [-1], []])
def test_an_unknown_layer_is_refused(language, prompts, vectors, layers):
    words = re.escape(f"layers {layers}: expected some of 0 to 2")
    with pytest.raises(ValueError, match=words):
        read(language, prompts, vectors, layers)


def test_a_prompt_longer_than_the_context_is_refused(language):
    fits = language.chat.text_prompt("a", " ".join(["bar"] * 92))
    assert read(language, [fits], None)[0].shape == (1, 96, D_MODEL)
    longer = language.chat.text_prompt("a", " ".join(["bar"] * 93))
    words = "a prompt of 97 tokens is longer than the 96 positions that"
    with pytest.raises(ValueError, match=words):
        read(language, [fits, longer], None)


def test_another_number_of_vectors_is_refused(language, prompts, vectors):
    with pytest.raises(ValueError, match="have 9 image positions, vectors are 6"):
        language.logits(prompts, vectors[:2])
    with pytest.raises(ValueError, match="have 9 image positions, vectors are 0"):
        read(language, prompts, None)
    with pytest.raises(ValueError, match="have 0 image positions, vectors are 9"):
        read(language, [language.chat.text_prompt("a", "b")] * 3, vectors)


def test_gradients_of_vectors_that_enter_later(language, prompts, vectors):
    """By finite differences, through the block before which they enter and later."""
    residuals = {}
    vectors.requires_grad_()
    logits = language.logits(
        prompts,
        vectors,
        layers=[0, 1, 2],
        visit=lambda n, x: residuals.update({n: x}),
        inject_layer=1,
    )
    # Layer 0 comes before them: nothing of it depends on them.
    assert [residuals[n].requires_grad for n in range(3)] == [False, True, True]
    assert list(residuals) == [0, 1, 2]
    (logits[:, 6].square().mean() + residuals[1][:, 5].sum()).backward()

    def value(moved):
        seen = {}
        with torch.no_grad():
            logits = language.logits(
                prompts,
                moved,
                layers=[1],
                visit=lambda n, x: seen.update({n: x[:, 5].sum()}),
                inject_layer=1,
            )
        return logits[:, 6].square().mean() + seen[1]

    step = torch.zeros_like(vectors)
    step[1, 2, 3] = 1e-5
    here = vectors.detach()
    slope = (value(here + step) - value(here - step)) / 2e-5
    torch.testing.assert_close(vectors.grad[1, 2, 3], slope, rtol=1e-5, atol=1e-7)


def test_no_block_to_enter_before(language, prompts, vectors):
    for layer in (-1, LAYERS):
        with pytest.raises(ValueError, match="enter before one of the blocks 0 to 2"):
            language.logits(prompts, vectors, inject_layer=layer)
