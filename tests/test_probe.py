"""The road end to end, against the same numbers computed without it."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tiny import D_MODEL, D_VISION, FEATURES, LAYERS, tiny_model

from vlm_probe.adapter import LinearAdapter
from vlm_probe.examples import Example
from vlm_probe.language import LanguageModel
from vlm_probe.probe import probe_layers
from vlm_probe.tokens import CONTROLS, GROUPS, METRICS
from vlm_probe.toy.examples import toy_examples


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def pictures():
    return toy_examples(7)


def probe(model, images, **settings):
    return probe_layers(model, images, progress=False, replicates=20, **settings)


def image_vectors(model, examples, batch_size):
    """Encoded in the batches of the probe.

    A picture alone differs from one in a batch by rounding, which the tiny language
    model's large weights make more of than the tests allow.
    """
    batches = [
        examples[at : at + batch_size] for at in range(0, len(examples), batch_size)
    ]
    pictures = [[example.picture() for example in batch] for batch in batches]
    return torch.cat([model.adapter(model.vision.encode(batch)) for batch in pictures])


def plain_activations(model, example, vectors):
    """Residuals by group from TransformerLens hooks alone, one example at a time."""
    tokenizer, hooked = model.language.tokenizer, model.language.hooked
    turn = f"<user> {example.prompt} <assistant>"
    words = {
        "picture": "<bos> " + "<unk> " * len(vectors) + turn,
        "words": f"<bos> {example.caption} {turn}",
    }
    found = {}
    for what, text in words.items():
        ids = tokenizer(text, add_special_tokens=False).input_ids

        def put(embedded, hook, what=what):
            if what == "picture":
                embedded[0, 1 : 1 + len(vectors)] = vectors.to(embedded.dtype)
            return embedded

        with hooked.hooks([("hook_embed", put)]), torch.no_grad():
            _, cache = hooked.run_with_cache(torch.tensor([ids]))
        begin = text.split().index("<user>")
        behind = range(begin + 1, len(ids) - 1)  # between the two chat markers
        for layer in range(LAYERS):
            x = cache["resid_post", layer][0]
            if what == "picture":
                found["image", layer] = x[1 : 1 + len(vectors)]
                found["text_after_image", layer] = x[behind]
            else:
                words_before = range(1, begin)
                found["text_only", layer] = x[[*words_before, *behind]]
    return found


def plain_metrics(sae, per_image, convention):
    """DESIGN's formulas written out, on sae-lens' own encode and decode."""
    tokens = [x.double() for x in per_image]
    codes = [sae.encode(x) for x in per_image]
    decoded = [sae.decode(z).double() for z in codes]
    x, y, z = (torch.cat(part) for part in (tokens, decoded, codes))
    values = {
        "mse": [((b - a) ** 2).mean(1) for a, b in zip(tokens, decoded, strict=True)],
        "nmse": [
            ((b - a) ** 2).sum(1) / (a**2).sum(1)
            for a, b in zip(tokens, decoded, strict=True)
        ],
        "cosine": [
            (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
            for a, b in zip(tokens, decoded, strict=True)
        ],
        "l0": [(c != 0).sum(1).double() for c in codes],
        "l0_share": [(c != 0).double().mean(1) for c in codes],
        "norm": [a.norm(dim=1) for a in tokens],
    }
    if convention == "paper":
        return {k: np.mean([float(v.mean()) for v in vs]) for k, vs in values.items()}
    pooled = {k: float(torch.cat(vs).mean()) for k, vs in values.items()}
    assert z.shape[1] == FEATURES
    spread = ((x - x.mean(0)) ** 2).sum()
    return pooled | {"fvu": float(((x - y) ** 2).sum() / spread)}


@pytest.mark.parametrize("convention", ["pooled", "paper"])
def test_every_number_equals_the_plain_computation(model, pictures, convention):
    result = probe(model, pictures, convention=convention, batch_size=3)
    vectors = image_vectors(model, pictures, 3)
    plain = [
        plain_activations(model, e, v) for e, v in zip(pictures, vectors, strict=True)
    ]
    assert len(result.layers) == LAYERS * len(GROUPS)
    for row in result.layers.itertuples():
        sae = model.saes[row.layer].sae
        per_image = [p[row.group, row.layer] for p in plain]
        assert row.n_tokens == sum(map(len, per_image))
        assert row.n_images == len(pictures)
        for name, value in plain_metrics(sae, per_image, convention).items():
            assert getattr(row, name) == pytest.approx(value, rel=1e-5), name


def test_a_language_model_in_bfloat16_under_saes_in_float32(pictures):
    model = tiny_model()
    model.language.hooked.to(torch.bfloat16)
    result = probe(model, pictures, batch_size=1)  # others round in another order
    vectors = image_vectors(model, pictures, 1)
    plain = [
        plain_activations(model, e, v) for e, v in zip(pictures, vectors, strict=True)
    ]
    assert plain[0]["image", 0].dtype == torch.bfloat16
    for row in result.layers.itertuples():
        sae = model.saes[row.layer].sae
        per_image = [p[row.group, row.layer].float() for p in plain]
        for name, value in plain_metrics(sae, per_image, "pooled").items():
            assert getattr(row, name) == pytest.approx(value, rel=1e-5), name


def test_features_and_their_places_equal_the_plain_codes(model, pictures):
    result = probe(model, pictures, batch_size=3, top_k=4)
    vectors = image_vectors(model, pictures, 3)
    plain = [
        plain_activations(model, e, v) for e, v in zip(pictures, vectors, strict=True)
    ]
    for (layer, group), found in result.features.groupby(["layer", "group"]):
        codes = [model.saes[layer].sae.encode(p[group, layer]) for p in plain]
        whole = torch.cat(codes).numpy()
        fired = np.flatnonzero((whole != 0).any(0))
        np.testing.assert_array_equal(found.feature, fired)
        np.testing.assert_array_equal(found.n_tokens, (whole != 0).sum(0)[fired])
        images = sum((c != 0).any(0).numpy().astype(int) for c in codes)
        np.testing.assert_array_equal(found.n_images, images[fired])
        np.testing.assert_allclose(found["max"], whole.max(0)[fired], rtol=1e-5)
        mean = whole.sum(0)[fired] / (whole != 0).sum(0)[fired]
        np.testing.assert_allclose(found["mean"], mean, rtol=1e-5)
        top = result.top_features
        for image, code in enumerate(codes):
            here = top[
                (top.layer == layer) & (top.group == group) & (top.image == image)
            ]
            best, at = code.max(0)
            strongest = best.sort(descending=True).values[:4]
            np.testing.assert_allclose(here.value, strongest, rtol=1e-5)
            assert (here.value > 0).all()
            if group == "image":
                patch = at[here.feature.tolist()].numpy()
                np.testing.assert_array_equal(here.patch_row, patch // 4)
                np.testing.assert_array_equal(here.patch_column, patch % 4)
                assert here.token.isna().all()


def test_words_of_top_features_are_those_at_their_position(model, pictures):
    top = probe(model, pictures).top_features
    text = top[top.group == "text_after_image"]
    for row in text.itertuples():
        turn = pictures[row.image].prompt.split()
        assert row.token == turn[row.position - (1 + 16 + 1)]
    assert text.patch_row.isna().all()


@pytest.mark.parametrize("group", ["text_after_image", "text_only"])
def test_special_tokens_are_in_no_group(model, pictures, group):
    """Whatever stands at special positions changes no number of the group itself."""
    plain = [e.prompt.split() for e in pictures]
    if group == "text_only":
        plain = [e.caption.split() + w for e, w in zip(pictures, plain, strict=True)]
    counted = probe(model, pictures, groups=[group]).layers.n_tokens
    assert (counted == sum(map(len, plain))).all()
    markers = 2  # of the chat; the beginning of text is never counted
    counted = probe(model, pictures, groups=[group], include_special=True)
    assert (
        counted.layers.n_tokens == sum(map(len, plain)) + markers * len(plain)
    ).all()


def test_batches_and_generators_change_nothing(model, pictures):
    one = probe(model, pictures, batch_size=2, controls=CONTROLS, seed=3)
    other = probe(model, iter(pictures), batch_size=5, controls=CONTROLS, seed=3)
    keys = ["layer", "group", "condition"]
    assert one.layers[keys].equals(other.layers[keys])
    numbers = [c for c in one.layers if c not in keys]
    np.testing.assert_allclose(
        one.layers[numbers], other.layers[numbers], rtol=1e-4, equal_nan=True
    )


def test_controls_are_conditions_of_the_same_table(model, pictures):
    result = probe(model, pictures, controls=CONTROLS)
    cases = result.layers.groupby("condition").group.unique()
    assert set(cases["model"]) == set(GROUPS)
    for control in CONTROLS:  # not measured without picture: no row, no zero
        assert set(cases[control]) == {"image", "text_after_image"}
    image = result.layers[result.layers.group == "image"]
    # Before the language model acts, every arm has the tokens of the model's arm.
    assert image.n_tokens.nunique() == 1
    assert image.groupby("layer").mse.nunique().eq(4).all()


def test_shuffled_images_are_the_vectors_of_the_image_before(model, pictures):
    shuffled = probe(model, pictures[:4], controls=["shuffled_images"])
    donors = [pictures[i].image for i in (1, 0, 1, 2)]
    swapped = [replace(e, image=d) for e, d in zip(pictures, donors, strict=False)]
    direct = probe(model, swapped)
    a = shuffled.layers.query("condition == 'shuffled_images'")
    b = direct.layers.query("group != 'text_only'")
    np.testing.assert_allclose(a[list(METRICS)], b[list(METRICS)], rtol=1e-5)
    # Which features fire, how strongly and where, is that of the other image, too.
    for table in ("features", "top_features"):
        a = getattr(shuffled, table).query("condition == 'shuffled_images'")
        b = getattr(direct, table).query("group != 'text_only'")
        a, b = (t.drop(columns="condition").reset_index(drop=True) for t in (a, b))
        pd.testing.assert_frame_equal(a, b, rtol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_image_before_is_found_whatever_the_batches(model, pictures, batch_size):
    """Pictures that cannot be read are passed over, at the start and between."""
    broken = Example("nowhere.png")
    given = [broken, pictures[0], broken, broken, *pictures[1:4], broken]
    shuffled = probe(
        model, given, controls=["shuffled_images"], batch_size=batch_size
    ).layers.query("condition == 'shuffled_images'")
    donors = [pictures[i].image for i in (1, 0, 1, 2)]
    swapped = [replace(e, image=d) for e, d in zip(pictures, donors, strict=False)]
    direct = probe(model, swapped, groups=["image", "text_after_image"]).layers
    np.testing.assert_allclose(
        shuffled[list(METRICS)], direct[list(METRICS)], rtol=1e-4
    )


def test_each_group_alone_is_what_it_is_among_all(model, pictures):
    whole = probe(model, pictures).layers
    for group in GROUPS:
        alone = probe(model, pictures, groups=[group]).layers
        assert alone.group.unique().tolist() == [group]
        np.testing.assert_allclose(
            alone[list(METRICS)],
            whole[whole.group == group][list(METRICS)],
            rtol=1e-4,
        )


def test_nothing_is_computed_that_nobody_asked_for(model, pictures, monkeypatch):
    """Neither words behind the picture, nor layers behind the last, nor logits."""
    lengths, blocks = [], set()
    hooked = model.language.hooked
    prompt = model.language.chat.image_prompt(pictures[0].prompt, 16)
    hooks = [
        (f"blocks.{layer}.hook_resid_pre", lambda x, hook: blocks.add(hook.layer()))
        for layer in range(LAYERS)
    ]
    hooks.append(("hook_embed", lambda x, hook: lengths.append(x.shape[1])))
    monkeypatch.setattr(hooked.unembed, "forward", pytest.fail)
    with hooked.hooks(hooks):
        probe(model, pictures[:1], groups=["image"], layers=[0])
    assert lengths == [prompt.image.stop]
    assert blocks == {0}


def test_screened_codes_give_the_same_tables(model, pictures):
    """Slow without fast bfloat16 products, and right all the same."""
    dense = probe(model, pictures, encoding="dense")
    screened = probe(model, pictures, encoding="screened")
    numbers = list(METRICS)
    np.testing.assert_allclose(
        screened.layers[numbers], dense.layers[numbers], rtol=1e-5
    )
    pd.testing.assert_frame_equal(screened.features, dense.features, rtol=1e-4)
    assert screened.meta["n_close"] >= dense.meta["n_close"] == 0


def test_time_is_told_by_stage(model, pictures, tmp_path):
    result = probe(model, pictures)
    stages = {"pictures", "vision", "language", "codes", "sums"}
    assert set(result.timing["stages"]) == stages
    assert sum(result.timing["stages"].values()) <= result.timing["seconds"] + 0.01
    assert min(result.timing["stages"].values()) >= 0
    again = type(result).load(result.save(tmp_path))
    assert again.timing == result.timing


def test_reference_texts_stand_in_for_captions(model, pictures):
    bare = [replace(e, caption=None) for e in pictures[:2]]
    with_words = [
        replace(e, caption=text)
        for e, text in zip(bare, model.reference_texts, strict=True)
    ]
    one, other = probe(model, bare), probe(model, with_words)
    assert one.meta["text_only_words"] == {"captions": 0, "reference texts": 2}
    assert other.meta["text_only_words"] == {"captions": 2, "reference texts": 0}
    np.testing.assert_allclose(one.layers[list(METRICS)], other.layers[list(METRICS)])


def test_a_broken_picture_is_recorded_and_the_rest_goes_on(model, pictures, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    missing = tmp_path / "missing.png"
    good = [e.image for e in pictures[:3]]
    result = probe(model, [good[0], broken, good[1], str(missing), good[2]])
    assert result.failures.image.tolist() == [1, 3]
    assert result.failures.id.tolist() == ["broken.png", "missing.png"]
    assert "cannot identify image file" in result.failures.error[0]
    assert "No such file" in result.failures.error[1]
    whole = probe(model, good)
    image = result.layers.query("group == 'image'")[list(METRICS)]
    np.testing.assert_allclose(
        image, whole.layers.query("group == 'image'")[list(METRICS)], rtol=1e-5
    )


def test_a_prompt_that_is_too_long_is_recorded_too(model, pictures):
    long = replace(pictures[1], prompt="what is " * 60, id="long")
    wordy = replace(pictures[1], caption="a red circle " * 40, id="wordy")
    result = probe(model, [pictures[0], long, wordy, pictures[2]])
    assert result.failures.id.tolist() == ["long", "wordy"]
    assert result.failures.error[0].startswith(
        "ValueError: a prompt of 140 tokens is longer than the 96 positions that the"
    )
    # Counted in no group, so that all are of the same pictures.
    assert (result.layers.n_images == 2).all()
    # Where its words are not read, nothing is too long.
    assert len(probe(model, [wordy, long], groups=["image"]).failures) == 0


def test_the_first_that_cannot_be_used_can_stop_the_run(model, pictures):
    given = [
        pictures[0],
        Example("nowhere.png"),
        replace(pictures[1], prompt="a " * 99),
    ]
    words = r"image 1, 'nowhere.png': FileNotFoundError: .*\(on_error=\"record\" lists"
    with pytest.raises(ValueError, match=words):
        probe(model, given, on_error="raise")
    with pytest.raises(
        ValueError, match="image 1, 'toy-0-1': ValueError: a prompt of 119"
    ):
        probe(model, given[::2], on_error="raise")
    with pytest.raises(ValueError, match="unknown on_error 'skip'; valid: record, rai"):
        probe(model, given, on_error="skip")


def test_bad_input_is_named(model, pictures, tmp_path):
    with pytest.raises(ValueError, match="no images given"):
        probe(model, [])
    with pytest.raises(TypeError, match="image 1 is of type ndarray; expected"):
        # Not as a list: the types that tests enforce look at an item of it at random.
        probe(model, iter([pictures[0], np.zeros((8, 8, 3))]))
    with pytest.raises(TypeError, match="put it in a list"):
        probe(model, "a.png")
    with pytest.raises(ValueError, match=r"none of 1 images could be used.*nowhere"):
        probe(model, [tmp_path / "nowhere.png"])
    with pytest.raises(ValueError, match="unknown layer '9'; valid: 0, 1, 2"):
        probe(model, pictures, layers=[0, 9])
    with pytest.raises(ValueError, match="unknown group 'text'; valid: image,"):
        probe(model, pictures, groups=["text"])
    with pytest.raises(TypeError, match="unknown setting 'layer'; valid: layers,"):
        probe(model, pictures, layer=3)
    with pytest.raises(ValueError, match="at least two readable images"):
        probe(model, pictures[:1], controls=["shuffled_images"])


def test_not_a_number_is_named_with_layer_and_example(pictures):
    model = tiny_model()
    blocks = model.language.hooked.blocks
    with torch.no_grad():
        blocks[1].mlp.b_out[0] = float("nan")
    with pytest.raises(ValueError, match=r"layer 1 is not a number.*'toy-0-0'"):
        probe(model, pictures)
    probe(model, pictures, layers=[0])  # the layers before are sound


def test_some_layers_only(model, pictures):
    whole = probe(model, pictures).layers
    part = probe(model, pictures, layers=[2]).layers
    assert part.layer.unique().tolist() == [2]
    np.testing.assert_allclose(
        part[list(METRICS)], whole[whole.layer == 2][list(METRICS)], rtol=1e-6
    )


def test_pictures_alone_are_enough(model):
    result = probe(model, [Image.new("L", (50, 30), 128)])
    assert result.top_features.id.unique().tolist() == ["0"]
    assert isinstance(model.language, LanguageModel)
    assert probe(model, [Example(Image.new("RGB", (9, 9)), id="x")]).meta["n_images"]


def test_image_tokens_are_missing_before_they_enter(model, pictures):
    """Nothing is measured where nothing is, and later layers are as by hand."""
    weights = model.adapter.state_dict()
    late = LinearAdapter(D_VISION, D_MODEL, manifest={"inject_layer": 1})
    late.load_state_dict(weights)
    late.requires_grad_(False)
    later = replace(model, adapter=late)
    result = probe(later, pictures, controls=CONTROLS)
    image = result.layers[result.layers.group == "image"]
    assert set(image.layer) == {1, 2}
    assert set(result.layers.layer) == {0, 1, 2}
    for table in (result.features, result.top_features):
        assert set(table[table.group == "image"].layer) == {1, 2}
    seen = {}
    n_patches = 16
    prompts = [later.language.chat.image_prompt(e.prompt, n_patches) for e in pictures]
    vectors = later.adapter(later.vision.encode([e.picture() for e in pictures]))
    later.language.read(
        prompts,
        vectors,
        [1],
        lambda n, x: seen.update({n: x[:, 1 : 1 + n_patches].norm(dim=-1).mean()}),
        inject_layer=1,
    )
    (row,) = image[(image.layer == 1) & (image.condition == "model")].itertuples()
    assert row.norm == pytest.approx(float(seen[1]), rel=1e-5)
    assert result.meta["inject_layer"] == 1
    with pytest.raises(ValueError, match="come before block 1"):
        probe(later, pictures, layers=[0], groups=["image"])
    with pytest.raises(ValueError, match="enter before block 3; the language model"):
        beyond = LinearAdapter(D_VISION, D_MODEL, manifest={"inject_layer": 3})
        replace(model, adapter=beyond)
