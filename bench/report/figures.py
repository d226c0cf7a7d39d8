"""Plotly figures of the report, as plain JSON-ready dicts: loss against compute and CEG against compute.

Plotly reads a small HTML of its own in labels, so every text from outside goes through `label`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import escape

from bench.report.format import (
    as_gain,
    axes_of,
    axis_label,
    format_compute,
    format_error,
    format_gain,
    format_interval,
    format_number,
    format_p,
    is_bound,
    is_extrapolated,
    printable,
)
from bench.report.ratio_axis import RatioAxis, log_ticks

INK, FAINT, GRID, WASH = "#26282b", "#6b7077", "#e8e9eb", "#f4f4f5"
# Okabe and Ito's colours, told apart by readers with any colour vision; the two lightest are darkened for thin lines.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b3568a", "#b58100", "#2f8fc4", "#7a4fb5", "#8c5a2b")
SYMBOLS = ("circle", "square", "diamond", "cross", "x", "star", "hexagon", "pentagon", "bowtie", "hourglass")
DASHES = ("solid", "dash", "dot", "dashdot")


@dataclass(frozen=True)
class Series:
    """What the points of one line of CEG against compute have in common, and how they look."""

    scale: str
    axis: str
    ratio_axis: RatioAxis
    colour: str
    symbol: str
    dash: str


def label(text: object) -> str:
    """`text` as plotly shows it letter for letter."""
    return str(escape(printable(text)))


def variants_of(gains: Mapping) -> list[str]:
    """Every variant that occurs, the baseline first, then in the order of the gains and of the frontiers."""
    entries = [*gains["gains"], *gains["frontiers"], *gains["classes"]]
    return list(dict.fromkeys([gains["baseline"], *(entry["variant"] for entry in entries)]))


def scales_of(gains: Mapping) -> list[str]:
    """Every scale that has a gain or a frontier, in the order of the file."""
    return list(dict.fromkeys(entry["scale"] for entry in [*gains["gains"], *gains["frontiers"]]))


def colour_of(gains: Mapping, variant: str) -> str:
    """The colour of a variant, the same in all figures and tables; the baseline is drawn in ink."""
    place = variants_of(gains).index(variant)
    return INK if place == 0 else COLOURS[(place - 1) % len(COLOURS)]


def loss_figure(gains: Mapping, scale: str, axis: str) -> dict:
    """Mean final loss against compute on `axis`, a line a variant, bars one standard deviation over seeds."""
    variants, traces, computes = variants_of(gains), [], []
    for frontier in gains["frontiers"]:
        if frontier["scale"] != scale or frontier["axis"] != axis:
            continue
        variant = frontier["variant"]
        points = [point for point in frontier["points"] if point["compute"] and point["loss"] is not None]
        computes += [point["compute"] for point in points]
        colour = colour_of(gains, variant)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": label(variant),
                "x": [point["compute"] for point in points],
                "y": [point["loss"] for point in points],
                "error_y": {
                    "type": "data",
                    "array": [point["loss_sd"] or None for point in points],
                    "color": colour,
                    "thickness": 1,
                    "width": 3,
                },
                "line": {"color": colour, "width": 2.2 if variant == gains["baseline"] else 1.6},
                "marker": {"symbol": SYMBOLS[variants.index(variant) % len(SYMBOLS)], "size": 8, "color": colour},
                "hoverinfo": "text",
                "hovertext": [_point_text(variant, point, axis) for point in points],
            }
        )
    layout = _layout(_compute_axis(computes, axis_label(axis)), {"l": 52, "r": 14, "t": 10, "b": 52})
    layout["yaxis"] |= {"title": {"text": "validation loss, nats per token", "font": {"size": 12}}}
    return {"data": traces, "layout": layout}


def gain_figure(gains: Mapping, variant: str, axis: str, ratio_axis: RatioAxis) -> dict:
    """CEG of one variant against the baseline's compute on `axis`, a line a scale; triangles are bounds.

    What is extrapolated, forecasts included, has open markers and dashed bars, and stands apart from the line.
    """
    scales, colour, traces, measured, extrapolated = scales_of(gains), colour_of(gains, variant), [], [], []
    for style, scale in enumerate(scales):
        points = _points(gains, {"scale": scale, "variant": variant, "axis": axis})
        inside = [point for point in points if not is_extrapolated(point)]
        outside = [point for point in points if is_extrapolated(point)]
        measured += [point["baseline_compute"] for point in inside]
        extrapolated += [point["baseline_compute"] for point in outside]
        look = colour, SYMBOLS[style % len(SYMBOLS)], DASHES[style % len(DASHES)]
        series = Series(scale, axis, ratio_axis, *look)
        if points:
            traces += _gain_traces(inside, series, legend=len(scales) > 1)
        if outside:
            traces += _extrapolated_traces(outside, series)
    compute_axis = _compute_axis(measured + extrapolated, f"the baseline's {axis_label(axis)}")
    layout = _layout(compute_axis, {"l": 38, "r": 10, "t": 6, "b": 44})
    layout["yaxis"] |= {
        "type": "log",
        "range": _log_range(ratio_axis.low, ratio_axis.high),
        "tickvals": ratio_axis.ticks,
        "ticktext": [f"{tick:g}" for tick in ratio_axis.ticks],
    }
    one = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 1, "y1": 1, "layer": "below"}
    layout["shapes"] = [one | {"line": {"color": FAINT, "width": 1.2}}]
    if measured and extrapolated and max(extrapolated) > max(measured):
        layout |= _beyond(layout, max(measured), max(extrapolated))
    return {"data": traces, "layout": layout}


def all_figures(gains: Mapping) -> dict[str, dict[str, dict]]:
    """Every figure of the report by panel and cost axis: `loss-0` is the first scale, `gain-0` the first variant."""
    axes = axes_of(gains)
    panels = {
        f"loss-{index}": {axis: loss_figure(gains, scale, axis) for axis in axes}
        for index, scale in enumerate(scales_of(gains))
    }
    for index, variant in enumerate(gained_variants(gains)):
        panels[f"gain-{index}"] = {}
        for axis in axes:
            drawn = [point for entry in gains["gains"] if entry["axis"] == axis for point in entry["curve"]]
            drawn += [as_gain(entry) for entry in gains["forecasts"] if entry["axis"] == axis]
            panels[f"gain-{index}"][axis] = gain_figure(gains, variant, axis, RatioAxis.around(drawn))
    return panels


def gained_variants(gains: Mapping) -> list[str]:
    """The variants that have a gain, in the order of the file."""
    return list(dict.fromkeys(entry["variant"] for entry in gains["gains"]))


def _points(gains: Mapping, place: Mapping) -> list[Mapping]:
    """The points of a curve, and the forecasts beyond it, that can be drawn."""
    curves = [point for entry in gains["gains"] if place.items() <= entry.items() for point in entry["curve"]]
    forecasts = [as_gain(entry) for entry in gains["forecasts"] if place.items() <= entry.items()]
    return [point for point in curves + forecasts if point["baseline_compute"] and _height(point) is not None]


def _gain_traces(points: Sequence[Mapping], series: Series, *, legend: bool) -> list[dict]:
    """The line through the values, and the values and bounds with their bars."""
    # A bound is no value to lead a line through: its triangle stands alone.
    line = {
        "type": "scatter",
        "mode": "lines",
        "name": label(series.scale),
        "x": [point["baseline_compute"] for point in points],
        "y": [point["ceg"] for point in points],
        "line": {"color": series.colour, "width": 1.4, "dash": series.dash},
        "hoverinfo": "skip",
        "showlegend": legend,
    }
    bars = [(_reach(point, series.ratio_axis), _height(point)) for point in points]
    markers = _markers(points, series, [_symbol(point, series.symbol) for point in points])
    markers["error_y"] = {
        "type": "data",
        "symmetric": False,
        # A bar of no length would still get its caps.
        "array": [high - height if high > low else None for (low, high), height in bars],
        "arrayminus": [height - low if high > low else None for (low, high), height in bars],
        "color": series.colour,
        "thickness": 1,
        "width": 3,
    }
    return [line, markers]


def _extrapolated_traces(points: Sequence[Mapping], series: Series) -> list[dict]:
    """Dashed bars, which plotly's error bars cannot be, and open markers."""
    ends = [_reach(point, series.ratio_axis) for point in points]
    bars = {
        "type": "scatter",
        "mode": "lines",
        "name": label(series.scale),
        # A missing point ends a bar.
        "x": [x for point in points for x in (point["baseline_compute"], point["baseline_compute"], None)],
        "y": [y for low, high in ends for y in (low, high, None)],
        "line": {"color": series.colour, "width": 1.2, "dash": "dot"},
        "hoverinfo": "skip",
        "showlegend": False,
    }
    return [bars, _markers(points, series, [_symbol(point, f"{series.symbol}-open") for point in points])]


