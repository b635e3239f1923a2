"""Sparse codes: what sae-lens says, gathered without loss."""

import numpy as np
import pytest
import torch
from tiny import D_MODEL, FEATURES, tiny_sae

from vlm_probe.codes import FeatureSums, SparseCodes, peaks

# Five tokens of three units; token 1 is silent, and so is unit 1 (token 2).
#            token 0      token 3      token 4
# feature 0      .          4.0          .
# feature 2     1.0         4.0         5.0
# feature 5     3.0          .          3.0
CODES = SparseCodes(
    token=np.array([0, 0, 3, 3, 4, 4]),
    feature=np.array([2, 5, 0, 2, 2, 5]),
    value=np.array([1.0, 3, 4, 4, 5, 3], np.float32),
    n_tokens=5,
    n_features=7,
)
UNIT = np.array([0, 0, 1, 2, 2])


def test_l0_counts_silent_tokens_too():
    assert CODES.l0().tolist() == [2, 0, 0, 2, 2]
    none = np.zeros(0, int)
    assert SparseCodes(none, none, np.zeros(0), 3, 7).l0().tolist() == [0, 0, 0]


def as_rows(found):
    columns = found.unit, found.feature, found.token, found.value
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_peaks_by_hand():
    assert as_rows(peaks(CODES, UNIT)) == [
        (0, 2, 0, 1.0),
        (0, 5, 0, 3.0),
        (2, 0, 3, 4.0),
        (2, 2, 4, 5.0),
        (2, 5, 4, 3.0),
    ]


def test_of_equal_values_the_first_token_is_the_peak():
    codes = SparseCodes(
        token=np.array([1, 2, 3]),
        feature=np.array([6, 6, 6]),
        value=np.array([1.0, 2, 2], np.float32),
        n_tokens=4,
        n_features=7,
    )
    assert as_rows(peaks(codes, np.zeros(4, int))) == [(0, 6, 2, 2.0)]


def test_peaks_do_not_need_the_units_in_order():
    # The same tokens, but now 0 and 4 are of unit 2, and 3 is of unit 0.
    found = peaks(CODES, np.array([2, 1, 1, 0, 2]))
    assert as_rows(found) == [
        (0, 0, 3, 4.0),
        (0, 2, 3, 4.0),
        (2, 2, 4, 5.0),
        (2, 5, 0, 3.0),
    ]


def test_strongest_by_hand():
    found = peaks(CODES, UNIT)
    assert as_rows(found.strongest(2)) == [
        (0, 5, 0, 3.0),
        (0, 2, 0, 1.0),
        (2, 2, 4, 5.0),
        (2, 0, 3, 4.0),
    ]
    assert as_rows(found.strongest(1)) == [(0, 5, 0, 3.0), (2, 2, 4, 5.0)]
    assert as_rows(found.strongest(0)) == []
    # Fewer than asked for is what there is, never a feature that was silent.
    assert len(found.strongest(9).unit) == 5


def test_of_equal_values_the_lower_feature_comes_first():
    codes = SparseCodes(
        token=np.array([0, 0, 0]),
        feature=np.array([1, 3, 6]),
        value=np.array([2.0, 5, 2], np.float32),
        n_tokens=1,
        n_features=7,
    )
    found = peaks(codes, np.zeros(1, int)).strongest(3)
    assert found.feature.tolist() == [3, 1, 6]


def test_code_is_what_sae_lens_encodes_and_decodes():
    layer_sae = tiny_sae(0)
    x = torch.randn(50, D_MODEL)
    codes, x_hat = layer_sae.code(x)
    dense = layer_sae.sae.encode(x)
    rebuilt = torch.zeros(50, FEATURES)
    rebuilt[codes.token, codes.feature] = torch.from_numpy(codes.value)
    assert torch.equal(rebuilt, dense)
    assert torch.equal(x_hat, layer_sae.sae.decode(dense))
    assert (codes.n_tokens, codes.n_features) == (50, FEATURES)
    assert codes.l0().tolist() == (dense != 0).sum(1).tolist()
    assert 0 < codes.l0().mean() < FEATURES / 2  # some fire, and most do not


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
    best = peaks(codes, np.arange(50)).strongest(FEATURES)
    assert len(best.unit) == len(codes.value)
    assert (best.value > 0.3).all()


def summed(*batches):
    sums = FeatureSums(7)
    for codes, unit in batches:
        sums.add(codes, peaks(codes, unit))
    return sums.columns()


def test_feature_sums_by_hand():
    found = {name: column.tolist() for name, column in summed((CODES, UNIT)).items()}
    assert found == {
        "feature": [0, 2, 5],
        "n_tokens": [1, 3, 2],
        "n_images": [1, 2, 2],
        "rate": pytest.approx([1 / 5, 3 / 5, 2 / 5]),
        "mean": pytest.approx([4, (1 + 4 + 5) / 3, (3 + 3) / 2]),
        "max": [4.0, 5.0, 3.0],
    }


def test_any_split_into_batches_gives_the_same_feature_sums():
    first = SparseCodes(CODES.token[:2], CODES.feature[:2], CODES.value[:2], 2, 7)
    rest = SparseCodes(CODES.token[2:] - 2, CODES.feature[2:], CODES.value[2:], 3, 7)
    whole = summed((CODES, UNIT))
    for split in (
        [(first, UNIT[:2]), (rest, UNIT[2:])],
        [(rest, UNIT[2:] - 1), (first, UNIT[:2])],
    ):
        for name, column in summed(*split).items():
            np.testing.assert_array_equal(column, whole[name], err_msg=name)
