"""What the toy's features say of its pictures, as tables for the documents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_probe.cli.app import app

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from vlm_probe.model import VisionLanguageModel
    from vlm_probe.result import ProbeResult
    from vlm_probe.toy.examples import ToyExample
    from vlm_probe.toy.labels import LayerLabels

K = 3
"""Features of an image that are judged."""


@app.command(name="toy-meaning")
def toy_meaning(
    *, n: int = 216, out: Path = Path("docs/toy_features.md"), seed: int = 3
) -> None:
    """Measure what the toy's features say of its pictures, layer by layer.

    Args:
        n: Held-out pictures.
        out: Markdown file for the tables.
        seed: Of the pictures; those of the labels are texts, and others.
    """
    from vlm_probe.cli import markdown
    from vlm_probe.model import load
    from vlm_probe.probe import probe_layers
    from vlm_probe.toy.examples import toy_examples
    from vlm_probe.toy.labels import BOUND, DOCUMENTS, toy_labels

    model, examples, labels = load("toy"), toy_examples(n, seed=seed), toy_labels()
    result = probe_layers(
        model, examples, rank_by=["activation", "selectivity"], top_k=16
    )
    parts = [
        "# What the toy's features say of its pictures",
        "Made by `make meaning`; what it shows is said in [features.md](features.md).",
        f"{n} held-out pictures. Bounds are of 95 % over pictures. Chance is the same "
        "features on other pictures, with the bounds within which 95 % of random "
        "exchanges of pictures fall; p is the share of exchanges that reach the rate.",
        "## Labels",
        f"Measured on {DOCUMENTS} texts: on one half a concept is chosen for each "
        f"feature, if it scores {BOUND} or more; `score` is the mean on the other.",
        markdown.table(_label_table(labels)),
    ]
    for by in ("activation", "selectivity"):
        parts += [f"## Top {K} by {by}: does the label describe the picture?"]
        found = _matched(result, examples, labels, by)
        for group, rows in found.groupby("group", sort=False):
            parts += [f"### {group}", markdown.table(rows.drop(columns="group"))]
    parts += ["## Where features of colors fire", _PLACES]
    parts += list(map(markdown.table, _places(model, examples, labels)))
    parts += ["## Features that a picture shares with its caption", _SHARED]
    parts += [markdown.table(_shared(result))]
    markdown.write(parts, out)


_PLACES = (
    "Of each color the feature with the highest score among those labeled with it, "
    "chosen on texts alone. First, one object of each picture whose color has a "
    "feature: is the feature stronger on its patches (mean AUROC within the picture), "
    "and is the strongest patch its own, beside a patch drawn at random? In `silent` "
    "pictures the feature fires nowhere; they have an AUROC of 0.5, and no strongest "
    "patch. Then the AUROC of each color's feature over the patches of all pictures; "
    "empty where no feature has the label."
)
_SHARED = (
    "Weighted Jaccard index of the top features of a picture and those of its caption, "
    "read without the picture; then with other pictures' captions; and how often the "
    "own caption is the nearest of all, and the own picture."
)


def _label_table(labels: dict[int, LayerLabels]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(
        {
            "layer": layer,
            "features that fire": of.n_fired,
            "labeled": len(of.labels),
            "by context": sum(x.reading == "context" for x in of.labels.values()),
            "concepts": len(set(of.concepts().values())),
            "score": sum(x.score for x in of.labels.values()) / max(1, len(of.labels)),
        }
        for layer, of in labels.items()
    )


def _matched(
    result: ProbeResult,
    examples: Sequence[ToyExample],
    labels: dict[int, LayerLabels],
    by: str,
) -> pd.DataFrame:
    """A row for each group and layer."""
    import warnings

    import pandas as pd

    from vlm_probe.analysis.descriptions import DescriptionTable
    from vlm_probe.analysis.judges import TruthJudge
    from vlm_probe.cli.markdown import between
    from vlm_probe.toy.truth import describes

    told = DescriptionTable({n: of.concepts() for n, of in labels.items()})
    with warnings.catch_warnings():
        # Some pictures have fewer features left; the table says of how many it is.
        warnings.simplefilter("ignore", UserWarning)
        rates = result.match(examples, told, TruthJudge(describes), by=by, k=K).rates
    order = {group: place for place, group in enumerate(dict.fromkeys(rates["group"]))}
    rates = rates.sort_values(["group", "layer"], key=lambda c: c.replace(order))
    found = rates[["group", "layer"]].copy()
    chosen = rates["n_features"] + rates["n_undescribed"]
    found["labeled"] = [
        f"{n} of {whole} ({n / whole:.2f})"
        for n, whole in zip(rates["n_features"], chosen, strict=True)
    ]
    for name, title in (("rate", "rate"), ("any_rate", f"any of {K}")):
        for part, words in (("", title), ("_chance", f"{title}, chance")):
            columns = [f"{name}{part}{end}" for end in ("", "_low", "_high")]
            found[words] = [between(*row) for row in rates[columns].to_numpy()]
        found[f"{title}, p"] = [
            "" if pd.isna(p) else f"{p:.3f}" for p in rates[f"{name}_p"]
        ]
    return found


def _places(
    model: VisionLanguageModel,
    examples: Sequence[ToyExample],
    labels: dict[int, LayerLabels],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One object of each picture; and each color."""
    from dataclasses import replace

    import numpy as np
    import pandas as pd

    from vlm_probe.analysis.localization import localize
    from vlm_probe.analysis.places import patch_maps
    from vlm_probe.cli.markdown import between
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
                "silent": int(fit.n_silent),
                "AUROC": between(
                    fit.image_auroc, fit.image_auroc_low, fit.image_auroc_high
                ),
                "strongest patch": between(
                    fit.pointing, fit.pointing_low, fit.pointing_high
                ),
                "chance": between(fit.chance, np.nan, np.nan),
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


def _shared(result: ProbeResult) -> pd.DataFrame:
    from vlm_probe.cli.markdown import between

    shared = result.shared_features()
    found = shared[["layer"]].copy()
    for name in ("overlap", "to_caption", "to_image"):
        columns = [name, f"{name}_low", f"{name}_high"]
        found[name.replace("_", " ")] = [
            between(*row) for row in shared[columns].to_numpy()
        ]
    found.insert(2, "shuffled", [f"{v:.3g}" for v in shared["shuffled"]])
    found.insert(3, "p", [f"{p:.3f}" for p in shared["p_value"]])
    found["chance"] = [f"{v:.3g}" for v in shared["chance"]]
    return found
