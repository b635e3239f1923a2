"""Which SAEs are loaded, from where, and what is known of them."""

import shutil

import huggingface_hub
import pytest
import torch
from formats import (
    D_MODEL,
    FEATURES,
    K,
    cached,
    expected,
    weights,
    write_gemma_scope,
    write_gemma_scope_2,
    write_llama_scope,
    write_old_saelens,
    write_qwen_scope,
    write_saelens,
    write_sparsify,
)
from sae_lens import SAE
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from tiny import tiny_sae

from vlm_probe.saes import LayerSae, load_saes
from vlm_probe.saes.offers import Offer, choose, features, place, release_offers
from vlm_probe.tokens import ranges


@pytest.mark.parametrize(
    ("width", "number"),
    [
        (16384, 16384),
        ("16384", 16384),
        ("1k", 1024),
        ("4k", 4096),
        ("16k", 16384),
        ("32K", 32768),
        ("64k", 65536),
        ("65k", 65536),
        ("80k", 80 * 1024),
        ("128k", 131072),
        ("131k", 131072),
        ("262k", 262144),
        ("524k", 524288),
        ("1m", 1048576),
    ],
)
def test_published_names_of_widths(width, number):
    assert features(width) == number


@pytest.mark.parametrize("width", ["wide", "16kk", "1.5k", "", 0])
def test_what_is_no_width_is_refused(width):
    with pytest.raises(ValueError, match=r"width .*: expected a number such as 16384"):
        features(width)


@pytest.mark.parametrize(
    ("name", "layer", "point"),
    [
        ("blocks.3.hook_resid_pre", 3, "resid_pre"),
        ("blocks.13.hook_resid_mid", 13, "resid_mid"),
        ("blocks.3.hook_resid_post", 3, "resid_post"),
        ("blocks.3.hook_in", 3, "resid_pre"),
        ("blocks.3.hook_out", 3, "resid_post"),
        ("layers.3", 3, "resid_post"),
        ("model.layers.3", 3, "resid_post"),
        ("model.layers.3.output", 3, "resid_post"),
        ("model.language_model.layers.3", 3, "resid_post"),
        ("gpt_neox.layers.3", 3, "resid_post"),
        ("transformer.h.3", 3, "resid_post"),
        ("h.3", 3, "resid_post"),
        ("blocks.3.hook_mlp_out", 3, "mlp_out"),
        ("blocks.3.attn.hook_z", 3, "attn.hook_z"),
        ("layers.3.mlp", 3, "mlp"),
        ("model.layers.3.self_attn.o_proj.input", 3, "self_attn.o_proj.input"),
        ("hook_embed", None, "hook_embed"),
        ("embed_tokens", None, "embed_tokens"),
        (None, None, None),
    ],
)
def test_names_of_hooks(name, layer, point):
    assert place(name) == (layer, point)


def offered(release, **asked):
    """Ids that would be loaded of a release of SAELens."""
    about = get_pretrained_saes_directory()[release]
    return choose(release_offers(about), f"release {release!r}", **asked)


GEMMA_3 = {"270m": 18, "1b": 26, "4b": 34, "12b": 48, "27b": 62}


