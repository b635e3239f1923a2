"""Tables of features and of match rates, as a person reads them on a terminal."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from vlm_probe.analysis.descriptions import Descriptions

_WIDEST = 70
"""Of a description on a terminal, in characters."""


def printable(text: str) -> str:
    """Text without what a terminal would obey: controls, and marks that turn its order.

    Descriptions and words are data of others. White space of any kind is one blank.
    """
    kept = "".join(
        c if c.isprintable() or c.isspace() else "\N{REPLACEMENT CHARACTER}"
        for c in text
    )
    return " ".join(kept.split())


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Warnings as notes on the standard error, without the place in the code."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield
    for warning in found:
        print(f"note: {warning.message}", file=sys.stderr)


def with_descriptions(
    chosen: pd.DataFrame, source: Descriptions | None
) -> pd.DataFrame:
    """Chosen features with what each is said to mean; missing where nothing is."""
    import pandas as pd

    said: dict[tuple[int, int], str | None] = {}
    if source is not None:
        for layer, rows in chosen.groupby("layer"):
            wanted = [int(f) for f in rows["feature"].unique()]
            told = source.of(int(layer), wanted)  # pyright: ignore -- a number
            said |= {(int(layer), f): words for f, words in told.items()}  # pyright: ignore
    pairs = zip(chosen["layer"], chosen["feature"], strict=True)
    words = [said.get((int(layer), int(f))) for layer, f in pairs]
    return chosen.assign(description=pd.array(words, dtype="str"))


def feature_table(chosen: pd.DataFrame) -> pd.DataFrame:
    """Rows of `with_descriptions` in few and short columns."""
    import pandas as pd

    columns = ["layer", "group", "id", "choice", "feature", "value"]
    shown = chosen[columns].copy()
    shown["id"] = [printable(str(name)) for name in shown["id"]]
    shown["where"] = [_where(row) for row in chosen.to_dict("records")]
    if chosen["description"].notna().any():
        shown["description"] = [
            "" if pd.isna(words) else _short(printable(words))
            for words in chosen["description"]
        ]
    return shown


def _short(words: str) -> str:
    return words if len(words) <= _WIDEST else words[: _WIDEST - 3] + "..."


def _where(row: Mapping) -> str:
    """The word, or the patch with its box in the picture."""
    import pandas as pd

    if pd.notna(row["token"]):
        return f"{printable(row['token'])!r} at {row['position']}"
    patch = f"patch {row['patch_row']},{row['patch_column']}"
    if pd.isna(row["left"]):
        return patch
    left, top, right, bottom = (
        f"{row[side]:.0f}" for side in ("left", "top", "right", "bottom")
    )
    return f"{patch}: x {left}-{right}, y {top}-{bottom}"


def rate_table(rates: pd.DataFrame) -> pd.DataFrame:
    """Match rates in few columns, with bounds, chance levels and p-values."""
    import pandas as pd

    shown = rates[["layer", "group", "n_images"]].copy()
    chosen = rates["n_features"] + rates["n_undescribed"]
    shown["described"] = [
        f"{n}/{all_of_them}"
        for n, all_of_them in zip(rates["n_features"], chosen, strict=True)
    ]
    if rates["n_unanswered"].any():
        shown["unanswered"] = rates["n_unanswered"]
    for name, title in (("rate", "rate"), ("any_rate", "any")):
        for part, words in (("", title), ("_chance", f"{title} chance")):
            bounds = rates[[f"{name}{part}{end}" for end in ("", "_low", "_high")]]
            shown[words] = [between(*row) for row in bounds.itertuples(index=False)]
        shown[f"{title} p"] = [
            "" if pd.isna(p) else f"{p:.3f}" for p in rates[f"{name}_p"]
        ]
    return shown


def shared_table(found: pd.DataFrame) -> pd.DataFrame:
    """How much images share with their captions, in few columns, with bounds."""
    shown = found[["layer", "n_images"]].copy()
    for name in ("overlap", "to_caption", "to_image"):
        bounds = found[[name, f"{name}_low", f"{name}_high"]]
        shown[name.replace("_", " ")] = [
            between(*row) for row in bounds.itertuples(index=False)
        ]
    shown.insert(3, "shuffled", found["shuffled"].round(3))
    shown.insert(4, "p", found["p_value"].round(3))
    shown["chance"] = found["chance"].round(3)
    return shown


def between(value: float, low: float, high: float) -> str:
    """A number with its bounds; nothing where it is missing."""
    import pandas as pd

    if pd.isna(value):
        return ""
    bounds = "" if pd.isna(low) else f" ({low:.3g}-{high:.3g})"
    return f"{value:.3g}{bounds}"
