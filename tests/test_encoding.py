"""Codes that are never dense, against sae-lens' own encode and decode."""

import numpy as np
import pytest
import torch
from sae_lens import SAE
from tiny import D_MODEL, FEATURES, tiny_sae

from vlm_probe.codes import code, encoding

D, F, N = 24, 700, 90


def random_sae(architecture, *, dtype="float32", seed=0, **config):
    sae = SAE.from_dict(
        {
            "architecture": architecture,
            "d_in": D,
            "d_sae": F,
            "dtype": dtype,
            "device": "cpu",
            "apply_b_dec_to_input": True,
            "normalize_activations": "none",
            "metadata": {},
        }
        | config
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sae.named_parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) / 4)
            if name == "threshold":  # some below zero, where ReLU alone decides
                weight.add_(0.8)
    return sae.eval().requires_grad_(False)


CASES = {
    "standard": {},
    "jumprelu": {},
    "gated": {},
    "topk": {"k": 20},
    "abstopk": {"k": 20},
    "matching_pursuit": {"residual_threshold": 1e-2, "max_iterations": 4},
}


def dense_of(codes):
    whole = codes.value.new_zeros(codes.n_tokens, codes.n_features)
    whole[codes.token, codes.feature] = codes.value
    return whole


def assert_same(found, expected):
    """Up to the rounding of float32 sums, whose terms are as large as the largest."""
    off = (found - expected).abs().max()
    assert off <= 1e-6 * expected.abs().max(), float(off)


@pytest.mark.parametrize("tile", [2**10, 2**26])  # bytes: three chunks, and one
@pytest.mark.parametrize("architecture", CASES)
def test_codes_are_those_of_sae_lens(architecture, tile, monkeypatch):
    monkeypatch.setitem(encoding.TILE, "cpu", tile)
    sae = random_sae(architecture, **CASES[architecture])
    x = torch.randn(N, D) * 2
    codes, x_hat = code(sae, x)
    dense = sae.encode(x)
    assert_same(dense_of(codes), dense)
    assert_same(x_hat, sae.decode(dense))
    assert codes.l0().tolist() == (dense != 0).sum(1).tolist()
    assert 0 < codes.l0().double().mean() < F / 2  # some fire, and most do not


@pytest.mark.parametrize("scaling", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", ["jumprelu", "topk"])
def test_normalization_is_done_and_undone(architecture, scaling):
    sae = random_sae(architecture, normalize_activations=scaling, **CASES[architecture])
    x = torch.randn(N, D) * 5 + 1
    codes, x_hat = code(sae, x)
    dense = sae.encode(x)
    assert_same(dense_of(codes), dense)
    assert_same(x_hat, sae.decode(dense))


@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_top_k_by_decoder_norm(architecture):
    sae = random_sae(architecture, k=20, rescale_acts_by_decoder_norm=True)
    x = torch.randn(N, D) * 2
    codes, x_hat = code(sae, x)
    dense = sae.encode(x)
    assert_same(dense_of(codes), dense)
    assert_same(x_hat, sae.decode(dense))


@pytest.mark.parametrize("architecture", CASES)
def test_codes_are_ordered_by_token_then_feature(architecture, monkeypatch):
    monkeypatch.setitem(encoding.TILE, "cpu", 2**10)
    codes, _ = code(random_sae(architecture, **CASES[architecture]), torch.randn(N, D))
    key = codes.token * F + codes.feature
    assert (key[1:] > key[:-1]).all()


def test_activations_of_bfloat16_are_coded_in_the_dtype_of_the_sae():
    sae = random_sae("jumprelu")
    x = torch.randn(N, D, dtype=torch.bfloat16)
    codes, x_hat = code(sae, x)
    assert x_hat.dtype == torch.float32
    assert_same(dense_of(codes), sae.encode(x))


def test_an_sae_of_float64():
    sae = random_sae("jumprelu", dtype="float64")
    x = torch.randn(N, D)
    codes, x_hat = code(sae, x)
    assert_same(dense_of(codes), sae.encode(x))
    torch.testing.assert_close(x_hat, sae.decode(sae.encode(x)))


def test_hooks_are_obeyed():
    sae = random_sae("jumprelu")
    with sae.hooks([("hook_sae_acts_post", lambda acts, hook: acts * 2)]):
        doubled, _ = code(sae, torch.ones(3, D))
    plain, _ = code(sae, torch.ones(3, D))
    assert_same(doubled.value, plain.value * 2)


def test_an_inactive_feature_is_never_there():
    layer_sae = tiny_sae(0)
    x = torch.randn(50, D_MODEL)
    x[7] = layer_sae.sae.b_dec  # nothing fires
    layer_sae.sae.b_enc.copy_(-layer_sae.sae.b_dec @ layer_sae.sae.W_enc)
    codes, x_hat = layer_sae.code(x)
    assert 7 not in codes.token
    assert codes.l0()[7] == 0
    assert torch.equal(x_hat[7], layer_sae.sae.b_dec)
    assert (codes.value > 0.3).all()  # the threshold of the tiny autoencoder


def test_no_token_at_all():
    codes, x_hat = code(tiny_sae(0).sae, torch.zeros(0, D_MODEL))
    assert x_hat.shape == (0, D_MODEL)
    assert (codes.n_tokens, codes.n_features) == (0, FEATURES)


def test_what_fires_at_the_threshold_is_what_sae_lens_says():
    """Products are the very same, so even equality is decided alike."""
    sae = random_sae("jumprelu", apply_b_dec_to_input=False)
    # Whole numbers: no sum of them is rounded, in whatever order.
    with torch.no_grad():
        for weight in (sae.W_enc, sae.b_enc):
            weight.copy_((weight * 8).round())
        sae.threshold.copy_(torch.from_numpy(np.arange(F) % 9 - 1.0))
    x = (torch.randn(N, D) * 2).round()
    dense = sae.encode(x)
    before = x @ sae.W_enc + sae.b_enc
    assert (before == sae.threshold).sum() > 500
    codes, _ = code(sae, x)
    assert torch.equal(dense_of(codes), dense)
