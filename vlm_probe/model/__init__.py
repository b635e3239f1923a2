"""The four frozen parts, joined and checked."""

from vlm_probe.model.findings import Finding, cheap_findings
from vlm_probe.model.joined import VisionLanguageModel, load

__all__ = ["Finding", "VisionLanguageModel", "cheap_findings", "load"]
