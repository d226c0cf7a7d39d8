import pytest
import torch

from bench.config import DeviceConfig
from bench.errors import UserError
from bench.training import device as device_module
from bench.training.device import open_device


def test_a_cpu_computes_in_float32_and_has_no_known_peak():
    device = open_device(DeviceConfig(name="cpu"))
    assert (device.torch_device.type, device.precision, device.peak_flops) == ("cpu", "float32", None)
    assert "threads" in device.description
    with device.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_bfloat16_when_asked_for():
    device = open_device(DeviceConfig(name="cpu", precision="bfloat16"))
    with device.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_a_peak_can_be_given():
    assert open_device(DeviceConfig(name="cpu", peak_flops=1e12)).peak_flops == 1e12


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA Unheard-of", None),
    ],
)
def test_peaks_by_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    device = open_device(DeviceConfig(name="auto"))
    assert (device.torch_device.type, device.precision, device.peak_flops) == ("cuda", "bfloat16", peak)
    assert [open_device(DeviceConfig(), local_rank=rank).torch_device.index for rank in range(4)] == [0, 1, 0, 1]
    assert open_device(DeviceConfig(name="cuda", precision="float32")).peak_flops is None


def test_threads_are_set(monkeypatch):
    asked = []
    monkeypatch.setattr(device_module.torch, "set_num_threads", asked.append)
    open_device(DeviceConfig(name="cpu", threads=3))
    open_device(DeviceConfig(name="cpu"))
    assert asked == [3]


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (DeviceConfig(name="tpu"), "choose auto, cpu or cuda"),
        (DeviceConfig(name="cpu", precision="fp8"), "choose auto, float32 or bfloat16"),
    ],
)
def test_unknown_settings(config, sentence):
    with pytest.raises(UserError, match=sentence):
        open_device(config)


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="use device=cpu"):
        open_device(DeviceConfig(name="cuda"))
    assert open_device(DeviceConfig(name="auto")).torch_device.type == "cpu"


@pytest.mark.parametrize(
    ("environment", "setting", "expected"),
    [("auto", None, ("auto", "torch")), ("auto", "torch", ("torch", "torch")), ("torch", None, ("torch", "torch"))],
)
def test_kernels_are_chosen_by_the_setting_or_else_the_environment(monkeypatch, environment, setting, expected):
    monkeypatch.setattr(device_module.backend, "_name", environment)
    device = open_device(DeviceConfig(name="cpu", kernels=setting))
    assert (device.kernels, device.implementation) == expected


def test_triton_runs_where_it_is_interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert open_device(DeviceConfig(name="cpu", kernels="triton")).implementation == "triton"


@pytest.mark.parametrize(
    ("setting", "environment", "sentence"),
    [
        ("cuda", "auto", "device.kernels=cuda is unknown: choose auto, triton, torch"),
        (None, "cuda", "CEGBENCH_KERNELS must be one of auto, triton, torch"),
        ("triton", "auto", "device.kernels=triton is impossible here: it needs an NVIDIA GPU"),
    ],
)
def test_kernels_that_cannot_run_are_refused(monkeypatch, setting, environment, sentence):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(device_module.backend, "_name", environment)
    with pytest.raises(UserError, match=sentence):
        open_device(DeviceConfig(name="cpu", kernels=setting))