@pytest.mark.parametrize(
    ("release", "asked", "layers", "point", "first"),
    [
        (
            "gemma-scope-2b-pt-res-canonical",
            {"width": 16384},
            26,
            "resid_post",
            "layer_0/width_16k/canonical",
        ),
        (
            "gemma-scope-2b-pt-res-canonical",
            {"width": 65536, "layers": [3, 20, 3]},
            [3, 20],
            "resid_post",
            "layer_3/width_65k/canonical",
        ),
        (
            "gemma-scope-2b-pt-res-canonical",
            {"width": 1048576},
            [5, 12, 19],
            "resid_post",
            "layer_5/width_1m/canonical",
        ),
        (
            "gemma-scope-2b-pt-res",
            {"width": 16384, "l0": 70.0},
            26,
            "resid_post",
            "layer_0/width_16k/average_l0_46",
        ),
        (
            "gemma-scope-9b-pt-res-canonical",
            {"width": 131072},
            42,
            "resid_post",
            "layer_0/width_131k/canonical",
        ),
        (
            "gemma-scope-9b-it-res",
            {"width": 16384, "l0": 80.0},
            [9, 20, 31],
            "resid_post",
            "layer_9/width_16k/average_l0_88",
        ),
        *(
            (
                f"gemma-scope-2-{size}-{kind}-res-all",
                {"width": 16384, "l0": 10.0},
                depth,
                "resid_post",
                "layer_0_width_16k_l0_small",
            )
            for size, depth in GEMMA_3.items()
            for kind in ("pt", "it")
        ),
        (
            "gemma-scope-2-1b-pt-res-all",
            {"width": 262144, "l0": 100.0},
            26,
            "resid_post",
            "layer_0_width_262k_l0_big",
        ),
        ("llama_scope_lxr_8x", {}, 32, "resid_post", "l0r_8x"),
        ("llama_scope_lxr_32x", {"layers": [31]}, [31], "resid_post", "l31r_32x"),
        (
            "gpt2-small-res-jb",
            {"hook_point": "resid_pre"},
            12,
            "resid_pre",
            "blocks.0.hook_resid_pre",
        ),
        (
            "gpt2-small-res-jb",
            {"layers": [4, 5]},
            [4, 5],
            "resid_pre",
            "blocks.4.hook_resid_pre",
        ),
        (
            "gpt2-small-res-jb",
            {"layers": [11]},
            [11],
            "resid_post",
            "blocks.11.hook_resid_post",
        ),
        (
            "gpt2-small-res-jb-feature-splitting",
            {"width": 3072},
            [8],
            "resid_pre",
            "blocks.8.hook_resid_pre_3072",
        ),
        (
            "gpt2-small-resid-mid-v5-32k",
            {},
            12,
            "resid_mid",
            "blocks.0.hook_resid_mid",
        ),
        (
            "pythia-70m-deduped-res-sm",
            {},
            6,
            "resid_post",
            "blocks.0.hook_resid_post",
        ),
        ("qwen-scope-3-1.7b-base-w32k-l50", {}, 28, "resid_post", "layer0"),
        ("qwen-scope-3.5-27b-w80k-l100", {}, 64, "resid_post", "layer0"),
        (
            "gemma-2-2b-res-matryoshka-dc",
            {},
            25,
            "resid_post",
            "blocks.0.hook_resid_post",
        ),
        (
            "goodfire-llama-3.1-8b-instruct",
            {},
            [19],
            "resid_post",
            "layer_19",
        ),
        (
            "llama-3.1-8b-instruct-andyrdt",
            {},
            [3, 7, 11, 15, 19, 23, 27],
            "resid_post",
            "resid_post_layer_3_trainer_1",
        ),
    ],
)
def test_what_a_release_offers(release, asked, layers, point, first):
    found = offered(release, **asked)
    numbers = list(range(layers)) if isinstance(layers, int) else layers
    assert [offer.layer for offer in found] == numbers
    assert {offer.hook_point for offer in found} == {point}
    assert found[0].name == first
    if "width" in asked:
        assert {offer.width for offer in found} == {asked["width"]}


def test_in_every_release_each_id_has_its_layer_and_place():
    named = {"embedding/width_4k"}  # the only ones of no layer
    for release, about in get_pretrained_saes_directory().items():
        offers = {offer.name: offer for offer in release_offers(about)}
        left_out = {i for i in about.saes_map if i not in offers}
        assert {"/".join(i.split("/")[:2]) for i in left_out} <= named, release
        assert all(offer.hook_point for offer in offers.values()), release
        # Where an id says its hook, that is what it is.
        for sae_id, offer in offers.items():
            if sae_id.startswith("blocks."):
                assert f"blocks.{offer.layer}." in sae_id, release
                if "resid" in sae_id:
                    assert str(offer.hook_point) in sae_id, release
    kinds = {
        "-att": "attn_out",
        "-mlp": "mlp_out",
        "transcoder": "transcoder",
        "lxa": "attn_out",
        "lxm": "mlp_out",
    }
    for release, about in get_pretrained_saes_directory().items():
        for part, kind in kinds.items():
            if part in release:
                points = {offer.hook_point for offer in release_offers(about)}
                assert points == {kind}, release


