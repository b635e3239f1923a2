"""Screened codes are the dense ones, whatever the numbers are like."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_encoding import random_sae

from vlm_probe.codes import code, encoding, screening, uses_screening
from vlm_probe.codes.screening import Screen, Screened, screen_of
from vlm_probe.saes import LayerSae

ULP = 2.0**-24
CROWDED = encoding._CROWDED


@pytest.fixture(autouse=True, scope="module")
def _screening_decides():
    """Not a dense product where much is near the threshold, as it all is here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "_CROWDED", 1.0)
        yield


def jumprelu(weight, bias, threshold):
    sae = random_sae("jumprelu", apply_b_dec_to_input=False, d_in=len(weight))
    with torch.no_grad():
        for name, value in {
            "W_enc": weight,
            "W_dec": weight.T.contiguous(),
            "b_enc": bias,
            "threshold": threshold,
        }.items():
            setattr(sae, name, torch.nn.Parameter(value, requires_grad=False))
    sae.cfg.d_sae = weight.shape[1]
    return sae


def exact(sae, x):
    """Pre-activations in float64, and how far float32 sums may be off them."""
    w = sae.W_enc.double()
    before = x.double() @ w + sae.b_enc.double()
    terms = x.double().abs() @ w.abs() + sae.b_enc.double().abs()
    return before, (len(w) + 2) * ULP * terms


def dense_of(codes):
    whole = torch.zeros(codes.n_tokens, codes.n_features)
    whole[codes.token, codes.feature] = codes.value
    return whole


def compare(sae, x):
    """Asserts that dense and screened codes agree; gives what there was to decide.

    Returns:
        Pairs of token and feature so near the threshold that bfloat16 alone could err.
    """
    dense, x_hat = code(sae, x, encoding="dense")
    screened, x_hat_too = code(sae, x, encoding="screened")
    before, rounding = exact(sae, x)
    least = sae.threshold.clamp(min=0).double()
    a, b = dense_of(dense), dense_of(screened)
    differs = (a != 0) != (b != 0)
    # In support only where float32 itself cannot tell, and each of these was counted.
    assert ((before - least).abs() <= 2 * rounding)[differs].all()
    assert int(differs.sum()) <= screened.n_close
    both = (a != 0) & (b != 0)
    # What two float32 sums of the same terms may be apart, or 1e-5 where that is more.
    allowed = (2 * rounding).clamp(min=1e-5)
    assert ((a - b).double().abs() <= allowed)[both].all()
    if not differs.any():
        scale = x_hat.abs().max().clamp(min=1)
        assert (x_hat - x_hat_too).abs().max() <= 1e-5 * scale
    # Nothing that fires was ruled out, before anything is computed in float32.
    gate = encoding._gate(sae)
    found = screen_of(sae, sae.W_enc).of(x, gate.bias, gate.least)
    proposed = found.candidates(0, len(least))
    assert proposed[before > least].all()
    assert proposed[a != 0].all()
    lost = x.norm(dim=1)[:, None] * sae.W_enc.norm(dim=0) * 2.0**-7
    return int(((before - least).abs() <= lost).sum())


