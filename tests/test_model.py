"""Parts that do not fit are refused at the door, and weights have an identity."""

import json
from dataclasses import replace

import hub
import pytest
import torch
from tiny import (
    D_MODEL,
    D_VISION,
    FEATURES,
    tiny_language,
    tiny_model,
    tiny_sae,
    tiny_vision,
)

from vlm_probe.adapter import LinearAdapter
from vlm_probe.language.hooked import save_hooked
from vlm_probe.model import load
from vlm_probe.saes import LayerSae, load_saes


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize(
    ("part", "made", "words"),
    [
        (
            "vision",
            lambda: tiny_vision(32),
            f"takes patch tokens of width {D_VISION}, the vision model 'tiny' gives 32",
        ),
        (
            "adapter",
            lambda: LinearAdapter(20, D_MODEL),
            f"takes patch tokens of width 20, the vision model 'tiny' gives {D_VISION}",
        ),
        (
            "adapter",
            lambda: LinearAdapter(D_VISION, 20),
            f"gives vectors of width 20, the language model 'tiny' takes {D_MODEL}",
        ),
        (
            "language",
            lambda: tiny_language(d_model=32),
            f"gives vectors of width {D_MODEL}, the language model 'tiny' takes 32",
        ),
        (
            "saes",
            lambda: {0: tiny_sae(0), 1: tiny_sae(1, d_model=20)},
            "SAE 'tiny/layer_1' codes activations of width 20, the language model's "
            f"are {D_MODEL}; use SAEs trained on this language model",
        ),
        ("saes", lambda: {1: tiny_sae(0)}, "SAE 'tiny/layer_0' of layer 0 under 1"),
        (
            "saes",
            lambda: {3: tiny_sae(3)},
            "'tiny/layer_3' is for layer 3; the language model has layers 0 to 2",
        ),
        ("saes", dict, "no SAE given; at least one layer needs one"),
    ],
)
def test_parts_that_do_not_fit_are_refused(model, part, made, words):
    with pytest.raises(ValueError, match=words):
        replace(model, **{part: made()})


@pytest.mark.parametrize(
    "hook", ["blocks.1.hook_resid_pre", "blocks.0.hook_resid_post", "blocks.1.mlp"]
)
def test_an_autoencoder_of_another_place_is_refused(hook):
    words = (
        f"SAE 'tiny/layer_1' was trained on {hook!r}, expected "
        "'blocks.1.hook_resid_post' for layer 1"
    )
    with pytest.raises(ValueError, match=words):
        tiny_sae(1, hook=hook)


def test_an_autoencoder_that_does_not_say_its_place_is_taken():
    sae = tiny_sae(1).sae
    sae.cfg.metadata.hook_name = None
    assert LayerSae(2, sae, "somewhere").n_features == FEATURES


def test_without_texts_the_embedded_ones_are_used(model):
    assert model.reference_texts[1] == "a small bar on sand ."
    texts = replace(model, reference_texts=()).reference_texts
    assert len(texts) > 10
    assert all(texts)


def parts(model):
    return {
        "vision": model.vision.visual,
        "adapter": model.adapter,
        "language": model.language.hooked,
        "sae of layer 0": model.saes[0].sae,
        "sae of layer 1": model.saes[1].sae,
        "sae of layer 2": model.saes[2].sae,
    }


def test_identities_are_the_weights():
    before = tiny_model().identities()
    model = tiny_model()
    assert model.identities() == before
    assert {who: about["name"] for who, about in before.items()} == {
        "vision": "tiny",
        "adapter": "adapter",
        "language": "tiny",
        "sae of layer 0": "tiny/layer_0",
        "sae of layer 1": "tiny/layer_1",
        "sae of layer 2": "tiny/layer_2",
    }
    assert len({about["sha256"] for about in before.values()}) == 6
    for who, module in parts(model).items():
        last = list(module.parameters())[-1].data.view(-1)
        kept = last[-1].clone()
        last[-1] += 1
        after = model.identities()
        assert {other for other in after if after[other] != before[other]} == {who}
        last[-1] = kept
    assert model.identities() == before


def test_a_saved_autoencoder_is_loaded_under_its_number(tmp_path):
    for layer in (10, 2):
        tiny_sae(layer).sae.save_model(tmp_path / f"layer_{layer}")
    (tmp_path / "notes").mkdir()
    found = load_saes(tmp_path)
    assert list(found) == [2, 10]
    assert [sae.layer for sae in found.values()] == [2, 10]
    x = torch.randn(20, D_MODEL)
    codes, x_hat = found[10].code(x)
    expected, expected_hat = tiny_sae(10).code(x)
    assert torch.equal(x_hat, expected_hat)
    assert (codes.feature == expected.feature).all()
    assert not any(p.requires_grad for p in found[10].sae.parameters())


def test_a_folder_without_autoencoders_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected folders layer_0, layer_1, "):
        load_saes(tmp_path)


def saved(folder):
    """A folder as `load` wants it, of parts that fit."""
    language = tiny_language()
    save_hooked(language.hooked, language.tokenizer, folder / "language")
    LinearAdapter(D_VISION, D_MODEL).save(folder / "adapter.safetensors")
    for layer in range(3):
        tiny_sae(layer).sae.save_model(folder / "saes" / f"layer_{layer}")
    hub.write_vision(folder / "vision")
    about = {
        "name": "kept",
        "vision_block": -2,
        "default_prompt": "look at the picture",
    }
    (folder / "model.json").write_text(json.dumps(about))
    return folder


def test_a_whole_folder_is_loaded(tmp_path):
    model = load(saved(tmp_path))
    assert (model.name, model.vision.block) == ("kept", -2)
    assert model.language.chat.default_prompt == "look at the picture"
    assert list(model.saes) == [0, 1, 2]
    assert len(model.reference_texts) > 10
    (tmp_path / "reference_texts.txt").write_text("a bar .\na ring .\n")
    assert load(str(tmp_path)).reference_texts == ("a bar .", "a ring .")


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no model in .*model\.json, language/"
    ):
        load(tmp_path)
    saved(tmp_path)
    (tmp_path / "adapter.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no adapter at .*adapter\.safetensors"
    ):
        load(tmp_path)
