"""What a person sees of a picture: upright, on white, in 8 bits a channel."""

from __future__ import annotations

import struct

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps


def as_seen(image: Image.Image) -> Image.Image:
    """The RGB picture that a person sees: upright, on white, in 8 bits a channel."""
    if 0 in image.size:
        raise ValueError(f"its width and height are {image.size}")
    _scale_clear_shade(image)
    image.load()
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, struct.error):
        turned = 1  # as viewers show a picture whose EXIF is damaged
    image = _in_8_bits(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        seen = Image.new("RGB", image.size, "white")
        seen.paste(layer, mask=layer)
    else:
        seen = image.convert("RGB")
    # What was said of the file's pixels does not hold of these. Nor is the old EXIF to
    # be written anew, which fails where any part of it is damaged.
    seen.info.clear()
    seen.getexif()[ExifTags.Base.Orientation] = turned
    ImageOps.exif_transpose(seen, in_place=True)
    return seen


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Shades of 16 or 32 bits scaled to 8, which `convert` would cut off at 255.

    No format says what is white in 32 bits: it is taken to be the least of 1 (of
    fractions only), 255 and 65,535 that no pixel exceeds, or else the brightest pixel.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    shades = np.array(image, np.float32)
    shades[~np.isfinite(shades)] = 0
    brightest = float(shades.max())
    usual = {"I": (255, 65535), "F": (1, 255, 65535)}.get(image.mode, (65535,))
    white = next((shade for shade in usual if brightest <= shade), brightest)
    scaled = (shades / (white / 255)).round().clip(0, 255)
    if "transparency" in image.info:
        scaled[shades == image.info["transparency"]] = 255
    return Image.fromarray(scaled.astype(np.uint8))


def _scale_clear_shade(image: Image.Image) -> None:
    """Brings the shade of gray that a PNG calls transparent to 8 bits.

    Pillow does so to pixels of 2 and 4 bits, while it leaves this shade as it is.
    """
    tiles = image.tile if isinstance(image, ImageFile.ImageFile) else []
    factor = {"L;2": 85, "L;4": 17}.get(str(tiles[0].args)) if tiles else None
    if factor and "transparency" in image.info:
        image.info["transparency"] *= factor
