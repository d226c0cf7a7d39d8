"""Where finished results come from: this project's own runs (`runs.py`), or what others have.

Each file with a function `read(path, config, name)` is a source, chosen on the command line by the file's name, as in
`data=table`. It reads what is there into one table and hands that to `columns.normalise`.
"""

import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import polars as pl

from bench.config import SourceConfig
from bench.errors import UserError


@dataclass(frozen=True)
class Results:
    """Finished results, wherever they come from, before anything is compared.

    Attributes:
        name: the study's.
        results: a row for each finished budget of each trajectory, with the columns of `runs.RESULTS` and
            `model_flops_with_optimizer`.
        curves: losses in mid-schedule, with the columns of `runs.CURVES` and the same; may be empty.
        runs: what gains.json says of each run: its path, its place in the study, its state, and `runs.PROVENANCE`
            (None where it is not known).
        warnings: sentences for the reader.
    """

    name: str
    results: pl.DataFrame
    curves: pl.DataFrame
    runs: list[dict[str, Any]]
    warnings: list[str]


class Source(Protocol):
    def read(self, path: Path, config: SourceConfig, name: str) -> Results: ...


def find_source(name: str) -> Source:
    """The source in the file of that name here.

    Raises:
        UserError: there is none; lists those there are.
    """
    modules = {
        found.name: importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)
    }
    sources = {found: module for found, module in modules.items() if hasattr(module, "read")}
    if name not in sources:
        raise UserError(f"data={name} is no source of results: choose one of {', '.join(sorted(sources))}")
    return sources[name]
