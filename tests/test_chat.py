"""What a prompt looks like, and the folder that a language model is kept in."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import D_MODEL, LAYERS, tiny_language

from vlm_probe.language import LanguageModel
from vlm_probe.language.hooked import save_hooked
from vlm_probe.toy.texts import make_tokenizer


@pytest.fixture(scope="module")
def language():
    return tiny_language()


def words(language, prompt):
    return " ".join(language.tokenizer.convert_ids_to_tokens(prompt.ids))


def test_prompts_by_hand(language):
    asked = language.chat.image_prompt("what color ?", 3)
    rest = "<user> what color ? <assistant>"
    assert words(language, asked) == f"<bos> <unk> <unk> <unk> {rest}"
    assert asked.image == range(1, 4)
    # An unknown word is a word all the same.
    special = {"<pad>", "<bos>", "<user>", "<assistant>", "<end>", "<image>"}
    assert set(language.tokenizer.convert_ids_to_tokens(asked.special)) == special
    told = language.chat.text_prompt("what color ?", "a red bar")
    assert words(language, told) == f"<bos> a red bar {rest}"
    assert told.image == range(0)


def test_without_a_prompt_the_default_is_asked():
    language = LanguageModel(
        tiny_language().hooked, make_tokenizer(), default_prompt="describe it"
    )
    rest = "<user> describe it <assistant>"
    assert words(language, language.chat.image_prompt(None, 1)) == f"<bos> <unk> {rest}"
    assert (
        words(language, language.chat.text_prompt(None, "sand")) == f"<bos> sand {rest}"
    )


def test_a_conversation_by_hand(language):
    turns = [("what color ?", "red"), ("where ?", "top left")]
    prompt, said = language.chat.conversation(turns, 2)
    assert words(language, prompt) == (
        "<bos> <unk> <unk> <user> what color ? <assistant> red <end> "
        "<user> where ? <assistant> top left <end>"
    )
    assert prompt.image == range(1, 3)
    assert [len(span) for span in said] == [2, 3]
    spoken = [prompt.ids[position] for span in said for position in span]
    spoken = " ".join(language.tokenizer.convert_ids_to_tokens(spoken))
    assert spoken == "red <end> top left <end>"


def with_template(change):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = change(tokenizer.chat_template)
    return LanguageModel(tiny_language().hooked, tokenizer, name="odd")


def test_without_a_beginning_the_picture_stands_before_the_users_words():
    language = with_template(lambda template: template.replace("{{ bos_token }}", ""))
    prompt = language.chat.image_prompt("what ?", 2)
    assert words(language, prompt) == "<user> <unk> <unk> what ? <assistant>"
    assert prompt.image == range(1, 3)


def test_a_template_that_rewrites_the_past_is_refused():
    # Some chat templates drop parts of earlier answers once the talk goes on.
    language = with_template(lambda t: t.replace("in messages", "in messages[-2:]"))
    language.chat.conversation([("what ?", "red")], 1)
    with pytest.raises(ValueError, match="chat template does not keep the begin"):
        language.chat.conversation([("what ?", "red"), ("where ?", "left")], 1)


@pytest.fixture
def saved(tmp_path):
    """A model of which float16 can hold every weight, and the folder it is in."""
    language = tiny_language()
    state = language.hooked.state_dict()
    rounded = {
        name: tensor.half().float() if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
        if "rotary" not in name and not name.endswith("IGNORE")
    }
    language.hooked.load_state_dict(state | rounded)
    save_hooked(language.hooked, language.tokenizer, tmp_path / "tongue")
    return language, tmp_path / "tongue"


def test_what_is_saved_is_loaded(saved):
    language, folder = saved
    loaded = LanguageModel.load(folder, default_prompt="describe it")
    assert (loaded.name, loaded.chat.default_prompt) == ("tongue", "describe it")
    assert (loaded.n_layers, loaded.d_model) == (LAYERS, D_MODEL)
    assert loaded.chat.special == language.chat.special
    assert loaded.chat.image_prompt("what ?", 2) == language.chat.image_prompt(
        "what ?", 2
    )
    prompts, vectors = (
        [language.chat.image_prompt("what ?", 2)],
        torch.randn(1, 2, D_MODEL),
    )
    residuals = {}
    for model in (language, loaded):
        model.read(
            prompts,
            vectors,
            range(LAYERS),
            lambda layer, x: residuals.setdefault(layer, []).append(x.clone()),
        )
    assert sorted(residuals) == [0, 1, 2]
    assert all(torch.equal(one, two) for one, two in residuals.values())
    logits = (model.logits(prompts, vectors) for model in (language, loaded))
    assert torch.equal(*logits)
    assert not any(p.requires_grad for p in loaded.hooked.parameters())


def test_a_model_is_loaded_where_its_autoencoders_are(saved, monkeypatch):
    # TransformerLens would take a GPU by itself; nothing else of ours does.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    loaded = LanguageModel.load(saved[1])
    assert {p.device.type for p in loaded.hooked.parameters()} == {"cpu"}


def test_missing_and_unexpected_weights_are_named(saved):
    _, folder = saved
    weights = load_file(folder / "model.safetensors")
    gone = weights.pop("blocks.1.mlp.W_in")
    save_file(weights | {"blocks.9.mlp.W_in": gone}, folder / "model.safetensors")
    words = (
        "hooked_transformer.json beside it: missing ['blocks.1.mlp.W_in'], "
        "unexpected ['blocks.9.mlp.W_in']"
    )
    with pytest.raises(ValueError, match=re.escape(words)):
        LanguageModel.load(folder)
