"""The frozen vision transformer of an open_clip model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from vlm_probe.vision.geometry import Box, boxes_in_original, without_far_ends
from vlm_probe.vision.origin import Origin, activation_mismatch, computes_quick_gelu
from vlm_probe.vision.sources import find_source
from vlm_probe.vision.towers import build_tower, fill_tower, preprocess_of, write_tower
from vlm_probe.weights import floating, read_weights


class VisionModel:
    """The frozen vision transformer of an open_clip model.

    Patch tokens are what a block leaves in the residual stream: before the final
    LayerNorm, and without class or register tokens.
    """

    def __init__(
        self,
        visual: nn.Module,
        preprocess: Callable[[Image.Image], Tensor],
        *,
        block: int = -1,
        name: str = "vision",
        config: Mapping | None = None,
        origin: Origin | None = None,
    ) -> None:
        """Wraps an open_clip vision tower.

        Args:
            visual: `model.visual` of an open_clip model, its own or timm's.
            preprocess: From a picture to the tower's input, as open_clip makes it.
            block: After which block tokens are taken; -1 the last (the paper), -2 the
                one before (LLaVA).
            name: Where it came from, for tables.
            config: `model_cfg` and `preprocess_cfg`, as in `open_clip_config.json`;
                without it the model cannot be saved.
            origin: What its weights were trained with, if that is known.

        Raises:
            ValueError: The tower has no transformer blocks, or not that many.
        """
        self.visual = visual.eval().requires_grad_(False)
        self.preprocess = preprocess
        self.name = name
        self.config = config
        self.origin = origin
        self.block = block
        if not -self.n_blocks <= block < self.n_blocks:
            raise ValueError(
                f"block {block}: the vision model {name!r} has {self.n_blocks} blocks, "
                f"0 to {self.n_blocks - 1}, or from the end -1 to -{self.n_blocks}"
            )
        rows, columns = self._input_size
        blank = Image.new("RGB", (columns, rows))
        found = self._features([blank], "NCHW")
        _, self.d_vision, *self._grid = found.shape

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        pretrained: str | Path | None = None,
        block: int | None = None,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
    ) -> VisionModel:
        """Loads a vision tower.

        Args:
            source: One of

                - an open_clip name and tag, "ViT-L-14-quickgelu:openai";
                - an open_clip name and a file, "ViT-B-16:/path/weights.pt";
                - "hf-hub:organization/repository";
                - a folder, or "local-dir:" and a folder, with `open_clip_config.json`
                  and weights;
                - a folder that `save` wrote.
            pretrained: The tag or file, if it is not part of `source`.
            block: After which block tokens are taken; -1 the last, which it is if
                nothing else was saved.
            device: Where it computes.
            dtype: What it computes in: "float32", "bfloat16", "float16" or "float64".

        Raises:
            FileNotFoundError: Files are missing, or cannot be downloaded.
            ValueError: There is no such model, tag or block, or the weights do not
                fit, are damaged or hold code.

        Warns:
            UserWarning: The tower computes another activation than its weights were
                trained with; see `activation_mismatch`.
        """
        found = find_source(str(source), str(pretrained) if pretrained else None)
        visual = build_tower(found.config, found.name)
        weights, _ = read_weights(found.weights, published=found.published)
        fill_tower(visual, weights, f"{found.weights} and the model {found.name!r}")
        model = cls(
            visual.to(device, floating(dtype)),
            preprocess_of(found.config, visual),
            block=found.block if block is None else block,
            name=found.name,
            config=found.config,
            origin=found.origin,
        )
        mismatch = model.activation_mismatch()
        if mismatch:
            warnings.warn(mismatch, stacklevel=2)
        return model

    def save(self, folder: str | Path) -> None:
        """Writes the tower to a folder, whatever it was loaded from.

        Raises:
            ValueError: There is no config, or what it describes is not this tower.
        """
        if self.config is None:
            raise ValueError(
                f"the vision model {self.name!r} was made without a config, and cannot "
                "be built again; give VisionModel(..., config={'model_cfg': ..., "
                "'preprocess_cfg': ...}), for instance open_clip.get_model_config(name)"
                " and visual.preprocess_cfg"
            )
        self._check_config(self.config)
        write_tower(
            Path(folder),
            self.visual,
            self.config,
            {
                "name": self.name,
                "block": self.block,
                "origin": self.origin and self.origin[:2],
            },
        )

    @property
    def n_blocks(self) -> int:
        """Number of transformer blocks."""
        for owner, blocks in (("transformer", "resblocks"), ("trunk", "blocks")):
            found = getattr(getattr(self.visual, owner, None), blocks, None)
            if found is not None:
                return len(found)
        raise ValueError(
            f"the vision model {self.name!r} is no vision transformer but a "
            f"{type(getattr(self.visual, 'trunk', self.visual)).__name__}; expected "
            "one of open_clip's ViT, SigLIP or EVA models"
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        rows, columns = self._grid
        return rows, columns

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self._weight.dtype

    @property
    def preprocessing(self) -> str:
        """What is done to a picture before the tower sees it, in words.

        Where its functions lie in memory says nothing, and is left out.
        """
        return re.sub(r" at 0x[0-9a-f]+", "", str(self.preprocess))

    @property
    def quick_gelu(self) -> bool | None:
        """Whether the tower computes QuickGELU; None for timm's towers."""
        return computes_quick_gelu(self.visual)

    def activation_mismatch(self) -> str | None:
        """What is wrong if the weights were trained with another activation.

        Returns:
            A sentence, without its full stop, on what the tower computes, what its
            weights were trained with, how that is known and what to do. None if they
            agree, or if nothing tells where the weights come from.
        """
        return activation_mismatch(self.name, self.quick_gelu, self.origin)

    def patch_box(self, index: int, original_size: tuple[int, int]) -> Box:
        """Where a patch lies in the original picture.

        Args:
            index: Of the patch, in the order of `encode`.
            original_size: Width and height of the original, as PIL gives them, after it
                was turned as its EXIF orientation says.

        Returns:
            Left, top, right, bottom in pixels of the original, cut off at its borders:
            a patch of padding has an empty box.

        Raises:
            ValueError: There is no such patch, or preprocessing has steps of which it
                is not known where they move pixels.
        """
        (box,) = self.patch_boxes(np.array([index]), original_size).tolist()
        left, top, right, bottom = box
        return left, top, right, bottom

    def patch_boxes(
        self, indices: Int[np.ndarray, " patch"], original_size: tuple[int, int]
    ) -> Float[np.ndarray, "patch 4"]:
        """Where some patches lie in one original picture; see `patch_box`."""
        rows, columns = self.grid
        unknown = indices[(indices < 0) | (indices >= rows * columns)]
        if len(unknown):
            raise ValueError(
                f"patch {unknown[0]}: the vision model {self.name!r} has {rows} x "
                f"{columns} patches, 0 to {rows * columns - 1}"
            )
        height, width = self._patch_size
        row, column = np.divmod(indices, columns)
        ends = [column * width, row * height, (column + 1) * width, (row + 1) * height]
        boxes = np.stack(ends, axis=1).astype(float)
        return boxes_in_original(self.preprocess, boxes, original_size)

    def encode(
        self, images: Sequence[Image.Image]
    ) -> Float[Tensor, "image patch d_vision"]:
        """Patch tokens of pictures, in order from the top left, row by row.

        They are on the tower's device, in the dtype that it computes in.
        """
        return self._features(images, "NLC")

    @torch.no_grad()
    def _features(self, images: Sequence[Image.Image], form: str) -> Tensor:
        pixels = torch.stack(
            [self.preprocess(without_far_ends(self.preprocess, i)) for i in images]
        )
        found = self.visual.forward_intermediates(
            pixels.to(self.device, self.dtype),
            indices=[self.block],
            stop_early=True,
            output_fmt=form,
            intermediates_only=True,
        )
        return found["image_intermediates"][0]

    @property
    def _weight(self) -> Tensor:
        """A weight on the device and in the dtype that inputs must have.

        Not any parameter: in mixed precision the class token stays in float32.
        """
        kinds = (nn.Conv2d, nn.Linear)
        return next(m.weight for m in self.visual.modules() if isinstance(m, kinds))

    @property
    def _input_size(self) -> tuple[int, int]:
        """Rows and columns of pixels that the tower takes."""
        size = self.visual.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def _patch_size(self) -> tuple[int, int]:
        """Rows and columns of pixels that a patch takes."""
        found = getattr(self.visual, "patch_size", None)
        if found is None:
            found = self.visual.trunk.patch_embed.patch_size
        (height, width), (rows, columns) = found, self._input_size
        if (rows // height, columns // width) == self.grid:
            return height, width  # what is left over at right and bottom is in no patch
        return rows // self.grid[0], columns // self.grid[1]  # patches of a conv stem

    def _check_config(self, config: Mapping) -> None:
        """That a tower built from the config gives the very same tokens."""
        visual = build_tower(config, repr(self.name))
        what = f"the weights of the vision model {self.name!r} and its config"
        fill_tower(visual, self.visual.state_dict(), what)
        twin = VisionModel(
            visual.to(self.device, self.dtype),
            preprocess_of(config, visual),
            block=self.block,
        )
        rows, columns = self._input_size
        pixels = np.random.default_rng(0).integers(0, 256, (rows + 9, columns * 2, 3))
        picture = Image.fromarray(pixels.astype(np.uint8))
        if not torch.equal(twin.encode([picture]), self.encode([picture])):
            raise ValueError(
                f"the config of the vision model {self.name!r} describes another "
                "model: it gives other patch tokens of the same picture; compare "
                "quick_gelu, preprocess_cfg and precision with how it was made"
            )
