"""The file of measurements: always whole JSON, rows kept only where they still hold, and where it goes."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.errors import UserError
from bench.speed import record
from bench.speed.record import Record, describe_moment, describe_setting, hash_folder, nvidia_smi, results_path
from bench.training.device import Device

CPU = Device(torch.device("cpu"), "float32", "A CPU, 2 threads", None, "auto")
GPU = Device(torch.device("cuda"), "bfloat16", "NVIDIA H100 80GB HBM3", 989.5e12, "auto")


def row(sequence: int, figure: float = 1.0) -> dict:
    return {"shape": {"sequence": sequence}, "figure": figure}


def test_the_file_is_whole_after_each_row(tmp_path) -> None:
    path = tmp_path / "somewhere" / "op.json"
    written = Record(path, "op", {"device": "x"})
    assert json.loads(path.read_text()) == {"op": "op", "setting": {"device": "x"}, "check": None, "shapes": []}
    for count in (1, 2):
        written.add(row(count))
        assert len(json.loads(path.read_text())["shapes"]) == count
    assert [entry.name for entry in path.parent.iterdir()] == ["op.json"]


def test_a_later_run_in_the_same_setting_adds_shapes_and_replaces_its_own(tmp_path) -> None:
    path = tmp_path / "op.json"
    first = Record(path, "op", {"torch": "1"})
    first.add(row(1))
    first.add(row(2))
    later = Record(path, "op", {"torch": "1"})
    later.note_check(3, [])
    later.add(row(2, figure=9.0))
    contents = json.loads(path.read_text())
    assert contents["shapes"] == [row(1), row(2, figure=9.0)]
    assert contents["check"] == {"cases": 3, "failures": []}


def test_another_setting_starts_anew(tmp_path) -> None:
    path = tmp_path / "op.json"
    Record(path, "op", {"torch": "1"}).add(row(1))
    assert Record(path, "op", {"torch": "2"}).rows == []
    assert json.loads(path.read_text())["shapes"] == []


def test_a_failed_check_drops_earlier_rows(tmp_path) -> None:
    path = tmp_path / "op.json"
    Record(path, "op", {}).add(row(1))
    Record(path, "op", {}).note_check(2, ["case: wrong"])
    assert json.loads(path.read_text())["shapes"] == []
    assert json.loads(path.read_text())["check"]["failures"] == ["case: wrong"]


@pytest.mark.parametrize("contents", ["{cut", "[]", '{"setting": {}}'])
def test_a_file_of_something_else_is_left_alone(tmp_path, contents) -> None:
    path = tmp_path / "op.json"
    path.write_text(contents)
    with pytest.raises(UserError, match=r"holds no measurements.*paths\.speed"):
        Record(path, "op", {})
    assert path.read_text() == contents


def test_a_folder_that_cannot_be_written_is_a_mistake() -> None:
    with pytest.raises(UserError, match=r"choose another paths\.speed"):
        Record(Path("/proc/nowhere/op.json"), "op", {})


def test_a_cpu_writes_only_where_told() -> None:
    assert results_path(None, CPU, "op") is None
    assert results_path("there", CPU, "op") == Path("there/a-cpu-2-threads/op.json")
    assert results_path(None, GPU, "op") == record.RESULTS / "nvidia-h100-80gb-hbm3" / "op.json"
    Record(None, "op", {}).add(row(1))


def test_the_setting_names_versions_and_code_and_is_the_same_twice() -> None:
    setting = describe_setting(CPU, "torch")
    assert setting == describe_setting(CPU, "torch")
    assert setting["torch"] == torch.__version__
    assert setting["implementation"] == "torch"
    assert len(setting["kernels"]) == 8
    assert (setting["cudnn"], setting["driver"], setting["ptxas"], setting["peak_tflops"]) == (None, None, None, None)


def test_the_moment_names_date_commit_and_command(monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "speed", "op=attention"])
    moment = describe_moment(CPU)
    assert moment["command"] == "python -m bench speed op=attention"
    assert moment["date"].endswith("+00:00")
    assert moment["gpu"] is None
    assert "git_commit" in moment


def test_the_hash_sees_contents_and_names(tmp_path) -> None:
    (tmp_path / "a.py").write_text("x = 1")
    before = hash_folder(tmp_path)
    (tmp_path / "notes.txt").write_text("not code")
    assert hash_folder(tmp_path) == before
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    renamed = hash_folder(tmp_path)
    (tmp_path / "b.py").write_text("x = 2")
    assert len({before, renamed, hash_folder(tmp_path)}) == 3


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="12-34"))


def test_nvidia_smi_is_asked_about_this_gpu(gpu, monkeypatch) -> None:
    def run(command, **options):
        assert command[0] == "nvidia-smi"
        assert command[-1] == "--id=GPU-12-34"
        return SimpleNamespace(stdout="700.00 W, 1980 MHz\n")

    monkeypatch.setattr(record.subprocess, "run", run)
    assert nvidia_smi("power.limit", "clocks.sm") == {"power.limit": "700.00 W", "clocks.sm": "1980 MHz"}


@pytest.mark.parametrize("trouble", [FileNotFoundError(), record.subprocess.TimeoutExpired("nvidia-smi", 20)])
def test_without_nvidia_smi_nothing_is_known(gpu, monkeypatch, trouble) -> None:
    def run(command, **options):
        raise trouble

    monkeypatch.setattr(record.subprocess, "run", run)
    assert nvidia_smi("clocks.sm") == {"clocks.sm": None}


def test_the_setting_of_a_gpu_names_its_driver_and_assembler(gpu, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(record.kernels.backend, "ptxas_version", lambda architecture: (13, 4, architecture))
    monkeypatch.setattr(record.subprocess, "run", lambda command, **options: SimpleNamespace(stdout="580.1\n"))
    setting = describe_setting(GPU, "triton")
    assert (setting["driver"], setting["ptxas"], setting["peak_tflops"]) == ("580.1", "13.4.90", 989.5)
