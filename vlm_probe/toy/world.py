"""Drawn pictures of a small world in which everything is known.

A scene is one to three objects on a textured background. Objects of one scene
differ in color, in shape and in cell, so every question has one answer. The masks
say exactly which pixels belong to which object.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

SIDE = 64
"""Side of a picture, in pixels."""

COLORS = {
    "red": (222, 38, 38),
    "green": (44, 186, 66),
    "blue": (48, 84, 230),
    "yellow": (246, 220, 48),
    "purple": (150, 56, 196),
    "orange": (250, 140, 24),
    "cyan": (70, 214, 226),
    "white": (248, 248, 248),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar")
SIZES = {"small": 6.0, "large": 10.0}
"""Half the side of the square that an object fills, in pixels."""
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
BACKGROUNDS = ("grass", "sand", "brick", "night", "stone", "wood")


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    color: str
    """A key of `COLORS`."""
    shape: str
    """One of `SHAPES`."""
    size: str
    """A key of `SIZES`."""
    row: str
    """One of `ROWS`."""
    column: str
    """One of `COLUMNS`."""


@dataclass(frozen=True)
class Scene:
    """What is in a picture."""

    things: tuple[Thing, ...]
    """One to three objects, no two alike in color, shape or cell."""
    background: str
    """One of `BACKGROUNDS`."""


def draw_scene(rng: np.random.Generator, count: int | None = None) -> Scene:
    """A random scene, of `count` objects if given, else of one to three."""
    n = int(rng.integers(1, 4)) if count is None else count
    colors = rng.choice(list(COLORS), n, replace=False)
    shapes = rng.choice(SHAPES, n, replace=False)
    cells = rng.choice(9, n, replace=False)
    sizes = rng.choice(list(SIZES), n)
    things = tuple(
        Thing(str(c), str(s), str(z), ROWS[k // 3], COLUMNS[k % 3])
        for c, s, z, k in zip(colors, shapes, sizes, cells, strict=True)
    )
    return Scene(things, str(rng.choice(BACKGROUNDS)))


def render(
    scene: Scene, rng: np.random.Generator
) -> tuple[Image.Image, Bool[np.ndarray, "thing row column"]]:
    """Draws a scene.

    Args:
        scene: What to draw.
        rng: Decides texture, brightness, and where in its cell an object lies.

    Returns:
        The picture, `SIDE` by `SIDE` pixels, and one mask for each object: the
        pixels at least half covered by it. Objects never overlap.
    """
    canvas = _texture(scene.background, rng)
    masks = []
    for thing in scene.things:
        cover = _cover(thing, rng)
        color = np.array(COLORS[thing.color], float) * rng.uniform(0.88, 1.0)
        canvas += cover[..., None] * (color - canvas)
        masks.append(cover >= 0.5)
    canvas += rng.normal(0, 3.0, canvas.shape)
    pixels = np.clip(canvas, 0, 255).round().astype(np.uint8)
    return Image.fromarray(pixels, "RGB"), np.stack(masks)


_Y, _X = np.mgrid[0:SIDE, 0:SIDE] + 0.5
_CELL = SIDE / 3


def _cover(thing: Thing, rng: np.random.Generator) -> Float[np.ndarray, "row column"]:
    """The share of each pixel that the object covers, from its signed distance."""
    half = SIZES[thing.size] * rng.uniform(0.95, 1.0)
    slack = _CELL / 2 - half
    x = _X - (COLUMNS.index(thing.column) + 0.5) * _CELL - rng.uniform(-slack, slack)
    y = _Y - (ROWS.index(thing.row) + 0.5) * _CELL - rng.uniform(-slack, slack)
    distance = {
        "circle": lambda: np.hypot(x, y) - half,
        "square": lambda: np.maximum(abs(x), abs(y)) - half * 0.9,
        "triangle": lambda: np.maximum(y - half * 0.9, abs(x) * 0.88 - (y + half) / 2),
        "cross": lambda: np.minimum(
            np.maximum(abs(x) - half, abs(y) - half * 0.3),
            np.maximum(abs(y) - half, abs(x) - half * 0.3),
        ),
        "ring": lambda: abs(np.hypot(x, y) - half * 0.75) - half * 0.25,
        "bar": lambda: np.maximum(abs(x) - half, abs(y) - half * 0.4),
    }[thing.shape]()
    return np.clip(0.5 - distance, 0.0, 1.0)


def _texture(name: str, rng: np.random.Generator) -> Float[np.ndarray, "row column 3"]:
    """A background: muted color, and a pattern whose phase is random."""
    u, v = rng.uniform(0, 8, 2)
    shade = np.zeros((SIDE, SIDE))
    if name == "grass":
        base, shade = (52, 82, 44), 14 * np.sin(2.2 * (_X + u) + np.sin(_Y / 3 + v))
    elif name == "sand":
        base, shade = (198, 178, 138), rng.normal(0, 14, (SIDE, SIDE))
    elif name == "brick":
        base = (122, 72, 58)
        row = np.floor((_Y + v) / 8)
        seam = ((_Y + v) % 8 < 1.5) | ((_X + u + 4 * (row % 2)) % 8 < 1.2)
        shade = 42.0 * seam
    elif name == "night":
        base, shade = (18, 20, 44), 150.0 * (rng.random((SIDE, SIDE)) < 0.012)
    elif name == "stone":
        blotch = np.sin((_X + 9 * u) / 5) * np.sin((_Y + 9 * v) / 4)
        base, shade = (128, 130, 134), 26 * blotch
    elif name == "wood":
        base, shade = (104, 70, 38), 16 * np.sin((_Y + v + np.sin(_X / 9 + u)) * 1.1)
    else:
        raise ValueError(f"no background {name!r}: one of {', '.join(BACKGROUNDS)}")
    return np.array(base, float) + shade[..., None]
