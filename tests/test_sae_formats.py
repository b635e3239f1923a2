"""What is read from a format computes what that format says, and nothing else."""

import json

import pytest
import torch
from formats import (
    D_MODEL,
    FEATURES,
    K,
    expected,
    weights,
    write_dictionary,
    write_gemma_scope,
    write_gemma_scope_2,
    write_json,
    write_llama_scope,
    write_old_saelens,
    write_saelens,
    write_sparsify,
    write_tensors,
)
from sae_lens import SAE

from vlm_probe.saes import load_saes

CASES = ("standard", "jumprelu", "topk", "gated")


def only(folder, **asked):
    """The one SAE in a folder."""
    (sae,) = load_saes(folder, **asked).values()
    return sae


def dense(codes):
    found = torch.zeros(codes.n_tokens, codes.n_features)
    found[codes.token, codes.feature] = codes.value
    return found


def check(sae, w, architecture, **how):
    """Codes and reconstructions of tokens of very unequal size, within 1e-5."""
    x = torch.randn(40, D_MODEL) * torch.linspace(0.5, 3, 40)[:, None] + 0.5
    codes, x_hat = sae.code(x)
    wanted, wanted_hat = expected(x, w, architecture, **how)
    torch.testing.assert_close(dense(codes).double(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x_hat.double(), wanted_hat, atol=1e-5, rtol=1e-5)
    firing = (wanted != 0).double().mean()
    assert 0.05 < firing < 0.95  # some do and some do not, or it would say little


@pytest.mark.parametrize("b_dec_first", [True, False])
@pytest.mark.parametrize(
    "normalize", ["none", "layer_norm", "expected_average_only_in"]
)
@pytest.mark.parametrize("architecture", CASES)
def test_saelens(tmp_path, architecture, normalize, b_dec_first):
    w = weights()
    config = {"normalize_activations": normalize, "apply_b_dec_to_input": b_dec_first}
    if normalize == "expected_average_only_in":
        config["norm_scaling_factor"] = 0.4
    hook = "blocks.4.hook_resid_post"
    write_saelens(tmp_path / "a", w, architecture, hook_name=hook, **config)
    sae = only(tmp_path)
    assert (sae.layer, sae.n_features, sae.d_model) == (4, FEATURES, D_MODEL)
    how = {"normalize": normalize, "b_dec_first": b_dec_first, "factor": 0.4}
    check(sae, w, architecture, **how)


def test_what_sae_lens_writes_itself(tmp_path):
    sae = SAE.from_dict(
        {
            "architecture": "topk",
            "k": 3,
            "d_in": D_MODEL,
            "d_sae": FEATURES,
            "rescale_acts_by_decoder_norm": True,
            "metadata": {"hook_name": "blocks.7.hook_resid_mid", "model_name": "m"},
        }
    )
    sae.save_model(tmp_path / "anything")
    found = only(tmp_path)
    assert (found.layer, found.hook_point, found.model_name) == (7, "resid_mid", "m")
    x = torch.randn(9, D_MODEL)
    torch.testing.assert_close(found.code(x)[1], sae(x))


def test_saelens_before_its_version_6(tmp_path):
    w = weights()
    write_old_saelens(tmp_path / "some", w, "blocks.0.hook_resid_pre")
    sae = only(tmp_path)
    assert (sae.layer, sae.hook_point) == (0, "resid_pre")
    assert (sae.model_name, sae.prepend_bos) == ("gpt2-small", True)
    assert sae.sae.cfg.device == "cpu"
    check(sae, w, "standard", b_dec_first=True)


def test_the_factor_may_lie_where_the_trainer_leaves_it(tmp_path):
    w = weights()
    normalize = "expected_average_only_in"
    folder = tmp_path / "layer_2"
    write_saelens(folder, w, "jumprelu", normalize_activations=normalize)
    words = (
        r"layer_2/cfg\.json asks for normalize_activations 'expected_average_only_in', "
        r"but nothing says the factor .* every code is wrong; write it there as "
        r"norm_scaling_factor"
    )
    with pytest.raises(ValueError, match=words):
        load_saes(tmp_path)
    scaler = {"scaling_factor": 0.3, "has_whitening": False}
    write_json(folder / "activation_scaler.json", scaler)
    how = {"normalize": normalize, "b_dec_first": True, "factor": 0.3}
    check(only(tmp_path), w, "jumprelu", **how)


@pytest.mark.parametrize(
    ("folder", "model"),
    [
        ("gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_71", "gemma-2-2b"),
        (
            "models--google--gemma-scope-9b-it-res/snapshots/0a/layer_9/width_16k/x",
            "gemma-2-9b-it",
        ),
        ("mine/layer_3/width_16k/average_l0_71", None),
        ("layer_3", None),
    ],
)
def test_gemma_scope(tmp_path, folder, model):
    w = weights()
    write_gemma_scope(tmp_path / folder, w)
    sae = only(tmp_path)
    assert sae.layer == int(folder.partition("layer_")[2].partition("/")[0])
    assert (sae.hook_point, sae.model_name, sae.processing) == ("resid_post", model, {})
    assert sae.prepend_bos is True
    assert sae.name == f"{tmp_path.name}/{folder}"
    check(sae, w, "jumprelu", b_dec_first=False)


@pytest.mark.parametrize("config", [True, False])
def test_gemma_scope_2(tmp_path, config):
    w = weights()
    about = {
        "architecture": "jump_relu",
        "model_name": "gemma-v3-1b-pt",
        "hf_hook_point_in": "model.layers.11.output",
    }
    root = tmp_path / ("mine" if config else "gemma-scope-2-1b-pt")
    folder = root / "resid_post_all" / "layer_11_width_16k_l0_small"
    write_gemma_scope_2(folder, w, about if config else None)
    sae = only(tmp_path)
    assert (sae.layer, sae.hook_point) == (11, "resid_post")
    assert sae.model_name == "google/gemma-3-1b-pt"
    check(sae, w, "jumprelu", b_dec_first=False)


def test_the_smallest_gemma_3_has_no_pt_in_its_name(tmp_path):
    folder = tmp_path / "gemma-scope-2-270m-pt" / "resid_post" / "layer_5_width_16k"
    write_gemma_scope_2(folder, weights())
    assert only(tmp_path).model_name == "google/gemma-3-270m"


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("b_dec_first", [True, False])
def test_llama_scope(tmp_path, weighted, b_dec_first):
    """A feature fires if, for a decoder of unit norm and the raw stream, it exceeds
    the one threshold: pre / scale * norm > threshold."""
    w = weights()
    scale = D_MODEL**0.5 / 7.5
    write_llama_scope(
        tmp_path / "Llama3_1-8B-Base-L3R-8x",
        w,
        "blocks.3.hook_resid_post",
        sparsity_include_decoder_norm=weighted,
        apply_decoder_bias_to_pre_encoder=b_dec_first,
    )
    sae = only(tmp_path)
    assert (sae.layer, sae.model_name) == (3, "meta-llama/Llama-3.1-8B")
    norm = w["W_dec"].norm(dim=1) if weighted else torch.ones(FEATURES)
    w["threshold"] = 0.53 * scale / norm
    how = {"normalize": "expected_average_only_in", "factor": scale}
    check(sae, w, "jumprelu", b_dec_first=b_dec_first, **how)


@pytest.mark.parametrize(
    ("kind", "architecture", "b_dec_first"),
    [
        ("AutoEncoder", "standard", True),
        ("AutoEncoderNew", "standard", False),
        ("AutoEncoderTopK", "topk", True),
        ("BatchTopKSAE", "jumprelu", True),
        ("MatryoshkaBatchTopKSAE", "jumprelu", True),
        ("GatedAutoEncoder", "gated", True),
        ("JumpReluAutoEncoder", "jumprelu", False),
    ],
)
def test_dictionary_learning(tmp_path, kind, architecture, b_dec_first):
    w = weights()
    write_dictionary(tmp_path / "resid_post_layer_3" / "trainer_0", w, kind)
    if "BatchTopK" in kind:  # one threshold for all
        w["threshold"] = w["threshold"][0].expand(FEATURES)
    sae = only(tmp_path)
    assert (sae.layer, sae.hook_point) == (3, "resid_post")
    assert sae.model_name == "EleutherAI/pythia-70m-deduped"
    assert sae.prepend_bos is None
    check(sae, w, architecture, b_dec_first=b_dec_first)


def test_the_input_of_a_block_is_another_hook_point(tmp_path):
    trainer = {"submodule_name": None}
    folder = tmp_path / "trainer_0"
    write_dictionary(folder, weights(), "AutoEncoder", layer=5, trainer=trainer)
    assert (only(tmp_path).layer, only(tmp_path).hook_point) == (5, "resid_post")
    buffer = {"io": "in"}
    write_dictionary(folder, weights(), "AutoEncoder", layer=5, buffer=buffer)
    assert (only(tmp_path).layer, only(tmp_path).hook_point) == (5, "resid_pre")


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("normalize_decoder", [False, True])
def test_sparsify(tmp_path, signed, normalize_decoder):
    w = weights()
    write_json(tmp_path / "config.json", {"model": "some/model", "ctx_len": 2048})
    how = {"signed": signed, "normalize_decoder": normalize_decoder}
    write_sparsify(tmp_path / "layers.3", w, **how)
    sae = only(tmp_path)
    assert (sae.layer, sae.hook_point) == (3, "resid_post")
    assert (sae.model_name, sae.prepend_bos) == ("some/model", None)
    check(sae, w, "abstopk" if signed else "topk", b_dec_first=True)


@pytest.mark.parametrize(
    "folder",
    ["gpt_neox.layers.3", "h.3", "layer_3", "layers.3/seed1", "model.layers.3"],
)
def test_sparsify_is_named_after_its_module(tmp_path, folder):
    write_sparsify(tmp_path / folder, weights())
    sae = only(tmp_path)
    assert (sae.layer, sae.hook_point, sae.model_name) == (3, "resid_post", None)


def all_formats(root):
    """One layer in each format."""
    hook = "blocks.{}.hook_resid_post"
    write_saelens(root / "layer_0", weights(0), hook_name=hook.format(0))
    write_gemma_scope(root / "layer_1" / "width_16k" / "average_l0_9", weights(1))
    write_gemma_scope_2(root / "resid_post" / "layer_2_width_16k", weights(2))
    write_llama_scope(root / "L3R-8x", weights(3), hook.format(3))
    write_dictionary(root / "trainer_0", weights(4), "AutoEncoderTopK", layer=4)
    write_sparsify(root / "layers.5", weights(5))


FILES = {
    0: "layer_0/sae_weights.safetensors",
    1: "layer_1/width_16k/average_l0_9/params.npz",
    2: "resid_post/layer_2_width_16k/params.safetensors",
    3: "L3R-8x/checkpoints/final.safetensors",
    4: "trainer_0/ae.pt",
    5: "layers.5/sae.safetensors",
}


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "float64"])
def test_everything_is_in_the_dtype_that_was_asked_for(tmp_path, dtype):
    all_formats(tmp_path)
    found = load_saes(tmp_path, dtype=dtype)
    assert list(found) == [0, 1, 2, 3, 4, 5]
    name = str(dtype).removeprefix("torch.")
    for sae in found.values():
        assert {str(p.dtype) for p in sae.sae.parameters()} == {f"torch.{name}"}
        assert sae.sae.cfg.dtype == name
        assert sae.code(torch.randn(3, D_MODEL))[1].dtype == sae.sae.dtype
        assert not any(p.requires_grad for p in sae.sae.parameters())


