"""The exact sparse codes of one autoencoder, and what they decode to."""

from vlm_probe.codes.encoding import TILE, code, uses_screening
from vlm_probe.codes.sparse import (
    FeatureSums,
    Peaks,
    SparseCodes,
    peak_table,
    strongest,
)

__all__ = [
    "TILE",
    "FeatureSums",
    "Peaks",
    "SparseCodes",
    "code",
    "peak_table",
    "strongest",
    "uses_screening",
]
