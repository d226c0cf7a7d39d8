"""What follows the gains in the terminal, as rows of cells: combinations, forecasts, seeds needed and fitted laws."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.report.format import (
    METHODS,
    as_gain,
    axis_label,
    format_compute,
    format_convergence,
    format_error,
    format_estimate,
    format_ratio,
    format_seeds_needed,
)


@dataclass(frozen=True)
class Section:
    """A table: the first cell of a row names the variant; a cell that is a mapping is a gain."""

    title: str
    headings: tuple[str, ...]
    rows: list[tuple[str | Mapping, ...]]


def sections(gains: Mapping, axis: str) -> list[Section]:
    """The tables of a gains dict that have a row on the cost axis `axis`."""
    power = gains["power"] or {"entries": []}
    parts = (
        (_interactions, gains["interactions"]),
        (_contributions, gains["contributions"]),
        (_forecasts, gains["forecasts"]),
        (_power, power["entries"]),
    )
    made = []
    for make, found in parts:
        entries = [entry for entry in found if entry["axis"] == axis]
        if entries:
            made.append(_with_scales(make(gains, axis, entries), entries))
    return made


def fit_lines(gains: Mapping, axis: str) -> list[str]:
    """A line for each law fitted on the cost axis `axis`: the law, its shared parameters, whether it converged."""
    lines = []
    for fit in gains["fits"]:
        if fit["axis"] == axis:
            values = [_parameter(name, value, fit["intervals"].get(name)) for name, value in fit["parameters"].items()]
            shared = f", {', '.join(values)}" if values else ""
            lines.append(f"fit, {fit['scale']}: {fit['law']}{shared}; {format_convergence(fit)}")
    return lines


def _parameter(name: str, value: float, interval: Sequence[float] | None) -> str:
    ends = "" if interval is None else f" [{', '.join(map(format_estimate, interval))}]"
    return f"{name} {format_estimate(value)}{ends}"


def _with_scales(section: Section, entries: Sequence[Mapping]) -> Section:
    """The section with a column of scales, where its entries come from more than one."""
    scales = [entry["scale"] for entry in entries]
    if len(set(scales)) == 1:
        return Section(f"{scales[0]}: {section.title}", section.headings, section.rows)
    headings = (section.headings[0], "scale", *section.headings[1:])
    rows = [(row[0], scale, *row[1:]) for scale, row in zip(scales, section.rows, strict=True)]
    return Section(section.title, headings, rows)


def _interactions(gains: Mapping, axis: str, entries: Sequence[Mapping]) -> Section:
    def ratio_or_dash(value: float | None) -> str:
        return "-" if value is None else format_ratio(value)

    rows = [
        (
            entry["variant"],
            ratio_or_dash(entry["joint"]),
            ratio_or_dash(entry["product"]),
            as_gain(entry),
            entry["verdict"],
        )
        for entry in entries
    ]
    title = f"interactions: the joint gain over the product of the single gains, {axis_label(axis)}"
    return Section(title, ("variant", "joint", "product", "ratio", "verdict"), rows)


def _contributions(gains: Mapping, axis: str, entries: Sequence[Mapping]) -> Section:
    rows = [
        (entry["variant"], entry["innovation"], entry, METHODS.get(entry["method"], entry["method"]))
        for entry in entries
    ]
    title = f"contributions: each innovation's factor inside a combination, {axis_label(axis)}"
    return Section(title, ("variant", "innovation", "factor", "method"), rows)


def _forecasts(gains: Mapping, axis: str, entries: Sequence[Mapping]) -> Section:
    rows = [
        (
            entry["variant"],
            format_compute(entry["baseline_compute"]),
            as_gain(entry),
            f"{entry['decades']:.1f} decades beyond the data",
        )
        for entry in entries
    ]
    title = f"forecasts: extrapolated, with {100 * gains['level']:g} % prediction intervals, {axis_label(axis)}"
    return Section(title, ("variant", "compute of the baseline", "CEG", ""), rows)


def _power(gains: Mapping, axis: str, entries: Sequence[Mapping]) -> Section:
    rows = [
        (
            entry["variant"],
            str(entry["seeds"]),
            format_error(entry["seed_sd"]),
            format_seeds_needed(entry),
            format_compute(entry["cost"]),
        )
        for entry in entries
    ]
    power = gains["power"]
    title = (
        f"seeds needed for a {100 * power['level']:g} % interval within a factor {1 + power['width']:g} of the CEG"
        f" (in brackets: by the cautious reading of the noise), {axis_label(axis)}"
    )
    return Section(title, ("variant", "seeds now", "SD between seeds", "seeds needed", "extra cost"), rows)