def test_everything_is_on_the_device_that_was_asked_for(tmp_path):
    all_formats(tmp_path)
    for sae in load_saes(tmp_path, device="meta").values():
        assert {p.device.type for p in sae.sae.parameters()} == {"meta"}
        assert sae.sae.cfg.device == "meta"


def test_what_was_saved_is_what_was_loaded(tmp_path):
    all_formats(tmp_path / "a")
    first = load_saes(tmp_path / "a")
    for layer, sae in first.items():
        sae.save(tmp_path / "b" / f"layer_{layer}")
    again = load_saes(tmp_path / "b")
    x = torch.randn(20, D_MODEL)
    for layer, sae in first.items():
        assert torch.equal(again[layer].code(x)[1], sae.code(x)[1])
        assert again[layer].model_name == sae.model_name


@pytest.mark.parametrize("layer", FILES)
@pytest.mark.parametrize("left", [0.6, 30])
def test_a_damaged_file_is_named(tmp_path, layer, left):
    all_formats(tmp_path)
    file = tmp_path / FILES[layer]
    whole = file.read_bytes()
    file.write_bytes(whole[: int(left * len(whole)) if left < 1 else left])
    with pytest.raises(ValueError) as found:
        load_saes(tmp_path)
    assert str(file) in str(found.value)
    assert "again" in str(found.value)


