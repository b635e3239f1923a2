"""Where in a picture a feature fires.

A second, small pass keeps what the probe's did not: the values of a few features at
every patch, and where each patch lies in its picture. Against masks they are judged by
`vlm_probe.analysis.localization`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from PIL import Image
from torch import Tensor

from vlm_probe.examples import Example, as_examples
from vlm_probe.model import VisionLanguageModel
from vlm_probe.tokens import check_names


@dataclass(frozen=True)
class PatchMaps:
    """The values of some features at every patch of some pictures."""

    values: Mapping[int, Float32[np.ndarray, "image feature patch_row patch_column"]]
    """By layer; 0 where a feature does not fire."""
    features: Mapping[int, tuple[int, ...]]
    """By layer, which they are."""
    ids: tuple[str, ...]
    """Of the pictures' examples."""
    sizes: tuple[tuple[int, int], ...]
    """Width and height of each picture as a person sees it, in pixels."""
    boxes: Float64[np.ndarray, "image patch_row patch_column 4"]
    """Left, top, right and bottom of each patch in its picture, in pixels; a patch of
    padding has no area."""

    def of(
        self, layer: int, feature: int
    ) -> Float32[np.ndarray, "image patch_row patch_column"]:
        """One feature's maps.

        Raises:
            ValueError: It was not asked for.
        """
        check_names("layer", [str(layer)], [str(n) for n in self.features])
        among = self.features[layer]
        check_names(f"feature of layer {layer}", [str(feature)], [*map(str, among)])
        return self.values[layer][:, among.index(feature)]


@torch.no_grad()
def patch_maps(
    model: VisionLanguageModel,
    examples: Iterable[Image.Image | str | Path | Example],
    features: Mapping[int, Sequence[int]],
    *,
    batch_size: int = 8,
) -> PatchMaps:
    """What some features do at every patch of some pictures.

    Args:
        model: Of `vlm_probe.load`.
        examples: Pictures, paths or examples.
        features: By layer, which features.
        batch_size: Pictures that go through the models together, in pictures.

    Raises:
        OSError: A picture cannot be read; maps and masks must belong together, so none
            is left out.
        ValueError: No picture, no feature, or a layer or feature that is not there; a
            preprocessing of which it is not known where it moves pixels.
    """
    asked = _asked(model, features)
    rows, columns = model.vision.grid
    prompt = model.language.chat.image_prompt(None, rows * columns)
    # What comes behind the picture is not seen by it.
    prompt = prompt.until(prompt.image.stop)
    found: dict[int, list[np.ndarray]] = {layer: [] for layer in asked}
    ids, sizes = [], []
    for batch in _batches(as_examples(examples), batch_size):
        pictures = [example.picture() for example in batch]
        ids += [str(example.id) for example in batch]
        sizes += [picture.size for picture in pictures]
        vectors = model.adapter(model.vision.encode(pictures))
        prompts = [prompt] * len(batch)

        def visit(layer: int, residual: Float[Tensor, "row pos d_model"]) -> None:
            x = residual[:, prompt.image.start : prompt.image.stop]
            codes, _ = model.saes[layer].code(x.flatten(0, 1))
            dense = np.zeros((len(asked[layer]), codes.n_tokens), np.float32)
            for place, feature in enumerate(asked[layer]):
                here = codes.feature == feature
                values = codes.value[here].float().cpu().numpy()
                dense[place, codes.token[here].cpu().numpy()] = values
            shape = (len(asked[layer]), len(x), rows, columns)
            found[layer].append(dense.reshape(shape).swapaxes(0, 1))

        model.language.read(
            prompts,
            vectors,
            [*asked],
            visit,
            hook_point=model.hook_point,
            inject_layer=model.adapter.inject_layer,
        )
    if not ids:
        raise ValueError("no pictures given; expected at least one")
    patches = np.arange(rows * columns)
    boxes = [model.vision.patch_boxes(patches, size) for size in sizes]
    return PatchMaps(
        {layer: np.concatenate(maps) for layer, maps in found.items()},
        asked,
        tuple(ids),
        tuple(sizes),
        np.stack(boxes).reshape(len(ids), rows, columns, 4),
    )


def _batches(examples: Iterator[Example], size: int) -> Iterator[list[Example]]:
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, given {size}")
    while batch := list(itertools.islice(examples, size)):
        yield batch


def _asked(
    model: VisionLanguageModel, features: Mapping[int, Sequence[int]]
) -> dict[int, tuple[int, ...]]:
    """The features that are asked for, each once."""
    check_names("layer", [*map(str, features)], [*map(str, sorted(model.saes))])
    found = {n: tuple(dict.fromkeys(map(int, features[n]))) for n in sorted(features)}
    if not any(found.values()):
        raise ValueError("no feature asked for; give some, by layer: {5: [17, 203]}")
    first = model.adapter.inject_layer
    for layer, chosen in found.items():
        if layer < first:
            raise ValueError(
                f"layer {layer} comes before block {first}, where the adapter's "
                "vectors enter: nothing of a picture is there; ask for later ones"
            )
        width = model.saes[layer].n_features
        if unknown := [f for f in chosen if not 0 <= f < width]:
            raise ValueError(
                f"feature {unknown[0]} of layer {layer}: its SAE has features 0 to "
                f"{width - 1}"
            )
    return found
