"""The figure shows what the table says: its values, its gaps, and nothing else."""

import numpy as np
import pandas as pd
import pytest

from vlm_probe.plots import AXES, _spread, layer_curves
from vlm_probe.result import ProbeResult
from vlm_probe.tokens import CONDITIONS, GROUPS, METRICS


def row(layer, group="image", condition="model", n_images=5, **values):
    """Every metric m of layer l is l + (place of m) / 10 + 1, bounds 0.5 around it."""
    made = {"layer": layer, "group": group, "condition": condition}
    made |= {"n_tokens": 40 * n_images, "n_images": n_images}
    for place, metric in enumerate(METRICS):
        value = values.get(metric, layer + place / 10 + 1)
        half = 0.5 if n_images > 1 else np.nan
        made |= {metric: value, f"{metric}_low": value - half}
        made |= {f"{metric}_high": value + half}
    return made


def result(rows, meta=None):
    nothing = pd.DataFrame()
    layers = pd.DataFrame(rows)
    return ProbeResult(layers, nothing, nothing, nothing, meta or {})


def whole(layers=range(4)):
    """All groups under all conditions, but text_only under the model alone."""
    return result(
        row(layer, group, condition)
        for layer in layers
        for group in GROUPS
        for condition in CONDITIONS
        if condition == "model" or group != "text_only"
    )


def traces(figure, **which):
    """Traces whose `meta` has these values."""
    return [t for t in figure.data if which.items() <= t.meta.items()]


def line(figure, **which):
    (found,) = traces(figure, part="line", **which)
    return found


def same(y, expected):
    return np.array_equal(np.array(y, float), np.array(expected, float), equal_nan=True)


def test_lines_are_the_table():
    made = whole()
    figure = layer_curves(made, list(METRICS))
    drawn = traces(figure, part="line")
    assert len(drawn) == len(METRICS) * (3 + 2 * 3)
    for trace in drawn:
        which = trace.meta
        frame = made.layers
        frame = frame[(frame.group == which["group"])]
        frame = frame[(frame.condition == which["condition"])].sort_values("layer")
        assert list(trace.x) == list(frame.layer)
        assert same(trace.y, frame[which["metric"]])


def test_a_panel_per_metric_with_its_unit():
    figure = layer_curves(whole(), ["cosine", "mse"])
    assert line(figure, metric="cosine", group="image", condition="noise").yaxis == "y"
    assert line(figure, metric="mse", group="image", condition="noise").yaxis == "y2"
    assert figure.layout.yaxis.title.text == AXES["cosine"]
    assert figure.layout.yaxis2.title.text == AXES["mse"]
    assert set(AXES) == set(METRICS)


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (3, 1), (4, 2), (5, 2), (7, 3)])
def test_panels_wrap(count, rows):
    figure = layer_curves(whole(), list(METRICS)[:count])
    tops = {axis.domain for axis in figure.select_yaxes()}
    assert len(tops) == rows
    assert len(list(figure.select_yaxes())) == count


def test_rows_in_any_order():
    made = whole()
    shuffled = result(made.layers.sample(frac=1, random_state=0).to_dict("records"))
    assert layer_curves(shuffled) == layer_curves(made)


def test_a_layer_missing_from_one_group_breaks_its_line():
    rows = [row(layer, group) for layer in range(5) for group in ("image", "text_only")]
    made = result(r for r in rows if (r["layer"], r["group"]) != (2, "image"))
    figure = layer_curves(made, ["fvu"])
    assert same(line(figure, group="image").y, [1.1, 2.1, np.nan, 4.1, 5.1])
    assert same(line(figure, group="text_only").y, [1.1, 2.1, 3.1, 4.1, 5.1])
    assert not line(figure, group="image").connectgaps


