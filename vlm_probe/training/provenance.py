"""How an adapter came to be, and what must be the same for a run to go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from vlm_probe.probe.provenance import versions
from vlm_probe.training.frozen import Frozen
from vlm_probe.training.settings import AdapterTraining, Stage

Plan = Sequence[tuple[Stage, int | None]]
"""Stages, and how many examples each has, if known."""


def told_of(frozen: Frozen, settings: AdapterTraining, plan: Plan) -> dict[str, Any]:
    """What an adapter's manifest says of its training, JSON only."""
    told = {
        "stages": [asdict(stage) | {"n_examples": n} for stage, n in plan],
        "training": asdict(settings),
        "vision": frozen.vision.name,
        "vision_block": frozen.vision.block,
        "language": frozen.language.name,
        "frozen": frozen.digests,
    }
    if settings.inject_layer:
        told["inject_layer"] = settings.inject_layer
    return told


def configuration(
    frozen: Frozen, settings: AdapterTraining, plan: Plan, n_processes: int
) -> dict[str, object]:
    """All that decides the numbers, JSON only."""
    vision, language = frozen.vision, frozen.language
    return {
        # Who reads the pictures changes nothing.
        "settings": asdict(settings) | {"workers": None},
        "stages": [asdict(stage) | {"n_examples": n} for stage, n in plan],
        "processes": n_processes,
        "frozen": frozen.digests,
        "vision": {
            "block": vision.block,
            "preprocess": vision.preprocessing,
            "device": vision.device.type,
            "dtype": str(vision.dtype),
        },
        "language": {
            "device": language.device.type,
            "dtype": str(language.dtype),
            "backend": language.backend,
            "default_prompt": language.chat.default_prompt,
            "chat_template": language.tokenizer.chat_template,
        },
        "versions": versions(),
    }
