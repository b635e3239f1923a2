"""Patch tokens are the tower's own residual stream, in reading order."""

import json
import re

import numpy as np
import open_clip
import pytest
import torch
import transformers
from eye import (
    CONFIG,
    PREPROCESS,
    model_config,
    pictures,
    timm_config,
    write_folder,
)
from PIL import Image
from tiny import D_VISION, tiny_vision

from vlm_probe.vision import VisionModel
from vlm_probe.vision.towers import build_tower


def residual_after(vision, block, images):
    """The block's output as a plain forward hook sees it, class token first."""
    seen = []
    handle = vision.visual.transformer.resblocks[block].register_forward_hook(
        lambda module, given, output: seen.append(output)
    )
    with torch.no_grad():
        vision.visual(torch.stack([vision.preprocess(image) for image in images]))
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("block", [-1, -2])
def test_tokens_are_the_blocks_output_without_the_class_token(block):
    tiny = tiny_vision()
    vision = VisionModel(tiny.visual, tiny.preprocess, block=block)
    images = pictures(3)
    expected = residual_after(vision, block, images)
    assert expected.shape == (3, 1 + 16, D_VISION)
    found = vision.encode(images)
    torch.testing.assert_close(found, expected[:, 1:], rtol=0, atol=1e-6)
    assert not found.requires_grad
    # Layers and LayerNorm make a difference here, so the test can tell them apart.
    other = residual_after(vision, -3 - block, images)
    assert (other - expected).abs().max() > 0.1
    normed = vision.visual.ln_post(expected)[:, 1:]
    assert (normed - found).abs().max() > 0.1


def hugging_face(visual, activation):
    """The CLIPVisionModel of transformers with the weights of an open_clip tower."""
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        hidden_act=activation,
    )
    renamed = {
        "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "conv1": "embeddings.patch_embedding",
        "ln_pre": "pre_layrnorm",
        "ln_post": "post_layernorm",
        "transformer.resblocks": "encoder.layers",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    state = {}
    for name, value in visual.state_dict().items():
        new = name
        for ours, theirs in renamed.items():
            new = re.sub(rf"(^|\.){re.escape(ours)}(\.|$)", rf"\1{theirs}\2", new)
        if "attn.in_proj_" in name:
            start, end = new.replace("attn", "self_attn").split("in_proj_")
            parts = zip("qkv", value.chunk(3), strict=True)
            state |= {f"{start}{letter}_proj.{end}": part for letter, part in parts}
        elif name != "proj":
            state[new] = value
    model = transformers.CLIPVisionModel(config)
    inner = getattr(model, "vision_model", model)
    missing, unexpected = inner.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("position_ids" in name for name in missing)
    return model.eval()


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_tokens_are_hugging_faces_hidden_states(tmp_path, activation):
    config = model_config(quick_gelu=activation == "quick_gelu")
    clip = open_clip.CLIP(**config)
    folder = write_folder(tmp_path / "eye", clip, config)
    last = VisionModel.load(folder)
    before = VisionModel.load(f"local-dir:{folder}", block=-2)
    assert last.quick_gelu is before.quick_gelu is (activation == "quick_gelu")
    images = pictures(3)
    pixels = torch.stack([last.preprocess(image) for image in images])
    with torch.no_grad():
        theirs = hugging_face(clip.visual, activation)(
            pixels, output_hidden_states=True
        )
    close = {"rtol": 0, "atol": 1e-5}
    expected = theirs.last_hidden_state[:, 1:]
    torch.testing.assert_close(last.encode(images), expected, **close)
    expected = theirs.hidden_states[-2][:, 1:]
    torch.testing.assert_close(before.encode(images), expected, **close)
    # The other activation would be seen.
    config = {"model_cfg": {**config, "quick_gelu": activation == "gelu"}}
    other = build_tower(config, "the other")
    other.load_state_dict(clip.visual.state_dict())
    wrong = VisionModel(other, last.preprocess).encode(images)
    assert (wrong - last.encode(images)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "side", "n_patches", "n_before"),
    [("tiny_siglip", 30, 9, 0), ("tiny_registers", 32, 16, 5)],
)
@pytest.mark.parametrize("block", [-1, 1])
def test_tokens_of_timms_towers(tmp_path, name, side, n_patches, n_before, block):
    config = timm_config(name, side)
    whole = open_clip.CLIP(**config)
    squash = {**PREPROCESS, "resize_mode": "squash"}
    folder = write_folder(tmp_path / name, whole, config, squash)
    vision = VisionModel.load(folder, block=block)
    assert vision.n_blocks == 3
    assert vision.quick_gelu is None
    images = pictures(2, side)
    pixels = torch.stack([vision.preprocess(image) for image in images])
    trunk, seen = whole.visual.trunk.eval(), []
    trunk.blocks[block].register_forward_hook(lambda *given: seen.append(given[-1]))
    with torch.no_grad():
        features = trunk.forward_features(pixels)
        assert seen[0].shape == (2, n_before + n_patches, 24)
        found = vision.encode(images)
        torch.testing.assert_close(found, seen[0][:, n_before:], rtol=0, atol=1e-5)
        if block == -1:
            normed = trunk.norm(found)
            torch.testing.assert_close(normed, features[:, n_before:])
    side_of_grid = int(n_patches**0.5)
    assert vision.grid == (side_of_grid, side_of_grid)


