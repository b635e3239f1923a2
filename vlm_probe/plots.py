"""Figures of a result: curves over layers, with bounds and control arms."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from vlm_probe.result import ProbeResult
from vlm_probe.tokens import CONDITIONS, GROUPS, METRICS, check_names

AXES = {
    "mse": "MSE (squared activation units, 0 perfect)",
    "fvu": "FVU (0 perfect, 1 mean predictor)",
    "nmse": "NMSE (0 perfect, 1 zero predictor)",
    "cosine": "cosine of x and x̂ (1 perfect)",
    "l0": "L0 (active features per token)",
    "l0_share": "L0 share (of all features)",
    "norm": "norm ‖x‖ (activation units)",
}
"""What stands beside each metric's axis: its unit and its direction."""

COLORS = {"image": "#0072B2", "text_after_image": "#D55E00", "text_only": "#4D4D4D"}
"""A group's hue. Of the usual palettes the one whose closest pair stays furthest apart
under every color blindness; gray is free because text_only has no control arms."""

_OTHER_COLOR, _INK, _GRID, _LANDMARK = "#009E73", "#222222", "#ECECEC", "#999999"
_DASHES = {"model": "solid", "random_adapter": "7px,3px", "noise": "2px,2.5px"}
_OTHER_DASH = "8px,2.5px,2px,2.5px"
# In pixels: legends and labels are placed by them.
_PANEL_WIDTH, _PANEL_HEIGHT, _GUTTER = 262, 262, 76
_LEGEND_WIDTH, _LINE = 152, 19
_LEFT, _RIGHT, _BOTTOM = 62, 108, 50
_NO_BUTTONS = ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"]
_NO_BUTTONS += ["sendChartToCloud"]  # it would upload the data


def layer_curves(
    result: ProbeResult,
    metrics: Sequence[str] = ("fvu", "cosine", "l0"),
    *,
    groups: Sequence[str] | None = None,
    conditions: Sequence[str] | None = None,
    log: Sequence[str] | None = None,
) -> go.Figure:
    """Draws metrics over layers: a panel per metric, a line per group and condition.

    Color says the group, dash the condition; a band goes from the lower to the upper
    95 % bound. A line breaks where a layer was not measured. A click on a legend entry
    hides its line in every panel, a click on a legend's title its whole condition.
    Each trace's `meta` holds its metric, group, condition and part: "band", "line" or
    "label".

    Args:
        result: What a probe found.
        metrics: Panels, in order: names of `vlm_probe.tokens.METRICS`.
        groups: Token groups; all that the result has if not given.
        conditions: The model and control arms; all that the result has if not given.
        log: Metrics on a logarithmic axis. If not given: mse, norm, l0 and l0_share
            where all values are positive and span more than a factor of 30; fvu and
            nmse where they also exceed 3, far beyond their landmark of 1.

    Returns:
        The figure.

    Raises:
        TypeError: A single string where a list of names belongs.
        ValueError: An unknown name, nothing to draw, or a logarithmic axis for values
            that are not all positive.
    """
    frame = result.layers
    metrics = _chosen("metric", metrics, list(METRICS))
    groups = _chosen("group", groups, _ordered(frame["group"], GROUPS))
    conditions = _chosen(
        "condition", conditions, _ordered(frame["condition"], CONDITIONS)
    )
    log = log if log is None else _chosen("metric", log, list(METRICS), least=0)
    grid = _grid(frame["layer"])
    frame = frame.loc[frame["group"].isin(groups) & frame["condition"].isin(conditions)]
    if frame.empty:
        raise ValueError(
            f"nothing to draw: the result has no row with a group of {groups} and a "
            f"condition of {conditions}"
        )
    columns = 2 if len(metrics) == 4 else min(3, len(metrics))
    figure = _panels(len(metrics), columns, groups, conditions)
    for index, metric in enumerate(metrics):
        row, column = divmod(index, columns)
        values = frame[[metric, f"{metric}_low", f"{metric}_high"]].to_numpy(float)
        on_log = _is_on_log(metric, values, log)
        curves = [
            _Curve(metric, group, condition, rank, grid, _table(rows, grid, metric))
            # The model last: it lies on top of its controls.
            for rank, condition in reversed(list(enumerate(conditions)))
            for group in groups
            if len(rows := _rows(frame, group, condition))
        ]
        traces = [t for c in curves for t in (*c.band(), c.line(in_legend=index == 0))]
        if column == columns - 1 or metric == metrics[-1]:
            traces += _labels([c for c in curves if c.rank == 0], values, on_log)
        figure.add_traces(traces, rows=row + 1, cols=column + 1)
        _style_values(figure, metric, values, on_log, row + 1, column + 1)
    _style_layers(figure, result)
    return figure


