"""The toy's vision model: a small open_clip CLIP, fitted on pictures with captions.

Contrast alone tells captions apart by color and background and hardly looks at
shape, so half of each batch are twins that differ in one attribute, and a light
patch-level objective asks each patch what covers it. Its heads are thrown away.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from vlm_probe.toy.fitting import fit
from vlm_probe.toy.texts import caption, make_tokenizer
from vlm_probe.toy.world import (
    BACKGROUNDS,
    COLORS,
    COLUMNS,
    ROWS,
    SHAPES,
    SIDE,
    SIZES,
    Scene,
    draw_scene,
    render,
)

STEPS = 1500
BATCH = 80
PATCH = 8
CONTEXT = 56
WIDTH = 128
HEADS = {
    "color": ["none", *COLORS],
    "shape": ["none", *SHAPES],
    "size": ["none", *SIZES],
    "background": list(BACKGROUNDS),
}
"""What each patch is asked, and the answers."""


class Batch(NamedTuple):
    """Pictures, their captions, and what covers each patch."""

    pictures: Float[Tensor, "image 3 row column"]
    captions: Int[Tensor, "image word"]
    labels: dict[str, Int[Tensor, "image patch"]]


def build(folder: Path, *, steps: int = STEPS, seed: int = 0) -> dict[str, float]:
    """Trains the CLIP model and saves it as open_clip reads it.

    Args:
        folder: Gets `open_clip_config.json` and `open_clip_model.safetensors`
            (float16), for `open_clip.create_model("local-dir:...")`.
        steps: Optimizer steps of `BATCH` pictures.
        seed: Of weights and pictures.

    Returns:
        Held-out figures, of `measure`.
    """
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    config = model_config(len(tokenizer), tokenizer.eos_token_id)
    model = open_clip.CLIP(**config)
    heads = nn.ModuleDict({k: nn.Linear(WIDTH, len(v)) for k, v in HEADS.items()})
    both = nn.ModuleDict({"clip": model, "heads": heads})
    rng = np.random.default_rng([seed, 2])
    fit(
        both,
        (_loss(model, heads, b) for b in _batches(tokenizer, rng)),
        steps,
        muon_lr=4e-3,
        adamw_lr=2e-3,
        matrices=_matrices,
        label="vision model",
    )
    figures = measure(model.half().float().eval(), tokenizer, seed=seed + 1)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    preprocess = {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    described = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(described, indent=1))
    return figures


def model_config(vocabulary: int, eos: int) -> dict:
    """The model in open_clip's own words."""
    return {
        "embed_dim": 64,
        "vision_cfg": {
            "image_size": SIDE,
            "patch_size": PATCH,
            "layers": 5,
            "width": WIDTH,
            "head_width": 32,
            "mlp_ratio": 3.0,
            # A learned position embedding leaves patches nearly position-free.
            "pos_embed_type": "sin_cos_2d",
        },
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": vocabulary,
            "width": 96,
            "heads": 3,
            "layers": 3,
            "pool_type": "eos",
            "eos_id": eos,
        },
    }