def near_threshold(seed, n_tokens, d, n_features, scale, outlier, shared, offset):
    """An SAE and tokens whose pre-activations lie around its thresholds."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    x = normal(n_tokens, d) * scale
    # A part that all tokens have, and a dimension as large as real models have it.
    x += shared * scale * normal(d)
    x[:, 0] += outlier * scale
    weight = normal(d, n_features) / d**0.5
    bias = normal(n_features) * scale / 10
    before = x @ weight + bias
    # Each feature's threshold is some token's own pre-activation, or a step beside it.
    token = torch.arange(n_features) % n_tokens
    threshold = before[token, torch.arange(n_features)].abs()
    step = torch.tensor([0.0, 1, -1, 40, -40])[torch.arange(n_features) % 5]
    threshold = threshold * (1 + step * 2 * ULP) + offset * scale * 2.0**-8
    return jumprelu(weight, bias, threshold), x


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**20),
    n_tokens=st.integers(1, 40),
    d=st.sampled_from([3, 31, 64, 100]),
    scale=st.sampled_from([1e-4, 1.0, 30.0, 1e5]),
    outlier=st.sampled_from([0.0, 50.0, 3000.0]),
    shared=st.sampled_from([0.0, 1.0, 100.0]),
    offset=st.sampled_from([-1.0, 0.0, 1.0]),
)
def test_any_numbers(seed, n_tokens, d, scale, outlier, shared, offset):
    compare(*near_threshold(seed, n_tokens, d, 600, scale, outlier, shared, offset))


def test_a_million_pairs_near_the_threshold():
    near = 0
    for seed, (outlier, shared) in enumerate(
        [(0.0, 0.0), (0.0, 200.0), (500.0, 0.0), (500.0, 50.0), (0.0, 1000.0)]
    ):
        near += compare(*near_threshold(seed, 100, 96, 6000, 3.0, outlier, shared, 0.0))
    assert near >= 1_000_000


@pytest.mark.parametrize("sign", [1, -1])
def test_roundings_that_all_go_the_same_way(sign):
    """The largest error there can be: every factor is rounded down by half a step."""
    d, below = 64, 1 + 2.0**-8 * (1 - 2.0**-10)  # rounds to 1
    x = torch.full((2, d), below)
    x[1] = -x[0]  # so that the mean is zero, and nothing of it can be taken out
    weight = torch.full((d, 3), sign * below)
    full = d * below**2
    threshold = torch.tensor([full - 1e-3, full + 1e-3, d * 1.0])
    sae = jumprelu(weight, torch.zeros(3), threshold)
    codes, _ = code(sae, x, encoding="screened")
    # In bfloat16 the product is 64, and the pre-activation is really 64.5.
    assert full - d > 0.4
    row = 0 if sign == 1 else 1
    assert codes.token.tolist() == [row, row]
    assert codes.feature.tolist() == [0, 2]
    compare(sae, x)


def test_what_is_degenerate():
    weight = torch.randn(16, 8)
    weight[:, 0] = 0  # a dead encoder
    threshold = torch.full((8,), 0.5)
    threshold[1], threshold[2] = torch.inf, -1.0
    bias = torch.zeros(8)
    bias[0], bias[3] = 1.0, -1e30
    sae = jumprelu(weight, bias, threshold)
    x = torch.randn(5, 16)
    x[2] = 0
    compare(sae, x)
    codes, _ = code(sae, x, encoding="screened")
    assert (codes.feature == 0).sum() == 5
    assert not set(codes.feature.tolist()) & {1, 3}
    compare(sae, x[:1])
    assert code(sae, x[:0], encoding="screened")[0].n_tokens == 0


def test_where_too_many_are_proposed_it_is_dense(monkeypatch):
    monkeypatch.setattr(encoding, "_CROWDED", CROWDED)
    sae, x = near_threshold(0, 40, 64, 600, 1.0, 0.0, 0.0, 0.0)
    sae.threshold.fill_(-1.0)  # half of all features fire
    dense, _ = code(sae, x, encoding="dense")
    refuse = pytest.fail  # one pair after the other would be slower
    monkeypatch.setattr(Screened, "products", lambda *_: refuse("not dense"))
    screened, _ = code(sae, x, encoding="screened")
    for name in ("token", "feature", "value"):
        assert torch.equal(getattr(screened, name), getattr(dense, name))


def test_only_crowded_chunks_are_dense(monkeypatch):
    """Features 0-255 fire all the time, the others hardly."""
    monkeypatch.setattr(encoding, "_CROWDED", CROWDED)
    sae, x = near_threshold(0, 40, 64, 1024, 1.0, 0.0, 0.0, 0.0)
    sae.threshold[:256] = -1.0
    sae.threshold[256:] = 3.0
    monkeypatch.setitem(encoding.TILE, "cpu", 1)  # chunks of 256
    asked = []
    products = Screened.products

    def counted(self, token, feature):
        asked.append(int(feature.min()))
        return products(self, token, feature)

    monkeypatch.setattr(Screened, "products", counted)
    compare(sae, x)
    assert asked and min(asked) >= 256


@pytest.mark.parametrize("architecture", ["standard", "gated"])
def test_other_architectures(architecture):
    sae = random_sae(architecture)
    # Few fire, as of real ones.
    name = "b_gate" if architecture == "gated" else "b_enc"
    with torch.no_grad():
        getattr(sae, name).sub_(2.5)
    x = torch.randn(90, 24)
    dense, x_hat = code(sae, x, encoding="dense")
    screened, x_hat_too = code(sae, x, encoding="screened")
    assert 0 < len(dense.token) < 90 * 700 / 20
    assert torch.equal(dense.token, screened.token)
    assert torch.equal(dense.feature, screened.feature)
    torch.testing.assert_close(dense.value, screened.value, atol=1e-5, rtol=0)
    torch.testing.assert_close(x_hat, x_hat_too, atol=1e-5, rtol=0)


def test_what_rounding_decides_is_counted():
    """Each feature's threshold is some token's own pre-activation, and nearly so."""
    sae, x = near_threshold(0, 40, 64, 600, 1.0, 0.0, 0.0, 0.0)
    codes, _ = code(sae, x, encoding="screened")
    before, _ = exact(sae, x)
    band = 2 * (64 + 2) * ULP * x.norm(dim=1)[:, None] * sae.W_enc.norm(dim=0)
    off = (before - sae.threshold.clamp(min=0)).abs()
    least, most = (int((off <= band * much).sum()) for much in (0.9, 1.1))
    assert 300 < least <= codes.n_close <= most
    assert code(sae, x, encoding="dense")[0].n_close == 0


def test_changed_weights_are_seen():
    sae, x = near_threshold(0, 40, 64, 600, 1.0, 0.0, 0.0, 1.0)
    compare(sae, x)
    with torch.no_grad():
        sae.W_enc.mul_(-1)
    compare(sae, x)
    sae.W_enc.data *= -2  # as sae-lens folds a factor into weights
    compare(sae, x)


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        sae = random_sae("standard")
        code(sae, torch.randn(3, 24), encoding="screened")


def test_chosen_where_the_hardware_has_it(monkeypatch):
    small, large = random_sae("jumprelu"), random_sae("jumprelu", d_sae=8192)
    assert uses_screening(small, "screened")
    assert not uses_screening(large, "dense")
    for fast in (True, False):
        monkeypatch.setattr(encoding, "fast_bfloat16", lambda _, fast=fast: fast)
        assert not uses_screening(small, "auto")
        assert uses_screening(large, "auto") is fast
        assert not uses_screening(random_sae("topk", d_sae=8192, k=9), "auto")
    assert screening.fast_bfloat16(torch.device("meta")) is False


def test_what_cannot_be_screened_says_why():
    for sae, words in (
        (random_sae("topk", k=9), r"\(topk\): it takes the largest of all features"),
        (random_sae("jumprelu", dtype="float64"), "computes in torch.float64, expect"),
        (random_sae("matching_pursuit", residual_threshold=1), "way of its own"),
    ):
        with pytest.raises(ValueError, match=words):
            code(sae, torch.randn(3, 24), encoding="screened")
    with pytest.raises(ValueError, match="unknown encoding 'fast'; valid: auto, dense"):
        LayerSae(0, random_sae("jumprelu"), "a").code(
            torch.randn(3, 24), encoding="fast"
        )


def test_dead_features_are_ruled_out():
    """Publishers set the threshold of a dead feature to infinity."""
    sae, x = near_threshold(0, 40, 64, 600, 1.0, 0.0, 0.0, 0.0)
    sae.threshold[::2] = torch.inf
    gate = encoding._gate(sae)
    found = screen_of(sae, sae.W_enc).of(x, gate.bias, gate.least)
    assert not found.candidates(0, 600)[:, ::2].any()
    compare(sae, x)


def test_the_screen_is_made_once():
    sae, _ = near_threshold(0, 4, 64, 600, 1.0, 0.0, 0.0, 1.0)
    first = screen_of(sae, sae.W_enc)
    assert isinstance(first, Screen)
    assert screen_of(sae, sae.W_enc) is first