def test_a_layer_missing_from_all_breaks_all_lines():
    figure = layer_curves(result(row(layer) for layer in (0, 1, 4, 5)), ["fvu"])
    drawn = line(figure, group="image")
    assert list(drawn.x) == [0, 1, 2, 4, 5]
    assert same(drawn.y, [1.1, 2.1, np.nan, 5.1, 6.1])
    assert list(figure.layout.xaxis.tickvals) == [0, 1, 4, 5]


def test_every_fifth_layer_is_no_gap():
    figure = layer_curves(result(row(layer) for layer in (0, 5, 10)), ["fvu"])
    assert same(line(figure, group="image").y, [1.1, 6.1, 11.1])


def test_a_band_is_a_polygon_per_run():
    figure = layer_curves(result(row(layer) for layer in (0, 1, 2, 5, 6)), ["mse"])
    (band,) = traces(figure, part="band")
    assert band.fill == "toself"
    assert list(band.x) == [0, 1, 2, 2, 1, 0, None, 5, 6, 6, 5, None]
    lows, highs = [0.5, 1.5, 2.5], [3.5, 2.5, 1.5]
    assert list(band.y) == [*lows, *highs, None, 5.5, 6.5, 7.5, 6.5, None]


def test_no_bounds_no_band():
    figure = layer_curves(result(row(layer, n_images=1) for layer in range(3)))
    assert not traces(figure, part="band")
    assert "no 95 % bounds" in traces(figure, part="line")[0].hovertext[0]


def test_a_lonely_layer_has_a_marker_and_a_bar():
    figure = layer_curves(result([row(3), row(3, condition="noise")]), ["mse"])
    for condition in ("model", "noise"):
        assert "markers" in line(figure, condition=condition).mode
        (bar,) = traces(figure, part="band", condition=condition)
        assert sorted(set(bar.y[:-1])) == [3.5, 4.5]
        assert min(bar.x[:-1]) < 3 < max(bar.x[:-1])


def test_hover_says_everything():
    figure = layer_curves(result(row(layer) for layer in range(3)), ["mse"])
    said = line(figure, group="image").hovertext[2]
    for words in ("image", "model", "layer 2", "mse = <b>3</b>", "2.5 to 3.5"):
        assert words in said
    assert "200 tokens of 5 images" in said


def test_a_click_takes_the_line_out_of_every_panel():
    figure = layer_curves(whole())
    entries = [t for t in figure.data if t.showlegend]
    assert len(entries) == 9
    for condition in CONDITIONS:
        of_condition = traces(figure, condition=condition)
        assert len({t.legend for t in of_condition}) == 1
        for group in GROUPS:
            of_line = traces(figure, condition=condition, group=group)
            assert len({t.legendgroup for t in of_line}) <= 1
    assert len({t.legendgroup for t in figure.data}) == 9
    assert figure.layout.legend2.title.text == "<b>random adapter</b>"


def test_a_group_has_a_color_and_a_condition_a_dash():
    drawn = traces(layer_curves(whole()), part="line")
    for group in GROUPS:
        assert len({t.line.color for t in drawn if t.meta["group"] == group}) == 1
    assert len({t.line.color for t in drawn}) == 3
    assert len({t.line.dash for t in drawn}) == 4
    assert drawn[-1].meta["condition"] == "model"


def test_some_groups_and_conditions():
    figure = layer_curves(whole(), groups=["image"], conditions=["noise", "model"])
    found = {(t.meta["group"], t.meta["condition"]) for t in figure.data}
    assert found == {("image", "noise"), ("image", "model")}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"metrics": ["fvu", "r2"]}, "unknown metric 'r2'; valid: mse, fvu, nmse, "),
        ({"groups": ["bos"]}, "unknown group 'bos'; valid: image, text_after_image, "),
        ({"conditions": ["nose"]}, "unknown condition 'nose'; valid: model, random_"),
        ({"log": ["l1"]}, "unknown metric 'l1'; valid: mse, "),
        ({"metrics": []}, "no metric to draw; valid: mse, "),
        (
            {"groups": ["text_only"], "conditions": ["noise"]},
            r"no row with a group of \['text_only'\] and a condition of \['noise'\]",
        ),
    ],
)
def test_wrong_names(asked, words):
    with pytest.raises(ValueError, match=words):
        layer_curves(whole(), **asked)