def _markers(points: Sequence[Mapping], series: Series, symbols: Sequence[str]) -> dict:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": label(series.scale),
        "showlegend": False,
        "x": [point["baseline_compute"] for point in points],
        "y": [_height(point) for point in points],
        "marker": {
            "size": [10 if point["ceg"] is None else 7 for point in points],
            "color": series.colour,
            "symbol": list(symbols),
        },
        "hoverinfo": "text",
        "hovertext": [_gain_text(point, series) for point in points],
    }


def _beyond(layout: Mapping, measured: float, extrapolated: float) -> dict:
    """Shapes and a note that set the computes beyond the largest `measured` apart."""
    # Halfway to the next point, or a tenth of a decade, whichever is nearer.
    start = measured * min(math.sqrt(extrapolated / measured), 10**0.1)
    area = {"type": "rect", "xref": "x", "yref": "paper", "x0": start, "x1": extrapolated * 1.25, "y0": 0, "y1": 1}
    note = {"xref": "paper", "x": 1, "xanchor": "right", "yref": "paper", "y": 1, "yanchor": "top", "showarrow": False}
    return {
        "shapes": [area | {"layer": "below", "line": {"width": 0}, "fillcolor": WASH}, *layout["shapes"]],
        "annotations": [note | {"text": "extrapolated", "font": {"size": 11, "color": FAINT}}],
    }


