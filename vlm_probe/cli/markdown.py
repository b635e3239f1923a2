"""Tables as Markdown, for documents that a command makes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def table(rows: pd.DataFrame) -> str:
    """A table in Markdown; numbers with three digits after the point."""
    lines = [
        list(rows.columns),
        ["---"] * len(rows.columns),
        *rows.astype(object).to_numpy(),
    ]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def write(parts: list[str], out: Path) -> None:
    """Writes a document of some paragraphs and tables, and prints it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n\n".join(parts) + "\n")
    print(out.read_text())


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
