"""The one road from images to a result."""

from vlm_probe.probe.road import probe_layers

__all__ = ["probe_layers"]
