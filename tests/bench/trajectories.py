"""What tests ask of the files that a trajectory leaves."""

from typing import Any

from bench.runs.folder import MEASURED, RunFolder, read_rows


def counted(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what is measured, which differs when a step is trained again."""
    return {name: value for name, value in row.items() if name not in MEASURED}


def counted_rows(folder: RunFolder) -> list[dict[str, Any]]:
    """All rows of metrics.jsonl and then of results.jsonl."""
    return [counted(row) for file in (folder.metrics, folder.results) for row in read_rows(file.path)]