@pytest.mark.parametrize("layer", FILES)
def test_a_pointer_of_git_lfs_is_named(tmp_path, layer):
    all_formats(tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (tmp_path / FILES[layer]).write_text(pointer)
    with pytest.raises(ValueError, match=r"git lfs pull"):
        load_saes(tmp_path)


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("layer_0/cfg.json", r"layer_0/cfg\.json is missing: .* SAELens, which has bo"),
        (
            FILES[0],
            r"layer_0 has cfg\.json, but no sae_weights\.safetensors or sae\.sa",
        ),
        ("L3R-8x/hyperparams.json", r"hyperparams\.json is missing: .* Llama Scope"),
        (FILES[3], r"L3R-8x has hyperparams\.json, but no checkpoints/final\.safetens"),
        ("trainer_0/config.json", r"config\.json is missing: .* dictionary_learning"),
        ("layers.5/cfg.json", r"layers\.5/cfg\.json is missing: .* of sparsify"),
        (FILES[5], r"layers\.5 has cfg\.json, but no sae_weights\.safetensors or sae"),
    ],
)
def test_a_missing_file_is_named(tmp_path, missing, words):
    all_formats(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=words):
        load_saes(tmp_path)


@pytest.mark.parametrize(
    ("file", "name", "words"),
    [
        (FILES[1], "threshold", r"params\.npz lacks 'threshold'; it holds W_dec, W_en"),
        (FILES[3], "decoder.bias", r"final\.safetensors lacks 'decoder\.bias'; it ho"),
        (FILES[4], "b_dec", r"ae\.pt lacks 'b_dec'; it holds decoder\.weight, enc"),
        (FILES[5], "W_dec", r"sae\.safetensors lacks 'W_dec'; it holds b_dec, enc"),
    ],
)
def test_a_missing_tensor_is_named(tmp_path, monkeypatch, file, name, words):
    from vlm_probe.saes import formats as sae_formats

    all_formats(tmp_path)
    path = tmp_path / file
    load = sae_formats._arrays if path.suffix == ".npz" else sae_formats.read_weights
    tensors = load(path) if path.suffix == ".npz" else load(path)[0]
    del tensors[name]
    write_tensors(path, tensors)
    with pytest.raises(ValueError, match=words):
        load_saes(tmp_path)