def _height(point: Mapping) -> float | None:
    known = [point[key] for key in ("ceg", "lower_bound", "upper_bound") if point[key] is not None]
    return known[0] if known else None


def _symbol(point: Mapping, symbol: str) -> str:
    if point["ceg"] is not None:
        return symbol
    return "triangle-up-open" if point["lower_bound"] is not None else "triangle-down-open"


def _reach(point: Mapping, ratio_axis: RatioAxis) -> tuple[float, float]:
    """Ends of the bar drawn at a point. An open side of a value's interval reaches the axis's end; a bound's triangle
    says by itself which side is open."""
    height = _height(point)
    if point["interval"] is None:
        return height, height
    open_low, open_high = (height, height) if is_bound(point) else (ratio_axis.low, ratio_axis.high)
    low, high = point["interval"]
    low = open_low if low is None else max(low, ratio_axis.low)
    high = open_high if high is None else min(high, ratio_axis.high)
    return min(low, height), max(high, height)


def _log_range(low: float, high: float) -> list[float]:
    return [math.log10(low), math.log10(high)]


def _compute_axis(computes: Sequence[float], title: str) -> dict:
    axis = {"type": "log", "title": {"text": label(title), "font": {"size": 12}}}
    if not computes:
        return axis
    low, high = min(computes), max(computes)
    ticks = log_ticks(low / 1.02, high * 1.02)
    return axis | {
        "range": _log_range(low / 1.25, high * 1.25),
        "tickvals": ticks,
        "ticktext": [_tick_text(tick) for tick in ticks],
    }


def _tick_text(tick: float) -> str:
    mantissa, times, power = format_compute(tick, typographic=True).partition(" \u00d7 ")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    if not times:
        return mantissa
    return power if mantissa == "1" else f"{mantissa}\u00d7{power}"


def _layout(compute_axis: dict, margin: dict) -> dict:
    line = {"gridcolor": GRID, "zeroline": False, "linecolor": FAINT, "ticks": "outside", "tickcolor": GRID}
    return {
        "autosize": True,
        "margin": margin,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "inherit", "size": 12, "color": INK},
        "hoverlabel": {"align": "left", "bgcolor": "#ffffff", "font": {"size": 12, "color": INK}},
        "hovermode": "closest",
        "dragmode": False,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "xaxis": line | {"showgrid": False} | compute_axis,
        "yaxis": dict(line),
    }


def _point_text(variant: str, point: Mapping, axis: str) -> str:
    spread = "" if point["loss_sd"] is None else f" (seeds differ by {format_number(point['loss_sd'])})"
    return (
        f"<b>{label(variant)}</b><br>loss {point['loss']:.4f}{spread}"
        f"<br>{format_compute(point['compute'], typographic=True)} {label(axis_label(axis))}"
        f"<br>seeds {point['seeds']}, learning rate {label(point['lr'] or 'not given')}"
    )


def _gain_text(point: Mapping, series: Series) -> str:
    target = "" if point.get("target_loss") is None else f", target loss {point['target_loss']:.4f}"
    compute = format_compute(point["baseline_compute"], typographic=True)
    lines = [
        f"<b>{label(format_gain(point, typographic=True))}</b>",
        f"at {label(series.scale)}{target}",
        f"{compute} {label(axis_label(series.axis))} of the baseline",
    ]
    if point["interval_90"] is not None:
        lines.append(f"90 % interval {format_interval(point['interval_90'], typographic=True)}")
    if point.get("p_value") is not None:
        lines.append(f"p of a CEG of 1: {label(format_p(point['p_value']))}")
    if point.get("seed_error") is not None:
        error = format_error(point["evaluation_error"], typographic=True)
        lines.append(f"errors of ln CEG: seeds {format_error(point['seed_error'])}, evaluation at most {error}")
    if "decades" in point:
        lines.append(f"a forecast, {point['decades']:.1f} decades beyond the data")
    elif is_extrapolated(point):
        lines.append("extrapolated by a fit")
    return "<br>".join(lines)
