"""The report of a study: one HTML file that holds its tables, its figures and plotly itself, and needs no network."""

import re
from collections.abc import Mapping
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from bench.report import figures
from bench.report import format as formats
from bench.report.ratio_axis import RatioAxis
from bench.runs.folder import write_whole

FOLDER = Path(__file__).parent
LAWS = {
    "L = E + K C^-gamma": Markup("L = E + K C<sup>&minus;&gamma;</sup>"),
    "L = E + A/N^alpha + B/D^beta": Markup("L = E + A / N<sup>&alpha;</sup> + B / D<sup>&beta;</sup>"),
}
SYMBOLS = {"alpha": "\u03b1", "beta": "\u03b2", "gamma": "\u03b3"}
PHRASES = {
    "gain": "gain",
    "loss": "lose",
    "contains 1": "cannot be told from no change",
    "bound only": "known only as a bound",
    "no interval": "without an interval",
    "unknown": "without a result",
}


def write_report(gains: Mapping, path: Path) -> Path:
    """Write the report of `gains` (the contents of gains.json) to `path`, replacing what is there; returns the path.

    The file appears whole or not at all.
    """
    from plotly.offline import get_plotlyjs

    path = Path(path)
    page = _environment().get_template("report.html.j2").render(**_page(gains), plotly=Markup(get_plotlyjs()))
    write_whole(path, page)
    return path


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.tests |= {"bound": formats.is_bound, "extrapolated": formats.is_extrapolated}
    environment.filters |= {
        "printable": formats.printable,
        "rate": lambda lr: "\u2014" if lr is None else formats.printable(lr),
        "breakable": _breakable,
        "number": formats.format_number,
        "parts": lambda gain: formats.gain_parts(gain, typographic=True),
        "interval": lambda interval: formats.format_interval(interval, typographic=True),
        "slope": lambda slope: formats.format_slope(slope, typographic=True),
        "compute": lambda value: formats.format_compute(value, typographic=True),
        "ratio": lambda value: "\u2014" if value is None else formats.format_ratio(value),
        "p": lambda value: formats.format_p(value, typographic=True),
        "error": lambda value: formats.format_error(value, typographic=True),
        "estimate": formats.format_estimate,
        "convergence": formats.format_convergence,
        "seeds_needed": lambda entry: formats.format_seeds_needed(entry, typographic=True),
        "law": _law,
        "symbol": lambda name: SYMBOLS.get(name, formats.printable(name)),
        "parameter_names": lambda mappings: list(dict.fromkeys(name for one in mappings for name in one)),
        "axis_label": formats.axis_label,
        "scale_title": formats.scale_title,
        "as_gain": formats.as_gain,
        "reading": formats.reading,
        "reading_words": formats.format_reading,
        "tuning": formats.format_tuning,
        "time": formats.format_time,
        "count": lambda value: "\u2014" if value is None else f"{value:,}",
    }
    return environment


def _breakable(text: object) -> Markup:
    """`text`, escaped, where a line may break after the signs that join the parts of a path or a variant's name."""
    return Markup(re.sub(r"([+/,])", r"\1<wbr>", str(escape(formats.printable(text)))))


def _law(law: str) -> Markup:
    """A law, escaped, its formula set as in print where it is a known one; a comma and what it says more may follow."""
    formula, comma, rest = formats.printable(law).partition(",")
    return LAWS.get(formula, escape(formula)) + comma + rest


def _page(gains: Mapping) -> dict:
    """What the template shows, in the template's order."""
    axes = formats.axes_of(gains)
    headline_axis = axes[0] if axes else "model_flops"
    headline = [entry for entry in gains["gains"] if entry["axis"] == headline_axis]
    scales, models, environments = figures.scales_of(gains), _models(gains["runs"]), []
    for run in gains["runs"]:
        if _environment_of(run) not in environments:
            environments.append(_environment_of(run))
    by_place = {(entry["scale"], entry["variant"], entry["axis"]): entry for entry in gains["gains"]}
    return {
        "gains": gains,
        "axes": axes,
        "headline_axis": headline_axis,
        "scales": scales,
        "headline": headline,
        "by_place": by_place,
        "readings": formats.READINGS,
        "counts": _counts(headline),
        "classes": {entry["variant"]: entry for entry in gains["classes"]},
        "variants": figures.gained_variants(gains),
        "colours": {variant: figures.colour_of(gains, variant) for variant in figures.variants_of(gains)},
        "part_axes": _part_axes(gains, axes),
        "methods": formats.METHODS,
        "extrapolates": bool(gains["forecasts"])
        or any(formats.is_extrapolated(point) for entry in gains["gains"] for point in entry["curve"]),
        "ratio_axis": RatioAxis.around(headline),
        "figures": figures.all_figures(gains),
        "in_scale": {scale: {e["variant"] for e in gains["gains"] if e["scale"] == scale} for scale in scales},
        "environments": environments,
        "environment_of": [environments.index(_environment_of(run)) + 1 for run in gains["runs"]],
        "models": models,
        "parameter_keys": list(dict.fromkeys(key for run in models for key in run.get("parameters") or {})),
        "flops_keys": list(dict.fromkeys(key for run in models for key in run.get("flops_per_token") or {})),
    }


def _part_axes(gains: Mapping, axes: list[str]) -> dict[str, list[str]]:
    """The cost axes each part is shown on: all, to choose from, or the only one that it is told on."""
    parts = {
        "combinations": [*gains["interactions"], *gains["contributions"]],
        "fits": gains["fits"],
        "forecasts": gains["forecasts"],
        "power": (gains["power"] or {"entries": []})["entries"],
    }
    found = {part: {entry["axis"] for entry in entries} for part, entries in parts.items()}
    return {part: axes if len(told) > 1 else list(told) for part, told in found.items()}


def _counts(headline: list[Mapping]) -> dict[str, str]:
    """For each scale a line that says how many variants have each reading, and how many of these are bounds."""
    lines = {}
    for scale in dict.fromkeys(entry["scale"] for entry in headline):
        parts = []
        for kind, phrase in PHRASES.items():
            found = [entry for entry in headline if entry["scale"] == scale and formats.reading(entry) == kind]
            bounds = sum(formats.is_bound(entry) for entry in found)
            aside = "only a bound" if len(found) == 1 else f"{bounds} of them only a bound"
            aside = f" ({aside})" if bounds and kind != "bound only" else ""
            parts += [f"{len(found)} {phrase}{aside}"] if found else []
        total = sum(entry["scale"] == scale for entry in headline)
        lines[scale] = f"{total} variant{'' if total == 1 else 's'}: {', '.join(parts)}."
    return lines


def _environment_of(run: Mapping) -> dict:
    """What ran a run and on which text: commit, device, versions and data, each None where it was not recorded."""
    return {key: run.get(key) for key in ("git_commit", "device", "versions", "data")}


def _models(runs: list[Mapping]) -> list[Mapping]:
    """One run for each scale and variant, one that recorded its parameters where there is one."""
    found: dict[tuple, Mapping] = {}
    for run in runs:
        place = (run["scale"], run["variant"])
        if place not in found or not found[place].get("parameters"):
            found[place] = run
    return list(found.values())