def test_a_config_that_is_damaged_or_says_too_little_is_named(tmp_path):
    write_sparsify(tmp_path / "layers.5", weights())
    config = tmp_path / "layers.5" / "cfg.json"
    about = json.loads(config.read_text())
    config.write_text(config.read_text()[:20])
    with pytest.raises(ValueError, match=r"layers\.5/cfg\.json is damaged, or no JSON"):
        load_saes(tmp_path)
    config.write_text("[]")
    with pytest.raises(ValueError, match=r"cfg\.json holds JSON of type list; expect"):
        load_saes(tmp_path)
    del about["k"]
    write_json(config, about)
    words = r"cfg\.json does not say all that an SAE of sparsify needs: KeyError\('k'\)"
    with pytest.raises(ValueError, match=words):
        load_saes(tmp_path)


def test_weights_that_are_not_those_of_the_config_are_refused(tmp_path):
    write_saelens(tmp_path / "layer_1", weights(), d_sae=FEATURES + 1)
    words = r"sae-lens cannot run what .*layer_1/sae_weights\.safetensors and its conf"
    with pytest.raises(ValueError, match=words):
        load_saes(tmp_path)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (
            lambda folder: (
                write_saelens(folder, weights(), architecture="standard")
                or write_json(
                    folder / "cfg.json",
                    {"architecture": "batchtopk", "d_sae": FEATURES},
                )
            ),
            r"holds an SAE in training \(batchtopk\), .*; save_inference_model makes a",
        ),
        (
            lambda folder: write_dictionary(folder, weights(), "Crosscoder"),
            r"dict_class 'Crosscoder'; known are AutoEncoder, AutoEncoderNew, AutoEnco",
        ),
        (
            lambda folder: write_sparsify(folder, weights(), activation="groupmax"),
            r"cfg\.json has activation 'groupmax'; known is 'topk'",
        ),
        (
            lambda folder: write_llama_scope(
                folder, weights(), "blocks.3.hook_resid_post", use_glu_encoder=True
            ),
            r"hyperparams\.json has \{'use_glu_encoder': True\}; known is \{'act_f",
        ),
        (
            lambda folder: write_saelens(
                folder, weights(), normalize_activations="covariance_whitening"
            ),
            r"normalized by 'covariance_whitening', and its weights do not do that yet",
        ),
    ],
)
def test_what_would_be_computed_wrong_is_refused(tmp_path, write, words):
    write(tmp_path / "layer_3")
    with pytest.raises(ValueError, match=words):
        load_saes(tmp_path)


