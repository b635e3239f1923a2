"""The four frozen parts, joined and checked."""

from vlm_probe.model.findings import Finding, cheap_findings
from vlm_probe.model.joined import VisionLanguageModel, lines
from vlm_probe.model.loading import FrozenParts, load, load_frozen

__all__ = [
    "Finding",
    "FrozenParts",
    "VisionLanguageModel",
    "cheap_findings",
    "lines",
    "load",
    "load_frozen",
]
