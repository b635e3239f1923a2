"""One self-contained page from a result."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from vlm_probe.plots import layer_curves
from vlm_probe.result import ProbeResult
from vlm_probe.tokens import CONDITIONS, GROUPS, METRICS

CURVES = ("fvu", "cosine", "l0", "nmse", "mse", "norm")
"""Metrics drawn; l0_share, which is l0 over the SAE's width, stands in the table."""

TOP = 5
"""Features listed for each layer, group and condition."""

READING = {
    "mse": (
        "squared activation units",
        "0 perfect; grows with the norm of x, so layers and groups do not compare",
    ),
    "fvu": ("share of variance", "0 perfect, 1 no better than the group's own mean x̄"),
    "nmse": (
        "share of squared norm",
        "0 perfect, 1 no better than zero; a part that all tokens share flatters it",
    ),
    "cosine": ("none", "1 perfect; blind to length"),
    "l0": ("features per token", "lower is sparser; text shows what is usual"),
    "l0_share": ("share of the SAE's features", "as l0, for SAEs of different width"),
    "norm": ("activation units", "no direction; explains mse"),
}
"""Unit and direction of every metric; `METRICS` has the formulas."""

MEANING = {
    "image": "positions of the image's vectors",
    "text_after_image": "the prompt's words behind the image",
    "text_only": "a second pass, without image: the prompt with words in its place",
    "model": "the model as it is",
    "random_adapter": "an untrained adapter, with the mean and covariance of the "
    "trained one's output",
    "noise": "Gaussian noise with the norm of each image vector",
    "shuffled_images": "another image's vectors",
}
"""What groups and conditions are."""

_CASE = ["layer", "group", "condition"]
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:; base-uri 'none'; form-action 'none'"
)


