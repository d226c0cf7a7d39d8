"""What tests do with trajectories, and ask of what they leave."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.compose import compose_config
from bench.config import settle
from bench.runs.folder import MEASURED, RowFile, RunFolder, read_rows
from bench.training.train import train


def folder_of(overrides: Sequence[str]) -> RunFolder:
    return RunFolder(settle(compose_config(overrides)).folder)


def counted(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what is measured, which differs when a step is trained again."""
    return {name: value for name, value in row.items() if name not in MEASURED}


def counted_rows(folder: RunFolder) -> list[dict[str, Any]]:
    """All rows of metrics.jsonl and then of results.jsonl."""
    return [counted(row) for file in (folder.metrics, folder.results) for row in read_rows(file.path)]


def without_nulls(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def interrupted(config, monkeypatch, after: int, mistake: type[BaseException] = KeyboardInterrupt) -> None:
    """Trains as if it were killed once it has written that many rows."""
    append, written = RowFile.append, []

    def stop(file, row):
        append(file, row)
        written.append(row)
        if len(written) == after:
            raise mistake

    with monkeypatch.context() as patch:
        patch.setattr(RowFile, "append", stop)
        with pytest.raises(mistake):
            train(config)


def descendants(pid: int) -> dict[int, str]:
    """Process ids and command lines of all processes below one."""
    below, found = {pid}, {}
    for stat in sorted(Path("/proc").glob("[0-9]*/stat"), key=lambda path: int(path.parts[2])):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            if parent in below:
                below.add(int(stat.parts[2]))
                found[int(stat.parts[2])] = stat.with_name("cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def read_offline_run(folder: Path) -> list[dict[str, Any]]:
    """The records of an offline run of W&B, as its own reader tells them."""
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(folder)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [json.loads(line) for line in lines]
