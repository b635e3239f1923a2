"""The four frozen parts, joined and checked."""

from vlm_probe.model.findings import Finding, cheap_findings
from vlm_probe.model.joined import VisionLanguageModel
from vlm_probe.model.loading import FrozenParts, load, load_frozen

__all__ = [
    "Finding",
    "FrozenParts",
    "VisionLanguageModel",
    "cheap_findings",
    "load",
    "load_frozen",
]
