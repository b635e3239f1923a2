"""Other adapters for the toy, compared layer by layer."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_probe.cli.app import app
from vlm_probe.cli.toy import trained_toy
from vlm_probe.training.settings import AdapterTraining

if TYPE_CHECKING:
    import pandas as pd

VARIANTS = {
    "linear": AdapterTraining(),
    "MLP": AdapterTraining(kind="mlp2x_gelu"),
    "SAE penalty": AdapterTraining(sae_penalty=1.0, penalty_layers=(0, 2, 4, 6)),
    "enters at layer 3": AdapterTraining(inject_layer=3),
}
"""Adapters that are compared, one change each."""


@app.command(name="toy-variants")
def toy_variants(
    *,
    out: Path = Path("docs/adapter_variants.md"),
    work: Path = Path("toy-work/variants"),
    captions: int = 150,
    answers: int = 350,
    n: int = 216,
    seed: int = 0,
) -> None:
    """Train other adapters for the toy, and compare them layer by layer.

    Args:
        out: Markdown file for the tables.
        work: Folder for their runs; begun again, training goes on from there.
        captions: Steps of the first stage, of 24 pictures each.
        answers: Steps of the second stage.
        n: Held-out pictures they are probed with; answers are of eight times as many.
        seed: Of everything random.
    """
    import pandas as pd

    from vlm_probe.cli import markdown
    from vlm_probe.examples import data_folder
    from vlm_probe.model import VisionLanguageModel
    from vlm_probe.probe import probe_layers
    from vlm_probe.toy.examples import toy_examples
    from vlm_probe.training.evaluate import evaluate_adapter

    reached, layers = [], []
    for name, settings in VARIANTS.items():
        frozen, adapter = trained_toy(
            data_folder() / "toy",
            work / name.replace(" ", "-"),
            {"captions": captions, "answers": answers},
            replace(settings, seed=seed),
        )
        parts = {"vision": frozen.vision, "language": frozen.language}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the table says it
            found = evaluate_adapter(
                **parts, adapter=adapter, examples=toy_examples(8 * n, seed=2)
            )
        arms = found.summary().set_index("arm")
        reached.append(
            {
                "adapter": name,
                **{f"right, {arm}": arms.accuracy[arm] for arm in arms.index},
                **{
                    f"caption nats, {arm}": arms.caption_cross_entropy[arm]
                    for arm in arms.index
                },
            }
        )
        result = probe_layers(
            VisionLanguageModel(**parts, adapter=adapter, saes=frozen.saes),
            toy_examples(n, seed=2),
            groups=("image", "text_only"),
        )
        layers.append(result.layers.assign(adapter=name))
    measured = pd.concat(layers)
    words = [
        "# Other adapters for the toy",
        "Made by `make variants`; what it shows is said in [training.md](training.md).",
        f"Each adapter: {captions} steps of captions, then {answers} of answers, 24 "
        f"pictures each, seed {seed}, one change from the first. Answers and captions "
        f"of {8 * n} held-out pictures; layers of {n}.",
        "## What the language model makes of them",
        markdown.table(pd.DataFrame(reached)),
    ]
    for metric, title in _METRICS.items():
        words += [f"## {title}", markdown.table(by_layer(measured, metric))]
    markdown.write(words, out)


_METRICS = {
    "fvu": "FVU at image positions (95 % bounds), text in the picture's place last",
    "cosine": "Cosine of image tokens and their reconstructions, text last",
    "l0": "L0 at image positions, text last",
}


def by_layer(measured: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A row per layer, a column per adapter; empty where there are no image tokens."""
    from vlm_probe.cli.printing import between

    shown = measured.assign(
        shown=[
            between(*bounded)
            for bounded in measured[
                [metric, f"{metric}_low", f"{metric}_high"]
            ].itertuples(index=False)
        ]
    )
    image = shown[shown.group == "image"]
    wide = image.pivot(index="layer", columns="adapter", values="shown")
    text = shown[(shown.group == "text_only") & (shown.adapter == "linear")]
    wide = wide.reindex(columns=list(VARIANTS), index=sorted(set(text.layer)))
    wide["text"] = text.set_index("layer").shown
    return wide.astype("str").where(wide.notna(), "").reset_index()
