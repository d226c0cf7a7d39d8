"""`status` as a person meets it: once, and live beside what trains."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.runs.folder import RunFolder
from bench.runs.study import study_experiments

ROOT = Path(__file__).parents[2]


@pytest.fixture
def study(overrides) -> list[str]:
    return [*overrides, "study.scales=[tiny]", "study.variants=[[],[rope]]"]


def test_status_names_the_machine_that_trains(study, capsys):
    folder = RunFolder(study_experiments(study)[0].folder)
    with folder.claimed():
        assert main(["status", *study]) == 0
    printed = capsys.readouterr().out
    assert f"running  {os.uname().nodename}" in printed
    assert "1 running, 1 absent of 2" in printed


@pytest.mark.parametrize("seconds", ["-1", "nan", "inf", "1e300"])
def test_a_time_that_nobody_can_wait_is_refused(study, capsys, seconds):
    assert main(["status", *study, f"watch={seconds}"]) == 2
    assert "watch must be" in capsys.readouterr().err


def test_watching_ends_by_itself_when_nothing_is_left(study, capsys):
    for experiment in study_experiments(study):
        experiment.folder.mkdir(parents=True)
        RunFolder(experiment.folder).finish()
    assert main(["status", *study, "watch=0.01"]) == 0
    assert "2 done of 2" in capsys.readouterr().out


def test_watching_follows_a_trajectory_until_it_is_interrupted(study):
    first, second = (RunFolder(experiment.folder) for experiment in study_experiments(study))
    command = [sys.executable, "-u", "-m", "bench", "status", *study, "watch=0.01"]
    watch = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert watch.stdout.readline().startswith("2 absent of 2")
        with first.claimed():
            assert watch.stdout.readline().startswith("1 running, 1 absent of 2")
            first.finish()
            assert watch.stdout.readline().startswith("1 done, 1 absent of 2")
        with second.claimed():
            assert watch.stdout.readline().startswith("1 done, 1 running of 2")
            watch.send_signal(signal.SIGINT)
            printed, errors = watch.communicate(timeout=60)
    finally:
        watch.kill()
        watch.communicate()
    assert (watch.returncode, errors) == (0, "")
    assert printed.splitlines()[-1].startswith("1 done, 1 running of 2")


@pytest.mark.parametrize(("setting", "sentence"), [("watch=-1", "watch must be 0"), ("watch=often", "watch")])
def test_a_slip_is_a_users_mistake(study, capsys, setting, sentence):
    assert main(["status", *study, setting]) == 2
    assert sentence in capsys.readouterr().err
