"""What the control arms keep of the trained vectors, and what they do not."""

import numpy as np
import pytest
import torch

from vlm_probe.adapter import LinearAdapter, MlpAdapter
from vlm_probe.controls import noise, previous_image, random_adapter


def correlated(tokens, d_vision, rank=None):
    """Tokens far from mean 0, with correlated dimensions, in float64."""
    mixing = torch.randn(rank or d_vision, d_vision, dtype=torch.float64)
    mixing = mixing * torch.logspace(0, -2, d_vision, dtype=torch.float64)
    drawn = torch.randn(tokens, len(mixing), dtype=torch.float64)
    return drawn @ mixing + 3 * torch.randn(d_vision, dtype=torch.float64)


def adapter_for(patches, d_model):
    adapter = LinearAdapter(patches.shape[1], d_model).double()
    return adapter.requires_grad_(False)


def moments(x):
    return x.mean(0), torch.cov(x.T, correction=0)


def assert_same_moments(one, other):
    for a, b in zip(moments(one), moments(other), strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()


def r_squared(y, x):
    """The share of y's variance, per dimension, that its counterpart in x explains."""
    y, x = y - y.mean(0), x - x.mean(0)
    return ((y * x).sum(0) / (y.norm(dim=0) * x.norm(dim=0))).square()


@pytest.mark.parametrize(
    ("d_vision", "d_model", "rank"),
    [(8, 30, None), (12, 12, None), (40, 6, None), (20, 12, 11)],
)
def test_random_adapter_has_the_trained_ones_mean_and_covariance(
    d_vision, d_model, rank
):
    # Rank 11 of 20: the other directions have no variance at all.
    patches = correlated(500, d_vision, rank)
    adapter = adapter_for(patches, d_model)
    trained = adapter(patches)
    untrained = random_adapter(adapter, patches, seed=0)(patches)
    assert trained.isfinite().all()
    assert_same_moments(untrained, trained)


def test_random_adapter_of_a_network_keeps_the_moments_of_what_comes_out():
    patches = correlated(500, 8)
    adapter = MlpAdapter(8, 12).double().requires_grad_(False)
    trained = adapter(patches)
    untrained = random_adapter(adapter, patches, seed=0)(patches)
    assert_same_moments(untrained, trained)
    assert r_squared(untrained, trained).mean() < 0.5


def test_random_adapter_says_something_else_of_each_token():
    patches = correlated(2000, 60)
    adapter = adapter_for(patches, 16)
    trained = adapter(patches)
    maps = [random_adapter(adapter, patches, seed) for seed in (0, 0, 1, 2, 3)]
    first, again, *others = (each(patches) for each in maps)
    assert torch.equal(first, again)
    explained = torch.stack([r_squared(u, trained) for u in (first, *others)])
    # Independent maps of this covariance explain about 1 / 10 of each other; it is
    # not 1 / 60 because few directions hold most of the variance.
    assert explained.mean() < 0.25
    assert r_squared(first, others[0]).mean() < 0.4


def test_random_adapter_is_a_fixed_map():
    patches = correlated(200, 10)
    untrained = random_adapter(adapter_for(patches, 5), patches, seed=4)
    new = correlated(8, 10).reshape(2, 4, 10)
    whole = untrained(new)
    assert whole.shape == (2, 4, 5)
    for image in range(2):
        torch.testing.assert_close(untrained(new[[image]])[0], whole[image])
    # Affine, as the trained one is: the middle of two goes to the middle of two.
    middle = untrained(new.mean(0, keepdim=True))
    torch.testing.assert_close(middle, whole.mean(0, keepdim=True))


def test_random_adapter_with_one_direction_by_hand():
    # What varies in one direction only is kept, or mirrored at its mean, here 2.
    patches = torch.tensor([[1.0, 5], [2, 5], [3, 5]], dtype=torch.float64)
    adapter = adapter_for(patches, 1)
    adapter.linear.weight.copy_(torch.tensor([[10, 100]]))
    adapter.linear.bias.fill_(1)
    found = [random_adapter(adapter, patches, seed)(patches) for seed in range(8)]
    rounded = {tuple(map(round, each.flatten().tolist())) for each in found}
    assert rounded == {(511, 521, 531), (531, 521, 511)}


def test_noise_has_each_vectors_norm_and_nothing_else_of_it():
    vectors = torch.randn(3, 50, 64) * torch.logspace(-2, 2, 50)[:, None]
    drawn = noise(vectors, [0, 1, 2], seed=0)
    torch.testing.assert_close(drawn.norm(dim=-1), vectors.norm(dim=-1))
    cosine = torch.cosine_similarity(drawn, vectors, dim=-1)
    assert cosine.abs().max() < 0.6  # 1 / 8 is their standard deviation
    assert cosine.mean().abs() < 0.05
    between = torch.cosine_similarity(drawn[0], drawn[1], dim=-1)
    assert between.abs().max() < 0.6
    assert noise(torch.zeros(1, 2, 4), [0], seed=0).count_nonzero() == 0


def test_noise_does_not_depend_on_the_batches():
    vectors = torch.randn(4, 5, 6)
    whole = noise(vectors, [7, 3, 9, 4], seed=2)
    assert torch.equal(noise(vectors[1:3], [3, 9], seed=2), whole[1:3])
    assert torch.equal(noise(vectors[[3, 0]], [4, 7], seed=2), whole[[3, 0]])
    assert not torch.equal(noise(vectors, [7, 3, 9, 4], seed=3), whole)


def test_noise_keeps_the_dtype():
    vectors = torch.randn(1, 2, 8, dtype=torch.bfloat16)
    assert noise(vectors, [0], seed=0).dtype == torch.bfloat16


def test_previous_image_by_hand():
    a, b, c, d = (torch.full((2, 3), float(value)) for value in range(4))
    assert previous_image(torch.stack([a, b, c]), d)[:, 0, 0].tolist() == [3, 0, 1]
    assert torch.equal(previous_image(torch.stack([d]), c), c[None])


def test_calibration_tokens_may_be_float32():
    patches = correlated(500, 12).float()
    adapter = LinearAdapter(12, 9).requires_grad_(False)
    untrained = random_adapter(adapter, patches, seed=0)(patches)
    assert untrained.dtype == torch.float32
    trained = adapter(patches)
    np.testing.assert_allclose(untrained.mean(0), trained.mean(0), atol=1e-5)
    np.testing.assert_allclose(torch.cov(untrained.T), torch.cov(trained.T), atol=1e-4)