@pytest.mark.parametrize(
    ("release", "asked", "words"),
    [
        (
            "gemma-scope-2b-pt-res-canonical",
            {},
            r"release 'gemma-scope-2b-pt-res-canonical' has 2 SAEs for layer 0: "
            r"layer_0/width_16k/canonical \(16384 features, L0 105\), "
            r"layer_0/width_65k/canonical \(65536 features, .*\); choose with width= "
            r"\(in vlm_probe\.load sae_width=, on the command line --sae-width\)$",
        ),
        (
            "gemma-scope-2b-pt-res",
            {"width": 16384},
            r"has 5 SAEs for layer 0: layer_0/width_16k/average_l0_105 .*; choose with "
            r"l0= \(in vlm_probe\.load sae_l0=, on the command line --sae-l0\)$",
        ),
        (
            "gemma-scope-2b-pt-res",
            {"l0": 70.0},
            r"; choose with width= and l0= \(in vlm_probe\.load sae_width= and "
            r"sae_l0=, on the command line --sae-width and --sae-l0\)$",
        ),
        (
            "gemma-scope-2b-pt-res-canonical",
            {"width": 16384, "layers": [3, 26, 27]},
            r"has no SAE of resid_post for layers 26-27, it has resid_post \(layers "
            r"0-25\)",
        ),
        (
            "gemma-scope-2b-pt-res-canonical",
            {"width": 1048576, "layers": [3, 5]},
            r"no SAE of 1048576 features for layer 3, it has 16384 \(layers 0-25\), "
            r"32768 \(layer 12\), 65536 \(layers 0-25\), .*76 \(layers 5, 12, 19\)",
        ),
        (
            "gemma-scope-2b-pt-res-canonical",
            {"width": 12345},
            r"has no SAE of 12345 features for layers 0-25, it has 16384",
        ),
        (
            "gpt2-small-res-jb",
            {},
            r"has SAEs of resid_post \(layer 11\), resid_pre \(layers 0-11\); choose "
            r"one with hook_point=",
        ),
        (
            "gpt2-small-res-jb",
            {"hook_point": "resid_mid"},
            r"has no SAE of resid_mid, it has resid_post \(layer 11\), resid_pre \(l",
        ),
        (
            "gpt2-small-res-jb",
            {"hook_point": "resid_post", "layers": [10, 11]},
            r"has no SAE of resid_post for layer 10, it has resid_post \(layer 11\)",
        ),
        (
            "gpt2-small-res-jb",
            {"hook_point": "mlp_out"},
            r"unknown hook point 'mlp_out'; valid: resid_pre, resid_mid, resid_post",
        ),
        (
            "gemma-scope-2b-pt-transcoders",
            {},
            r"has no SAE of a residual stream \(.*\), it has transcoder \(layers 0-2",
        ),
        (
            "llama_scope_lxm_8x",
            {"hook_point": "resid_post"},
            r"has no SAE of a residual stream \(.*\), it has mlp_out \(layers 0-31\)",
        ),
        (
            "llama_scope_r1_distill",
            {},
            r"has 3 SAEs for layer 0: l0r_800m_slimpajama, .*; they differ in neither "
            r"width nor L0",
        ),
        (
            "sae_bench_pythia70m_sweep_topk_ctx128_0730",
            {"layers": [3]},
            r"has 24 SAEs for layer 3: .* and 12 more; they differ in neither",
        ),
    ],
)
def test_what_a_release_has_not_is_said(release, asked, words):
    with pytest.raises(ValueError, match=words):
        offered(release, **asked)


def test_of_two_as_near_the_sparser_is_taken():
    offers = [Offer(f"{n}", 0, "resid_post", 8, n) for n in (90.0, 50.0, 20.0)]
    for l0, name in ((70.0, "50"), (71.0, "90"), (35.0, "20"), (1.0, "20")):
        (found,) = choose(offers, "they", l0=l0)
        assert found.name == f"{name}.0"


def test_unknown_l0_and_width_are_no_hindrance_where_there_is_no_choice():
    offers = [Offer("a", 0, None, None, None), Offer("b", 1, "resid_pre", 8, None)]
    found = choose(offers, "they", width=8, l0=4.0, hook_point="resid_pre")
    assert [offer.name for offer in found] == ["a", "b"]


def test_whole_numbers_as_ranges():
    assert ranges([7, 0, 1, 2, 3, 3]) == "0-3, 7"
    assert (ranges([]), ranges([5]), ranges({1, 2})) == ("", "5", "1-2")