def twin(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same scene but for one attribute of one object, or the background."""
    things = list(scene.things)
    i = int(rng.integers(len(things)))
    what = str(rng.choice(["shape", "shape", "color", "size", "place", "background"]))
    if what == "background":
        others = [b for b in BACKGROUNDS if b != scene.background]
        return Scene(scene.things, str(rng.choice(others)))
    if what == "place":
        taken = {(t.row, t.column) for t in things}
        free = [(r, c) for r in ROWS for c in COLUMNS if (r, c) not in taken]
        row, column = free[int(rng.integers(len(free)))]
        things[i] = replace(things[i], row=row, column=column)
    else:
        values = {"shape": SHAPES, "color": tuple(COLORS), "size": tuple(SIZES)}[what]
        taken = {getattr(t, what) for t in (things if what != "size" else [things[i]])}
        value = str(rng.choice([v for v in values if v not in taken]))
        things[i] = replace(things[i], **{what: value})
    return Scene(tuple(things), scene.background)


def patch_owner(
    masks: Bool[np.ndarray, "thing row column"],
) -> Int[np.ndarray, " patch"]:
    """For each patch, the index of the object that covers it most, or -1.

    An object counts from a tenth of the patch's pixels on.
    """
    n, side = len(masks), masks.shape[1] // PATCH
    area = masks.reshape(n, side, PATCH, side, PATCH).sum((2, 4)).reshape(n, -1)
    owner = area.argmax(0)
    return np.where(area.max(0) >= PATCH * PATCH / 10, owner, -1)


def _batches(
    tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator
) -> Iterator[Batch]:
    while True:
        scenes = [draw_scene(rng) for _ in range(BATCH // 2)]
        yield _batch([*scenes, *(twin(s, rng) for s in scenes)], tokenizer, rng)


def _batch(
    scenes: list[Scene], tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator
) -> Batch:
    pictures, labels = [], []
    for scene in scenes:
        picture, masks = render(scene, rng)
        pictures.append(_pixels(picture))
        labels.append(_labels(scene, patch_owner(masks)))
    texts = [f"{caption(s, rng)} <end>" for s in scenes]
    words = tokenizer(
        texts,
        add_special_tokens=False,
        padding="max_length",
        max_length=CONTEXT,
        return_tensors="pt",
    ).input_ids
    stacked = {k: torch.tensor(np.stack([x[k] for x in labels])) for k in HEADS}
    return Batch(torch.stack(pictures), words, stacked)


def _pixels(picture: Image.Image) -> Float[Tensor, "3 row column"]:
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    return (pixels - 0.5) / 0.25


def _labels(
    scene: Scene, owner: Int[np.ndarray, " patch"]
) -> dict[str, Int[np.ndarray, " patch"]]:
    labels = {
        name: np.array([0, *(answers.index(getattr(t, name)) for t in scene.things)])
        for name, answers in HEADS.items()
        if name != "background"
    }
    found = {name: label[owner + 1] for name, label in labels.items()}
    background = HEADS["background"].index(scene.background)
    return {**found, "background": np.full(len(owner), background)}


def _forward(
    model: nn.Module, batch: Batch
) -> tuple[Tensor, Tensor, Float[Tensor, "image patch width"]]:
    seen = model.visual.forward_intermediates(
        batch.pictures, indices=[-1], output_fmt="NLC"
    )
    pictures = nn.functional.normalize(seen["image_features"], dim=-1)
    return (
        pictures,
        model.encode_text(batch.captions, normalize=True),
        seen["image_intermediates"][0],
    )


def _loss(model: nn.Module, heads: nn.ModuleDict, batch: Batch) -> Tensor:
    pictures, texts, patches = _forward(model, batch)
    logits = model.logit_scale.exp().clamp(max=100) * pictures @ texts.T
    same = torch.arange(len(logits))
    contrast = nn.functional.cross_entropy(logits, same)
    contrast = (contrast + nn.functional.cross_entropy(logits.T, same)) / 2
    local = sum(
        nn.functional.cross_entropy(head(patches).flatten(0, 1), labels.flatten())
        for head, labels in ((heads[k], batch.labels[k]) for k in HEADS)
    )
    return contrast + local


def _matrices(name: str, parameter: nn.Parameter) -> list[slice | int] | None:
    if "resblocks" not in name or parameter.ndim != 2:
        return None
    rows, columns = parameter.shape
    if "in_proj" in name:
        return [slice(i, i + columns) for i in range(0, rows, columns)]
    return [slice(None)]


@torch.no_grad()
def measure(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, *, seed: int
) -> dict[str, float]:
    """What the frozen model tells of pictures it was not trained on.

    Args:
        model: The CLIP model, with the weights that are shipped.
        tokenizer: Of the world.
        seed: Of the pictures.

    Returns:
        `retrieval`: how often a picture's own caption is nearest among `BATCH`, twins
        included. For each of `HEADS`: how often a linear probe of the patch tokens,
        fitted on half of the pictures by ridge regression, names patches on objects
        right in the other half.
    """
    rng = np.random.default_rng([seed, 3])
    batches = itertools.islice(_batches(tokenizer, rng), 16)
    nearest, tokens = [], []
    labels: dict[str, list[Tensor]] = {name: [] for name in HEADS}
    for batch in batches:
        pictures, texts, patches = _forward(model, batch)
        own = (pictures @ texts.T).argmax(-1) == torch.arange(len(texts))
        nearest += own.tolist()
        covered = batch.labels["color"] > 0
        tokens.append(patches[covered])
        for name in HEADS:
            labels[name].append(batch.labels[name][covered])
    x = torch.cat(tokens).double()
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    half = sum(map(len, tokens[:8]))
    square = x[:half].T @ x[:half]
    square += 1e-3 * square.diagonal().mean() * torch.eye(len(square), dtype=x.dtype)
    found = {"retrieval": float(np.mean(nearest))}
    for name, answers in HEADS.items():
        y = torch.cat(labels[name])
        target = nn.functional.one_hot(y[:half], len(answers)).double()
        probe = torch.linalg.solve(square, x[:half].T @ target)
        hit = (x[half:] @ probe).argmax(-1) == y[half:]
        found[name] = float(hit.double().mean())
    return found