@pytest.mark.parametrize(
    ("write", "place"),
    [
        (
            lambda root: write_saelens(
                root / "a", weights(), hook_name="blocks.3.hook_mlp_out"
            ),
            "mlp_out",
        ),
        (
            lambda root: write_saelens(
                root / "a", weights(), hook_name="blocks.3.attn.hook_z"
            ),
            r"attn\.hook_z",
        ),
        (
            lambda root: write_gemma_scope(
                root / "gemma-scope-2b-pt-transcoders" / "layer_3", weights()
            ),
            "transcoders",
        ),
        (
            lambda root: write_gemma_scope(
                root / "gemma-scope-2b-pt-att" / "layer_3", weights()
            ),
            "attn_out",
        ),
        (
            lambda root: write_gemma_scope_2(
                root / "mlp_out_all" / "layer_3_width_16k_l0_big", weights()
            ),
            "mlp_out",
        ),
        (
            lambda root: write_gemma_scope_2(
                root / "layer_3",
                weights(),
                {
                    "hf_hook_point_in": "model.layers.3.pre_feedforward_layernorm",
                    "hf_hook_point_out": "model.layers.3.post_feedforward_layernorm",
                },
            ),
            "transcoder",
        ),
        (
            lambda root: write_llama_scope(
                root / "a",
                weights(),
                "blocks.3.hook_resid_post",
                hook_point_out="blocks.3.hook_mlp_out",
            ),
            "transcoder",
        ),
        (
            lambda root: write_dictionary(
                root / "a",
                weights(),
                "AutoEncoder",
                trainer={"submodule_name": "mlp_out_layer_3"},
            ),
            "mlp_out",
        ),
        (lambda root: write_sparsify(root / "layers.3.mlp", weights()), "mlp"),
        (
            lambda root: write_sparsify(root / "layers.3", weights(), transcode=True),
            "transcoder",
        ),
    ],
)
def test_another_place_than_the_residual_stream_is_refused_by_name(
    tmp_path, write, place
):
    write(tmp_path)
    words = rf"has no SAE of a residual stream .*, it has {place} \(layer 3\)"
    with pytest.raises(ValueError, match=words):
        load_saes(tmp_path)


def test_beside_others_those_of_the_residual_stream_are_found(tmp_path):
    for layer in range(2):
        write_sparsify(tmp_path / f"layers.{layer}", weights())
        write_sparsify(tmp_path / f"layers.{layer}.mlp", weights())
    write_gemma_scope(tmp_path / "embedding" / "width_4k" / "average_l0_6", weights())
    assert list(load_saes(tmp_path)) == [0, 1]