def write_report(result: ProbeResult, path: str | PathLike[str]) -> Path:
    """Writes one HTML file that needs neither network nor other files.

    Args:
        result: What a probe found.
        path: The file. Its folders are made; a file of that name is replaced.

    Returns:
        The path.

    Raises:
        IsADirectoryError: `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(
            f"{path} is a folder; expected the name of a file, for instance "
            f"{path / 'report.html'}"
        )
    title = f"Layer probe of {escape(str(result.meta.get('model', 'a model')))}"
    sections = {
        "What was run": _facts(result),
        "Curves": _curves(result),
        "Layers": _layers(result.layers),
        "Top features": _top_features(result),
        "Failures": _failures(result.failures),
        "How to read it": _reading(),
        "Provenance": "<details><summary>All of <code>meta</code>, as JSON</summary>"
        f"<pre>{_json(result.meta)}</pre></details>",
    }
    anchors = {name: name.lower().replace(" ", "-") for name in sections}
    links = "".join(f'<a href="#{at}">{name}</a>' for name, at in anchors.items())
    body = "".join(
        f'<section id="{anchors[name]}">\n<h2>{name}</h2>\n{content}\n</section>\n'
        for name, content in sections.items()
    )
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_beside('css')}</style>\n</head>\n<body>\n"
        f"<header><h1>{title}</h1>\n{_partial(result)}<nav>{links}</nav></header>\n"
        f"<main>\n{body}</main>\n<script>{_beside('js')}</script>\n</body>\n</html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _partial(result: ProbeResult) -> str:
    """What must be read before anything else, if the run was stopped."""
    if not result.partial:
        return ""
    said = escape(str(result.meta["partial"]))
    return f'<p class="partial" role="alert">A partial result: {said}.</p>\n'


def _facts(result: ProbeResult) -> str:
    """What is known of the run; what `meta` lacks is left out."""
    meta, layers = result.meta, _in_order(result.layers)
    settings = _dict(meta.get("settings"))
    parts = {part: _dict(about) for part, about in _dict(meta.get("parts")).items()}
    saes = [str(p.get("name", "?")) for part, p in parts.items() if _is_sae(part)]
    probed = sorted({int(layer) for layer in layers["layer"]})
    facts: dict[str, object] = {
        "Model": meta.get("model"),
        **{
            part.capitalize(): f"{about.get('name', '?')}, "
            f"sha256 {str(about.get('sha256', '?'))[:12]}"
            for part, about in parts.items()
            if not _is_sae(part)
        },
        "SAEs": _brief(saes),
        "Layers": f"{_brief(probed)} ({meta.get('hook_point', 'hook point unknown')})",
        "Images": f"{meta.get('n_images', layers['n_images'].max())} read, "
        f"{len(result.failures)} failed",
        "Groups": ", ".join(layers["group"].unique()),
        "Conditions": ", ".join(layers["condition"].unique()),
        "Convention": settings.get("convention"),
        "Bootstrap": settings.get("replicates")
        and f"{settings['replicates']} redrawings of the images, for the 95 % bounds",
        "Words instead of images": _dict(meta.get("text_only_words"))
        and ", ".join(f"{n} {kind}" for kind, n in meta["text_only_words"].items()),
        "Seed": settings.get("seed"),
        "Started": result.timing.get("started"),
        "Took": result.timing.get("seconds") and f"{result.timing['seconds']} s",
    }
    said = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>\n"
        for name, value in facts.items()
        if value not in (None, "", {})
    )
    return f'<dl class="facts">\n{said}</dl>'


def _curves(result: ProbeResult) -> str:
    figure = layer_curves(result, CURVES).update_layout(width=None, autosize=True)
    drawn = figure.to_html(
        full_html=False,
        include_plotlyjs=True,
        div_id="figure",
        config={"displaylogo": False, "showSendToCloud": False, "responsive": True},
    )
    return (
        "<p>Color: token group. Dash: condition. Bands: 95 % bounds. A click on a "
        "legend entry hides its lines, on a legend's title the whole condition; drag "
        "to zoom, double-click to go back. A broken line: not measured there.</p>\n"
        f'<figure class="scroll">{drawn}</figure>'
    )


class _Cell(NamedTuple):
    """What a table shows in a place, and what it is sorted by."""

    html: str
    value: object
    numeric: bool = False


def _layers(layers: pd.DataFrame) -> str:
    rows = [
        [_Cell(escape(str(row[name])), row[name]) for name in _CASE]
        + [_number(row[name]) for name in ("n_tokens", "n_images")]
        + [_number(*(row[m + end] for end in ("", "_low", "_high"))) for m in METRICS]
        for row in _in_order(layers).to_dict("records")
    ]
    return (
        "<p>Under each value its 95 % bounds. A click on a column sorts by it.</p>\n"
        + _table([*_CASE, "n_tokens", "n_images", *METRICS], rows)
    )


def _top_features(result: ProbeResult) -> str:
    """The features that most images have among their strongest."""
    top = result.top_features.reset_index(drop=True)
    if "by" in top:
        # A feature may be in several rankings; activation's is shown where it is there.
        top = top[top["by"].eq(top["by"].min())]
    if top.empty:
        return "<p>None were kept.</p>"
    found = top.groupby([*_CASE, "feature"], as_index=False).agg(
        images=("image", "nunique"), mean=("value", "mean"), best=("value", "idxmax")
    )
    found = found.sort_values(["images", "mean"], ascending=False, kind="stable")
    found = _in_order(found.groupby(_CASE).head(TOP))
    found = found.merge(result.layers[[*_CASE, "n_images"]], on=_CASE, how="left")
    rates = result.features[[*_CASE, "feature", "rate"]]
    found = found.merge(rates, on=[*_CASE, "feature"], how="left")
    rows = [
        [_Cell(escape(str(row[name])), row[name]) for name in (*_CASE, "feature")]
        + [_share(row["images"], row["n_images"]), _number(row["rate"])]
        + [
            _number(row["mean"]),
            _number(best["value"]),
            _Cell(_where(best), best["id"]),
        ]
        for row in found.to_dict("records")
        for best in [top.loc[row["best"]].to_dict()]
    ]
    head = [*_CASE, "feature", "images", "rate", "mean", "max", "strongest in"]
    return (
        f"<p>For each layer, group and condition the {TOP} features that most images "
        "have among their strongest. Images: how many of those measured. Rate: share "
        "of the group's tokens it fires on; one that fires nearly everywhere says "
        "little. Mean, max: of its strongest value in each of these images.</p>\n"
        + _table(head, rows)
    )


def _failures(failures: pd.DataFrame) -> str:
    if failures.empty:
        return "<p>None: every image was read.</p>"
    rows = [
        [_Cell(escape(str(row[name])), row[name]) for name in ("image", "id", "error")]
        for row in failures.to_dict("records")
    ]
    return (
        f"<p>{len(rows)} could not be read and are in no number of this page.</p>\n"
        + _table(["image", "id", "error"], rows)
    )


def _reading() -> str:
    metrics = "".join(
        f'<tr><th scope="row"><code>{name}</code></th><td>{escape(formula)}</td>'
        f"<td>{escape(READING[name][0])}</td><td>{escape(READING[name][1])}</td></tr>\n"
        for name, formula in METRICS.items()
    )
    names = {"Token groups": GROUPS, "Conditions": CONDITIONS}
    lists = "".join(
        f"<h3>{title}</h3>\n<dl>"
        + "".join(
            f"<div><dt><code>{n}</code></dt><dd>{escape(MEANING[n])}</dd></div>\n"
            for n in members
        )
        + "</dl>\n"
        for title, members in names.items()
    )
    return (
        "<p>For a group's tokens x at a layer, their reconstruction x̂ by that layer's "
        'SAE, and x̄ the mean of x:</p>\n<div class="scroll"><table><thead><tr>'
        "<th>metric</th><th>formula</th><th>unit</th><th>direction</th></tr></thead>\n"
        f"<tbody>{metrics}</tbody></table></div>\n{lists}"
        "<p>A curve proves nothing without its controls: what the control arms show as "
        "well does not come from the picture. Bounds are of a bootstrap over images, "
        "since tokens of one image are not independent. Convention <code>pooled</code> "
        "counts every token alike; <code>paper</code> (arXiv 2506.11976) takes the "
        "mean over images of each image's own mean. What was not measured is missing, "
        "never zero.</p>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[_Cell]]) -> str:
    """A table that the page's script sorts, and filters by the columns of a case."""
    right = [rows[0][i].numeric for i in range(len(head))]
    heads = "".join(
        f'<th scope="col"{" data-filter" if name in _CASE else ""}'
        f"{' class=number' if numeric else ''}>"
        f'<button type="button">{escape(name)}</button></th>'
        for name, numeric in zip(head, right, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f'<td data-value="{escape(str(cell.value))}"'
            f"{' class=number' if cell.numeric else ''}>{cell.html}</td>"
            for cell in row
        )
        + "</tr>\n"
        for row in rows
    )
    return (
        '<div class="scroll tall"><table class="data">\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}</tbody></table></div>"
    )