@dataclass(frozen=True)
class _Curve:
    """One line of one panel."""

    metric: str
    group: str
    condition: str
    rank: int
    """The condition's place among those drawn, from 0."""
    layers: list[int]
    table: Float[np.ndarray, "layer 5"]
    """Value, lower and upper bound, n_tokens, n_images; not a number in a gap."""

    @property
    def color(self) -> str:
        return COLORS.get(self.group, _OTHER_COLOR)

    @property
    def end(self) -> float:
        """The last value there is."""
        known = self.table[np.isfinite(self.table[:, 0]), 0]
        return float(known[-1]) if len(known) else np.nan

    def line(self, *, in_legend: bool) -> go.Scatter:
        """The values; with markers for the model, and where a layer stands alone."""
        model = self.condition == "model"
        y = self.table[:, 0]
        alone = any(run.stop - run.start == 1 for run in _runs(np.isfinite(y)))
        dash = _DASHES.get(self.condition, _OTHER_DASH)
        return go.Scatter(
            x=self.layers,
            y=y,
            name=_words(self.group),
            showlegend=in_legend,
            mode="lines+markers" if model or alone else "lines",
            line={"color": self.color, "width": 2.2 if model else 1.4, "dash": dash},
            marker={"size": 5, "symbol": "circle" if model else "circle-open"},
            opacity=1 if model else 0.85,
            hovertext=[self._said(i) for i in range(len(y))],
            hovertemplate="%{hovertext}<extra></extra>",
            **self._place("line"),
        )

    def band(self) -> list[go.Scatter]:
        """From lower to upper bound: a polygon per unbroken run, none without bounds.

        `fill="tonexty"` would join across gaps. A layer that stands alone gets a bar.
        """
        layers = np.array(self.layers, float)
        low, high = self.table[:, 1], self.table[:, 2]
        bar = 0.008 * (np.ptp(layers) + 1) * np.array([-1, 1])
        x: list[float | None] = []
        y: list[float | None] = []
        for run in _runs(np.isfinite(low + high)):
            at = layers[run] if run.stop - run.start > 1 else layers[run] + bar
            bottom, top = (np.broadcast_to(end[run], at.shape) for end in (low, high))
            x += [*at.tolist(), *at[::-1].tolist(), None]
            y += [*bottom.tolist(), *top[::-1].tolist(), None]
        opacity = 0.18 if self.condition == "model" else 0.09
        look = {"fill": "toself", "fillcolor": self.color, "opacity": opacity}
        fill = self.silent("band", x=x, y=y, mode="lines", line_width=0, **look)
        return [fill] if x else []

    def silent(self, part: str, **look: object) -> go.Scatter:
        """A trace that is neither in the legend nor under the pointer."""
        place = self._place(part)
        return go.Scatter(showlegend=False, hoverinfo="skip", **look, **place)

    def _place(self, part: str) -> dict[str, object]:
        """What a trace is, and the legend entry that hides it."""
        return {
            "legend": _legend(self.rank),
            "legendgroup": f"{self.condition}/{self.group}",
            "meta": {
                "metric": self.metric,
                "group": self.group,
                "condition": self.condition,
                "part": part,
            },
        }

    def _said(self, index: int) -> str:
        value, low, high, tokens, images = self.table[index].tolist()
        known = np.isfinite(low) and np.isfinite(high)
        bounds = f"95 % bounds {low:.4g} to {high:.4g}" if known else "no 95 % bounds"
        return (
            f"<b>{_words(self.group)}</b>, {_words(self.condition)}<br>layer "
            f"{self.layers[index]}: {self.metric} = <b>{value:.4g}</b><br>{bounds}<br>"
            f"{tokens:,.0f} tokens of {images:,.0f} images"
        )


def _table(
    rows: pd.DataFrame, layers: list[int], metric: str
) -> Float[np.ndarray, "layer 5"]:
    columns = [metric, f"{metric}_low", f"{metric}_high", "n_tokens", "n_images"]
    return rows.set_index("layer").reindex(layers)[columns].to_numpy(float)


