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
from bench.runs.claim import take_claim
from bench.runs.folder import RunFolder
from tests.bench.trajectories import counted_rows, folder_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def first_folder(overrides) -> RunFolder:
    folder = folder_of(overrides)
    folder.path.mkdir(parents=True)
    return folder


@pytest.fixture
def quick_looks(monkeypatch):
    monkeypatch.setattr(sweep, "LOOK_SECONDS", 0.01)


@pytest.mark.parametrize("left", ["done", "unfinished", "failed"])
def test_what_another_process_trains_is_left_to_it(overrides, first_folder, quick_looks, capsys, left):
    """Another one ends it, leaves it to this sweep, or fails in it, while this sweep has trained the rest."""
    claim = take_claim(first_folder.path)
    second = folder_of([*overrides, "seed=1"])

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


def test_what_is_one_trajectory_is_trained_and_counted_once(overrides, capsys):
    assert main(["train", "-m", *overrides, "seed=0,0", "logging.every=1,2"]) == 0
    assert "1 trajectories, 0 of them done" in capsys.readouterr().out


def test_what_a_broken_pool_had_not_begun_is_sent_again(overrides, first_folder, monkeypatch, capsys):
    """Also what an earlier sweep had begun; the folder shows who has been there since."""
    folders = [folder_of([*overrides, f"seed={n}"]) for n in range(3)]
    folders[2].path.mkdir()
    for folder in (folders[0], folders[2]):
        take_claim(folder.path).release()
    sent = []

    def launch(shared, jobs, *_):
        sent.append([own[0] for own in jobs])
        if len(sent) == 1:
            take_claim(first_folder.path).release()
            raise sweep.PoolBroken
        return [None] * len(jobs)

    monkeypatch.setattr(sweep, "launch", launch)
    assert main(["train", "-m", *overrides, "seed=0,1,2"]) == 1
    assert sent == [["seed=0", "seed=1", "seed=2"], ["seed=1", "seed=2"]]
    assert "a worker process was killed" in capsys.readouterr().err.splitlines()[0]


@pytest.mark.slow
def test_two_sweeps_share_a_study_and_one_that_is_stopped_goes_on(overrides, tmp_path):
    common = [*overrides, "device.threads=1", "budgets=[1e8,10e8]"]
    jobs = "seed=0,1,2,3"
    whole = [*common, f"paths.runs={tmp_path}/whole"]
    assert main(["train", "-m", *whole, jobs]) == 0
    command = [sys.executable, "-m", "bench", "train", "-m", *common, jobs]
    sweeps = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(2)]
    folders = [[folder_of([*c, f"seed={n}"]) for n in range(4)] for c in (whole, common)]
    while sum(folder.metrics.size > 0 for folder in folders[1]) < 2:
        assert all(process.poll() is None for process in sweeps), "a sweep ended before both had begun"
        time.sleep(0.01)
    os.kill(sweeps[0].pid, signal.SIGTERM)
    assert sweeps[0].wait() == 75
    assert sweeps[1].wait() == 0, sweeps[1].stderr.read()
    for one, other in zip(*folders, strict=True):
        assert other.state == "done"
        assert counted_rows(one) == counted_rows(other)
