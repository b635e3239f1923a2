"""Which position of a prompt belongs to which group."""

import pytest

from vlm_probe.tokens import GROUPS, Prompt, check_names

# 1 begins a text, 3 and 4 are chat markers, 2 fills the picture's place.
SPECIAL = frozenset({0, 1, 2, 3, 4})
WITH_PICTURE = Prompt((1, 2, 2, 2, 3, 11, 12, 4), range(1, 4), SPECIAL)
WITHOUT = Prompt((1, 21, 22, 3, 11, 12, 4), range(0), SPECIAL)


@pytest.mark.parametrize(
    ("prompt", "group", "words", "all_tokens"),
    [
        # The picture's positions are its own, though their ids are special.
        (WITH_PICTURE, "image", [1, 2, 3], [1, 2, 3]),
        (WITH_PICTURE, "text_after_image", [5, 6], [4, 5, 6, 7]),
        (WITH_PICTURE, "text_only", [], []),
        (WITHOUT, "image", [], []),
        (WITHOUT, "text_after_image", [], []),
        (WITHOUT, "text_only", [1, 2, 4, 5], [1, 2, 3, 4, 5, 6]),
    ],
)
def test_positions_by_hand(prompt, group, words, all_tokens):
    assert prompt.positions(group) == words
    assert prompt.positions(group, include_special=True) == all_tokens


def test_words_before_the_picture_are_in_no_group():
    prompt = Prompt((1, 11, 2, 2, 12), range(2, 4), SPECIAL)
    assert prompt.positions("image") == [2, 3]
    assert prompt.positions("text_after_image", include_special=True) == [4]
    assert prompt.positions("text_only") == []


@pytest.mark.parametrize("prompt", [WITH_PICTURE, WITHOUT])
def test_no_position_is_in_two_groups(prompt):
    found = [p for group in GROUPS for p in prompt.positions(group)]
    assert len(found) == len(set(found))


def test_an_unknown_group_is_refused_with_the_valid_ones():
    words = "unknown group 'text'; valid: image, text_after_image, text_only$"
    with pytest.raises(ValueError, match=words):
        WITHOUT.positions("text")


def test_every_unknown_name_is_named():
    check_names("metric", ["mse", "l0"], ("l0", "mse", "fvu"))
    words = r"unknown metric 'r2', 'l1'; valid: mse, l0$"
    with pytest.raises(ValueError, match=words):
        check_names("metric", ["r2", "mse", "l1"], ("mse", "l0"))