@pytest.mark.parametrize("name", ["embed_tokens", "gpt_neox.embed_in", "wte"])
def test_an_sae_of_the_embedding_is_left_out(tmp_path, name):
    write_sparsify(tmp_path / name, weights())
    with pytest.raises(ValueError, match=r"has no SAE of a residual stream .*emb|wte"):
        load_saes(tmp_path)
    write_sparsify(tmp_path / "layers.2", weights())
    write_saelens(tmp_path / "e", weights(), hook_name="hook_embed")
    assert list(load_saes(tmp_path)) == [2]


def test_the_folder_that_was_given_tells_the_layer_where_no_other_does(tmp_path):
    folder = tmp_path / "layer_1"
    write_gemma_scope(folder / "width_16k" / "average_l0_71", weights())
    assert list(load_saes(folder)) == [1]
    # What is nearer is surer: the folder's name may count the layers in it.
    write_gemma_scope(tmp_path / "layers_26" / "layer_5", weights())
    hook = "blocks.6.hook_resid_post"
    write_saelens(tmp_path / "layers_26" / "a", weights(), hook_name=hook)
    assert list(load_saes(tmp_path / "layers_26")) == [5, 6]


def test_llama_scope_says_whether_its_threshold_counts_the_decoders_norm(tmp_path):
    write_llama_scope(tmp_path, weights(), "blocks.3.hook_resid_post")
    file = tmp_path / "hyperparams.json"
    about = json.loads(file.read_text())
    del about["sparsity_include_decoder_norm"]
    write_json(file, about)
    words = r"hyperparams\.json does not say all .*'sparsity_include_decoder_norm'"
    with pytest.raises(ValueError, match=words):
        load_saes(tmp_path)


def test_the_layer_is_told_by_the_folder_or_the_config(tmp_path):
    write_saelens(tmp_path / "some", weights())
    with pytest.raises(
        ValueError, match=r"nothing says of which layer the SAE in .*some"
    ):
        load_saes(tmp_path)
    (tmp_path / "some").rename(tmp_path / "layer_6")
    assert list(load_saes(tmp_path)) == list(load_saes(tmp_path / "layer_6")) == [6]
    hook = "model.layers.7"
    write_saelens(tmp_path / "layer_6", weights(), hook_name=hook)
    words = (
        r"layer_6 is named after layer 6, but what it holds is of layer 7; rename it"
    )
    with pytest.raises(ValueError, match=words):
        load_saes(tmp_path)


def test_tokens_of_one_group_leave_nothing_to_another(tmp_path):
    for layer, normalize in enumerate(["layer_norm", "constant_norm_rescale"]):
        folder = tmp_path / f"layer_{layer}"
        write_saelens(folder, weights(), normalize_activations=normalize)
    image, text = torch.randn(30, D_MODEL) * 50 + 9, torch.randn(7, D_MODEL)
    for layer, sae in load_saes(tmp_path).items():
        fresh = load_saes(tmp_path)[layer]
        alone = {"image": fresh.code(image)[1]}
        fresh = load_saes(tmp_path)[layer]
        alone["text"] = fresh.code(text)[1]
        for group in ("image", "text", "image", "text", "text"):
            sae.sae.encode(torch.randn(7, D_MODEL) * 3)  # someone looks in between
            x_hat = sae.code(image if group == "image" else text)[1]
            assert torch.equal(x_hat, alone[group])
        # And a token's are its own: order and company change nothing.
        both = sae.code(torch.cat([text, image]))[1]
        torch.testing.assert_close(both[:7], alone["text"])
        torch.testing.assert_close(both[7:], alone["image"])


def test_k_is_how_many_fire(tmp_path):
    write_sparsify(tmp_path / "layers.0", weights(), signed=True)
    codes, _ = only(tmp_path).code(torch.randn(25, D_MODEL))
    assert codes.l0().tolist() == [K] * 25
    assert (codes.value < 0).any()
