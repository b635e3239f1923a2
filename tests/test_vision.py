"""Patch tokens are open_clip's own residual stream, in reading order."""

import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import D_VISION, tiny_vision

from vlm_probe.vision import VisionModel

CONFIG = {
    "embed_dim": 8,
    "vision_cfg": {
        "image_size": 32,
        "patch_size": 8,
        "layers": 3,
        "width": 16,
        "head_width": 8,
    },
    "text_cfg": {
        "context_length": 8,
        "vocab_size": 10,
        "width": 8,
        "heads": 1,
        "layers": 1,
    },
}


def pictures(n, side=32):
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in drawn]


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


def wide_vision():
    """32 pixels high and 48 wide: 4 rows of 6 patches."""
    config = {**CONFIG["vision_cfg"], "image_size": (32, 48)}
    clip = open_clip.CLIP(8, config, CONFIG["text_cfg"])
    transform = open_clip.transform.image_transform((32, 48), is_train=False)
    return VisionModel(clip.visual, transform, block=-3)


def test_patches_come_in_reading_order():
    vision = wide_vision()
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


@pytest.mark.parametrize("block", [-1, -2])
def test_a_folder_in_open_clips_format_gives_the_same_tokens(tmp_path, block):
    folder = tmp_path / "eye"
    folder.mkdir()
    clip = open_clip.CLIP(**CONFIG).half().float()
    weights = {name: t.half().contiguous() for name, t in clip.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic"}
    described = {"model_cfg": CONFIG, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(described))

    loaded = VisionModel.load(folder, block=block)
    assert (loaded.name, loaded.d_vision, loaded.block) == ("eye", 16, block)
    images = pictures(2)
    pixels = torch.stack([loaded.preprocess(image) for image in images])
    by_hand = np.stack([np.array(image) for image in images]) / 255
    by_hand = torch.tensor((by_hand - 0.5) / 0.25).permute(0, 3, 1, 2)
    torch.testing.assert_close(pixels, by_hand.float(), rtol=0, atol=1e-6)
    kept = VisionModel(clip.visual, loaded.preprocess, block=block)
    assert torch.equal(loaded.encode(images), kept.encode(images))


def test_pictures_of_any_size_and_mode_are_taken():
    vision = tiny_vision()
    odd = [Image.new(mode, (50, 40)) for mode in ("RGB", "L", "RGBA")]
    assert vision.encode(odd).shape == (3, 16, D_VISION)