def test_pictures_do_not_depend_on_their_batch():
    vision, images = tiny_vision(), pictures(4)
    whole = vision.encode(images)
    alone = torch.cat([vision.encode([image]) for image in images])
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-6)


def test_dropout_is_off():
    tiny = tiny_vision()
    tiny.visual.train()
    vision = VisionModel(tiny.visual, tiny.preprocess)
    assert not vision.visual.training
    assert not any(p.requires_grad for p in vision.visual.parameters())


def test_width_and_grid_by_hand():
    vision = tiny_vision()
    assert vision.d_vision == D_VISION
    assert vision.grid == (4, 4)  # 32 pixels, 8 a patch
    assert vision.n_blocks == 2


@pytest.mark.parametrize("block", [2, -3, 24])
def test_a_block_that_is_not_there_is_refused(block):
    tiny = tiny_vision()
    words = f"block {block}: the vision model 'eye' has 2 blocks, 0 to 1, or from the"
    with pytest.raises(ValueError, match=words):
        VisionModel(tiny.visual, tiny.preprocess, block=block, name="eye")


def test_a_convolutional_network_is_refused():
    config = {**CONFIG["vision_cfg"], "layers": [1, 1, 1, 1], "head_width": 32}
    clip = open_clip.CLIP(8, config, CONFIG["text_cfg"])
    words = "'RN' is no vision transformer but a ModifiedResNet; expected one of"
    with pytest.raises(ValueError, match=words):
        VisionModel(clip.visual, tiny_vision().preprocess, name="RN")


def wide_vision(**given):
    """32 pixels high and 48 wide: 4 rows of 6 patches."""
    config = model_config(image_size=(32, 48))
    clip = open_clip.CLIP(**config)
    transform = open_clip.image_transform((32, 48), is_train=False)
    return VisionModel(clip.visual, transform, block=-3, **given), config


def test_patches_come_in_reading_order():
    vision, _ = wide_vision()
    rows, columns = vision.grid
    assert (rows, columns) == (4, 6)
    plain = Image.new("RGB", (48, 32), "gray")
    before = vision.encode([plain])[0]
    assert len(before) == rows * columns
    for row in range(rows):
        for column in range(columns):
            dotted = plain.copy()
            dotted.paste("red", (column * 8, row * 8, column * 8 + 8, row * 8 + 8))
            moved = (vision.encode([dotted])[0] - before).norm(dim=1)
            assert moved.argmax() == row * columns + column


