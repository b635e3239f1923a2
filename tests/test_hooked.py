"""Checkpoints in Hugging Face's folders: residual streams and logits as there."""

import json

import hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge

from vlm_probe.language import LanguageModel
from vlm_probe.language.chat import Chat
from vlm_probe.tokens import Prompt

# Names that TransformerLens, asked by path, would take for a model of its list.
NAMES = {
    "gemma2": "tiny-gemma-2",
    "llama": "Llama-tiny",
    "qwen2": "qwen2",
    "gpt2": "gpt2",
    "gpt_neox": "pythia",
}
KIND = {"hooked": HookedTransformer, "bridge": TransformerBridge}
PATCHES = 5
QUESTIONS = ("what color is it?", "look", "the dog jumps over a large red circle here")


@pytest.fixture(scope="module", params=hub.FAMILIES)
def checkpoint(request, tmp_path_factory):
    """A family, its folder, and Hugging Face's model."""
    family = request.param
    folder = tmp_path_factory.mktemp("hub") / NAMES[family]
    return family, folder, hub.write_language(folder, family)


@pytest.fixture(scope="module", params=["hooked", "bridge"])
def loaded(request, checkpoint):
    return LanguageModel.load(checkpoint[1], backend=request.param)


def expected(hf, prompt, vectors, inject_layer=0):
    """One prompt, alone and unpadded, through Hugging Face: residuals and logits."""
    inputs = hf.get_input_embeddings()(torch.tensor([prompt.ids])).clone()
    inputs[0, list(prompt.image)] = 0 if inject_layer else vectors
    blocks = next(
        m for m in hf.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3
    )
    seen = []
    hooks = [
        # What a block gives is a tensor or a tuple, by family.
        block.register_forward_hook(
            lambda module, given, out: seen.append(
                out[0] if isinstance(out, tuple) else out
            )
        )
        for block in blocks
    ]
    if inject_layer:

        def put(module, given):
            (entering, *rest) = given
            entering = entering.clone()
            entering[0, list(prompt.image)] = vectors
            return entering, *rest

        hooks.append(blocks[inject_layer].register_forward_pre_hook(put))
    with torch.no_grad():
        logits = hf(inputs_embeds=inputs).logits[0]
    for hook in hooks:
        hook.remove()
    return [x[0] if x.ndim == 3 else x for x in seen], logits


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pictured", [True, False])
def test_residuals_and_logits_are_hugging_faces(checkpoint, loaded, side, pictured):
    _, _, hf = checkpoint
    loaded.padding_side = side
    if pictured:
        prompts = [loaded.chat.image_prompt(q, PATCHES) for q in QUESTIONS]
        vectors = torch.randn(len(QUESTIONS), PATCHES, 32)
    else:
        prompts = [loaded.chat.text_prompt(q, "a dog.") for q in QUESTIONS]
        vectors = None
    assert len({len(prompt.ids) for prompt in prompts}) == 3
    seen = {}
    loaded.read(prompts, vectors, range(3), lambda n, x: seen.update({n: x.clone()}))
    with torch.no_grad():
        logits = loaded.logits(prompts, vectors)
    for row, prompt in enumerate(prompts):
        put = torch.zeros(0, 32) if vectors is None else vectors[row]
        residuals, answer = expected(hf, prompt, put)
        assert len(residuals) == 3
        n = len(prompt.ids)
        for layer, residual in enumerate(residuals):
            torch.testing.assert_close(
                seen[layer][row, :n], residual, atol=1e-5, rtol=0
            )
        torch.testing.assert_close(logits[row, :n], answer, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layer", [1, 2])
def test_vectors_that_enter_later(checkpoint, loaded, layer):
    prompts = [loaded.chat.image_prompt(q, PATCHES) for q in QUESTIONS]
    vectors = torch.randn(len(QUESTIONS), PATCHES, 32)
    seen = {}
    loaded.read(
        prompts,
        vectors,
        range(3),
        lambda n, x: seen.update({n: x.clone()}),
        inject_layer=layer,
    )
    with torch.no_grad():
        logits = loaded.logits(prompts, vectors, inject_layer=layer)
    for row, prompt in enumerate(prompts):
        residuals, answer = expected(checkpoint[2], prompt, vectors[row], layer)
        for n, residual in enumerate(residuals):
            # The block before gives what stood there until then.
            torch.testing.assert_close(
                seen[n][row, : len(prompt.ids)], residual, atol=1e-5, rtol=0
            )
        torch.testing.assert_close(
            logits[row, : len(prompt.ids)], answer, atol=1e-5, rtol=0
        )


def test_the_kind_is_the_one_asked_for(checkpoint, loaded, request):
    backend = request.node.callspec.params["loaded"]
    assert isinstance(loaded.hooked, KIND[backend])
    assert (loaded.n_layers, loaded.d_model) == (3, 32)
    assert loaded.name == NAMES[checkpoint[0]]
    assert not any(p.requires_grad for p in loaded.hooked.parameters())


def test_words_enter_as_in_hugging_face(checkpoint, loaded):
    ids = [5, 17, 200]
    expected = checkpoint[2].get_input_embeddings()(torch.tensor(ids))
    torch.testing.assert_close(loaded.embed(ids), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("point", ["resid_pre", "resid_mid"])
def test_other_hook_points(checkpoint, loaded, point):
    family, _, hf = checkpoint
    prompts = [loaded.chat.text_prompt("look", "a dog.")]
    seen = {}

    def read(layers):
        loaded.read(
            prompts,
            None,
            layers,
            lambda n, x: seen.update({n: x.clone()}),
            hook_point=point,
        )

    if (family, point) == ("gpt_neox", "resid_mid"):
        # Attention and MLP stand side by side; there is nothing between them.
        with pytest.raises(ValueError, match=r"no resid_mid.*resid_pre or resid_post"):
            read([0])
        return
    read([1, 2])
    after, _ = expected(hf, prompts[0], torch.zeros(0, 32))
    if point == "resid_pre":
        for layer in (1, 2):
            torch.testing.assert_close(seen[layer][0], after[layer - 1])
    else:
        assert sorted(seen) == [1, 2]
        assert not torch.allclose(seen[1][0], after[1])
        assert not torch.allclose(seen[1][0], after[0])


def test_a_placeholder_is_never_the_padding(checkpoint, loaded):
    assert loaded.chat.placeholder != loaded.chat.pad
    prompt = loaded.chat.image_prompt("look", 2)
    assert {prompt.ids[i] for i in prompt.image} == {loaded.chat.placeholder}


def test_special_tokens_are_found(checkpoint, loaded):
    family, _, _ = checkpoint
    named, others, _ = hub.TOKENIZERS[family]
    assert loaded.chat.special == set(
        loaded.tokenizer.convert_tokens_to_ids([*named.values(), *others])
    )


def test_markers_declared_only_as_added_tokens_are_special(tmp_path):
    """As in Llama 3, whose headers are in no list of special tokens."""
    hub.write_language(tmp_path / "llama", "llama")
    described = tmp_path / "llama" / "tokenizer_config.json"
    fields = json.loads(described.read_text())
    for name in ("additional_special_tokens", "extra_special_tokens"):
        fields.pop(name, None)
    described.write_text(json.dumps(fields))
    language = LanguageModel.load(tmp_path / "llama")
    header = language.tokenizer.convert_tokens_to_ids("<|start_header_id|>")
    assert header not in language.tokenizer.all_special_ids
    assert header in language.chat.special


def test_a_base_model_gets_plain_lines(tmp_path):
    hub.write_language(tmp_path / "gpt2", "gpt2")
    language = LanguageModel.load(tmp_path / "gpt2")
    prompt = language.chat.image_prompt("what color is it?", 2)
    assert prompt.image == range(1, 3)
    said = language.tokenizer.decode(prompt.ids[3:])
    assert (prompt.ids[0], said) == (
        language.tokenizer.bos_token_id,
        "what color is it?\n",
    )
    whole, answer = language.chat.conversation([("what?", "red")], 2)
    spoken = [whole.ids[i] for i in answer[0]]
    assert language.tokenizer.decode(spoken) == "red<|endoftext|>"


def test_processed_weights_and_centered_image_vectors(tmp_path):
    """Words lose their mean over d_model, and so must what stands among them."""
    hub.write_language(tmp_path / "gpt2", "gpt2")
    raw = LanguageModel.load(tmp_path / "gpt2")
    processed = LanguageModel.load(
        tmp_path / "gpt2", processing={"center_writing_weights": True}
    )
    assert (raw.processing, processed.processing) == (
        {},
        {"center_writing_weights": True},
    )
    prompts = [raw.chat.image_prompt("look", PATCHES)]
    vectors = torch.randn(1, PATCHES, 32) + 1.0
    seen = {}
    for language in (raw, processed):
        language.read(
            prompts, vectors, [2], lambda _, x, to=language: seen.update({to: x})
        )
    centered = seen[raw] - seen[raw].mean(-1, keepdim=True)
    torch.testing.assert_close(seen[processed], centered, atol=2e-5, rtol=0)
    torch.testing.assert_close(
        processed.logits(prompts, vectors).log_softmax(-1),
        raw.logits(prompts, vectors).log_softmax(-1),
        atol=2e-5,
        rtol=0,
    )
    assert seen[raw].mean(-1).abs().max() > 0.1
    # Rounding leaves a little of the mean, and it is seen all the same.
    low = LanguageModel.load(
        tmp_path / "gpt2", processing=processed.processing, dtype="bfloat16"
    )
    assert low.processing == processed.processing
    assert LanguageModel.load(tmp_path / "gpt2", dtype="bfloat16").processing == {}


def test_bfloat16(checkpoint, loaded):
    _, folder, _ = checkpoint
    low = LanguageModel.load(folder, dtype="bfloat16")
    assert low.dtype == torch.bfloat16
    prompts = [loaded.chat.image_prompt("look", PATCHES)]
    vectors = torch.randn(1, PATCHES, 32)
    seen = []
    for language in (low, loaded):
        language.read(prompts, vectors, [2], lambda _, x: seen.append(x.float()))
    error = (seen[0] - seen[1]).norm() / seen[1].norm()
    assert 1e-4 < error < 0.1


def test_a_model_in_memory_and_a_saved_one(checkpoint, loaded, tmp_path):
    _, folder, hf = checkpoint
    backend = "bridge" if isinstance(loaded.hooked, TransformerBridge) else "hooked"
    held = LanguageModel.load(
        transformers.AutoModelForCausalLM.from_pretrained(folder), backend=backend
    )
    loaded.save(tmp_path / "saved")
    again = LanguageModel.load(tmp_path / "saved", backend=backend)
    assert type(again.hooked) is type(loaded.hooked)
    prompts = [Prompt(tuple(range(10, 30)), range(0), frozenset())]
    expected = hf(torch.tensor([prompts[0].ids])).logits
    for language in (held, again):
        torch.testing.assert_close(
            language.logits(prompts, None), expected, atol=1e-5, rtol=0
        )


def test_what_transformer_lens_cannot_convert_becomes_a_bridge(tmp_path):
    config = transformers.Gemma3TextConfig(
        vocab_size=340,
        head_dim=16,
        architectures=["Gemma3ForCausalLM"],
        **hub.GROUPED,
    )
    folder = tmp_path / "tiny-gemma-3"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    hub.tokenizer("gemma2").save_pretrained(folder)
    assert isinstance(LanguageModel.load(folder).hooked, TransformerBridge)
    with pytest.raises(
        ValueError, match=r'it does not know Gemma3ForCausalLM.*"bridge"'
    ):
        LanguageModel.load(folder, backend="hooked")
    with pytest.raises(ValueError, match=r"with center_writing.*a bridge does not do"):
        LanguageModel.load(folder, processing={"center_writing_weights": True})


@pytest.mark.parametrize(
    ("family", "changed"),
    [
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
        ("llama", {"attention_bias": True}),
        ("llama", {"head_dim": 16}),
        ("gemma2", {"hidden_activation": "gelu"}),
    ],
)
def test_what_transformer_lens_converts_wrongly_becomes_a_bridge(
    tmp_path, family, changed
):
    """It leaves out what it does not know, and so its own answers are asked for."""
    if "rope_parameters" in changed:
        changed["rope_parameters"]["rope_theta"] = 1e4
    folder = tmp_path / "model"
    hf = hub.write_language(folder, family, **changed)
    language = LanguageModel.load(folder)
    assert language.backend == "bridge"
    ids = tuple(range(10, 30))
    logits = language.logits([Prompt(ids, range(0), frozenset())], None)
    torch.testing.assert_close(logits, hf(torch.tensor([ids])).logits)
    with pytest.raises(ValueError, match=r'that is .*model: .*with backend="bridge"'):
        LanguageModel.load(folder, backend="hooked")


def test_weights_that_are_not_all_there_are_refused(tmp_path):
    """Hugging Face fills in random ones."""
    folder = tmp_path / "llama"
    hub.write_language(folder, "llama")
    weights = load_file(folder / "model.safetensors")
    gone = weights.pop("model.layers.1.mlp.down_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    words = r"not those of its config.json, missing keys: model.layers.1.mlp.down_proj"
    with pytest.raises(ValueError, match=words):
        LanguageModel.load(folder)
    weights["model.layers.1.mlp.down_proj.weight"] = gone
    weights["model.layers.3.mlp.down_proj.weight"] = gone.clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"unexpected keys: model.layers.3.mlp.down"):
        LanguageModel.load(folder)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    hub.write_language(tmp_path / "gpt2", "gpt2")
    for file in (tmp_path / "gpt2").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(
        ValueError, match=r"no tokenizer in .*gpt2: what was made of it"
    ):
        LanguageModel.load(tmp_path / "gpt2")


def test_without_a_bos_token_the_picture_stands_before_the_users_words(tmp_path):
    """The first position draws attention whatever stands there."""
    hub.write_language(tmp_path / "qwen2", "qwen2")
    language = LanguageModel.load(tmp_path / "qwen2")
    header = language.tokenizer("<|im_start|>user\n").input_ids
    for prompt in (
        language.chat.image_prompt("look", 2),
        language.chat.text_prompt("look", "a dog"),
    ):
        assert list(prompt.ids[: len(header)]) == header
    picture = language.chat.image_prompt("look", 2).image
    assert picture == range(len(header), len(header) + 2)
    told = language.chat.text_prompt("look", "a dog")
    assert told.positions("text_only")[0] == len(header)
    # In some families the marker of every turn is called the BOS token.
    language.tokenizer.bos_token = "<|im_start|>"
    assert Chat(language.tokenizer, "look").head == len(header)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"no config for 'google/gemma-2-2b-it': it is no folder here, .*hf down",
    ):
        LanguageModel.load("gemma-2-2b-it")  # TransformerLens' name for it
    with pytest.raises(ValueError, match=r"no config .*written by save_pretrained"):
        LanguageModel.load(tmp_path)
    hub.write_language(tmp_path / "a", "llama")
    with pytest.raises(ValueError, match=r"unknown backend 'x'; valid: auto, hooked"):
        LanguageModel.load(tmp_path / "a", backend="x")
    with pytest.raises(ValueError, match=r"dtype 'int8': expected one of float32"):
        LanguageModel.load(tmp_path / "a", dtype="int8")
    with pytest.raises(ValueError, match=r"unknown weight processing 'fold'; valid"):
        LanguageModel.load(tmp_path / "a", processing={"fold": True})
    weights = tmp_path / "a" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"no weights of a language model could be re"):
        LanguageModel.load(tmp_path / "a")
    weights.unlink()
    with pytest.raises(ValueError, match=r"no weights of a language model could be re"):
        LanguageModel.load(tmp_path / "a")
