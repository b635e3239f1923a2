"""The frozen parts of the toy, trained one after the other into one folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from vlm_probe.language import LanguageModel
from vlm_probe.saes import load_saes
from vlm_probe.toy import labels, language, saes, vision
from vlm_probe.toy.texts import DESCRIBE, caption
from vlm_probe.toy.world import draw_scene

FROZEN = ("language", "vision", "saes", "labels")
"""The stages, in an order in which each finds what it needs."""


def build_frozen(stage: str, folder: Path, *, seed: int = 0) -> dict:
    """Trains one frozen part from scratch.

    Args:
        stage: One of `FROZEN`; "saes" needs the language model in the folder,
            "labels" both.
        folder: The toy's folder.
        seed: Of everything random.

    Returns:
        What was measured on held-out data.
    """
    if stage == "language":
        return language.build(folder / "language", seed=seed)
    if stage == "vision":
        return vision.build(folder / "vision", seed=seed)
    if stage == "saes":
        frozen = LanguageModel.load(folder / "language")
        figures = saes.build(folder / "saes", frozen, seed=seed)
        return {f"layer {layer}": found for layer, found in figures.items()}
    if stage == "labels":
        return _label(folder)
    raise ValueError(f"unknown stage {stage!r}; valid: {', '.join(FROZEN)}")


def _label(folder: Path) -> dict:
    """Writes the labels, and says how many there are and what they are worth."""
    frozen = LanguageModel.load(folder / "language")
    found = labels.measure_labels(frozen, load_saes(folder / "saes"))
    labels.write_labels(found, folder / labels.LABELS)
    figures = {}
    for layer, of in found.items():
        told = list(of.labels.values())
        figures[f"layer {layer}"] = {
            "fired": of.n_fired,
            "labeled": len(told),
            "by context": sum(label.reading == "context" for label in told),
            "score": round(sum(label.score for label in told) / len(told), 3),
        }
    return figures


def write_description(folder: Path) -> None:
    """Writes what `vlm_probe.load` reads beside the parts."""
    about = {"name": "toy", "vision_block": -1, "default_prompt": DESCRIBE}
    (folder / "model.json").write_text(json.dumps(about, indent=1) + "\n")
    rng = np.random.default_rng([0, 6])
    texts = [caption(draw_scene(rng), rng) for _ in range(64)]
    (folder / "reference_texts.txt").write_text("\n".join(texts) + "\n")
