"""The device a trajectory runs on: which one, in which precision, and how fast it could be."""

import platform
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from bench.config import DeviceConfig
from bench.errors import UserError
from kernels import backend

# Dense bfloat16 FLOP/s from NVIDIA's data sheets; the first name that the device's name contains counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989.5e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.5e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165.2e12,
}


@dataclass(frozen=True)
class Device:
    torch_device: torch.device
    precision: str  # float32 | bfloat16
    description: str
    peak_flops: float | None  # None where not known
    kernels: str  # what to ask `kernels.backend` for: auto | triton | torch

    def autocast(self) -> AbstractContextManager:
        """Mixed precision for the forward pass, where the precision asks for it."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.torch_device.type, torch.bfloat16)

    @property
    def implementation(self) -> str:
        """What the kernels run on where they can: triton or torch."""
        if self.kernels != "auto":
            return self.kernels
        return "torch" if backend.why_not_triton(self.torch_device.type) else "triton"

    def synchronize(self) -> None:
        """Waits until everything queued is done, so that a clock read next is true."""
        if self.torch_device.type == "cuda":
            torch.cuda.synchronize(self.torch_device)


def open_device(config: DeviceConfig, local_rank: int = 0) -> Device:
    """The device the configuration asks for, and of several GPUs the one for this process.

    Raises:
        UserError: there is no such device here, or a setting is unknown.
    """
    kind = config.name
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind not in ("cpu", "cuda"):
        raise UserError(f"device.name={config.name} is unknown: choose auto, cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("device.name=cuda, but PyTorch finds no NVIDIA GPU here: use device=cpu")
    precision = config.precision
    if precision == "auto":
        precision = "bfloat16" if kind == "cuda" else "float32"
    if precision not in ("float32", "bfloat16"):
        raise UserError(f"device.precision={config.precision} is unknown: choose auto, float32 or bfloat16")
    if config.threads:
        torch.set_num_threads(config.threads)
    torch_device = torch.device(kind)
    if kind == "cuda":  # under srun each task may see its own GPU alone
        torch_device = torch.device(kind, local_rank % torch.cuda.device_count())
        torch.cuda.set_device(torch_device)
    description = torch.cuda.get_device_name() if kind == "cuda" else _cpu_name()
    peak = config.peak_flops
    if peak is None and precision == "bfloat16":
        peak = next((value for name, value in PEAK_FLOPS.items() if name in description), None)
    return Device(torch_device, precision, description, peak, _choose_kernels(config, kind))


def _choose_kernels(config: DeviceConfig, kind: str) -> str:
    try:
        kernels = config.kernels or backend.name()
    except ValueError as error:
        raise UserError(str(error)) from None
    if kernels not in backend.NAMES:
        raise UserError(f"device.kernels={kernels} is unknown: choose {', '.join(backend.NAMES)}")
    if kernels == "triton" and (problem := backend.why_not_triton(kind, interpreter=True)):
        raise UserError(f"device.kernels=triton is impossible here: {problem}")
    return kernels


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            model = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads"
