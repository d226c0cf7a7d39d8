import html
import json
import re

import plotly.graph_objects as go
import pytest

from bench.report.figures import all_figures, colour_of, gain_figure, label, loss_figure, scales_of, variants_of
from bench.report.ratio_axis import RatioAxis


def each_figure(gains):
    return [figure for panel in all_figures(gains).values() for figure in panel.values()]


def test_plotly_takes_every_figure_as_it_is(make_gains):
    figures = each_figure(make_gains(scales=("compact", "full")))
    assert len(figures) == (2 + 5) * 4
    for figure in figures:
        go.Figure(figure)
        json.dumps(figure, allow_nan=False)


def test_loss_lines_hold_the_numbers_of_the_frontiers(make_gains):
    gains = make_gains(scales=("compact", "full"))
    figure = loss_figure(gains, "full", "seconds")
    frontiers = [f for f in gains["frontiers"] if f["scale"] == "full" and f["axis"] == "seconds"]
    assert [trace["name"] for trace in figure["data"]] == [f["variant"] for f in frontiers]
    for trace, frontier in zip(figure["data"], frontiers, strict=True):
        assert trace["x"] == [point["compute"] for point in frontier["points"]]
        assert trace["y"] == [point["loss"] for point in frontier["points"]]
        assert trace["error_y"]["array"] == [point["loss_sd"] for point in frontier["points"]]
    assert figure["layout"]["xaxis"]["title"]["text"] == "seconds"


def test_one_seed_has_no_spread_and_missing_numbers_are_left_out(make_gains):
    gains = make_gains(seeds=1)
    gains["frontiers"][0]["points"][1]["loss"] = None
    gains["frontiers"][0]["points"][2]["compute"] = None
    trace = loss_figure(gains, "compact", "model_flops")["data"][0]
    assert trace["x"] == [1e12]
    assert trace["error_y"]["array"] == [None]
    assert "seeds differ" not in trace["hovertext"][0]


def test_ceg_bars_are_the_intervals_and_lines_skip_bounds(make_gains):
    gains = make_gains(scales=("compact", "full"))
    axis = RatioAxis(0.1, 20.0)
    line, points, *_ = gain_figure(gains, "layer_norm", "model_flops", axis)["data"]
    assert line["mode"], points["mode"] == ("lines", "markers")
    assert line["y"] == points["y"] == [2.31] * 3
    assert points["error_y"]["arrayminus"] == pytest.approx([2.31 - 1.80] * 3)
    assert points["error_y"]["array"] == pytest.approx([2.96 - 2.31] * 3)
    for variant, bound, symbol in (("rope", 4.0, "triangle-up-open"), ("mqa", 0.5, "triangle-down-open")):
        line, points, *_ = gain_figure(gains, variant, "model_flops", axis)["data"]
        assert line["y"] == [None] * 3
        assert points["y"] == [bound] * 3
        assert points["error_y"]["array"] == points["error_y"]["arrayminus"] == [None] * 3
        assert points["marker"]["symbol"] == [symbol] * 3
    open_above = gain_figure(gains, "flash_attention+layer_norm+rope", "model_flops", axis)["data"][1]
    assert open_above["error_y"]["array"] == pytest.approx([20 - 3.483] * 3)


def test_a_bound_has_a_bar_only_where_its_interval_is_limited(make_gains, make_gain):
    bound = make_gain(ceg=None, upper_bound=1.0, interval=[None, 1.16])
    points = gain_figure(make_gains(points={"rope": bound}), "rope", "model_flops", RatioAxis(0.5, 2.0))["data"][1]
    assert points["error_y"]["array"] == pytest.approx([0.16] * 3)
    assert points["error_y"]["arrayminus"] == [0] * 3


def test_points_where_nothing_is_known_are_left_out(make_gains, make_gain):
    gains = make_gains(points={"rope": make_gain(ceg=None, interval=None)})
    figure = gain_figure(gains, "rope", "model_flops", RatioAxis(0.5, 2.0))
    assert all(trace["y"] == [] for trace in figure["data"])
    go.Figure(figure)


