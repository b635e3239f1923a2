"""The sums: numbers done by hand, laws, and what the bootstrap promises."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_probe.sums import LayerSums, bootstrap_weights, unit_sums
from vlm_probe.tokens import METRICS


def summed(x, x_hat, l0=None, unit=None, *, features=10, replicates=0, **how):
    x, x_hat = torch.as_tensor(x), torch.as_tensor(x_hat)
    unit = np.zeros(len(x), int) if unit is None else np.asarray(unit)
    l0 = torch.ones(len(x)).int() if l0 is None else torch.as_tensor(l0)
    sums = LayerSums(x.shape[1], features, replicates)
    weights = bootstrap_weights(list(range(unit.max() + 1)), replicates, 0)
    sums.add(x, x_hat, l0, unit, weights, **how)
    return sums


def test_two_tokens_by_hand():
    # x: (3, 4) and (0, 2); x_hat: (3, 3) and (0, 1). Both errors are (0, 1).
    row = summed([[3.0, 4], [0, 2]], [[3.0, 3], [0, 1]], l0=[2, 3]).row()
    assert row["mse"] == pytest.approx(2 / 4)  # 1 + 1 over 2 tokens x 2 dimensions
    # mean (1.5, 3); squared distances 2.25 + 1 each, so 6.5
    assert row["fvu"] == pytest.approx(2 / 6.5)
    assert row["nmse"] == pytest.approx((1 / 25 + 1 / 4) / 2)
    assert row["cosine"] == pytest.approx((21 / (5 * 18**0.5) + 1) / 2)
    assert row["l0"] == 2.5
    assert row["l0_share"] == 0.25
    assert row["norm"] == pytest.approx((5 + 2) / 2)
    assert (row["n_tokens"], row["n_images"]) == (2, 1)
    assert np.isnan(row["mse_low"])  # one image bounds nothing


def test_sums_move_to_the_next_image_by_hand():
    def sums(*images):
        unit = np.repeat(np.arange(len(images)), [len(image) for image in images])
        x = torch.tensor([[float(v)] for image in images for v in image])
        return unit_sums(x, x, torch.ones(len(x)).int(), unit, len(images))

    moved = sums([1], [2, 3], [4]).after(sums([7, 8, 9], [], []))
    expected = sums([7, 8, 9], [1], [2, 3])
    assert moved.counts.tolist() == expected.counts.tolist() == [3, 1, 2]
    assert torch.equal(moved.scalars, expected.scalars)
    assert moved.vector.tolist() == [[24], [1], [5]]


def test_every_metric_is_there():
    assert set(LayerSums(1, 1, 0).replicates()) == set(METRICS)


def test_perfect_reconstruction_is_zero_and_the_mean_predictor_one():
    x = torch.randn(50, 8, dtype=torch.float64) + 3
    perfect = summed(x, x).row()
    assert (perfect["mse"], perfect["fvu"], perfect["nmse"]) == (0, 0, 0)
    assert perfect["cosine"] == pytest.approx(1)
    mean = summed(x, x.mean(0).expand_as(x)).row()
    assert mean["fvu"] == pytest.approx(1, abs=1e-12)


def test_paper_convention_by_hand():
    # One image of one token with error 1, one of three tokens with error 9 each.
    x = torch.ones(4, 1)
    x_hat = x + torch.tensor([[1.0], [3], [3], [3]])
    unit, l0 = [0, 1, 1, 1], [4, 2, 2, 2]
    pooled = summed(x, x_hat, l0, unit).row()
    paper = summed(x, x_hat, l0, unit, convention="paper").row()
    assert pooled["mse"] == (1 + 9 * 3) / 4
    assert paper["mse"] == (1 + 9) / 2
    assert pooled["l0_share"] == (4 + 6) / 4 / 10
    assert paper["l0_share"] == (4 + 2) / 2 / 10
    assert paper["n_tokens"] == 4


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=2, max_size=8),
    st.randoms(use_true_random=False),
    st.sampled_from(["pooled", "paper"]),
)
def test_any_split_and_any_order_give_the_same_sums(lengths, random, convention):
    rng = np.random.default_rng(random.randrange(2**32))
    images = [
        (rng.normal(size=(n, 6)) * 100, rng.normal(size=(n, 6)), rng.integers(0, 9, n))
        for n in lengths
    ]

    def total(order, cuts):
        sums = LayerSums(6, 10, 5)
        for batch in np.split(order, cuts):
            if not len(batch):
                continue
            x, x_hat, l0 = (
                np.concatenate([images[i][k] for i in batch]) for k in range(3)
            )
            unit = np.repeat(np.arange(len(batch)), [lengths[i] for i in batch])
            weights = bootstrap_weights(batch.tolist(), 5, 7)
            sums.add(
                torch.tensor(x),
                torch.tensor(x_hat),
                torch.tensor(l0),
                unit,
                weights,
                convention=convention,
            )
        return sums.replicates()

    n = len(images)
    whole = total(np.arange(n), [])
    cuts = sorted(random.sample(range(n + 1), 2))
    other = total(np.array(random.sample(range(n), n)), cuts)
    for name, values in whole.items():
        np.testing.assert_allclose(other[name], values, rtol=1e-12, err_msg=name)


def test_merged_sums_are_the_sums_of_all():
    x, x_hat = torch.randn(6, 4), torch.randn(6, 4)
    unit, l0 = np.array([0, 0, 0, 1, 1, 1]), torch.arange(6)
    weights = bootstrap_weights([0, 1], 3, 0)
    whole, first, second = (LayerSums(4, 10, 3) for _ in range(3))
    whole.add(x, x_hat, l0, unit, weights)
    first.add(x[:3], x_hat[:3], l0[:3], unit[:3], weights[:, :1])
    second.add(x[3:], x_hat[3:], l0[3:], unit[3:] - 1, weights[:, 1:])
    first.merge(second)
    assert first.row() == pytest.approx(whole.row(), rel=1e-12, nan_ok=True)
    with pytest.raises(ValueError, match="4 x 10 x 4 and 4 x 11 x 4"):
        first.merge(LayerSums(4, 11, 3))


def test_an_image_is_redrawn_alike_in_every_batch():
    together = bootstrap_weights([3, 8], 50, 1)
    assert (together[0] == 1).all()
    np.testing.assert_array_equal(together[:, [1]], bootstrap_weights([8], 50, 1))
    assert (together != bootstrap_weights([3, 8], 50, 2)).any()


def test_bounds_hold_the_truth_as_often_as_they_say():
    """Tokens of an image share a mean and an error scale, so they are dependent."""
    n_images, n_tokens, d, trials = 60, 12, 6, 250
    hits = dict.fromkeys(["mse", "fvu", "l0"], 0)
    naive = 0
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        shared = rng.normal(size=(n_images, 1, d)) * 0.7
        x = shared + rng.normal(size=(n_images, n_tokens, d)) * 0.51**0.5
        scale = rng.gamma(4, 0.25, size=(n_images, 1, 1))  # mean 1
        error = rng.normal(size=x.shape) * 0.4 * scale**0.5
        rate = rng.gamma(9, 1, size=(n_images, 1))
        l0 = rng.poisson(rate, size=(n_images, n_tokens))
        unit = np.repeat(np.arange(n_images), n_tokens)
        sums = LayerSums(d, 10, 400)
        flat = torch.tensor(x.reshape(-1, d))
        weights = bootstrap_weights(list(range(n_images)), 400, trial)
        noisy = flat + torch.tensor(error.reshape(-1, d))
        sums.add(flat, noisy, torch.from_numpy(l0.ravel()), unit, weights)
        row = sums.row()
        # True values: error variance 0.16, token variance 1, mean rate 9.
        for name, truth in {"mse": 0.16, "fvu": 0.16, "l0": 9.0}.items():
            hits[name] += row[f"{name}_low"] <= truth <= row[f"{name}_high"]
        spread = 1.96 * l0.std() / l0.size**0.5
        naive += abs(l0.mean() - 9) <= spread
    coverage = {name: hit / trials for name, hit in hits.items()}
    assert all(0.92 <= c <= 0.98 for c in coverage.values()), coverage
    assert naive / trials < 0.75, naive / trials  # tokens are not independent
