"""Which implementation of an op runs: the Triton kernel or plain PyTorch.

    auto     Triton on an NVIDIA GPU that it is right and fast on (sm_80 or newer, a safe ptxas), PyTorch elsewhere
    triton   Triton or an error; with TRITON_INTERPRET=1 in the environment on a CPU too, slowly
    torch    PyTorch

The environment variable CEGBENCH_KERNELS says which to start with, `use` which for a while.
"""

import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

NAMES = ("auto", "triton", "torch")
SAFE_HOPPER_PTXAS = (13, 3)

_name = os.environ.get("CEGBENCH_KERNELS", "auto")
_deterministic = True


@contextmanager
def use(choice: str, *, deterministic: bool = True) -> Iterator[None]:
    """Chooses the implementation for the ops called inside; their backward passes take the same one.

    Args:
        choice: auto, triton or torch.
        deterministic: False lets kernels sum in an order that changes from run to run, where that may be faster.

    Raises:
        ValueError: `choice` is none of the three.
    """
    global _name, _deterministic
    before = _name, _deterministic
    _name, _deterministic = _checked(choice, "backend"), deterministic
    try:
        yield
    finally:
        _name, _deterministic = before


def name() -> str:
    """The choice in force: auto, triton or torch.

    Raises:
        ValueError: CEGBENCH_KERNELS is none of the three.
    """
    return _checked(_name, "CEGBENCH_KERNELS")


def deterministic() -> bool:
    """Whether results must be the same bits every time."""
    return _deterministic


def choose(op: str, device: torch.device, unsupported: str = "") -> str:
    """ "triton" or "torch", for a call of `op` with tensors on `device`.

    Args:
        op: its name, for what is said to the user.
        unsupported: why the op's Triton kernel cannot take these arguments; empty where it can.

    Raises:
        ValueError: Triton was demanded and cannot run here, or CEGBENCH_KERNELS is none of the names.
    """
    if _name == "torch":
        return "torch"
    return _settle_outside_graphs(_name, op, device.type, device.index, unsupported)


@torch.compiler.assume_constant_result
def _settle_outside_graphs(*call: str | int | None) -> str:
    return _settle(*call)


@functools.cache
def _settle(name: str, op: str, device_type: str, device_index: int | None, unsupported: str) -> str:
    """`choose` where the answer does not change while the process lives, which also makes its warning come once."""
    _checked(name, "CEGBENCH_KERNELS")
    problem = unsupported or why_not_triton(device_type, device_index, interpreter=name == "triton")
    if not problem:
        return "triton"
    if name == "triton":
        raise ValueError(f"{op} cannot run its Triton kernel: {problem}")
    if device_type == "cuda":
        warnings.warn(f"{op} runs on PyTorch instead of its Triton kernel: {problem}", stacklevel=2)
    return "torch"


def why_not_triton(device_type: str, device_index: int | None = None, *, interpreter: bool = False) -> str:
    """Why Triton kernels cannot be trusted on this device; empty where they can.

    Args:
        interpreter: whether Triton's interpreter will do on a CPU.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device_type != "cuda":
        if device_type == "cpu" and interpreter and interpreting():
            return ""
        return (
            f"it needs an NVIDIA GPU, or on a CPU TRITON_INTERPRET=1 in the environment; this is a {device_type} tensor"
        )
    if torch.version.hip is not None:
        return "it needs an NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability(device_index)
    if major < 8:
        return f"it needs compute capability 8.0 or newer, this GPU has {major}.{minor}"
    return why_ptxas_is_unsafe(major)


def interpreting() -> bool:
    """Whether Triton's kernels are interpreted (TRITON_INTERPRET=1 since before they were imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


def why_ptxas_is_unsafe(major: int) -> str:
    """Before 13.3, ptxas may reuse the registers of a WGMMA in flight on Hopper (compute capability 9), so that a
    product whose left factor is in registers, as attention's P V, is silently wrong (triton-lang/triton#11781).
    """
    if major != 9:
        return ""
    version = ptxas_version(90)
    if version >= SAFE_HOPPER_PTXAS:
        return ""
    return (
        f"ptxas {'.'.join(map(str, version))} can give wrong numbers on Hopper: install triton >= 3.9, or set"
        " TRITON_PTXAS_PATH to the ptxas of CUDA 13.3 or newer (package nvidia-cuda-nvcc)"
    )


def ptxas_version(architecture: int) -> tuple[int, ...]:
    """The version of the assembler that Triton calls for an architecture such as 90."""
    from triton.backends.nvidia.compiler import get_ptxas

    return tuple(int(part) for part in get_ptxas(architecture).version.split("."))


def _checked(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(NAMES)}, got {name!r}")
    return name