def test_forecasts_have_open_markers_and_dashed_bars_apart_from_the_line(make_gains):
    gains = make_gains(forecasts=True)
    figure = gain_figure(gains, "layer_norm", "model_flops", RatioAxis(0.5, 20.0))
    line, points, bars, markers = figure["data"]
    assert line["x"] == points["x"] == [1e12, 2e12, 4e12]
    assert markers["x"] == [4e13, 4e14]
    assert markers["y"] == [2.2, 2.2]
    assert markers["marker"]["symbol"] == ["circle-open"] * 2
    assert "error_y" not in markers
    assert bars["x"] == [4e13, 4e13, None, 4e14, 4e14, None]
    assert bars["y"] == pytest.approx([1.3, 3.9, None, 0.8, 4.9, None])
    assert bars["line"]["dash"] == "dot"
    assert "a forecast, 2.0 decades beyond the data" in markers["hovertext"][1]
    assert "<b>~2.20 [0.80, 4.90]</b>" in markers["hovertext"][1]
    assert [note["text"] for note in figure["layout"]["annotations"]] == ["extrapolated"]
    shade = figure["layout"]["shapes"][0]
    assert 4e12 < shade["x0"] < 4e13
    low, high = (10**end for end in figure["layout"]["xaxis"]["range"])
    assert low < 1e12
    assert high > 4e14
    go.Figure(figure)


def test_the_axis_of_gains_shows_every_forecast(make_gains):
    gains = make_gains(forecasts=True)
    for entry in gains["forecasts"]:
        entry |= {"ceg": 300.0, "interval": [200.0, 450.0]}
    low, high = all_figures(gains)["gain-0"]["model_flops"]["layout"]["yaxis"]["range"]
    assert 10**low < 0.5
    assert 10**high > 450


def test_extrapolated_points_of_a_curve_stand_apart_too(make_gains):
    gains = make_gains()
    curve = next(e for e in gains["gains"] if e["variant"] == "layer_norm" and e["axis"] == "model_flops")["curve"]
    curve[2]["extrapolated"] = True
    line, points, _, markers = gain_figure(gains, "layer_norm", "model_flops", RatioAxis(0.5, 20.0))["data"]
    assert line["x"] == points["x"] == [1e12, 2e12]
    assert markers["x"] == [4e12]
    assert "extrapolated by a fit" in markers["hovertext"][0]


def test_a_bound_is_never_extrapolated(make_gains, make_gain):
    gains = make_gains(points={"rope": make_gain(ceg=None, interval=None, lower_bound=4.0, extrapolated=True)})
    figure = gain_figure(gains, "rope", "model_flops", RatioAxis(0.5, 20.0))
    assert len(figure["data"]) == 2
    assert "annotations" not in figure["layout"]
    assert "extrapolated" not in figure["data"][1]["hovertext"][0]


def test_hovering_tells_the_other_interval_the_p_value_and_both_errors(make_gains, make_gain):
    point = make_gain(interval_90=[1.88, 2.84], p_value=0.0002, seed_error=0.127, evaluation_error=0.004)
    text = gain_figure(make_gains(points={"rope": point}), "rope", "model_flops", RatioAxis(0.5, 8))["data"][1]
    for words in ("90 % interval [1.88, 2.84]", "1: &lt;0.001", "seeds 0.13, evaluation at most 0.0040"):
        assert words in text["hovertext"][0]


def test_scales_are_told_apart_by_a_legend_only_where_there_are_several(make_gains):
    for scales in (("compact",), ("compact", "full")):
        traces = gain_figure(make_gains(scales=scales), "layer_norm", "model_flops", RatioAxis(0.5, 8))["data"]
        legend = [trace["name"] for trace in traces if trace["showlegend"]]
        assert legend == (list(scales) if len(scales) > 1 else [])
    assert len({trace["line"]["dash"] for trace in traces if "line" in trace}) == 2


def test_colours_differ_and_the_baseline_comes_first(make_gains):
    gains = make_gains()
    assert variants_of(gains)[0] == "baseline"
    assert len({colour_of(gains, variant) for variant in variants_of(gains)}) == 6
    assert scales_of(gains) == ["compact"]


def test_texts_from_outside_reach_plotly_as_text(make_gains, make_gain, hostile):
    points = {name: make_gain() for name in hostile}
    gains = make_gains(points=points, scales=hostile[:2], baseline=hostile[0] + "b", forecasts=True)
    for figure in each_figure(gains):
        texts = [text for trace in figure["data"] for text in (trace["name"], *trace.get("hovertext", ()))]
        for text in texts:
            assert set(re.findall(r"<[^>]*>", text)) <= {"<b>", "</b>", "<br>"}
        assert all(trace.get("hovertemplate") is None for trace in figure["data"])
    names = {trace["name"] for trace in loss_figure(gains, hostile[0], "model_flops")["data"]}
    assert {html.unescape(name) for name in names} == {*hostile, hostile[0] + "b"}
    assert label("<b>\x1b") == "&lt;b&gt;\\x1b"