def test_a_patchs_box_by_hand():
    vision = tiny_vision()  # 32 pixels, 4 x 4 patches of 8
    assert vision.patch_box(0, (32, 32)) == (0, 0, 8, 8)
    assert vision.patch_box(6, (64, 64)) == (32, 16, 48, 32)
    # 96 x 64 is halved to 48 x 32, of which 8 columns are cut off at either side.
    assert vision.patch_box(0, (96, 64)) == (16, 0, 32, 16)
    assert vision.patch_box(15, (96, 64)) == (64, 48, 80, 64)
    for index in (-1, 16):
        words = f"patch {index}: the vision model 'tiny' has 4 x 4 patches, 0 to 15"
        with pytest.raises(ValueError, match=words):
            vision.patch_box(index, (32, 32))


def painted(size, box):
    """White in the box, in part where it covers a pixel in part; black elsewhere."""
    covered = []
    for length, start, end in zip(size, box[:2], box[2:], strict=True):
        pixel = np.arange(length)
        covered.append(
            np.clip(np.minimum(pixel + 1, end) - np.maximum(pixel, start), 0, 1)
        )
    white = np.round(np.outer(covered[1], covered[0]) * 255).astype(np.uint8)
    return Image.fromarray(white).convert("RGB")


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize(
    "size",
    [(32, 32), (100, 100), (97, 61), (61, 97), (640, 427), (333, 500), (40, 31)],
)
@pytest.mark.parametrize("target", [(32, 32), (24, 40)])
def test_what_is_painted_in_a_patchs_box_lights_up_that_patch(mode, size, target):
    config = model_config(image_size=target)
    visual = open_clip.CLIP(**config).visual
    preprocess = open_clip.image_transform(
        target, is_train=False, mean=(0,) * 3, std=(1,) * 3, resize_mode=mode
    )
    vision = VisionModel(visual, preprocess)
    rows, columns = vision.grid
    for index in range(rows * columns):
        box = vision.patch_box(index, size)
        pixels = preprocess(painted(size, box))[0]
        light = pixels.reshape(rows, 8, columns, 8).sum((1, 3)).flatten()
        left, top, right, bottom = box
        if (right - left) * (bottom - top) < 1:
            assert mode == "longest"  # padding only
            continue
        assert light.argmax() == index
        # Interpolation blurs an edge by about a pixel, of which a patch has 8.
        assert light[index] > 0.8 * light.sum()


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_a_dot_lights_up_the_patch_whose_box_it_is_in(mode):
    rng = np.random.default_rng(0)
    vision = tiny_vision()
    preprocess = open_clip.image_transform(
        32, is_train=False, mean=(0,) * 3, std=(1,) * 3, resize_mode=mode
    )
    vision = VisionModel(vision.visual, preprocess)
    seen = 0
    for _ in range(60):
        width, height = (int(n) for n in rng.integers(33, 200, 2))
        x, y = int(rng.integers(width)), int(rng.integers(height))
        dot = (x, y, x + 1, y + 1)
        pixels = preprocess(painted((width, height), dot))[0]
        light = pixels.reshape(4, 8, 4, 8).sum((1, 3)).flatten()
        if light.max() < 0.02:
            continue  # cut off
        seen += 1
        left, top, right, bottom = vision.patch_box(
            int(light.argmax()), (width, height)
        )
        # Interpolation spreads a dot by a pixel of the preprocessed picture at most.
        reach_x, reach_y = (right - left) / 8, (bottom - top) / 8
        assert left - reach_x < x + 0.5 < right + reach_x
        assert top - reach_y < y + 0.5 < bottom + reach_y
    assert seen > 20


def test_boxes_of_a_tower_that_leaves_pixels_over(tmp_path):
    config = timm_config("tiny_siglip", 30)  # 3 patches of 8 pixels in 30
    clip = open_clip.CLIP(**config)
    folder = write_folder(tmp_path / "eye", clip, config)
    assert VisionModel.load(folder).patch_box(8, (30, 30)) == (16, 16, 24, 24)


