"""What features are said to mean, wherever that is written."""

from vlm_probe.analysis.descriptions.api import NeuronpediaApi
from vlm_probe.analysis.descriptions.export import ExportReport, NeuronpediaExport
from vlm_probe.analysis.descriptions.interface import Descriptions, SaeIdentity
from vlm_probe.analysis.descriptions.labels import TextLabels, label_from_texts
from vlm_probe.analysis.descriptions.opening import open_descriptions
from vlm_probe.analysis.descriptions.table import (
    DescriptionTable,
    read_descriptions,
    write_descriptions,
)

__all__ = [
    "DescriptionTable",
    "Descriptions",
    "ExportReport",
    "NeuronpediaApi",
    "NeuronpediaExport",
    "SaeIdentity",
    "TextLabels",
    "label_from_texts",
    "open_descriptions",
    "read_descriptions",
    "write_descriptions",
]
