"""A JSON file of measurements: what was measured where, with what, rewritten whole after each shape."""

import hashlib
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import kernels
from bench.errors import UserError
from bench.runs.folder import write_whole
from bench.training.device import Device
from bench.training.train import git_commit

RESULTS = Path(__file__).parent / "results"
GPU_FIELDS = ("power.limit", "power.draw", "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu")


class Record:
    """The check's outcome and a row for each shape; earlier rows stay where code, device and versions are the same.

    Args:
        path: of the file, which is written at once and after each change; None writes nothing.
        setting: what all rows of a file have in common.

    Raises:
        UserError: the file cannot be written, or something else lies there.
    """

    def __init__(self, path: Path | None, op: str, setting: dict[str, Any]) -> None:
        self.path = path
        self.contents: dict[str, Any] = {"op": op, "setting": setting, "check": None, "shapes": []}
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            earlier = json.loads(path.read_text()) if path.exists() else {}
            if earlier.get("setting") == setting:
                self.contents["shapes"] = earlier["shapes"]
            self._write()
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; choose another paths.speed") from None
        except (ValueError, KeyError, AttributeError):
            raise UserError(f"{path} holds no measurements: move it away, or choose another paths.speed") from None

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.contents["shapes"]

    def note_check(self, cases: int, failures: list[str]) -> None:
        """What a kernel that failed measured before does not count."""
        self.contents["check"] = {"cases": cases, "failures": failures}
        if failures:
            self.rows.clear()
        self._write()

    def add(self, row: dict[str, Any]) -> None:
        """Takes the place of the row of the same shape, if there is one."""
        self.rows[:] = [other for other in self.rows if other["shape"] != row["shape"]] + [row]
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            write_whole(self.path, json.dumps(self.contents, indent=1, allow_nan=False) + "\n")


def results_path(folder: str | None, device: Device, op: str) -> Path | None:
    """Where an op's measurements on a device go; None for a CPU where no folder is named."""
    if folder is None and device.torch_device.type == "cpu":
        return None
    name = re.sub("[^a-z0-9]+", "-", device.description.lower()).strip("-")
    return Path(folder or RESULTS) / name / f"{op}.json"


def describe_setting(device: Device, implementation: str) -> dict[str, Any]:
    """What times depend on. `kernels` is a hash of that folder, for copies of it that have no git."""
    on_gpu = device.torch_device.type == "cuda"
    return {
        "device": device.description,
        "precision": device.precision,
        "peak_tflops": device.peak_flops and device.peak_flops / 1e12,
        "implementation": implementation,
        "kernels": hash_folder(Path(kernels.__file__).parent),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "ptxas": ptxas() if on_gpu else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "driver": nvidia_smi("driver_version")["driver_version"] if on_gpu else None,
    }


def describe_moment(device: Device) -> dict[str, Any]:
    """When and by which command a row was measured, and what the GPU's clocks and power were just then."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
        "flash-attn-4": version("flash-attn-4"),
        "liger-kernel": version("liger-kernel"),
        "gpu": nvidia_smi(*GPU_FIELDS) if device.torch_device.type == "cuda" else None,
    }


def hash_folder(folder: Path) -> str:
    """Eight hexadecimal digits of a hash of its Python and JSON files."""
    digest = hashlib.blake2b(digest_size=4)
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".py", ".json"):
            digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def ptxas() -> str | None:
    """The version that Triton calls for this GPU."""
    major, minor = torch.cuda.get_device_capability()
    try:
        return ".".join(map(str, kernels.backend.ptxas_version(10 * major + minor)))
    except Exception:  # no Triton, or one that keeps its ptxas elsewhere
        return None


def nvidia_smi(*fields: str) -> dict[str, str | None]:
    """What nvidia-smi says of this GPU, with units; None where there is none that answers."""
    try:
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid).removeprefix("GPU-")
        command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", f"--id=GPU-{uuid}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return dict(zip(fields, (value.strip() for value in done.stdout.split(",")), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError, RuntimeError):
        return dict.fromkeys(fields)