def _number(value: int | float, low: float = math.nan, high: float = math.nan) -> _Cell:
    """A rounded number with its bounds."""
    if not math.isfinite(value):
        return _Cell("n/a", "", numeric=True)
    bounds = f"<small>{_round(low, 3)} to {_round(high, 3)}</small>"
    shown = _round(value, 4) + (bounds if math.isfinite(low + high) else "")
    return _Cell(shown, value, numeric=True)


def _round(value: int | float, digits: int) -> str:
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".") if value else "0"


def _share(part: int | float, whole: int | float) -> _Cell:
    return _Cell(f"{part:,.0f} of {whole:,.0f}", part / whole, numeric=True)


def _where(best: dict) -> str:
    """The image and the place in it, escaped."""
    place = f"position {best['position']}"
    if pd.notna(best["patch_row"]):
        place = f"patch row {best['patch_row']}, column {best['patch_column']}"
    elif pd.notna(best["token"]):
        place = f"{best['token']!r}, {place}"
    return f"{escape(str(best['id']))}<small>{escape(place)}</small>"


def _in_order(frame: pd.DataFrame) -> pd.DataFrame:
    """By layer, then group, then condition, so that controls stand by the model."""
    rank = {name: i for i, name in enumerate((*GROUPS, *CONDITIONS))}
    return frame.sort_values(
        _CASE,
        key=lambda c: c if c.name == "layer" else c.map(rank).fillna(len(rank)),
        kind="stable",
    )


def _is_sae(part: str) -> bool:
    return part.startswith("sae")


def _dict(value: object) -> dict:
    return value if isinstance(value, dict) else {}


def _brief(names: Sequence[object]) -> str:
    """All of a few names, the first and last of many."""
    if len(names) <= 4:
        return ", ".join(map(str, names))
    return f"{names[0]}, {names[1]}, …, {names[-1]}: {len(names)} in all"


def _beside(kind: str) -> str:
    """The page's style or script, which lies beside this file."""
    return Path(__file__).with_suffix(f".{kind}").read_text(encoding="utf-8")


def _json(meta: dict) -> str:
    return escape(json.dumps(meta, indent=2, ensure_ascii=False, default=str))
