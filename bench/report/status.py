"""How the trajectories of a study stand, as a table in the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.report.format import printable
from bench.report.terminal import open_console
from bench.runs.study import Standing

COLOURS = {"done": "green", "running": "cyan", "failed": "red"}


def print_status(standings: Sequence[Standing], console: Console | None = None) -> None:
    """Prints a row a trajectory and a line of totals; costs are model FLOPs over all branches."""
    console = console or open_console()
    table = Table(box=None, pad_edge=False)
    for heading in ("scale", "variant", "seed", "lr", "state", "FLOPs spent", "FLOPs left", "error"):
        table.add_column(heading, justify="right" if heading in ("seed", "lr", "FLOPs spent", "FLOPs left") else "left")
    for standing in standings:
        experiment = standing.experiment
        table.add_row(
            Text(printable(experiment.scale)),
            Text(printable(experiment.variant)),
            str(experiment.seed),
            f"{experiment.optimizer.lr:g}",
            Text(standing.state, COLOURS.get(standing.state, "dim")),
            _flops(standing.spent),
            _flops(standing.left),
            Text(printable(standing.error)),
        )
    console.print(table)
    counts = {state: sum(s.state == state for s in standings) for state in dict.fromkeys(s.state for s in standings)}
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    known = [standing.left for standing in standings if standing.left is not None]
    left = _flops(sum(known)) if len(known) == len(standings) else "an unknown number"
    console.print(f"{states} of {len(standings)}; {_flops(sum(s.spent for s in standings))} FLOPs spent, {left} left")


def _flops(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
