"""Sparse codes: what is gathered of them, without loss."""

import numpy as np
import pytest
import torch

from vlm_probe.codes import FeatureSums, SparseCodes, peak_table, strongest

# Five tokens of three units; token 1 is silent, and so is unit 1 (token 2).
#            token 0      token 3      token 4
# feature 0      .          4.0          .
# feature 2     1.0         4.0         5.0
# feature 5     3.0          .          3.0
CODES = SparseCodes(
    token=torch.tensor([0, 0, 3, 3, 4, 4]),
    feature=torch.tensor([2, 5, 0, 2, 2, 5]),
    value=torch.tensor([1.0, 3, 4, 4, 5, 3]),
    n_tokens=5,
    n_features=7,
)
UNIT = torch.tensor([0, 0, 1, 2, 2])


def best(codes, unit, k):
    found = strongest(codes, unit, peak_table(codes, unit, int(unit.max()) + 1), k)
    columns = found.unit, found.rank, found.feature, found.token, found.value
    return list(zip(*(column.tolist() for column in columns), strict=True))


def one_token(features, values):
    token = torch.zeros(len(features), dtype=torch.long)
    return SparseCodes(token, torch.tensor(features), torch.tensor(values), 1, 7)


def test_l0_counts_silent_tokens_too():
    assert CODES.l0().tolist() == [2, 0, 0, 2, 2]
    none = torch.zeros(0, dtype=torch.long)
    assert SparseCodes(none, none, torch.zeros(0), 3, 7).l0().tolist() == [0, 0, 0]


def test_a_part_counts_from_its_first_token():
    part = CODES.part(1, 4)
    assert (part.n_tokens, part.n_features) == (3, 7)
    assert part.token.tolist() == [2, 2]
    assert part.feature.tolist() == [0, 2]
    assert part.value.tolist() == [4, 4]
    assert len(CODES.part(1, 3).token) == 0


def test_peaks_by_hand():
    table = peak_table(CODES, UNIT, 3)
    off = -torch.inf
    assert table.tolist() == [
        [off, off, 1, off, off, 3, off],
        [off] * 7,
        [4, off, 5, off, off, 3, off],
    ]


def test_strongest_by_hand():
    assert best(CODES, UNIT, 2) == [
        (0, 1, 5, 0, 3.0),
        (0, 2, 2, 0, 1.0),
        (2, 1, 2, 4, 5.0),
        (2, 2, 0, 3, 4.0),
    ]
    assert best(CODES, UNIT, 1) == [(0, 1, 5, 0, 3.0), (2, 1, 2, 4, 5.0)]
    assert best(CODES, UNIT, 0) == []
    # Fewer than asked for is what there is, never a feature that was silent.
    assert len(best(CODES, UNIT, 9)) == 5


def test_strongest_by_weighted_values_by_hand():
    # Scores 1.5 * feature 2 and 0.5 * feature 5 tie in unit 0; feature 0 has none left.
    weight = torch.tensor([0, 1, 1.5, 1, 1, 0.5, 1])
    found = strongest(CODES, UNIT, peak_table(CODES, UNIT, 3), 2, weight)
    assert found.unit.tolist() == [0, 0, 2, 2]
    assert found.rank.tolist() == [1, 2, 1, 2]
    assert found.feature.tolist() == [2, 5, 2, 5]
    assert found.score.tolist() == [1.5, 1.5, 7.5, 1.5]
    assert found.value.tolist() == [1, 3, 5, 3]
    assert found.token.tolist() == [0, 0, 4, 4]
    # A weight of zero makes nothing silent, and nothing silent active.
    found = strongest(CODES, UNIT, peak_table(CODES, UNIT, 3), 7, weight)
    assert found.feature.tolist() == [2, 5, 2, 5, 0]
    assert found.score.tolist() == [1.5, 1.5, 7.5, 1.5, 0]


def test_units_need_not_be_in_order():
    # The same tokens, but now 0 and 4 are of unit 2, and 3 is of unit 0.
    assert best(CODES, torch.tensor([2, 1, 1, 0, 2]), 2) == [
        (0, 1, 0, 3, 4.0),
        (0, 2, 2, 3, 4.0),
        (2, 1, 2, 4, 5.0),
        (2, 2, 5, 0, 3.0),
    ]


def test_of_equal_values_the_first_token_is_the_peak():
    codes = SparseCodes(
        token=torch.tensor([1, 2, 3]),
        feature=torch.tensor([6, 6, 6]),
        value=torch.tensor([1.0, 2, 2]),
        n_tokens=4,
        n_features=7,
    )
    assert best(codes, torch.zeros(4, dtype=torch.long), 3) == [(0, 1, 6, 2, 2.0)]


def test_of_equal_values_the_lower_feature_comes_first():
    codes = one_token([1, 3, 6], [2.0, 5.0, 2.0])
    assert [f for _, _, f, _, _ in best(codes, torch.tensor([0]), 3)] == [3, 1, 6]
    # Where more tie than there is room for, too.
    codes = one_token([1, 3, 4, 6], [2.0, 5.0, 2.0, 2.0])
    assert [f for _, _, f, _, _ in best(codes, torch.tensor([0]), 2)] == [3, 1]


def test_features_that_fire_below_zero_have_peaks():
    codes = one_token([2, 4], [-3.0, -1.0])
    assert best(codes, torch.tensor([0]), 1) == [(0, 1, 4, 0, -1.0)]
    assert summed((codes, torch.tensor([0])))["max"].tolist() == [-3, -1]


def summed(*batches):
    sums = FeatureSums(7)
    for codes, unit in batches:
        sums.add(codes, peak_table(codes, unit, int(unit.max()) + 1))
    return sums.columns()


BY_HAND = {
    "feature": [0, 2, 5],
    "n_tokens": [1, 3, 2],
    "n_images": [1, 2, 2],
    "rate": pytest.approx([1 / 5, 3 / 5, 2 / 5]),
    "mean": pytest.approx([4, (1 + 4 + 5) / 3, (3 + 3) / 2]),
    "max": [4.0, 5.0, 3.0],
}


def test_feature_sums_by_hand():
    found = {name: column.tolist() for name, column in summed((CODES, UNIT)).items()}
    assert found == BY_HAND


FIRST, REST = (CODES.part(0, 2), UNIT[:2]), (CODES.part(2, 5), UNIT[2:] - 1)


@pytest.mark.parametrize("split", [[FIRST, REST], [REST, FIRST]])
def test_any_split_into_batches_gives_the_same_feature_sums(split):
    whole = summed((CODES, UNIT))
    for name, column in summed(*split).items():
        np.testing.assert_array_equal(column, whole[name], err_msg=name)


def test_feature_sums_of_two_machines_are_added():
    here, there, read = FeatureSums(7), FeatureSums(7), FeatureSums(7)
    here.add(FIRST[0], peak_table(*FIRST, 1))
    there.add(REST[0], peak_table(*REST, 2))
    read.restore(there.state())
    here.merge(read)
    found = {name: column.tolist() for name, column in here.columns().items()}
    assert found == BY_HAND
