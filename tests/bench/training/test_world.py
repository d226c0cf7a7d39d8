import os
import stat

import pytest
import torch

from bench.config import DeviceConfig
from bench.errors import UserError
from bench.training.trainer import share_of
from bench.training.workers import workers_to_start
from bench.training.world import ALONE, World, find_world, step_address

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node07"}
SRUN = {"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "4", "SLURM_LOCALID": "1"}
BATCH_SCRIPT = {"SLURM_NTASKS": "6", "SLURM_PROCID": "0", "SLURM_JOB_ID": "9"}


@pytest.mark.parametrize(
    ("environment", "world"),
    [
        ({}, ALONE),
        (TORCHRUN, World(5, 8, 1, 2)),
        (SRUN, World(4, 6, 1, 2)),
        (BATCH_SCRIPT, ALONE),  # it is one process, whatever `srun` would start
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, ALONE),
        ({"RANK": "0", "WORLD_SIZE": "1"}, ALONE),
        ({"RANK": "0", "WORLD_SIZE": "", "SLURM_STEP_NUM_TASKS": ""}, ALONE),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "9", "SLURM_STEP_NUM_NODES": "4"}, World(4, 9, 1, 4)),
        ({**SRUN, **TORCHRUN}, World(5, 8, 1, 2)),
    ],
)
def test_the_environment_says_where_a_process_is(environment, world):
    assert find_world(environment) == world


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({**TORCHRUN, "WORLD_SIZE": "abc"}, "WORLD_SIZE=abc is no number"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK=-1 is no number"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set: start it with torchrun"),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "x"}, "SLURM_STEP_NUM_TASKS=x is no number"),
    ],
)
def test_what_nobody_can_mean_is_named(environment, sentence):
    with pytest.raises(UserError, match=sentence):
        find_world(environment)


@pytest.mark.parametrize(
    ("processes", "environment", "starts"),
    [
        (1, {}, 0),
        (0, {}, 0),  # no GPU here: alone
        (3, {}, 3),
        (3, TORCHRUN, 0),  # it is a worker
        (3, {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "1"}, 0),
        (3, {"RANK": "0", "WORLD_SIZE": "1"}, 3),  # left over from something else
        (1, SRUN, 0),  # so is every task
        (3, SRUN, 3),  # each task stands for a machine
        (0, SRUN, 1),
    ],
)
def test_who_starts_workers(monkeypatch, processes, environment, starts):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert workers_to_start(DeviceConfig(processes=processes), environment) == starts


def test_a_worker_for_every_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert workers_to_start(DeviceConfig(processes=0), {}) == 4
    assert workers_to_start(DeviceConfig(processes=0, name="cpu"), {}) == 0
    assert workers_to_start(DeviceConfig(processes=8, name="cpu"), {}) == 8
    with pytest.raises(UserError, match="only 4 GPUs are visible here"):
        workers_to_start(DeviceConfig(processes=8), {})


def test_the_tasks_of_a_step_meet_at_one_place(tmp_path, monkeypatch):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$3" = "node[07-08]" ] && printf "node07\\nnode08\\n"\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    step = {"SLURM_STEP_NODELIST": "node[07-08]", "SLURM_JOB_ID": "123", "SLURM_STEP_ID": "0"}
    host, port = step_address(step)
    assert host == "node07"
    assert 1024 < port < 65536
    assert step_address({**step, "SLURM_STEP_ID": "1"})[1] != port
    with pytest.raises(UserError, match="use torchrun"):
        step_address({**step, "SLURM_STEP_NODELIST": ""})


def test_alone_everything_is_free_and_as_it_is():
    value = torch.tensor([1.0, 2.0])
    assert ALONE.leads
    assert ALONE.first(lambda: value) is value
    assert ALONE.total(value) is value
    assert ALONE.any(True, False) == (True, False)
    assert ALONE.concatenate(value) is value
    assert ALONE.merge({"0": 1}) == {"0": 1}
    with pytest.raises(KeyError):
        ALONE.first(lambda: {}["absent"])


def test_every_process_has_an_equal_share():
    assert share_of(12, World(0, 4)) == 3
    with pytest.raises(UserError, match="12 cannot be shared equally by 5 processes"):
        share_of(12, World(0, 5))
