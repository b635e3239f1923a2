"""The source of descriptions that a word or a path means."""

from __future__ import annotations

from pathlib import Path

from vlm_probe.analysis.descriptions.api import NeuronpediaApi
from vlm_probe.analysis.descriptions.export import NeuronpediaExport
from vlm_probe.analysis.descriptions.interface import Descriptions, Saes
from vlm_probe.analysis.descriptions.table import read_descriptions


def open_descriptions(source: str | Path, saes: Saes) -> Descriptions:
    """Opens a source of descriptions.

    Args:
        source: "neuronpedia" for its API, a folder or .jsonl.gz file of its exports, or
            a table in CSV or JSON; a `Path` is always taken for a folder or file.
        saes: The SAEs whose features are described, by layer.

    Raises:
        FileNotFoundError: There is nothing at the path.
        ValueError: It is none of these, or does not fit the SAEs.
    """
    if source == "neuronpedia":
        return NeuronpediaApi(saes)
    path = Path(source)
    if path.is_dir() or path.name.endswith((".jsonl", ".jsonl.gz")):
        return NeuronpediaExport(path, saes)
    if path.suffix in (".csv", ".json"):
        return read_descriptions(path, saes)
    raise (ValueError if path.exists() else FileNotFoundError)(
        f"no descriptions at {str(source)!r}: expected 'neuronpedia', a folder of its "
        "exports, or a table in .csv or .json"
    )
