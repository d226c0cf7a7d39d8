"""Which implementation runs: names, the switch, and what each device and assembler is trusted with."""

import contextlib
import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from kernels import backend, flash_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _forgetful(monkeypatch):
    """No answer of an earlier test is remembered, nor one of these by a later test."""
    monkeypatch.setattr(backend, "_name", "auto")
    backend._settle.cache_clear()
    yield
    backend._settle.cache_clear()


@pytest.fixture
def pretend(monkeypatch):
    """A call that pretends to a compute capability and a version of ptxas."""

    def set_device(capability: tuple[int, int], ptxas: tuple[int, ...] = (12, 8)) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(backend, "ptxas_version", lambda architecture: ptxas)

    return set_device


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    """`code` in a Python of its own, without this one's switches."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("CEGBENCH_KERNELS", "TRITON_INTERPRET")}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=inherited | environment, capture_output=True, text=True, check=False
    )


def test_unknown_name() -> None:
    with (
        pytest.raises(ValueError, match=r"^backend must be one of auto, triton, torch, got 'cuda'"),
        backend.use("cuda"),
    ):
        pass
    assert backend.name() == "auto"


def test_switch_nests_and_restores() -> None:
    assert backend.deterministic()
    with backend.use("torch", deterministic=False):
        assert not backend.deterministic()
        with contextlib.suppress(KeyError), backend.use("triton"):
            assert (backend.name(), backend.deterministic()) == ("triton", True)
            raise KeyError
        assert (backend.name(), backend.deterministic()) == ("torch", False)
        with pytest.raises(ValueError, match="backend must be"), backend.use("none"):
            pass
        assert (backend.name(), backend.deterministic()) == ("torch", False)
    assert (backend.name(), backend.deterministic()) == ("auto", True)


def test_unknown_name_in_the_environment(monkeypatch) -> None:
    monkeypatch.setattr(backend, "_name", "tritn")
    with pytest.raises(ValueError, match=r"^CEGBENCH_KERNELS must be one of auto, triton, torch, got 'tritn'"):
        backend.name()


def test_auto_on_a_cpu_is_torch_and_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.choose("flash_attention", CPU) == "torch"
        assert backend.choose("flash_attention", CPU, "it has no kernel for torch.float64") == "torch"


@pytest.mark.skipif(not backend.interpreting(), reason="kernels are compiled here")
def test_triton_on_a_cpu_is_interpreted() -> None:
    with backend.use("triton"):
        assert backend.choose("flash_attention", CPU) == "triton"


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"CEGBENCH_KERNELS": "triton", "TRITON_INTERPRET": "1"}, "triton"),
        ({"CEGBENCH_KERNELS": "tritn"}, "CEGBENCH_KERNELS must be one of auto, triton, torch, got 'tritn'"),
        (
            {"CEGBENCH_KERNELS": "triton"},
            "attention cannot run its Triton kernel: it needs an NVIDIA GPU, or on a CPU TRITON_INTERPRET=1 in the"
            " environment; this is a cpu tensor",
        ),
    ],
)
def test_environment_variable(environment, said) -> None:
    result = run(
        "import torch\n"
        "from kernels import backend\n"
        "try:\n"
        "    print(backend.choose('attention', torch.device('cpu')))\n"
        "except ValueError as error:\n"
        "    print(error)",
        **environment,
    )
    assert (result.stdout.strip(), result.returncode) == (said, 0), result.stderr


def test_arguments_without_a_kernel_under_triton() -> None:
    wide = torch.zeros(1, 1, 4, 300)
    double = torch.zeros(1, 1, 4, 16, dtype=torch.float64)
    small = torch.zeros(1, 1, 4, 16)
    with backend.use("triton"):
        with pytest.raises(ValueError, match=r"^flash_attention cannot run .* head sizes end at 256, got 300"):
            flash_attention(wide, wide, wide)
        with pytest.raises(ValueError, match=r"^flash_attention cannot run .* head sizes end at 256, got 300"):
            flash_attention(small, small, wide)
        with pytest.raises(ValueError, match=r"^flash_attention cannot run .* no kernel for torch.float64"):
            flash_attention(double, double, double)
        with pytest.raises(
            ValueError, match=r"^flash_attention cannot run .* interpreter's bfloat16 products are wrong"
        ):
            flash_attention(*[small.bfloat16()] * 3)
    with backend.use("auto"):
        assert flash_attention(wide, wide, wide, window=2).shape == wide.shape
        assert flash_attention(double, double, double, window=2).dtype == torch.float64
        assert flash_attention(*[small.bfloat16()] * 3, window=2).dtype == torch.bfloat16


def test_arguments_without_a_kernel_on_a_gpu_are_warned_of_once(pretend) -> None:
    pretend((8, 0))
    problem = "its head sizes end at 256, got 300"
    with pytest.warns(
        UserWarning, match="flash_attention runs on PyTorch instead of its Triton kernel: its head sizes"
    ):
        assert backend.choose("flash_attention", CUDA, problem) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.choose("flash_attention", CUDA, problem) == "torch"
        assert backend.choose("flash_attention", CUDA) == "triton"


@pytest.mark.parametrize(
    ("capability", "ptxas"),
    [
        ((8, 0), (12, 0)),
        ((8, 9), (12, 8)),
        ((9, 0), (13, 3)),
        ((9, 0), (13, 3, 1)),
        ((9, 0), (13, 10)),
        ((9, 0), (14, 0)),
        ((10, 0), (12, 8)),
        ((12, 0), (12, 8)),
    ],
)
def test_trusted_devices(pretend, capability, ptxas) -> None:
    pretend(capability, ptxas)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("auto", "triton"):
            with backend.use(name):
                assert backend.choose("flash_attention", CUDA) == "triton"


@pytest.mark.parametrize(
    ("capability", "ptxas", "problem"),
    [
        ((7, 5), (13, 3), r"it needs compute capability 8.0 or newer, this GPU has 7.5"),
        (
            (9, 0),
            (12, 8),
            r"ptxas 12.8 can give wrong .* triton >= 3.9, or set TRITON_PTXAS_PATH .* CUDA 13.3 or newer",
        ),
        ((9, 0), (13, 2), r"ptxas 13.2 can give wrong numbers on Hopper"),
    ],
)
def test_devices_that_are_not_trusted(pretend, capability, ptxas, problem) -> None:
    pretend(capability, ptxas)
    with pytest.warns(UserWarning, match=f"flash_attention runs on PyTorch .*: {problem}"):
        assert backend.choose("flash_attention", CUDA) == "torch"
    with backend.use("triton"), pytest.raises(ValueError, match=f"^flash_attention cannot run .*: {problem}"):
        backend.choose("flash_attention", CUDA)
    with backend.use("torch"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.choose("flash_attention", CUDA) == "torch"


def test_amd_gpus_run_pytorch(pretend, monkeypatch) -> None:
    pretend((9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert backend.why_not_triton("cuda", 0) == "it needs an NVIDIA GPU"


@pytest.mark.parametrize("device", ["mps", "xpu", "meta"])
def test_other_devices_run_pytorch(device) -> None:
    assert device in backend.why_not_triton(device, interpreter=True)


def test_without_triton(monkeypatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
    )
    assert backend.choose("flash_attention", CPU) == "torch"
    with backend.use("triton"), pytest.raises(ValueError, match="triton is not installed"):
        backend.choose("flash_attention", CPU)


def test_pytorch_needs_no_triton() -> None:
    """The package, its PyTorch path and gradients work where Triton cannot be imported."""
    result = run(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, kernels\n"
        "q = torch.ones(1, 2, 8, 16, requires_grad=True)\n"
        "kernels.flash_attention(q, q, q, window=3).sum().backward()\n"
        "assert 'kernels.attention.fused.launch' not in sys.modules and q.grad is not None",
        CEGBENCH_KERNELS="torch",
    )
    assert result.returncode == 0, result.stderr


def test_version_of_the_assembler_that_triton_calls() -> None:
    pytest.importorskip("triton")
    version = backend.ptxas_version(90)
    assert len(version) >= 2
    assert all(isinstance(part, int) for part in version)
    assert version >= (12, 0)
