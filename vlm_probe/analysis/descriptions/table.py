"""Descriptions in a table of the user: CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vlm_probe.analysis.descriptions.explanations import is_entry, sound
from vlm_probe.analysis.descriptions.interface import (
    Descriptions,
    Saes,
    check_features,
    identities,
)
from vlm_probe.tokens import ranges

_COLUMNS = ("layer", "feature", "description")

Row = tuple[str, object, object, object]
"""Its place for messages, layer, feature and description, as they stand there."""


class DescriptionTable(Descriptions):
    """Descriptions in memory."""

    def __init__(
        self,
        told: Mapping[int, Mapping[int, str | None]],
        *,
        name: str = "table",
        widths: Mapping[int, int] | None = None,
    ) -> None:
        """Takes them.

        Args:
            told: Descriptions by layer and feature.
            name: Where they come from.
            widths: Number of features by layer, where that is known.
        """
        self.name = name
        self._told = {n: dict(sorted(here.items())) for n, here in sorted(told.items())}
        self._widths = dict(widths or {})

    def of(self, layer: int, features: Sequence[int]) -> dict[int, str | None]:
        """See `Descriptions.of`."""
        features = check_features(layer, features, self._widths.get(layer))
        here = self._told.get(layer, {})
        return {feature: here.get(feature) for feature in features}

    def layers(self) -> tuple[int, ...]:
        """The layers that the table names."""
        return tuple(self._told)

    def described(self, layer: int) -> tuple[int, ...]:
        """See `Descriptions.described`."""
        here = self._told.get(layer, {})
        return tuple(f for f, text in here.items() if text is not None)


def read_descriptions(path: str | Path, saes: Saes | None = None) -> DescriptionTable:
    """Reads a table.

    Args:
        path: A CSV file with the columns layer, feature and description (others may
            stand beside them); or JSON: a list of objects with these three, or
            `{layer: {feature: description}}`. An empty description is none.
        saes: If given, features that they do not have are refused.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is damaged, a feature is described in two ways, or the SAEs
            do not have it; names the lines.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no descriptions at {path}: there is no such file")
    widths = {n: sae.n_features for n, sae in identities(saes).items()} if saes else {}
    told: dict[int, dict[int, str | None]] = {}
    places: dict[tuple[int, int], str] = {}
    for where, *cells in _rows(path):
        layer, feature = (
            _number(cell, f"{where} of {path}", what)
            for what, cell in zip(_COLUMNS[:2], cells[:2], strict=True)
        )
        text = _text(cells[2], f"{where} of {path}")
        width = widths.get(layer)
        if width is not None and feature >= width:
            raise ValueError(
                f"{where} of {path}: feature {feature} of layer {layer}, whose SAE has "
                f"features 0 to {width - 1}; was the table made for another SAE?"
            )
        here = told.setdefault(layer, {})
        earlier = places.setdefault((layer, feature), where)
        if here.setdefault(feature, text) != text:
            raise ValueError(
                f"{path} describes feature {feature} of layer {layer} twice: "
                f"{earlier} says {here[feature]!r}, {where} says {text!r}; keep one"
            )
    if widths and told and not set(widths) & set(told):
        raise ValueError(
            f"{path} describes layers {ranges(told)}, the SAEs are of layers "
            f"{ranges(widths)}"
        )
    return DescriptionTable(told, name=path.name, widths=widths)


