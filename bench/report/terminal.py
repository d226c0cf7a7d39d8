"""The gains of a study as a table in the terminal, or as plain lines where the output is not one."""

import sys
from collections.abc import Mapping

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
    printable,
    reading,
)

SHOWN_AXES = ("model_flops", "flops_6nd", "seconds")
COLOURS = {"gain": "green", "loss": "red"}
# Wide enough that a table sent to a file or another program is never folded.
PLAIN_WIDTH = 240


def open_console() -> Console:
    """The terminal, or where the output is none, plain lines that are never folded."""
    return Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH)


def print_gains(gains: Mapping, console: Console | None = None) -> None:
    """Print a table a scale: each variant's CEG with its interval on three cost axes, learning rate, tuning and class.

    gains: the contents of gains.json. A console that is too narrow gets fewer columns and names broken at `+`, and
    one too narrow for that, lines for each variant. Warnings and caveats follow the tables.
    """
    console = console or open_console()
    found = axes_of(gains)
    axes = [axis for axis in SHOWN_AXES if axis in found] or found[:1]
    classes = {entry["variant"]: entry for entry in gains["classes"]}
    if not gains["gains"]:
        console.print(Text("No gain could be computed."))
    for scale in scales_of(gains):
        entries = [entry for entry in gains["gains"] if entry["scale"] == scale]
        if entries and axes:
            _print_scale(scale, entries, axes, classes, console)
            console.print()
    for heading, lines in (("warning", gains["warnings"]), ("caveat", gains["caveats"])):
        for line in lines:
            console.print(Text(f"{heading}: {printable(line)}", style="yellow" if heading == "warning" else "dim"))


def _print_scale(scale: str, entries: list[Mapping], axes: list[str], classes: Mapping, console: Console) -> None:
    console.print(Text(_heading(scale, entries, axes[0]), style="bold"))
    names = [*(f"CEG, {axis_label(axis)}" for axis in axes), "learning rate", "tuning", "class"]
    rows = {
        variant: _cells(variant, entries, axes, classes)
        for variant in dict.fromkeys(entry["variant"] for entry in entries)
    }
    # From the whole table to the least that is still one: folded, then without the class, then without the middle axis.
    kept = [name for name in names if name != "class"]
    least = [name for name in kept if name not in names[1 : len(axes) - 1]]
    for chosen, folded in ((names, False), (names, True), (kept, True), (least, True)):
        table = _table(names, rows, chosen, folded=folded)
        if Measurement.get(console, console.options.update(max_width=10_000), table).maximum <= console.width:
            console.print(table)
            return
    for variant, cells in rows.items():
        console.print(Text(printable(variant)))
        for heading, cell in zip(names, cells, strict=True):
            console.print(Text.assemble(f"  {printable(heading)}: ", cell))


def _table(names: list[str], rows: Mapping[str, list[Text]], chosen: list[str], *, folded: bool) -> Table:
    """The columns `chosen` of `names`; folded, variants, headings and verdicts break where their parts meet."""

    def fold(text: Text, mark: str) -> Text:
        if not folded:
            return text
        return Text("\n").join(text.split(mark, include_separator=True))

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("variant", *chosen):
        table.add_column(fold(Text(printable(heading)), ", "), no_wrap=True)
    for variant, cells in rows.items():
        shown = [cell for name, cell in zip(names, cells, strict=True) if name in chosen]
        verdicts = [fold(cell, ", " if name == "class" else ": ") for name, cell in zip(chosen, shown, strict=True)]
        table.add_row(fold(Text(printable(variant)), "+"), *verdicts)
    return table


def _heading(scale: str, entries: list[Mapping], axis: str) -> str:
    entry = next((entry for entry in entries if entry["axis"] == axis), None)
    if entry is None or entry["target_loss"] is None:
        return printable(scale)
    cost = f"{format_compute(entry['baseline_compute'])} {axis_label(axis)}"
    return printable(f"{scale}: target loss {entry['target_loss']:.4f}, which cost the baseline {cost}")


def _cells(variant: str, entries: list[Mapping], axes: list[str], classes: Mapping) -> list[Text]:
    """A variant's cells: its gain on each axis, learning rate, tuning, class."""
    mine = {entry["axis"]: entry for entry in entries if entry["variant"] == variant}
    cells = [
        Text(format_gain(mine[axis]), Style(color=COLOURS.get(reading(mine[axis])), italic=is_bound(mine[axis])))
        if axis in mine
        else Text("-")
        for axis in axes
    ]
    entry = mine.get(axes[0]) or next(iter(mine.values()))
    known = classes.get(variant)
    verdicts = f"{known['sign']['verdict']}, slope {known['slope']['verdict']}" if known else "-"
    return [*cells, Text(printable(entry["lr"])), Text(format_tuning(entry)), Text(printable(verdicts))]
