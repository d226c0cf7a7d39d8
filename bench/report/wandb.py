"""A study's gains on Weights & Biases: tables and figures in a run of the study's group, its files as an artifact."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from bench.config import WandbConfig
from bench.report import figures
from bench.report.spreadsheet import FITS, GAINS
from bench.runs.mirror import run_id, start_run

TABLES = {"table": ("gains", GAINS), "fits": ("fits", FITS)}


def publish(gains: Mapping[str, Any], files: Mapping[str, Path], wandb_config: WandbConfig, study: str) -> str:
    """Puts the gains on W&B, or in an offline run beside them; returns where they are.

    Each time it is the same W&B run, which shows the newest; the artifact keeps every version.

    Args:
        gains: the contents of gains.json.
        files: what `write_gains` in bench/commands.py wrote of it.
    Raises:
        UserError: W&B refuses, for want of a key or a connection.
    """
    import wandb
    from plotly.graph_objects import Figure

    run = start_run(
        wandb_config,
        study,
        "report",
        identity=run_id("report", study),
        name="report",
        tags=(),
        config={
            "cegbench_report": {key: gains[key] for key in ("schema", "study", "baseline", "estimator", "created")}
        },
        folder=files["gains"].parent,
        silent=False,  # it says itself when an upload fails
        quiet=True,
    )
    exit_code = 1
    try:
        shown = {
            name: wandb.Table(*_table(files[key], schema)) for key, (name, schema) in TABLES.items() if key in files
        }
        shown |= {name: wandb.Plotly(Figure(figure)) for name, figure in _figures(gains)}
        run.log({**shown, "report": wandb.Html(str(files["report"]), inject=False)})
        artifact = wandb.Artifact(run_id("gains", study), type="gains")
        for file in files.values():
            artifact.add_file(str(file))
        run.log_artifact(artifact)
        exit_code = 0
    finally:
        run.finish(exit_code=exit_code)
    return run.url or str(Path(run.dir).parent)


def _table(file: Path, schema: Mapping[str, Any]) -> tuple[list[str], list[tuple]]:
    return list(schema), pl.read_csv(file, schema=dict(schema)).rows()


def _figures(gains: Mapping[str, Any]) -> Iterator[tuple[str, dict]]:
    """The report's figures; those of one cost axis are a section of a W&B page, because their names begin with it."""
    shows = {f"loss-{n}": scale for n, scale in enumerate(figures.scales_of(gains))}
    shows |= {f"gain-{n}": variant for n, variant in enumerate(figures.gained_variants(gains))}
    for panel, by_axis in figures.all_figures(gains).items():
        name = shows[panel].replace("/", "_")[:50]  # it becomes a part of a file's name
        for axis, figure in by_axis.items():
            yield f"{axis}/{panel} {name}", figure
