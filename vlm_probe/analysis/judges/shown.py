"""A picture as a judge is shown it."""

from __future__ import annotations

import base64
import io

from PIL import Image

from vlm_probe.examples import Example


def picture_as_shown(example: Example, side: int) -> Image.Image:
    """The example's picture with its longer side at most `side` pixels.

    Raises:
        OSError: It cannot be read.
        ValueError: There is none.
    """
    picture = example.picture()
    scale = side / max(picture.size)
    if scale >= 1:
        return picture
    width, height = (max(1, round(length * scale)) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def data_url(picture: Image.Image) -> str:
    """The picture in base64. As PNG, so that what was hashed is what is seen."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
