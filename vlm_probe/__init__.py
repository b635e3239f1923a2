"""At which layer, and in which SAE features, image tokens become language."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlm_probe.checkup import doctor
    from vlm_probe.examples import Example, read_examples
    from vlm_probe.model import VisionLanguageModel, load
    from vlm_probe.probe import probe_layers
    from vlm_probe.result import ProbeResult
    from vlm_probe.settings import ProbeSettings
    from vlm_probe.toy.examples import toy_examples
    from vlm_probe.training.adapter import train_adapter

__version__ = "0.1.0"

_HOME = {
    "Example": "examples",
    "ProbeResult": "result",
    "ProbeSettings": "settings",
    "VisionLanguageModel": "model",
    "doctor": "checkup",
    "load": "model",
    "probe_layers": "probe",
    "read_examples": "examples",
    "toy_examples": "toy.examples",
    "train_adapter": "training.adapter",
}
__all__ = [
    "Example",
    "ProbeResult",
    "ProbeSettings",
    "VisionLanguageModel",
    "doctor",
    "load",
    "probe_layers",
    "read_examples",
    "toy_examples",
    "train_adapter",
]


def __getattr__(name: str) -> object:
    # Nothing is imported until it is used: torch alone takes seconds (PEP 562).
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
