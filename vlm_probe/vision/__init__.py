"""Images become patch tokens."""

from vlm_probe.vision.model import VisionModel
from vlm_probe.vision.token_cache import TokenCache

__all__ = ["TokenCache", "VisionModel"]
