"""What a probe can be asked, and what is refused."""

from dataclasses import FrozenInstanceError

import jaxtyping
import pytest

from vlm_probe.settings import ProbeSettings
from vlm_probe.tokens import GROUPS


def test_what_is_measured_when_nothing_is_asked():
    settings = ProbeSettings()
    assert (settings.layers, settings.groups, settings.controls) == (None, GROUPS, ())
    assert settings.convention == "pooled"


def test_lists_become_tuples():
    settings = ProbeSettings(layers=[2, 0], groups=["image"], controls=["noise"])
    assert settings.layers == (2, 0)
    assert settings.groups == ("image",)
    assert settings.controls == ("noise",)
    assert settings == ProbeSettings((2, 0), ("image",), ("noise",))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"groups": ["image", "text"]},
            "unknown group 'text'; valid: image, text_after_image, text_only",
        ),
        (
            {"controls": ["blank"]},
            "unknown control 'blank'; valid: random_adapter, noise, shuffled_images",
        ),
        (
            {"convention": "mean"},
            "unknown convention 'mean'; valid: pooled, paper",
        ),
        ({"groups": []}, "no group given; valid: image, text_after_image, text_only"),
        ({"rank_by": ["value"]}, "unknown ranking 'value'; valid: activation, selecti"),
        ({"rank_by": []}, "no ranking given; valid: activation, selectivity"),
        ({"top_k": -1}, "top_k must be at least 0, given -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, given 0"),
        ({"replicates": -1}, "replicates must be at least 0, given -1"),
        ({"calibration": 0}, "calibration must be at least 1, given 0"),
        ({"encoding": "sparse"}, "unknown encoding 'sparse'; valid: auto, dense, scre"),
    ],
)
def test_a_wrong_setting_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        ProbeSettings(**given)


@pytest.mark.parametrize("name", ["layers", "groups", "controls", "rank_by"])
def test_a_string_is_no_list_of_names(name, monkeypatch):
    # As a list it would be taken apart into its letters. The types that tests enforce
    # would refuse it in their own words; users have ours only.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(TypeError, match=f"{name} takes a list of names, given 'noise'"):
        ProbeSettings(**{name: "noise"})


def test_the_least_values_are_allowed():
    ProbeSettings(top_k=0, batch_size=1, replicates=0, calibration=1)
    ProbeSettings(controls=["shuffled_images"], batch_size=2)


def test_settings_do_not_change():
    with pytest.raises(FrozenInstanceError):
        ProbeSettings().seed = 1
