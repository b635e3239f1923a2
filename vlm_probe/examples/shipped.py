"""Where the files lie that ship with the package."""

from __future__ import annotations

from pathlib import Path


def data_folder() -> Path:
    """The folder `data`: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "data"
    return inside if inside.is_dir() else package.parent / "data"
