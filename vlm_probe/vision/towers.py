"""A vision tower is built from open_clip's config and filled with weights.

The text tower that open_clip pairs it with is neither built in earnest nor read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import open_clip
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

SAVED = ("vision.json", "vision.safetensors")
"""The files that `write_tower` makes."""
_MODEL = ("embed_dim", "vision_cfg", "quick_gelu")
_PREPROCESS = ("mean", "std", "interpolation", "resize_mode", "fill_color")
_NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}


def build_tower(config: Mapping, of: str) -> nn.Module:
    """A tower with random weights: `model.visual` of an open_clip model.

    Args:
        config: With `model_cfg`, as in `open_clip_config.json`.
        of: Whose config it is, for messages.

    Raises:
        ValueError: open_clip can build nothing from that config.
    """
    model = config.get("model_cfg", {})
    if not {"embed_dim", "vision_cfg"} <= set(model):
        raise ValueError(
            f"the config of {of} has no model_cfg with embed_dim and vision_cfg; "
            "expected what open_clip writes to open_clip_config.json"
        )
    vision = {**model["vision_cfg"], "timm_model_pretrained": False}
    quick_gelu = model.get("quick_gelu", False)
    try:
        clip = open_clip.CLIP(model["embed_dim"], vision, _NO_TEXT, quick_gelu)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(
            f"open_clip {open_clip.__version__} cannot build the vision model of {of}: "
            f"{error}"
        ) from error
    return clip.visual


def preprocess_of(
    config: Mapping, visual: nn.Module
) -> Callable[[Image.Image], Tensor]:
    """From a picture to the tower's input, as open_clip makes it of a config."""
    given = config.get("preprocess_cfg", {})
    return open_clip.image_transform(
        visual.image_size,
        is_train=False,
        **{key: given[key] for key in _PREPROCESS if given.get(key) is not None},
    )


def fill_tower(visual: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    """Copies weights into a tower: all of them, each of the very shape.

    open_clip itself stretches position embeddings of another picture size in silence.

    Args:
        visual: The tower.
        weights: Of a whole open_clip model, or of its vision tower alone.
        what: Weights and tower in words, for the message if they do not fit.

    Raises:
        ValueError: They do not fit; says where, and which of open_clip's models do.
    """
    prefixes = ("module.visual.", "visual.")
    part = {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        for prefix in prefixes
        if name.startswith(prefix)
    } or dict(weights)
    own = {name: tuple(value.shape) for name, value in visual.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in part.items()}
    wrong = [
        f"{len(names)} weights {what_of_them}, {min(names)} first"
        for names, what_of_them in (
            (own.keys() - given.keys(), "are missing"),
            (given.keys() - own.keys(), "have no place"),
        )
        if names
    ]
    common = [name for name in own if name in given and own[name] != given[name]]
    wrong += [f"{n} has shape {given[n]}, expected {own[n]}" for n in common[:3]]
    if wrong:
        raise ValueError(f"{what} do not fit: {'; '.join(wrong)}; {_instead(given)}")
    visual.load_state_dict(part)


def write_tower(folder: Path, visual: nn.Module, config: Mapping, about: dict) -> None:
    """Writes a tower's weights, and what is needed to build it again.

    Args:
        folder: Made if it is not there.
        visual: The tower.
        config: With `model_cfg` and `preprocess_cfg`.
        about: Whatever else is to be kept, JSON only.
    """
    model = {
        key: config["model_cfg"][key] for key in _MODEL if key in config["model_cfg"]
    }
    described = {
        **about,
        "model_cfg": model,
        "preprocess_cfg": config.get("preprocess_cfg", {}),
    }
    tensors = {k: v.cpu().contiguous() for k, v in visual.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SAVED[0]).write_text(json.dumps(described, indent=1))
    save_file(tensors, folder / SAVED[1])


def _instead(given: Mapping[str, tuple[int, ...]]) -> str:
    """What weights of these shapes are, for who gave them for something else."""
    if any("vision_model." in name for name in given):
        return "these are Hugging Face's names; open_clip has its own files of CLIP"
    fitting = _models_of(given)
    if fitting:
        return f"they are weights of {' or '.join(fitting)}"
    return "expected a state dict of an open_clip model, or of its visual part"


def _models_of(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Names of open_clip's models whose tower has these shapes."""
    if not {"conv1.weight", "positional_embedding"} <= set(shapes):
        return []
    width, _, _, patch = shapes["conv1.weight"]
    side = patch * math.isqrt(shapes["positional_embedding"][0] - 1)
    layers = len({n.split(".")[2] for n in shapes if n.startswith("transformer.")})
    found = []
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name) or {}
        about = open_clip.CLIPVisionCfg(**config["vision_cfg"])
        shape = (about.width, about.patch_size, about.image_size, about.layers)
        if shape == (width, patch, side, layers) and not about.timm_model_name:
            found.append(name)
    return found
