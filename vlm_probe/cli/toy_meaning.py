"""What the toy's features say of its pictures, as tables for the documents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_probe.cli.app import app
from vlm_probe.cli.toy_places import places_of_colors

if TYPE_CHECKING:
    import pandas as pd

    from vlm_probe.analysis.match import MatchResult
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
        rates = _rate_table(found.rates)
        for group, rows in rates.groupby("group", sort=False):
            parts += [f"### {group}", markdown.table(rows.drop(columns="group"))]
        parts += ["### What the labels of image tokens are about", _ABOUT]
        parts += [markdown.table(_kind_table(found))]
    parts += ["## Where features of colors fire", _PLACES]
    parts += list(map(markdown.table, places_of_colors(model, examples, labels)))
    parts += ["## Features that a picture shares with its caption", _SHARED]
    parts += [markdown.table(_shared(result))]
    markdown.write(parts, out)


_ABOUT = (
    "All layers together. `true of` is the share of all pictures that these labels are "
    "true of."
)
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
) -> MatchResult:
    """Whether the labels of top features are true of the pictures."""
    import warnings

    from vlm_probe.analysis.descriptions import DescriptionTable
    from vlm_probe.analysis.judges import TruthJudge
    from vlm_probe.toy.truth import describes

    told = DescriptionTable({n: of.concepts() for n, of in labels.items()})
    with warnings.catch_warnings():
        # Some pictures have fewer features left; the table says of how many it is.
        warnings.simplefilter("ignore", UserWarning)
        return result.match(examples, told, TruthJudge(describes), by=by, k=K)


def _rate_table(rates: pd.DataFrame) -> pd.DataFrame:
    """A row for each group and layer."""
    import pandas as pd

    from vlm_probe.cli.printing import between

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


def _kind_table(found: MatchResult) -> pd.DataFrame:
    """A row for each kind of concept, of image tokens."""
    import pandas as pd

    from vlm_probe.toy.truth import KINDS_OF_CONCEPTS

    kinds = {word: kind for kind, of in KINDS_OF_CONCEPTS.items() for word in of}
    rows = found.judgements.dropna(subset="description")
    rows = rows[rows["group"] == "image"]
    everywhere = found.answers.groupby("description")["verdict"].mean()
    rows = pd.DataFrame(
        {
            "about": rows["description"].map(kinds),
            "rate": rows["verdict"].astype(float),
            "true of": rows["description"].map(everywhere).astype(float),
        }
    )
    grouped = rows.groupby("about", sort=False)
    means = grouped.mean().assign(labeled=grouped.size())
    means = means.reindex([kind for kind in KINDS_OF_CONCEPTS if kind in means.index])
    return means[["labeled", "rate", "true of"]].reset_index()


def _shared(result: ProbeResult) -> pd.DataFrame:
    from vlm_probe.cli.printing import between

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
