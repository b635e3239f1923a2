"""One sparse autoencoder per layer."""

from vlm_probe.saes.layer import LayerSae, load_saes

__all__ = ["LayerSae", "load_saes"]