def test_a_folder_in_open_clips_format_is_read_as_open_clip_does(tmp_path):
    clip = open_clip.CLIP(**CONFIG).half()
    folder = write_folder(tmp_path / "eye", clip, CONFIG)
    loaded = VisionModel.load(folder, block=-2)
    assert (loaded.name, loaded.d_vision, loaded.block) == ("eye", 16, -2)
    images = pictures(2)
    pixels = torch.stack([loaded.preprocess(image) for image in images])
    by_hand = np.stack([np.array(image) for image in images]) / 255
    by_hand = torch.tensor((by_hand - 0.5) / 0.25).permute(0, 3, 1, 2)
    torch.testing.assert_close(pixels, by_hand.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"resize_mode": "squash", "interpolation": "bilinear"},
        {"resize_mode": "longest", "fill_color": 127},
        {"mean": None, "std": None},  # open_clip's own
    ],
)
def test_a_folder_gives_what_open_clip_makes_of_it(tmp_path, changed):
    preprocess = {**PREPROCESS, **changed}
    folder = write_folder(
        tmp_path / "eye", open_clip.CLIP(**CONFIG), CONFIG, preprocess
    )
    theirs, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    expected = VisionModel(theirs.visual, transform, block=-2)
    loaded = VisionModel.load(folder, block=-2)
    assert str(loaded.preprocess) == str(transform)
    images = [picture.resize((60, 41)) for picture in pictures(2)]
    assert torch.equal(loaded.encode(images), expected.encode(images))


def test_pictures_of_any_size_and_mode_are_taken():
    vision = tiny_vision()
    odd = [Image.new(mode, (50, 40)) for mode in ("RGB", "L", "RGBA")]
    assert vision.encode(odd).shape == (3, 16, D_VISION)


def test_a_very_long_picture_is_seen_as_it_was():
    vision = tiny_vision()
    rng = np.random.default_rng(0)
    noise = rng.integers(64, 192, (1500, 20, 3), dtype=np.uint8)
    for long in (Image.fromarray(noise), Image.fromarray(noise.swapaxes(0, 1))):
        with torch.no_grad():
            expected = vision.visual.forward_intermediates(
                vision.preprocess(long)[None],
                indices=[-1],
                output_fmt="NLC",
                intermediates_only=True,
            )["image_intermediates"][0]
        found = vision.encode([long])
        assert (found - expected).abs().max() < 0.02 * expected.std()
    longer = Image.new("RGB", (1, 50_000), "red")
    plain = Image.new("RGB", (32, 32), "red")
    assert torch.equal(vision.encode([longer]), vision.encode([plain]))


def test_tokens_are_in_the_dtype_asked_for(tmp_path):
    folder = write_folder(tmp_path / "eye", open_clip.CLIP(**CONFIG), CONFIG)
    images = pictures(2)
    exact = VisionModel.load(folder, dtype="float64").encode(images)
    half = VisionModel.load(folder, dtype="bfloat16").encode(images)
    assert (exact.dtype, half.dtype) == (torch.float64, torch.bfloat16)
    assert 1e-4 < (half - exact).abs().max() / exact.abs().max() < 0.1
    words = "dtype 'int8': expected one of float32, bfloat16, float16, float64"
    with pytest.raises(ValueError, match=words):
        VisionModel.load(folder, dtype="int8")


