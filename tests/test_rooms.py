"""The architecture: imports go one way, and what is heavy is imported only where it is used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {"kernels": {"kernels"}, "models": {"models", "kernels"}, "bench": {"bench", "models", "kernels"}}


def imported_packages(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_go_one_way(room):
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        ours = imported_packages(path) & set(MAY_IMPORT)
        assert ours <= MAY_IMPORT[room], f"{path} imports {ours - MAY_IMPORT[room]}"


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_command_list_imports_nothing_heavy():
    loaded = modules_after("from bench.__main__ import main; main([])")
    assert not loaded & {"torch", "numpy", "hydra", "omegaconf", "wandb", "polars", "plotly", "rich"}


def test_what_trains_runs_where_wandb_polars_and_plotly_are_missing():
    loaded = modules_after(
        "import kernels, models.gpt, bench.data, bench.training.train, bench.runs.folder, bench.runs.study, "
        "bench.speed.training_step"
    )
    assert "torch" in loaded
    assert not loaded & {"wandb", "polars", "plotly"}


def test_no_module_is_a_drawer_of_odds_and_ends():
    names = {path.stem for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py")}
    assert not names & {"utils", "util", "helpers", "helper", "misc", "common"}
