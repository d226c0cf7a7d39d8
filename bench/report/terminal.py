"""The gains of a study as a table in the terminal, or as plain lines where the output is not one."""

import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.style import Style
from rich.table import Table
from rich.text import Text

from bench.report.figures import scales_of
from bench.report.format import (
    axes_of,
    axis_label,
    format_compute,
    format_gain,
    format_tuning,
    is_bound,
    is_extrapolated,
    printable,
    reading,
    scale_title,
)
from bench.report.terminal_sections import fit_lines, sections

SHOWN_AXES = ("model_flops", "flops_6nd", "seconds")
COLOURS = {"gain": "green", "loss": "red"}
EXTRAPOLATED = "~ marks an extrapolated value: it comes from a fit, outside the budgets that were trained"
# Wide enough that a table sent to a file or another program is never folded.
PLAIN_WIDTH = 240


def open_console() -> Console:
    """The terminal, or where the output is none, plain lines that are never folded."""
    return Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH)


def print_gains(gains: Mapping, console: Console | None = None) -> None:
    """Print a table a scale: each variant's CEG with its interval on three cost axes, learning rate, tuning and class.

    gains: the contents of gains.json. A console that is too narrow gets fewer columns and names broken at `+`, and
    one too narrow for that, lines for each variant. Combinations, forecasts, seeds needed and fits follow on the first
    of the axes, then warnings and caveats.
    """
    console = console or open_console()
    told = {entry["axis"] for entry in gains["gains"]}
    axes = [axis for axis in SHOWN_AXES if axis in told] or axes_of(gains)[:1]
    classes = {entry["variant"]: entry for entry in gains["classes"]}
    if not gains["gains"] and not gains["fits"]:
        console.print(Text("No gain could be computed."))
    for scale in scales_of(gains):
        entries = [entry for entry in gains["gains"] if entry["scale"] == scale]
        if entries and axes:
            _print_scale(scale, entries, axes, classes, console)
            console.print()
    _print_remarks(gains, axes, console)
    for section in sections(gains, axes[0]) if axes else ():
        console.print(Text(printable(section.title), style="bold"))
        rows = [(str(row[0]), [_cell(cell) for cell in row[1:]]) for row in section.rows]
        layouts = [(section.headings[1:], folded) for folded in (False, True)]
        _print_widest(section.headings, rows, layouts, console)
        console.print()
    for line in fit_lines(gains, axes[0]) if axes else ():
        console.print(Text(printable(line)))
    for heading, lines in (("warning", gains["warnings"]), ("caveat", gains["caveats"])):
        for line in lines:
            console.print(Text(f"{heading}: {printable(line)}", style="yellow" if heading == "warning" else "dim"))


def _print_remarks(gains: Mapping, axes: Sequence[str], console: Console) -> None:
    """How to read the tables of gains: what marks an extrapolated value, and what the classes rest on."""
    shown = [entry for entry in [*gains["gains"], *gains["forecasts"]] if entry["axis"] in axes]
    remarks = [EXTRAPOLATED] if any(is_extrapolated(entry) for entry in shown) else []
    remarks += [f"classes: {gains['correction']}"] if gains["classes"] and gains["correction"] else []
    for remark in remarks:
        console.print(Text(printable(remark), style="dim"))
    if remarks:
        console.print()


def _print_scale(scale: str, entries: list[Mapping], axes: list[str], classes: Mapping, console: Console) -> None:
    console.print(Text(_heading(scale, entries, axes[0]), style="bold"))
    names = [*(f"CEG, {axis_label(axis)}" for axis in axes), "learning rate", "tuning", "class"]
    variants = dict.fromkeys(entry["variant"] for entry in entries)
    rows = [(variant, _cells(variant, entries, axes, classes)) for variant in variants]
    # From the whole table to the least that is still one: folded, then without the class, then without the middle axis.
    kept = [name for name in names if name != "class"]
    least = [name for name in kept if name not in names[1 : len(axes) - 1]]
    layouts = [(names, False), (names, True), (kept, True), (least, True)]
    _print_widest(["variant", *names], rows, layouts, console)


def _print_widest(
    headings: Sequence[str],
    rows: Sequence[tuple[str, list[Text]]],
    layouts: Sequence[tuple[Sequence[str], bool]],
    console: Console,
) -> None:
    """The first of `layouts` (columns, folded or not) that fits the console, or else a line for each cell."""
    names = headings[1:]
    for chosen, folded in layouts:
        table = _table(headings, rows, chosen, folded=folded)
        if Measurement.get(console, console.options.update(max_width=10_000), table).maximum <= console.width:
            console.print(table)
            return
    for variant, cells in rows:
        console.print(Text(printable(variant)))
        for heading, cell in zip(names, cells, strict=True):
            console.print(Text.assemble(f"  {printable(heading)}: " if heading else "  ", cell))


def _table(
    headings: Sequence[str], rows: Sequence[tuple[str, list[Text]]], chosen: Sequence[str], *, folded: bool
) -> Table:
    """The first of the columns and those `chosen`; folded, variants, headings and verdicts break where parts meet."""

    def fold(text: Text, mark: str) -> Text:
        if not folded:
            return text
        return Text("\n").join(text.split(mark, include_separator=True))

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading in (headings[0], *chosen):
        table.add_column(fold(Text(printable(heading)), ", "), no_wrap=True)
    for variant, cells in rows:
        shown = [cell for name, cell in zip(headings[1:], cells, strict=True) if name in chosen]
        verdicts = [fold(cell, ", " if name == "class" else ": ") for name, cell in zip(chosen, shown, strict=True)]
        table.add_row(fold(Text(printable(variant)), "+"), *verdicts)
    return table


def _heading(scale: str, entries: list[Mapping], axis: str) -> str:
    entry = next((entry for entry in entries if entry["axis"] == axis), None)
    title = scale_title(scale)
    if entry is None or entry["target_loss"] is None:
        return printable(title)
    cost = f"{format_compute(entry['baseline_compute'])} {axis_label(axis)}"
    return printable(f"{title}: target loss {entry['target_loss']:.4f}, which cost the baseline {cost}")


def _cells(variant: str, entries: list[Mapping], axes: list[str], classes: Mapping) -> list[Text]:
    """A variant's cells: its gain on each axis, learning rate, tuning, class."""
    mine = {entry["axis"]: entry for entry in entries if entry["variant"] == variant}
    cells = [_cell(mine.get(axis, "-")) for axis in axes]
    entry = mine.get(axes[0]) or next(iter(mine.values()))
    known = classes.get(variant)
    verdicts = f"{known['sign']['verdict']}, slope {known['slope']['verdict']}" if known else "-"
    return [
        *cells,
        Text("-" if entry["lr"] is None else printable(entry["lr"])),
        Text(format_tuning(entry)),
        Text(printable(verdicts)),
    ]


def _cell(content: str | Mapping) -> Text:
    """A text as it is, or a gain in the colour of its reading, a bound in italics."""
    if isinstance(content, str):
        return Text(printable(content))
    return Text(format_gain(content), Style(color=COLOURS.get(reading(content)), italic=is_bound(content)))
