"""One sparse autoencoder per layer."""

from vlm_probe.saes.layer import LayerSae
from vlm_probe.saes.loading import load_saes
from vlm_probe.saes.residency import SCREEN_SHARE, StreamedSaes, encoding_of, outlines

__all__ = [
    "SCREEN_SHARE",
    "LayerSae",
    "StreamedSaes",
    "encoding_of",
    "load_saes",
    "outlines",
]