def write_descriptions(
    descriptions: Descriptions,
    path: str | Path,
    *,
    features: Mapping[int, Sequence[int]] | None = None,
) -> Path:
    """Writes a table that `read_descriptions` reads.

    Args:
        descriptions: From wherever.
        path: A .csv or .json file, which is written over.
        features: Which features of which layers; those without description stay, with
            an empty one. All that are described if not given.

    Raises:
        ValueError: Another kind of file, or the source cannot list its features.
    """
    path = Path(path)
    if features is None:
        features = {n: descriptions.described(n) for n in descriptions.layers()}
    rows = [
        (layer, feature, text)
        for layer, asked in sorted(features.items())
        for feature, text in descriptions.of(layer, asked).items()
    ]
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([_COLUMNS, *rows])
    elif path.suffix == ".json":
        told = [dict(zip(_COLUMNS, row, strict=True)) for row in rows]
        path.write_text(
            json.dumps(told, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )
    else:
        raise ValueError(f"{path}: descriptions are written to .csv or .json")
    return path


def _rows(path: Path) -> Iterator[Row]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(
            f"line {line} of {path} is no UTF-8; save the table as UTF-8"
        ) from error
    if path.suffix == ".csv":
        return _csv_rows(text, path)
    if path.suffix == ".json":
        return _json_rows(text, path)
    raise ValueError(f"{path}: descriptions are read from .csv or .json")


def _csv_rows(text: str, path: Path) -> Iterator[Row]:
    # With newline="" line breaks inside a quoted description stay as they are.
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    head = [name.strip() for name in next(lines, [])]
    missing = [name for name in _COLUMNS if name not in head]
    if missing:
        raise ValueError(
            f"{path} has no column {', '.join(missing)}; its first line must name "
            f"{', '.join(_COLUMNS)}, and is {','.join(head)!r}"
        )
    places = [head.index(name) for name in _COLUMNS]
    first = lines.line_num + 1
    try:
        for cells in lines:
            where, first = f"line {first}", lines.line_num + 1
            if not cells:
                continue
            if len(cells) != len(head):
                raise ValueError(
                    f"{where} of {path} has {len(cells)} cells, its first line "
                    f"{len(head)}; a description with a comma stands in quotes"
                )
            layer, feature, description = (cells[place] for place in places)
            yield where, layer, feature, description
    except csv.Error as error:
        raise ValueError(f"line {first} of {path} is no CSV: {error}") from error


def _json_rows(text: str, path: Path) -> Iterator[Row]:
    try:
        # As pairs, for json keeps the last of two equal keys and does not say so.
        whole = json.loads(text, object_pairs_hook=_Pairs)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"line {error.lineno} of {path} is no JSON: {error.msg}"
        ) from error
    if isinstance(whole, _Pairs):
        for layer, here in whole:
            if not isinstance(here, _Pairs):
                raise ValueError(
                    f"layer {layer} of {path} is no object; expected "
                    "{layer: {feature: description}}"
                )
            for feature, description in here:
                where = f"layer {layer}, feature {feature}"
                yield where, layer, feature, description
    elif isinstance(whole, list):
        for number, pairs in enumerate(whole, 1):
            record = dict(pairs) if isinstance(pairs, _Pairs) else {}
            if is_entry(record):
                raise ValueError(
                    f"{path} is an export of Neuronpedia; open it with "
                    "NeuronpediaExport, which knows how to check it"
                )
            if not set(_COLUMNS) <= set(record):
                raise ValueError(
                    f"entry {number} of {path} is no object with {', '.join(_COLUMNS)}"
                )
            yield f"entry {number}", *(record[name] for name in _COLUMNS)
    else:
        raise ValueError(
            f"{path} holds neither a list nor an object; expected a list of objects "
            f"with {', '.join(_COLUMNS)}, or {{layer: {{feature: description}}}}"
        )


class _Pairs(list):
    """An object of JSON as it is written."""


def _number(cell: object, where: str, what: str) -> int:
    written = str(cell).strip()
    if isinstance(cell, bool) or not (written.isascii() and written.isdecimal()):
        raise ValueError(f"{where}: {what} {cell!r} is no number from 0")
    return int(written)


def _text(cell: object, where: str) -> str | None:
    if cell is not None and not isinstance(cell, str):
        raise ValueError(f"{where}: the description {cell!r} is no text")
    return sound(cell) if cell and cell.strip() else None