def test_a_tower_in_mixed_precision_gets_what_its_convolution_takes():
    clip = open_clip.CLIP(**CONFIG, cast_dtype=torch.bfloat16)
    open_clip.convert_weights_to_lp(clip, torch.bfloat16)
    assert next(clip.visual.parameters()).dtype == torch.float32
    vision = VisionModel(clip.visual, tiny_vision().preprocess)
    assert vision.encode(pictures(1)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "preprocess"),
    [
        (model_config(quick_gelu=True), PREPROCESS),
        (model_config(image_size=[32, 48]), {**PREPROCESS, "resize_mode": "longest"}),
        (
            timm_config("tiny_registers", 32),
            {**PREPROCESS, "interpolation": "bilinear"},
        ),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, config, preprocess, dtype):
    clip = open_clip.CLIP(**config)
    folder = write_folder(tmp_path / "eye", clip, config, preprocess)
    vision = VisionModel.load(folder, block=-2, dtype=dtype)
    saved = tmp_path / "bundle" / "vision"
    vision.save(saved)
    assert {file.name for file in saved.iterdir()} == {
        "vision.json",
        "vision.safetensors",
    }
    again = VisionModel.load(saved, dtype=dtype)
    odd = [*pictures(1, 45), Image.effect_mandelbrot((70, 41), (-3, -2, 2, 2), 99)]
    assert torch.equal(again.encode(odd), vision.encode(odd))
    assert (again.name, again.block, again.grid) == ("eye", -2, vision.grid)
    assert again.patch_box(3, (70, 41)) == vision.patch_box(3, (70, 41))
    assert VisionModel.load(saved, block=0).block == 0
    assert "text_cfg" not in (saved / "vision.json").read_text()


def test_a_tower_from_memory_is_saved_with_its_config(tmp_path):
    words = "'eye' was made without a config, and cannot be built again; give VisionMod"
    vision, config = wide_vision(name="eye")
    with pytest.raises(ValueError, match=words):
        vision.save(tmp_path / "a")
    vision.config = {"model_cfg": config}
    vision.save(tmp_path / "a")
    again = VisionModel.load(tmp_path / "a")
    images = pictures(2)
    assert torch.equal(again.encode(images), vision.encode(images))


@pytest.mark.parametrize(
    ("config", "preprocess", "words"),
    [
        (model_config(quick_gelu=True), {}, "it gives other patch tokens of the same"),
        (model_config(), {"mean": [0] * 3}, "it gives other patch tokens of the same"),
        (model_config(layers=2), {}, "weights have no place, transformer.resblocks.2."),
        ({}, {}, "the config of 'eye' has no model_cfg with embed_dim and vision_cfg"),
    ],
)
def test_a_config_of_another_tower_is_refused(tmp_path, config, preprocess, words):
    clip = open_clip.CLIP(**CONFIG)
    transform = open_clip.image_transform(32, is_train=False)
    described = {"model_cfg": config, "preprocess_cfg": preprocess}
    vision = VisionModel(clip.visual, transform, name="eye", config=described)
    with pytest.raises(ValueError, match=words):
        vision.save(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_the_wrong_activation_is_named_and_stays_so_in_what_is_saved(tmp_path):
    config = model_config(quick_gelu=False)
    folder = write_folder(tmp_path / "eye", open_clip.CLIP(**config), config)
    assert VisionModel.load(folder).activation_mismatch() is None
    about = {"model_type": "clip", "vision_config": {"hidden_act": "quick_gelu"}}
    (folder / "config.json").write_text(json.dumps(about))
    sentence = (
        "the vision model 'eye' computes GELU, but its weights were trained with "
        f'QuickGELU: hidden_act in {folder / "config.json"}; set "quick_gelu": true '
        "in its model_cfg"
    )
    with pytest.warns(UserWarning, match=re.escape(sentence)):
        vision = VisionModel.load(folder)
    assert vision.activation_mismatch() == sentence
    vision.save(tmp_path / "saved")
    with pytest.warns(UserWarning, match=re.escape(sentence)):
        again = VisionModel.load(tmp_path / "saved")
    assert again.activation_mismatch() == sentence


def test_nothing_tells_of_a_tower_from_memory():
    vision = tiny_vision()
    assert vision.quick_gelu is False
    assert vision.activation_mismatch() is None
