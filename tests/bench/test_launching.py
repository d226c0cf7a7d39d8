"""A sweep through every launcher: what is killed is listed, the others go on, and the same command finishes it."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.compose import compose_config
from bench.errors import Stopped, UserError
from bench.launching import PoolBroken, at_a_time, launch, told
from bench.runs.folder import read_rows
from tests.bench.trajectories import counted, descendants

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "joblib": "hydra_plugins.hydra_joblib_launcher",
    "submitit_local": "hydra_plugins.hydra_submitit_launcher",
    "submitit_slurm": "hydra_plugins.hydra_submitit_launcher",
    "ray": "hydra_plugins.hydra_ray_launcher",
}


def needs(launcher: str):
    """Marks what is skipped where the launcher's package is not installed."""
    package = PACKAGES.get(launcher)
    try:
        missing = package is not None and importlib.util.find_spec(package) is None
    except ModuleNotFoundError:
        missing = True
    return pytest.mark.skipif(missing, reason=f"needs hydra/launcher={launcher}: pip install -e .[cluster]")


def slurm_answers() -> bool:
    if shutil.which("sinfo") is None:
        return False
    try:
        return subprocess.run(["sinfo"], capture_output=True, timeout=20).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def of(launcher: str, *more: str) -> list[str]:
    options = ["+hydra.launcher.ray.init.num_cpus=2"] if launcher == "ray" else []
    return [f"hydra/launcher={launcher}", *options, *more]


def record(config) -> None:
    folder = Path(config.paths.runs)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{'+'.join(config.innovation)}-{config.seed}-{config.lr}").touch()
    if config.seed == 1:
        raise RuntimeError("a job that fails\nwith more to say")


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(name, marks=[needs(name), *([pytest.mark.slow] if name == "ray" else [])])
        for name in ("basic", "joblib", "submitit_local", "ray")
    ],
)
def test_jobs_of_any_shape_go_through_the_launcher_and_a_failure_stops_no_other(tmp_path, launcher):
    jobs = [["innovation=[rope]", "seed=1"], ["innovation=[]", "seed=0", "lr=0.1"], ["seed=2"]]
    errors = launch([f"paths.runs={tmp_path}", *of(launcher)], jobs, record)
    found = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert found >= {"rope-1-None", "-0-0.1", "-2-None"}
    assert errors == ["RuntimeError: a job that fails with more to say", None, None]


def stop(config) -> None:
    record(config)
    raise Stopped


def test_a_trajectory_that_was_told_to_stop_ends_the_sweep(tmp_path):
    with pytest.raises(SystemExit) as caught:
        launch([f"paths.runs={tmp_path}"], [["seed=2"], ["seed=3"]], stop)
    assert caught.value.code == 75
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["-2-None"]


def end(config) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_pool_that_lost_a_worker_is_told_from_a_mistake(tmp_path):
    with pytest.raises(PoolBroken):
        launch([f"paths.runs={tmp_path}", "hydra/launcher=joblib"], [["seed=0"], ["seed=2"]], end)


@pytest.mark.slow  # submitit waits a quarter of a minute for the result of a process that is gone
@needs("submitit_local")
def test_jobs_go_in_batches_and_one_that_is_lost_is_named(tmp_path):
    batches = ["hydra/launcher=submitit_local", "hydra.sweeper.max_batch_size=1"]
    lost, none = launch([f"paths.runs={tmp_path}", *batches], [["seed=1"], ["seed=0"]], end_or_record)
    assert none is None
    assert lost is not None
    assert lost.startswith("the job was lost")
    assert Path(lost.split()[-1]).is_file()


def end_or_record(config) -> None:
    end(config) if config.seed == 1 else record(config)


