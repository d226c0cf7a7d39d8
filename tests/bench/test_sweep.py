"""Several processes, of one machine or of several, train one study between them."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bench import sweep
from bench.__main__ import main
from bench.compose import compose_config
from bench.config import settle
from bench.runs.claim import take_claim
from bench.runs.folder import RunFolder, read_rows

ROOT = Path(__file__).parents[2]


@pytest.fixture
def first_folder(overrides) -> RunFolder:
    folder = RunFolder(settle(compose_config(overrides)).folder)
    folder.path.mkdir(parents=True)
    return folder


@pytest.fixture
def quick_looks(monkeypatch):
    monkeypatch.setattr(sweep, "LOOK_SECONDS", 0.01)


@pytest.mark.parametrize("left", ["done", "unfinished", "failed"])
def test_what_another_process_trains_is_left_to_it(overrides, first_folder, quick_looks, capsys, left):
    """Another one ends it, leaves it to this sweep, or fails in it, while this sweep has trained the rest."""
    claim = take_claim(first_folder.path)
    second = RunFolder(settle(compose_config([*overrides, "seed=1"])).folder)

    def end() -> None:
        while second.state != "done":
            time.sleep(0.01)
        if left != "unfinished":
            (first_folder.path / left.upper()).write_text("Diverged: step 3: loss nan" if left == "failed" else "")
        claim.release()

    other = threading.Thread(target=end)
    other.start()
    status = main(["train", "-m", *overrides, "seed=0,1"])
    other.join()
    printed = capsys.readouterr()
    assert printed.out.count("waiting for 1 trajectories that other processes train") == 1
    assert status == (1 if left == "failed" else 0)
    assert first_folder.state == ("failed" if left == "failed" else "done")
    assert bool(first_folder.results.size) == (left == "unfinished")
    assert ("loss nan" in printed.err) == (left == "failed")


@pytest.mark.slow
def test_two_sweeps_share_a_study_and_one_that_is_stopped_goes_on(overrides, tmp_path):
    common = [*overrides, "device.threads=1", "budgets=[1e8,10e8]"]
    jobs = "seed=0,1,2,3"
    whole = [*common, f"paths.runs={tmp_path}/whole"]
    assert main(["train", "-m", *whole, jobs]) == 0
    command = [sys.executable, "-m", "bench", "train", "-m", *common, jobs]
    sweeps = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(2)]
    folders = [[RunFolder(settle(compose_config([*c, f"seed={n}"])).folder) for n in range(4)] for c in (whole, common)]
    while sum(folder.state == "running" for folder in folders[1]) < 2:
        assert all(process.poll() is None for process in sweeps), "a sweep ended before both had begun"
        time.sleep(0.01)
    os.kill(sweeps[0].pid, signal.SIGTERM)
    assert sweeps[0].wait() == 75
    assert sweeps[1].wait() == 0, sweeps[1].stderr.read()
    for one, other in zip(*folders, strict=True):
        assert other.state == "done"
        assert rows_without_seconds(one) == rows_without_seconds(other)


def rows_without_seconds(folder: RunFolder) -> list[dict]:
    rows = [*read_rows(folder.metrics.path), *read_rows(folder.results.path)]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
