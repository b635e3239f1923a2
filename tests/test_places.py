"""A direction planted in one patch is found there, by all who look."""

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from scipy.stats import mannwhitneyu
from tiny import LAYERS, tiny_model
from torch import nn

from vlm_probe.analysis.localization import covered, localize, weighted_auroc
from vlm_probe.analysis.places import PatchMaps, patch_maps
from vlm_probe.probe import probe_layers
from vlm_probe.toy.examples import toy_examples

PLANTED = 7


def planted(mode):
    """A model in which one feature's value is how bright a patch is.

    The vision tower and the language model keep their random parts switched off, so a
    patch's brightness goes its way untouched: along one direction, to one feature.

    Args:
        mode: How pictures are resized.
    """
    model = tiny_model()
    visual, hooked = model.vision.visual, model.language.hooked
    model.vision.preprocess = open_clip.image_transform(
        32, is_train=False, resize_mode=mode, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    visual.ln_pre = nn.Identity()
    with torch.no_grad():
        visual.conv1.weight.zero_()
        visual.conv1.weight[0] = 1 / (2 * visual.conv1.weight[0].numel())
        visual.positional_embedding.zero_()
        for block in visual.transformer.resblocks:
            for last in (block.attn.out_proj, block.mlp.c_proj):
                last.weight.zero_()
                last.bias.zero_()
        for block in hooked.blocks:
            for weight in (block.attn.W_O, block.mlp.W_out):
                weight.zero_()
        direction = nn.functional.normalize(torch.randn(model.language.d_model), dim=0)
        adapter = model.adapter
        adapter.linear.weight.zero_()
        adapter.linear.weight[:, 0] = direction
        adapter.linear.bias.copy_(0.5 * direction)  # so that black is zero
        for layer in range(LAYERS):
            sae = model.saes[layer].sae
            sae.b_dec.zero_()
            sae.W_enc[:, PLANTED] = direction
            sae.threshold[PLANTED] = 0.05
    return model


def spotted(size, box):
    """A black picture with a white box."""
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    left, top, right, bottom = box
    pixels[top:bottom, left:right] = 255
    return Image.fromarray(pixels)


SPOT = (82, 34, 94, 46)
SIZE = (192, 64)


@pytest.mark.parametrize(
    ("mode", "patch"),
    [
        # Of 192 x 64, 64 to 128 are seen, in columns of 16 and rows of 16.
        ("shortest", (2, 1)),
        # All is seen, in columns of 48 and rows of 16.
        ("squash", (2, 1)),
        # Resized to 32 x 10.67, with padding above and below: columns of 48.
        ("longest", (2, 1)),
    ],
)
def test_a_direction_planted_in_one_patch_of_a_long_picture_is_found(mode, patch):
    model = planted(mode)
    picture, mask = spotted(SIZE, SPOT), np.zeros(SIZE[::-1], bool)
    mask[SPOT[1] : SPOT[3], SPOT[0] : SPOT[2]] = True
    other = spotted((64, 192), (5, 7, 6, 8))  # nothing of it can be seen
    found = probe_layers(
        model, [other, picture], groups=["image"], replicates=0, progress=False
    ).top_features.query("feature == @PLANTED and image == 1")
    assert found.layer.tolist() == [*range(LAYERS)]
    # Nothing else is as strong, once nothing but one direction is there.
    for row in found.itertuples():
        assert (row.patch_row, row.patch_column) == patch
        assert row.left <= SPOT[0] < SPOT[2] <= row.right
        middle = (SPOT[1] + SPOT[3]) / 2
        assert row.top <= middle <= row.bottom
    maps = patch_maps(model, [other, picture], {n: [PLANTED, 3] for n in range(LAYERS)})
    for layer, row in zip(range(LAYERS), found.itertuples(), strict=True):
        map_ = maps.of(layer, PLANTED)[1]
        assert np.unravel_index(map_.argmax(), map_.shape) == patch
        assert map_.max() == pytest.approx(row.value)
        box = maps.boxes[1][patch].tolist()
        assert box == [row.left, row.top, row.right, row.bottom]
    fit = localize(maps, [np.zeros((192, 64), bool), mask], feature=PLANTED, cover=0.05)
    assert fit.layer.tolist() == [*range(LAYERS)]
    assert (fit.pointing == 1).all()
    assert (fit.n_pointed == 1).all()
    assert (fit.n_without == 1).all()
    assert (fit.auroc == 1).all()
    # As far to the right of the middle as the spot is to its left.
    masks = [np.zeros((192, 64), bool), mask[:, ::-1]]
    wrong = localize(maps, masks, feature=PLANTED, cover=0.05)
    assert (wrong.pointing == 0).all()
    assert (wrong.auroc < 0.5).all()


def test_maps_equal_the_plain_codes():
    model, examples = tiny_model(), toy_examples(3)
    features = {2: [5, 60], 0: [1]}
    maps = patch_maps(model, examples, features, batch_size=2)
    assert maps.features == {0: (1,), 2: (5, 60)}
    assert maps.ids == tuple(e.id for e in examples)
    assert maps.sizes == ((64, 64),) * 3
    batches = [examples[:2], examples[2:]]
    place = 0
    for batch in batches:
        vectors = model.adapter(model.vision.encode([e.picture() for e in batch]))
        for put in vectors:

            def put_in(embedded, hook, put=put):
                embedded[0, 1:] = put
                return embedded

            bos = model.language.tokenizer.bos_token_id
            with (
                torch.no_grad(),
                model.language.hooked.hooks([("hook_embed", put_in)]),
            ):
                _, cache = model.language.hooked.run_with_cache(
                    torch.tensor([[bos] + [5] * 16])
                )
            for layer, chosen in maps.features.items():
                code = model.saes[layer].sae.encode(cache["resid_post", layer][0, 1:])
                for feature in chosen:
                    np.testing.assert_allclose(
                        maps.of(layer, feature)[place],
                        code[:, feature].reshape(4, 4).numpy(),
                        rtol=1e-3,
                        atol=1e-3,
                    )
            place += 1
    assert any((values > 0).any() for values in maps.values.values())


def maps_of(values, boxes=None, size=(4, 4)):
    """Maps of one feature on a grid of 2 x 2, which is all of a picture of 4 x 4."""
    values = np.array(values, np.float32).reshape(-1, 1, 2, 2)
    if boxes is None:
        ends = [(0.0, 2.0), (2.0, 4.0)]
        boxes = [[[x[0], y[0], x[1], y[1]] for x in ends] for y in ends]
    n = len(values)
    return PatchMaps(
        {3: values},
        {3: (9,)},
        tuple(f"picture {i}" for i in range(n)),
        (size,) * n,
        np.stack([np.array(boxes, float)] * n),
    )


def mask_of(*patches):
    """Pixels of a picture of 4 x 4 in whole patches of 2 x 2."""
    mask = np.zeros((4, 4), bool)
    for row, column in patches:
        mask[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = True
    return mask


def fit(maps, masks, **options):
    (row,) = localize(maps, masks, **options).to_dict("records")
    return row


def test_covered_by_hand():
    mask = np.zeros((3, 6), bool)
    mask[0, :4] = True
    # Two columns of 3 and two rows of 1.5; and a column that is empty.
    xs, ys = [(0.0, 3.0), (3.0, 6.0), (6.0, 6.0)], [(0.0, 1.5), (1.5, 3.0)]
    boxes = np.array([[[x[0], y[0], x[1], y[1]] for x in xs] for y in ys])
    found = covered(mask, boxes)
    np.testing.assert_allclose(found[:, :2], [[1 / 1.5, 1 / 4.5], [0, 0]])
    assert np.isnan(found[:, 2]).all()
    # A box of a third of a pixel.
    third = np.array([[[3.5, 0.0, 4.5, 1.0]]])
    assert covered(mask, third).tolist() == [[0.5]]


def test_auroc_and_pointing_by_hand():
    maps = maps_of([[5, 1, 0, 2], [1, 3, 0, 0], [0, 0, 0, 0], [4, 0, 0, 0]])
    masks = [mask_of((0, 0), (0, 1))] * 3 + [mask_of()]
    row = fit(maps, masks)
    # Inside 5 1, 1 3, 0 0; outside 0 2, 0 0, 0 0, 4 0 0 0. Of 6 x 10 pairs, each of the
    # inside is above: 5: 10, 1: 8, 1: 8, 3: 9, 0: 8 ties, twice.
    assert row["auroc"] == pytest.approx((10 + 8 + 8 + 9 + 4 + 4) / 60)
    assert row["image_auroc"] == pytest.approx((0.75 + 1 + 0.5) / 3)
    assert (row["n_images"], row["n_without"], row["n_silent"]) == (4, 1, 1)
    assert (row["n_inside"], row["n_outside"], row["n_between"]) == (6, 10, 0)
    assert (row["n_scored"], row["n_pointed"]) == (3, 2)
    assert (row["pointing"], row["chance"]) == (1, 0.5)
    # Wilson's for 2 of 2: from 1 / (1 + z^2 / 2).
    assert row["pointing_low"] == pytest.approx(1 / (1 + 1.959964**2 / 2))
    assert row["pointing_high"] == 1
    assert row["auroc_low"] <= row["auroc"] <= row["auroc_high"]


def test_what_is_half_covered_is_judged_by_the_setting():
    mask = np.zeros((4, 4), bool)
    mask[0, 0] = True  # a quarter of the first patch
    maps, masks = maps_of([[9, 1, 1, 1]]), [mask]
    row = fit(maps, masks)
    assert (row["n_inside"], row["n_outside"], row["n_between"]) == (0, 3, 1)
    assert row["n_without"] == 1
    assert np.isnan(row["auroc"])
    assert np.isnan(row["pointing"])
    row = fit(maps, masks, cover=0.25)
    assert (row["n_inside"], row["n_between"], row["pointing"]) == (1, 0, 1)
    # Where there is something else to hit, what is between is a miss.
    mask = mask | mask_of((1, 1))
    assert fit(maps, [mask])["pointing"] == 0


def test_padding_is_in_nothing():
    """The lower row is none of the picture's; what fires there is not looked at."""
    ends = [(0.0, 2.0), (2.0, 4.0)]
    flat = [[x[0], 0.0, x[1], 2.0] for x in ends]
    none = [[x[0], 2.0, x[1], 2.0] for x in ends]
    maps = maps_of([[1, 0, 9, 9]], boxes=[flat, none], size=(4, 2))
    row = fit(maps, [mask_of((0, 0))[:2]])
    assert (row["n_inside"], row["n_outside"], row["n_between"]) == (1, 1, 0)
    assert (row["pointing"], row["chance"], row["auroc"]) == (1, 0.5, 1)


def test_ties_of_the_strongest_count_in_parts():
    row = fit(maps_of([[3, 3, 3, 0]]), [mask_of((0, 0))])
    assert row["pointing"] == pytest.approx(1 / 3)


def test_weighted_auroc_is_scipys_of_repeated_patches():
    rng = np.random.default_rng(0)
    value = rng.integers(0, 5, 40).astype(float)
    inside = rng.random(40) < 0.4
    weights = rng.poisson(1.0, (20, 40)).astype(float)
    weights[0] = 1
    found = weighted_auroc(value, inside, weights)
    for drawn, auroc in zip(weights.astype(int), found, strict=True):
        x, y = (np.repeat(value[part], drawn[part]) for part in (inside, ~inside))
        expected = mannwhitneyu(x, y).statistic / (len(x) * len(y))
        assert auroc == pytest.approx(expected)


def test_maps_that_know_nothing_are_at_chance():
    rng = np.random.default_rng(1)
    masks = [mask_of(divmod(int(rng.integers(4)), 2)) for _ in range(400)]
    row = fit(maps_of(rng.random((400, 4))), masks, replicates=100)
    assert row["auroc_low"] < 0.5 < row["auroc_high"]
    assert row["image_auroc_low"] < 0.5 < row["image_auroc_high"]
    assert row["pointing_low"] < row["chance"] == 0.25 < row["pointing_high"]
    assert row["auroc_high"] - row["auroc_low"] < 0.1
    # And a map that is the mask is right everywhere.
    known = np.stack([mask[::2, ::2] for mask in masks])
    row = fit(maps_of(known), masks, replicates=10)
    assert (row["auroc"], row["image_auroc"], row["pointing"]) == (1, 1, 1)


def test_what_holds_of_values_holds_of_any_that_rise_with_them():
    rng = np.random.default_rng(2)
    values, masks = rng.random((9, 4)), [mask_of((0, 1))] * 9
    one, other = (fit(maps_of(v), masks) for v in (values, np.exp(3 * values)))
    assert one == other


def test_pil_masks_are_taken():
    maps, masks = maps_of([[5, 1, 0, 2], [1, 0, 0, 2]]), [mask_of((0, 0))] * 2
    assert fit(maps, [Image.fromarray(mask) for mask in masks]) == fit(maps, masks)


def test_toy_masks_are_taken(toy):
    examples = toy_examples(2)
    maps = patch_maps(toy, examples, {4: [308]})
    row = fit(maps, [example.masks.any(0) for example in examples])
    assert row["n_inside"] + row["n_outside"] + row["n_between"] == 2 * 64


def test_one_picture_has_no_bounds():
    row = fit(maps_of([[5, 1, 0, 2]]), [mask_of((0, 0))])
    assert np.isnan([row["auroc_low"], row["image_auroc_high"]]).all()


@pytest.mark.parametrize(
    ("masks", "options", "words"),
    [
        ([], {}, "0 masks for 1 pictures; give one for each, without pixels where"),
        (
            [np.zeros((4, 3), bool)],
            {},
            r"mask of 'picture 0' has rows and columns \(4, 3\), its picture \(4, 4\)",
        ),
        ([mask_of()], {"layer": 4}, "unknown layer '4'; valid: 3"),
        ([mask_of()], {"feature": 1}, "unknown feature of layer 3 '1'; valid: 9"),
        (
            [mask_of()],
            {"cover": 0.0},
            "cover is a share of a patch, above 0 to 1, given",
        ),
    ],
)
def test_masks_that_do_not_fit_are_refused(masks, options, words):
    with pytest.raises(ValueError, match=words):
        localize(maps_of([[5, 1, 0, 2]]), masks, **options)


def test_what_the_model_does_not_have_is_refused():
    model, examples = tiny_model(), toy_examples(1)
    for features, words in (
        ({9: [0]}, "unknown layer '9'; valid: 0, 1, 2"),
        ({0: []}, "no feature asked for; give some, by layer"),
        ({1: [64]}, "feature 64 of layer 1: its SAE has features 0 to 63"),
    ):
        with pytest.raises(ValueError, match=words):
            patch_maps(model, examples, features)
    with pytest.raises(ValueError, match="no pictures given"):
        patch_maps(model, [], {0: [1]})
    with pytest.raises(ValueError, match="batch_size must be at least 1, given 0"):
        patch_maps(model, examples, {0: [1]}, batch_size=0)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        patch_maps(model, ["nowhere.png"], {0: [1]})