def test_a_group_that_was_not_measured():
    with pytest.raises(ValueError, match=r"'text_only'; valid: image$"):
        layer_curves(result([row(0)]), groups=["text_only"])


def test_a_string_is_no_list():
    with pytest.raises(TypeError, match="metrics takes a list of names, given 'fvu'"):
        layer_curves(whole(), "fvu")


def test_log_axes():
    def kinds(made, **asked):
        figure = layer_curves(made, ["fvu", "cosine", "l0"], **asked)
        return [axis.type for axis in figure.select_yaxes()]

    wide = result([row(0, l0=10, fvu=0.9), row(1, l0=900, fvu=0.91)])
    assert kinds(wide) == ["linear", "linear", "log"]
    assert kinds(wide, log=[]) == ["linear"] * 3
    assert kinds(result([row(0, fvu=0.6), row(1, fvu=60)])) == ["log", *["linear"] * 2]
    assert kinds(result([row(0, l0=0), row(1, l0=900)])) == ["linear"] * 3
    with pytest.raises(ValueError, match="l0 has values that are not positive"):
        kinds(result([row(0, l0=0), row(1, l0=900)]), log=["l0"])


def test_the_mean_predictor_is_drawn_where_it_is_near():
    assert len(layer_curves(result([row(0, fvu=0.7)]), ["fvu"]).layout.shapes) == 1
    near = {"n_images": 1, "fvu": 0.2}
    assert not layer_curves(result([row(0, **near)]), ["fvu"]).layout.shapes


def test_the_layer_axis_names_the_hook_point():
    made = result([row(0)], {"hook_point": "resid_post"})
    assert layer_curves(made).layout.xaxis.title.text == "layer (resid_post)"
    assert layer_curves(result([row(0)])).layout.xaxis.title.text == "layer"


def test_a_metric_without_any_value():
    made = result(row(layer, fvu=np.nan) for layer in range(3))
    figure = layer_curves(made, ["fvu", "l0"])
    assert same(line(figure, metric="fvu").y, [np.nan] * 3)
    assert not traces(figure, metric="fvu", part="band")


def test_names_from_data_are_no_markup():
    figure = layer_curves(result([row(0, group="<b>x</b>")]), ["fvu"])
    drawn = line(figure, group="<b>x</b>")
    (label,) = traces(figure, part="label")
    for text in (drawn.name, drawn.hovertext[0], label.text[0]):
        assert "&lt;b&gt;x&lt;/b&gt;" in text
        assert "<b>x" not in text


def test_labels_do_not_overlap():
    """The axis begins at 0 and so is 11 long, or more; a label is 15 pixels high."""
    rows = [row(0, "image", l0=10), row(0, "text_only", l0=10.01)]
    figure = layer_curves(result(r | {"l0_high": 11} for r in rows), ["l0"])
    places = {t.meta["group"]: t.y[0] for t in traces(figure, part="label")}
    height = figure.layout.height - figure.layout.margin.t - figure.layout.margin.b
    assert places["text_only"] - places["image"] >= 15 * 11 / height
    assert sum(places.values()) / 2 == pytest.approx(10.005)


def test_labels_are_moved_apart_as_little_as_possible():
    places = _spread(np.array([5.0, 1.0, 1.0]), 1.0)
    assert places.tolist() == [5.0, 0.5, 1.5]
    # 0, 0.9, 1.8 a gap of 1 apart: the middle stays, the others give 0.1 each.
    assert _spread(np.array([0.0, 0.9, 1.8]), 1.0) == pytest.approx([-0.1, 0.9, 1.9])
    assert _spread(np.empty(0), 1.0).tolist() == []
