"""Images become patch tokens."""

from vlm_probe.vision.model import VisionModel

__all__ = ["VisionModel"]