@pytest.mark.parametrize(
    ("mistake", "sentence"),
    [
        pytest.param(["hydra/launcher=joblib", "hydra.launcher.n_jobs=0"], "cannot run the jobs: n_jobs"),
        pytest.param(of("submitit_slurm", "hydra.launcher.partitoin=x"), "partitoin", marks=needs("submitit_slurm")),
        pytest.param(of("submitit_slurm", "hydra.launcher.nodes=x"), "Integer", marks=needs("submitit_slurm")),
        pytest.param(
            of("submitit_slurm", "hydra.launcher.partition=nope", "hydra.launcher.gpus_per_node=4"),
            "device.processes=0",
            marks=needs("submitit_slurm"),
        ),
        pytest.param(of("ray", "+hydra.launcher.ray.init.nope=1"), "nope", marks=needs("ray")),
    ],
)
def test_a_mistake_in_a_launchers_options_is_one_line(tmp_path, mistake, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        launch([f"paths.runs={tmp_path}", *mistake], [["seed=0"]], record)
    assert "\n" not in str(caught.value)


@needs("submitit_local")
def test_a_launcher_that_would_hide_the_gpu_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"say hydra\.launcher\.gpus_per_node=1, or device=cpu"):
        launch([f"paths.runs={tmp_path}", "hydra/launcher=submitit_local"], [["seed=0"]], record)


