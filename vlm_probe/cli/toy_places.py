"""Whether the toy's features of colors fire where pictures show the color."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from vlm_probe.model import VisionLanguageModel
    from vlm_probe.toy.examples import ToyExample
    from vlm_probe.toy.labels import LayerLabels


def places_of_colors(
    model: VisionLanguageModel,
    examples: Sequence[ToyExample],
    labels: dict[int, LayerLabels],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """How well features of colors fit the patches that show them.

    Returns:
        A table of one object of each picture, and one of each color.
    """
    from dataclasses import replace

    import numpy as np
    import pandas as pd

    from vlm_probe.analysis.localization import localize
    from vlm_probe.analysis.places import patch_maps
    from vlm_probe.cli.printing import between
    from vlm_probe.toy.world import COLORS

    best = {layer: _of_colors(of) for layer, of in labels.items()}
    wanted = {n: list(of.values()) for n, of in best.items() if of}
    maps = patch_maps(model, examples, wanted)
    objects, colors = [], []
    for layer, of in best.items():
        row: dict[str, object] = {"layer": layer}
        for color in COLORS:
            row[color] = ""
            if color in of:
                masks = [_mask(example, color) for example in examples]
                fit = localize(maps, masks, layer=layer, feature=of[color]).iloc[0]
                row[color] = between(fit.auroc, fit.auroc_low, fit.auroc_high)
        colors.append(row)
        # The first object, in the order of the scene, whose color has a feature.
        chosen = [
            next((t.color for t in example.scene.things if t.color in of), None)
            for example in examples
            if example.scene is not None
        ]
        there = [n for n, color in enumerate(chosen) if color is not None]
        if not there:
            objects.append({"layer": layer, "colors": 0, "pictures": 0})
            continue
        one = replace(
            maps,
            values={
                layer: np.stack(
                    [maps.of(layer, of[str(chosen[n])])[n][None] for n in there]
                )
            },
            features={layer: (0,)},
            ids=tuple(maps.ids[n] for n in there),
            sizes=tuple(maps.sizes[n] for n in there),
            boxes=maps.boxes[there],
        )
        masks = [_mask(examples[n], str(chosen[n])) for n in there]
        fit = localize(one, masks).iloc[0]
        objects.append(
            {
                "layer": layer,
                "colors": len(of),
                "pictures": len(there),
                "silent": str(int(fit.n_silent)),
                "AUROC": between(
                    fit.image_auroc, fit.image_auroc_low, fit.image_auroc_high
                ),
                "strongest patch": between(
                    fit.pointing, fit.pointing_low, fit.pointing_high
                ),
                "chance": f"{fit.chance:.3g}",
            }
        )
    return pd.DataFrame(objects).fillna(""), pd.DataFrame(colors)


def _of_colors(of: LayerLabels) -> dict[str, int]:
    """The feature that is most surely each color's, as far as there is one."""
    from vlm_probe.toy.world import COLORS

    found: dict[str, int] = {}
    for feature, label in of.labels.items():
        held = found.get(label.concept)
        if label.concept in COLORS and (
            held is None or label.score > of.labels[held].score
        ):
            found[label.concept] = feature
    return found


def _mask(example: ToyExample, color: str) -> np.ndarray:
    """The pixels of the picture that show the color."""
    import numpy as np

    if example.scene is None or example.masks is None:
        raise ValueError(f"example {example.id!r} does not know its scene")
    shown = [thing.color == color for thing in example.scene.things]
    return np.any(example.masks[np.array(shown, bool)], axis=0)