def _labels(curves: list[_Curve], values: np.ndarray, on_log: bool) -> list[go.Scatter]:
    """The groups' names at the ends of their lines, moved apart where they meet."""
    curves = [curve for curve in curves if np.isfinite(curve.end)]
    ends = np.array([curve.end for curve in curves])
    values = values[np.isfinite(values)]
    if on_log:
        ends, values = np.log10(ends), np.log10(values)
    elif curves and curves[0].metric != "cosine":
        values = np.append(values, 0)  # where the axis begins
    # The axis is a little longer than the data.
    pixel = 1.15 * (np.ptp(values) if len(values) else 1) / _PANEL_HEIGHT
    return [
        curve.silent(
            "label",
            x=[curve.layers[-1] + _margin(curve.layers)],
            y=[float(10**y if on_log else y)],
            mode="text",
            text=[" " + _words(curve.group)],
            textposition="middle right",
            textfont_color=curve.color,
            cliponaxis=False,
        )
        for curve, y in zip(curves, _spread(ends, 15 * float(pixel)), strict=True)
    ]


def _spread(y: np.ndarray, gap: float) -> np.ndarray:
    """The nearest places, in the same order, that are at least a gap apart.

    Each less the gaps below it must not fall: isotonic regression, by its max-min form.
    """
    order = np.argsort(y, kind="stable")
    steps = gap * np.arange(len(y))
    z = y[order] - steps
    ends = range(len(y))
    means = [[z[a : b + 1].mean() for b in ends[a:]] for a in ends]
    places = np.empty(len(y))
    places[order] = [max(min(means[a][i - a :]) for a in ends[: i + 1]) for i in ends]
    places[order] += steps
    return places