def test_how_many_jobs_go_at_once(monkeypatch):
    """submitit would start all on this machine, and give each the same GPUs."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6))
    assert [at_a_time(name, 40, 0) for name in ("submitit_local", "submitit_slurm", "ray")] == [6, 40, 40]
    assert [at_a_time(name, 40, 2) for name in ("submitit_local", "submitit_slurm", "ray")] == [1, 40, 40]


def test_a_launcher_without_its_package_says_what_to_install(monkeypatch):
    from hydra.core.config_store import ConfigStore

    compose_config([])  # Hydra looks for plugins once
    launchers = ConfigStore.instance().repo["hydra"]["launcher"]
    for name in ("ray.yaml", "ray_plugin.yaml"):
        monkeypatch.delitem(launchers, name, raising=False)
    with pytest.raises(UserError, match=r"^hydra/launcher=ray needs packages .* pip install -e \.\[cluster\]$"):
        compose_config(["hydra/launcher=ray"])


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
@pytest.mark.parametrize(("value", "sentence"), [("2", "device.processes"), ("two", "unset it")])
def test_a_sweep_is_started_once(monkeypatch, capsys, overrides, variable, value, sentence):
    monkeypatch.setenv(variable, value)
    assert main(["train", "-m", *overrides, "seed=0,1"]) == 2
    assert sentence in capsys.readouterr().err


def test_a_batch_of_less_than_one_job_is_refused(overrides, capsys):
    assert main(["train", "-m", *overrides, "seed=0,1", "hydra.sweeper.max_batch_size=-1"]) == 2
    assert "hydra.sweeper.max_batch_size" in capsys.readouterr().err


def test_how_far_a_sweep_is_is_told_when_it_changed(monkeypatch, capsys):
    monkeypatch.setattr("bench.launching.TELL_SECONDS", 0.001)
    sayings = iter(["none", "none", "one"])
    said = []

    def standing() -> str:
        said.append(next(sayings, "one"))
        return said[-1]

    with told(standing):
        while len(said) < 5:
            time.sleep(0.001)
    assert capsys.readouterr().out == "none\none\n"


@pytest.fixture
def study(overrides) -> list[str]:
    """Four trajectories of some seconds each."""
    changed = ("study.name", "budgets", "logging.every")
    return [
        "study=default",
        *[override for override in overrides if not override.startswith(changed)],
        "study.name=small",
        "study.scales=[tiny]",
        "study.variants=[[],[layer_norm]]",
        "study.seeds=[0,1]",
        "device.threads=1",
        "budgets=[4e9,8e9]",
        "logging.every=10",
        "logging.checkpoint_seconds=1",
    ]


def start(arguments: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "bench", "train", "-m", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen, look):
    while process.poll() is None:
        if found := look():
            return found
        time.sleep(0.05)
    raise AssertionError(f"the sweep ended too early: {process.communicate()}")


def failures(error: str) -> list[str]:
    return [line for line in error.splitlines() if line.startswith("failed: ")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "worker", "listed"),
    [
        # A killed worker ends joblib's others too: two were at work. The two that had not begun go on.
        pytest.param(of("joblib", "hydra.launcher.n_jobs=2"), "popen_loky", 2, id="joblib"),
        pytest.param(of("submitit_local"), "submitit.core._submit", 1, id="submitit", marks=needs("submitit_local")),
        pytest.param(
            of("ray", "+hydra.launcher.ray.remote.max_retries=0"), "ray::_run", 1, id="ray", marks=needs("ray")
        ),
    ],
)
def test_a_killed_worker_is_listed_and_the_others_go_on(study, tmp_path, launcher, worker, listed):
    study = [*study, "budgets=[2e9,4e9]"]
    process = start([*study, *launcher, "hydra.sweeper.max_batch_size=4"])
    wait_for(process, lambda: len(list(tmp_path.glob("runs/small/*/*/*/metrics.jsonl"))) >= 2)
    workers = [pid for pid, command in descendants(process.pid).items() if worker in command]
    os.kill(workers[-1], signal.SIGKILL)
    _, error = process.communicate()
    assert process.returncode == 1
    assert len(failures(error)) == listed
    assert "Traceback" not in error
    assert len(list(tmp_path.glob("runs/small/*/*/*/DONE"))) == 4 - listed
    assert main(["train", "-m", *study]) == 0


@pytest.mark.slow
@needs("submitit_slurm")
@pytest.mark.skipif(not slurm_answers(), reason="no SLURM here: scripts/slurm_local.sh starts one")
def test_slurm_requeues_what_runs_out_of_time_and_a_job_that_crashed_is_listed(study, tmp_path, capsys):
    process = start([*study, "hydra/launcher=submitit_slurm"])
    runs, jobs = tmp_path / "runs" / "small", tmp_path / "runs" / "small" / ".submitit"
    # SLURM sends KILL only after TERM and some seconds, in which a short trajectory comes to its end.
    to_signal = {"USR2": ("baseline/seed=1", "*_1"), "ABRT": ("layer_norm/seed=0", "*_2")}

    def signal_those_that_train() -> bool:
        for name, (trajectory, job) in list(to_signal.items()):
            if list(runs.glob(f"*/{trajectory},*/metrics.jsonl")):
                subprocess.run(["scancel", f"--signal={name}", next(jobs.glob(job)).name], check=True)
                del to_signal[name]
        return not to_signal

    try:
        wait_for(process, signal_those_that_train)
        _, error = process.communicate(timeout=500)
    finally:
        process.kill()
        for first in jobs.glob("*_0"):
            subprocess.run(["scancel", first.name.removesuffix("_0")])
    assert process.returncode == 1, error
    (failure,) = failures(error)
    assert "layer_norm/seed=0" in failure
    assert "the job was lost" in failure
    assert "Traceback" not in error
    assert len(list(runs.glob("*/*/*/DONE"))) == 3
    log = next(jobs.glob("*_1/*_log.err")).read_text()
    assert "SIGUSR2" in log
    assert main(["train", "-m", *study, "hydra/launcher=submitit_slurm"]) == 0
    assert "4 trajectories, 3 of them done" in capsys.readouterr().out

    assert main(["train", "-m", *study, f"paths.runs={tmp_path}/undisturbed"]) == 0
    for results in runs.glob("*/*/*/results.jsonl"):
        undisturbed = tmp_path / "undisturbed" / results.relative_to(tmp_path / "runs")
        rows, expected = (list(map(counted, read_rows(path))) for path in (results, undisturbed))
        assert len(rows) == 2
        assert rows == expected