# Folders


def test_a_folder_is_chosen_from_like_a_release(tmp_path):
    for layer in (0, 1):
        for l0 in (20, 71, 120):
            folder = f"layer_{layer}/width_16k/average_l0_{l0}"
            write_gemma_scope(tmp_path / folder, weights(l0))
        wide = weights(9, features=64)
        write_gemma_scope(tmp_path / f"layer_{layer}/width_65k/average_l0_70", wide)
    found = load_saes(tmp_path, width=FEATURES, l0=80.0)
    assert list(found) == [0, 1]
    name = f"{tmp_path.name}/layer_0/width_16k/average_l0_71"
    assert found[0].name == name
    assert torch.equal(found[0].sae.W_dec.data, weights(71)["W_dec"])
    assert load_saes(tmp_path, width=64, layers=[1])[1].n_features == 64
    with pytest.raises(ValueError, match=r"4 SAEs for layer 0: .* width= and l0= \("):
        load_saes(tmp_path)
    with pytest.raises(ValueError, match=r"3 SAEs for layer 0: .*; choose with l0= \("):
        load_saes(tmp_path, width="32")
    with pytest.raises(
        ValueError, match=r"no SAE of 16384 features for layers 0-1, it"
    ):
        load_saes(tmp_path, width="16k")
    with pytest.raises(
        ValueError, match=r"no SAE of resid_post for layer 2, it has re"
    ):
        load_saes(tmp_path, layers=[2], width=64)


def test_the_same_layer_twice_is_refused(tmp_path):
    for name in ("a", "b"):
        write_saelens(tmp_path / name / "layer_3", weights())
    words = (
        r"2 SAEs for layer 3: a/layer_3 \(32 features\), b/layer_3 \(32 features\); "
        r"they differ in neither width nor L0; give a folder that has one of them"
    )
    with pytest.raises(ValueError, match=words):
        load_saes(tmp_path)
    assert list(load_saes(tmp_path / "a")) == [3]


def test_one_hook_point_at_a_time(tmp_path):
    for layer, point in ((0, "resid_pre"), (1, "resid_pre"), (1, "resid_post")):
        hook = f"blocks.{layer}.hook_{point}"
        write_saelens(tmp_path / f"{layer}-{point}", weights(), hook_name=hook)
    with pytest.raises(
        ValueError, match=r"has SAEs of resid_post \(layer 1\), resid_p"
    ):
        load_saes(tmp_path)
    found = load_saes(tmp_path, hook_point="resid_pre")
    assert [(sae.layer, sae.hook_point) for sae in found.values()] == [
        (0, "resid_pre"),
        (1, "resid_pre"),
    ]


def test_what_does_not_say_its_place_is_taken_at_the_users_word(tmp_path):
    write_gemma_scope(tmp_path / "layer_3", weights())
    assert load_saes(tmp_path)[3].hook_point == "resid_post"
    sae = load_saes(tmp_path, hook_point="resid_mid")[3]
    assert sae.hook_point == "resid_mid"
    sae.save(tmp_path / "kept" / "layer_3")
    assert load_saes(tmp_path / "kept")[3].hook_point == "resid_mid"