def _panels(
    n_panels: int, columns: int, groups: list[str], conditions: list[str]
) -> go.Figure:
    """Empty panels, and a legend per condition above them."""
    n_rows = -(-n_panels // columns)
    # With one panel, the legends may need more room than it does.
    width = max(
        columns * (_PANEL_WIDTH + _GUTTER) - _GUTTER,
        len(conditions) * _LEGEND_WIDTH,
    )
    height = n_rows * (_PANEL_HEIGHT + _GUTTER) - _GUTTER
    several = len(conditions) > 1
    top = 24 + _LINE * (1 + len(groups) if several else 1)
    used = np.arange(n_rows * columns).reshape(n_rows, columns) < n_panels
    figure = make_subplots(
        rows=n_rows,
        cols=columns,
        horizontal_spacing=_GUTTER / width,
        vertical_spacing=_GUTTER / height if n_rows > 1 else 0,
        specs=[[{} if panel else None for panel in row] for row in used],
    )
    figure.update_layout(
        template="simple_white",
        width=_LEFT + width + _RIGHT,
        height=top + height + _BOTTOM,
        margin={"l": _LEFT, "r": _RIGHT, "t": top, "b": _BOTTOM},
        font={"family": "Inter, Helvetica, Arial, sans-serif", "size": 12},
        font_color=_INK,
        hovermode="closest",
        hoverlabel={"bgcolor": "white", "font_color": _INK, "align": "left"},
        modebar_remove=_NO_BUTTONS,
    )
    for rank, condition in enumerate(conditions):
        legend = {
            "x": rank * _LEGEND_WIDTH / width,
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "bgcolor": "rgba(0,0,0,0)",
            "itemwidth": 36,
            "tracegroupgap": 0,
            "orientation": "v" if several else "h",
            "title": {"text": f"<b>{_words(condition)}</b>" if several else ""},
        }
        figure.update_layout({_legend(rank): legend})
    return figure


def _style_values(
    figure: go.Figure, metric: str, values: np.ndarray, on_log: bool, row: int, col: int
) -> None:
    """A panel's vertical axis, and the landmark at 1 where it is near."""
    values = values[np.isfinite(values)]
    figure.update_yaxes(
        title={"text": AXES[metric] + (", log axis" if on_log else "")},
        title_standoff=8,
        title_font_size=12,
        type="log" if on_log else "linear",
        rangemode="normal" if metric == "cosine" else "tozero",
        tickvals=_ticks(values) if on_log else None,
        tickformat=",~g" if on_log else None,
        showgrid=True,
        gridcolor=_GRID,
        row=row,
        col=col,
    )
    if metric in ("fvu", "nmse") and values.max(initial=0) > 0.6:
        landmark = {"color": _LANDMARK, "width": 1, "dash": "dot"}
        figure.add_shape(
            type="line",
            x0=0,
            x1=1,
            xref="x domain",
            y0=1,
            y1=1,
            line=landmark,
            layer="below",
            row=row,
            col=col,
        )


def _ticks(values: np.ndarray) -> list[float]:
    """1, 2, 5, 10, ... around the values; over many decades only 1, 10, 100, ..."""
    first, last = np.floor(np.log10([values.min(), values.max()])).astype(int).tolist()
    digits = (1, 2, 5) if last - first < 3 else (1,)
    return [d * 10.0**power for power in range(first, last + 2) for d in digits]


def _style_layers(figure: go.Figure, result: ProbeResult) -> None:
    """The horizontal axes, zoomed together, with ticks at layers that were measured."""
    layers = sorted({int(layer) for layer in result.layers["layer"]})
    margin = _margin(layers)
    hook_point = result.meta.get("hook_point")
    figure.update_xaxes(
        title={"text": f"layer ({html.escape(hook_point)})" if hook_point else "layer"},
        title_standoff=6,
        title_font_size=12,
        range=[layers[0] - margin, layers[-1] + margin],
        tickvals=layers[:: -(-len(layers) // 10)],
    )
    # The first cannot follow itself.
    figure.update_xaxes({"matches": "x"}, lambda axis: axis.plotly_name != "xaxis")


def _margin(layers: list[int]) -> float:
    """Room left and right of the curves, in layers."""
    return max(0.3, 0.03 * (layers[-1] - layers[0]))


def _chosen(
    what: str, given: Sequence[str] | None, valid: list[str], least: int = 1
) -> list[str]:
    """The names asked for, each once, or all valid ones."""
    if isinstance(given, str):
        raise TypeError(f"{what}s takes a list of names, given {given!r}")
    names = valid if given is None else list(dict.fromkeys(given))
    check_names(what, names, valid)
    if len(names) < least:
        raise ValueError(f"no {what} to draw; valid: {', '.join(valid) or 'none'}")
    return names


def _ordered(column: Iterable[str], known: Iterable[str]) -> list[str]:
    """A column's names: the known ones in their order, then others by alphabet."""
    present = set(column)
    first = [name for name in known if name in present]
    return first + sorted(present.difference(first))


def _rows(frame: pd.DataFrame, group: str, condition: str) -> pd.DataFrame:
    return frame.loc[frame["group"].eq(group) & frame["condition"].eq(condition)]


def _grid(layers: Iterable[int]) -> list[int]:
    """The result's layers, and one more in every gap, where no line has a value.

    A probe of every fifth layer has no gap; one of 8 layers that lacks layer 3 has. So
    a gap is a step greater than the most common one (of those, the smallest).
    """
    known = sorted({int(layer) for layer in layers})
    steps = Counter(after - layer for layer, after in pairwise(known))
    usual = min(steps, key=lambda step: (-steps[step], step), default=1)
    gaps = [layer + usual for layer, after in pairwise(known) if after - layer > usual]
    return sorted(known + gaps)


def _runs(there: np.ndarray) -> list[slice]:
    """Stretches without a break."""
    edges = np.flatnonzero(np.diff(there, prepend=False, append=False)).tolist()
    return [slice(*ends) for ends in zip(edges[::2], edges[1::2], strict=True)]


def _is_on_log(metric: str, values: np.ndarray, log: Sequence[str] | None) -> bool:
    values = values[np.isfinite(values)]
    positive = values.size > 0 and bool((values > 0).all())
    if log is not None:
        if metric in log and not positive:
            raise ValueError(
                f"{metric} has values that are not positive, or none, and cannot be on "
                "a logarithmic axis; leave it out of log"
            )
        return metric in log
    if metric == "cosine" or not positive or values.max() < 30 * values.min():
        return False
    return metric not in ("fvu", "nmse") or bool(values.max() > 3)


def _legend(rank: int) -> str:
    return f"legend{rank + 1}" if rank else "legend"


def _words(name: str) -> str:
    return html.escape(name.replace("_", " "))
