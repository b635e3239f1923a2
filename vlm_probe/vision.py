"""Images become patch tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import open_clip
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn


class VisionModel:
    """The frozen vision transformer of an open_clip model.

    Patch tokens are what a block leaves in the residual stream: before the final
    LayerNorm, and without the class token.
    """

    def __init__(
        self,
        visual: nn.Module,
        preprocess: Callable[[Image.Image], Tensor],
        *,
        block: int = -1,
        name: str = "vision",
    ) -> None:
        """Wraps an open_clip vision tower.

        Args:
            visual: `model.visual` of an open_clip model.
            preprocess: From a picture to the tower's input, as open_clip makes it.
            block: After which block tokens are taken; -1 the last (the paper), -2 the
                one before (LLaVA).
            name: Where it came from, for tables.
        """
        self.visual = visual.eval().requires_grad_(False)
        self.preprocess = preprocess
        self.block = block
        self.name = name
        side = visual.image_size
        blank = Image.new("RGB", (side, side) if isinstance(side, int) else side[::-1])
        self.d_vision = self.encode([blank]).shape[-1]

    @classmethod
    def load(cls, source: str | Path, *, block: int = -1) -> VisionModel:
        """Loads a folder with `open_clip_config.json` and weights."""
        model, preprocess = open_clip.create_model_from_pretrained(
            f"local-dir:{source}", return_transform=True
        )
        return cls(model.visual, preprocess, block=block, name=Path(source).name)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        rows, columns = self.visual.grid_size
        return rows, columns

    @torch.no_grad()
    def encode(
        self, images: Sequence[Image.Image]
    ) -> Float[Tensor, "image patch d_vision"]:
        """Patch tokens of pictures, in order from the top left, row by row."""
        weight = next(self.visual.parameters())
        pixels = torch.stack([self.preprocess(image) for image in images])
        found = self.visual.forward_intermediates(
            pixels.to(weight.device, weight.dtype),
            indices=[self.block],
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        return found["image_intermediates"][0]
