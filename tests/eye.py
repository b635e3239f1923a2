"""A random open_clip model, small, in the formats that such models lie on disk in."""

import copy
import json

import numpy as np
from PIL import Image
from safetensors.torch import save_file
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer

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
PREPROCESS = {
    "mean": [0.5] * 3,
    "std": [0.25] * 3,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def model_config(**changes):
    """The config with other entries; those of the vision tower by their own names."""
    config = copy.deepcopy(CONFIG)
    for key, value in changes.items():
        (config if key in ("quick_gelu", "embed_dim") else config["vision_cfg"])[
            key
        ] = value
    return config


def timm_config(name, image_size):
    vision = {
        "timm_model_name": name,
        "image_size": image_size,
        "timm_pool": "map",
        "timm_proj": "none",
    }
    return {**CONFIG, "embed_dim": 24, "vision_cfg": vision}


def pictures(n, side=32):
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in drawn]


def write_folder(folder, clip, config, preprocess=PREPROCESS):
    """The folder of a model as open_clip pushes it to the hub."""
    folder.mkdir(parents=True, exist_ok=True)
    described = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    state = {name: value.contiguous() for name, value in clip.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


def _timm(**given):
    """timm hands a model's constructor what only its own builder wants."""
    for name in ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        given.pop(name, None)
    size = {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 8}
    return VisionTransformer(**{**size, **given})


@register_model
def tiny_siglip(**given):
    """No class token; 30 pixels are three patches of 8 and a rest that none sees."""
    return _timm(img_size=30, class_token=False, **{"global_pool": "map", **given})


@register_model
def tiny_registers(**given):
    """A class token and four registers before the patches."""
    return _timm(img_size=32, reg_tokens=4, **{"global_pool": "map", **given})