def test_a_folder_may_be_named_by_a_string_and_comes_before_a_release(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_sparsify(tmp_path / "gpt2-small-res-jb" / "layers.2", weights())
    assert list(load_saes("gpt2-small-res-jb")) == [2]
    assert load_saes("gpt2-small-res-jb")[2].name == "gpt2-small-res-jb/layers.2"


def test_where_there_is_nothing(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no SAEs in .*: expected folders laye"
    ):
        load_saes(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"no SAEs in .*/no: there is no such f"
    ):
        load_saes(tmp_path / "no")
    with pytest.raises(FileNotFoundError, match=r"there is no folder '/no/such', nor"):
        load_saes("/no/such")


def test_an_unknown_release_and_the_nearest():
    words = (
        r"there is no folder 'gemma-scope-2b-res-canonical', nor has SAELens a release "
        r"of that name; near it are .*gemma-scope-2b-pt-res-canonical"
    )
    with pytest.raises(ValueError, match=words):
        load_saes("gemma-scope-2b-res-canonical")
    words = "near it are gemma-scope-2b-pt-res, gemma-scope-2b-pt-res-canonical$"
    with pytest.raises(ValueError, match=words):
        load_saes("google/gemma-scope-2b-pt-res")


def test_an_unknown_dtype_is_refused(tmp_path):
    write_saelens(tmp_path / "layer_0", weights())
    with pytest.raises(ValueError, match="dtype 'int8': expected one of float32, bflo"):
        load_saes(tmp_path, dtype="int8")


# Releases, from a cache of the hub


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(
        huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub")
    )
    return tmp_path / "hub"


@pytest.fixture
def shrink(monkeypatch):
    """Lets a release, whose sizes sae-lens knows by heart, have the tiny ones."""

    def change(release, **overrides):
        about = get_pretrained_saes_directory()[release]
        sizes = {"d_in": D_MODEL, "d_sae": FEATURES} | overrides
        merged = (about.config_overrides or {}) | sizes
        monkeypatch.setattr(about, "config_overrides", merged)

    return change


def same(sae, w, architecture, **how):
    x = torch.randn(30, D_MODEL) * 2
    codes, x_hat = sae.code(x)
    wanted, wanted_hat = expected(x, w, architecture, **how)
    assert codes.l0().tolist() == (wanted != 0).sum(1).tolist()
    torch.testing.assert_close(x_hat.double(), wanted_hat, atol=1e-5, rtol=1e-5)


def test_gemma_scope_as_released(cache, shrink):
    release = "gemma-scope-2b-pt-res-canonical"
    shrink(release, d_sae=16384)
    repo = cached(cache, "google/gemma-scope-2b-pt-res")
    about = get_pretrained_saes_directory()[release]
    for layer in (3, 0):
        path = about.saes_map[f"layer_{layer}/width_16k/canonical"]
        write_gemma_scope(repo / path, weights(layer, features=16384))
    found = load_saes(release, layers=[3, 0], width="16k", dtype="float64")
    assert list(found) == [0, 3]
    for layer, sae in found.items():
        assert sae.name == f"{release}/layer_{layer}/width_16k/canonical"
        assert (sae.hook_point, sae.model_name) == ("resid_post", "gemma-2-2b")
        assert sae.neuronpedia_id == f"gemma-2-2b/{layer}-gemmascope-res-16k"
        assert (sae.processing, sae.prepend_bos) == ({}, True)
        assert sae.sae.dtype == torch.float64
        same(sae, weights(layer, features=16384), "jumprelu", b_dec_first=False)
    # The same files, as a folder.
    (other,) = load_saes(repo, layers=[3]).values()
    assert torch.equal(other.sae.W_enc.double(), found[3].sae.W_enc)
    assert other.model_name == found[3].model_name


def test_a_width_that_is_not_what_was_asked_for_is_refused(cache, shrink):
    release = "gemma-scope-2b-pt-res-canonical"
    shrink(release)
    repo = cached(cache, "google/gemma-scope-2b-pt-res")
    write_gemma_scope(repo / "layer_0/width_16k/average_l0_105", weights())
    with pytest.raises(ValueError, match="has 32 features, asked for were 16384"):
        load_saes(release, layers=[0], width="16k")


def test_gpt2_as_released(cache):
    repo = cached(cache, "jbloom/GPT2-Small-SAEs-Reformatted")
    for layer in (4, 5):
        hook = f"blocks.{layer}.hook_resid_pre"
        write_old_saelens(repo / hook, weights(layer), hook)
    found = load_saes("gpt2-small-res-jb", layers=[4, 5], hook_point="resid_pre")
    for layer, sae in found.items():
        assert (sae.layer, sae.hook_point) == (layer, "resid_pre")
        assert (sae.model_name, sae.prepend_bos) == ("gpt2-small", True)
        assert sae.processing == {"center_writing_weights": True}
        assert sae.neuronpedia_id == f"gpt2-small/{layer}-res-jb"
        same(sae, weights(layer), "standard", b_dec_first=True)
    # A folder keeps what the release knew.
    found[4].save(cache / "kept" / "layer_4")
    again = load_saes(cache / "kept")[4]
    assert again.processing == {"center_writing_weights": True}
    assert again.neuronpedia_id == "gpt2-small/4-res-jb"


def test_what_the_list_knows_is_kept_for_configs_of_today_too(
    cache, shrink, monkeypatch
):
    """sae-lens puts it where only a config from before its version 6 has it."""
    release = "gemma-2-2b-res-matryoshka-dc"
    shrink(release, model_from_pretrained_kwargs={"fold_ln": True})
    repo = cached(cache, "chanind/gemma-2-2b-batch-topk-matryoshka-saes-w-32k-l0-40")
    hook = "blocks.4.hook_resid_post"
    write_saelens(repo / "standard" / hook, weights(), "jumprelu", hook_name=hook)
    about = get_pretrained_saes_directory()[release]
    monkeypatch.setitem(about.neuronpedia_id, hook, "gemma-2-2b/4-res")
    sae = load_saes(release, layers=[4])[4]
    assert sae.model_name == "gemma-2-2b"
    assert sae.processing == {"fold_ln": True}
    assert sae.neuronpedia_id == "gemma-2-2b/4-res"
    same(sae, weights(), "jumprelu", b_dec_first=True)


def test_llama_scope_as_released_is_what_its_folder_is(cache):
    repo = cached(cache, "fnlp/Llama3_1-8B-Base-LXR-8x")
    folder = repo / "Llama3_1-8B-Base-L3R-8x"
    w = weights()
    write_llama_scope(folder, w, "blocks.3.hook_resid_post")
    sae = load_saes("llama_scope_lxr_8x", layers=[3], width=FEATURES)[3]
    assert sae.model_name == "meta-llama/Llama-3.1-8B"
    assert sae.neuronpedia_id == "llama3.1-8b/3-llamascope-res-32k"
    scale = D_MODEL**0.5 / 7.5
    w["threshold"] = 0.53 * scale / w["W_dec"].norm(dim=1)
    how = {"normalize": "expected_average_only_in", "factor": scale}
    same(sae, w, "jumprelu", b_dec_first=False, **how)
    x = torch.randn(10, D_MODEL)
    assert torch.equal(load_saes(folder)[3].code(x)[1], sae.code(x)[1])


@pytest.mark.parametrize("config", [True, False])
def test_gemma_scope_2_as_released_needs_no_network(cache, config):
    repo = cached(cache, "google/gemma-scope-2-1b-pt")
    folder = repo / "resid_post_all" / "layer_3_width_16k_l0_small"
    about = {
        "model_name": "gemma-v3-1b-pt",
        "architecture": "jump_relu",
        "hf_hook_point_in": "model.layers.3.output",
    }
    w = weights(features=16384)
    write_gemma_scope_2(folder, w, about if config else None)
    release = "gemma-scope-2-1b-pt-res-all"
    asked = {"layers": [3], "width": "16k", "l0": 10.0, "dtype": "float64"}
    sae = load_saes(release, **asked)[3]
    assert sae.name == f"{release}/layer_3_width_16k_l0_small"
    assert (sae.hook_point, sae.model_name) == ("resid_post", "google/gemma-3-1b-pt")
    same(sae, w, "jumprelu", b_dec_first=False)


def test_qwen_scope_as_released(cache, shrink):
    release = "qwen-scope-3-1.7b-base-w32k-l50"
    shrink(release, activation_fn_kwargs={"k": K})
    repo = cached(cache, "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50")
    write_qwen_scope(repo / "layer27.sae.pt", weights())
    sae = load_saes(release, layers=[27])[27]
    assert sae.model_name == "Qwen/Qwen3-1.7B-Base"
    same(sae, weights(), "topk", b_dec_first=False)


def test_what_is_not_in_the_cache_is_said(cache):
    words = (
        r"SAE 'blocks\.4\.hook_resid_pre' of release 'gpt2-small-res-jb' is neither in "
        r"the cache nor to be had from the Hugging Face hub \(.*\); load it once with "
        r"network, which keeps it, or give a folder with the files "
        r"\(jbloom/GPT2-Small-SAEs-Reformatted, blocks\.4\.hook_resid_pre\)"
    )
    with pytest.raises(FileNotFoundError, match=words):
        load_saes("gpt2-small-res-jb", layers=[4])
    for release in ("llama_scope_lxr_8x", "gemma-scope-2-1b-pt-res-all"):
        with pytest.raises(FileNotFoundError, match="is neither in the cache nor"):
            load_saes(
                release, layers=[3], l0=10.0, width=16384 if "g" in release else None
            )


@pytest.mark.parametrize(
    ("release", "repo", "file", "write"),
    [
        (
            "gpt2-small-res-jb",
            "jbloom/GPT2-Small-SAEs-Reformatted",
            "blocks.4.hook_resid_pre/sae_weights.safetensors",
            lambda folder: write_old_saelens(
                folder, weights(), "blocks.4.hook_resid_pre"
            ),
        ),
        (
            "gemma-2-2b-res-matryoshka-dc",
            "chanind/gemma-2-2b-batch-topk-matryoshka-saes-w-32k-l0-40",
            "standard/blocks.4.hook_resid_post/sae_weights.safetensors",
            lambda folder: write_saelens(folder, weights()),
        ),
    ],
)
def test_what_is_damaged_in_the_cache_is_said(cache, release, repo, file, write):
    path = cached(cache, repo) / file
    write(path.parent)
    path.write_bytes(path.read_bytes()[:500])
    words = rf"of release '{release}' is damaged in the cache .*{repo}.* load it again"
    with pytest.raises(ValueError, match=words):
        load_saes(release, layers=[4])


def test_a_release_that_needs_a_factor_that_no_one_knows_is_refused(cache):
    repo = cached(cache, "chanind/gemma-2-2b-batch-topk-matryoshka-saes-w-32k-l0-40")
    folder = repo / "standard" / "blocks.4.hook_resid_post"
    hook, normalize = "blocks.4.hook_resid_post", "expected_average_only_in"
    write_saelens(folder, weights(), hook_name=hook, normalize_activations=normalize)
    with pytest.raises(
        ValueError, match="normalized by 'expected_average_only_in', an"
    ):
        load_saes("gemma-2-2b-res-matryoshka-dc", layers=[4])


# One SAE


@pytest.mark.parametrize(
    ("hook", "point"),
    [
        ("blocks.1.hook_resid_pre", "resid_pre"),
        ("blocks.1.hook_resid_mid", "resid_mid"),
        ("gpt_neox.layers.1", "resid_post"),
        (None, "resid_mid"),
    ],
)
def test_a_place_agrees_with_what_the_sae_says(hook, point):
    sae = tiny_sae(1).sae
    sae.cfg.metadata.hook_name = hook
    assert LayerSae(1, sae, "x", point).hook_point == point
    if hook:
        other = "resid_post" if point != "resid_post" else "resid_pre"
        with pytest.raises(ValueError, match=rf"expected 'blocks\.1\.hook_{other}' fo"):
            LayerSae(1, sae, "x", other)
        with pytest.raises(ValueError, match=rf"expected 'blocks\.2\.hook_{point}' fo"):
            LayerSae(2, sae, "x", point)


def test_an_unknown_place_is_refused():
    with pytest.raises(
        ValueError, match="is for 'mlp_out'; valid: resid_pre, resid_mi"
    ):
        LayerSae(0, tiny_sae(0).sae, "x", "mlp_out")


def test_what_it_knows_of_its_model():
    sae = tiny_sae(0)
    assert (sae.model_name, sae.processing, sae.prepend_bos) == (None, {}, None)
    assert sae.neuronpedia_id is None
    sae.sae.cfg.metadata.model_from_pretrained_kwargs = {"fold_ln": True}
    assert sae.processing == {"fold_ln": True}
    assert (sae.d_model, sae.n_features) == (16, 64)


def test_an_architecture_that_does_not_reconstruct_its_input_is_refused():
    sae = SAE.from_dict(
        {
            "architecture": "transcoder",
            "d_in": 4,
            "d_out": 4,
            "d_sae": 8,
            "apply_b_dec_to_input": False,
        }
    )
    words = r"of architecture 'transcoder'; known are standard, jumprelu, topk, gated"
    with pytest.raises(ValueError, match=words):
        LayerSae(0, sae, "x")


def test_the_toys_saes_are_found(tmp_path):
    from vlm_probe.examples import data_folder

    folder = data_folder() / "toy" / "saes"
    found = load_saes(folder)
    assert list(found) == list(range(8))
    assert {sae.sae.dtype for sae in found.values()} == {torch.float32}
    assert found[0].name == "saes/layer_0"
    shutil.copytree(folder / "layer_7", tmp_path / "layer_7")
    assert list(load_saes(tmp_path)) == [7]
