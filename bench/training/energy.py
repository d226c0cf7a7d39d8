"""Joules: what the hardware says it drew while a trajectory was trained, or None where it does not say.

On a GPU, NVML's energy counter of the very GPU that this process trains on, or its power integrated over time where
there is no counter. On a CPU, RAPL's counters of all packages. Both count whatever else runs on the device, and nothing
beside it: no host of a GPU, no memory, no power supply.

`python -m bench.training.energy` loads a GPU for a minute and prints its counter beside its integrated power.
"""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")
MOST_WATTS = 5000.0  # of one GPU or CPU package; a counter that says more was set back or forward
LONGEST_DELAY = 1.0  # seconds between two movements of a counter: NVML's moves every 0.1 s or so, RAPL's every 0.001 s
LONGEST_GAP = 5.0  # seconds for which power may be unknown, or a counter stand still
BETWEEN_POWER = 0.1  # seconds between readings; a GPU's own reading is a mean over as long or longer
BETWEEN_RAPL = 1.0  # seconds between readings, so that no wrap is missed: two lie a minute or more apart


class NotMeasuredError(Exception):
    """Why there are no joules. It ends the measurement, never the training."""


class Counter:
    """Joules by a counter that only rises; above `wraps_at` joules it starts from 0 again."""

    def __init__(self, read: Callable[[], float], wraps_at: float | None = None) -> None:
        self.read, self.wraps_at = read, wraps_at
        self.value = read()
        self.moved = opened = monotonic()
        # On some virtual machines it stands still for ever, which is not 0 joules.
        while not self.advance():
            if monotonic() - opened > LONGEST_DELAY:
                raise NotMeasuredError("the energy counter stands still")
            sleep(0.005)

    def advance(self) -> float:
        """Joules since it was opened or last asked; raises where they cannot be known."""
        value, now = self.read(), monotonic()
        gained, elapsed = value - self.value, now - self.moved
        if gained == 0 and elapsed <= LONGEST_GAP:
            return 0.0
        if self.wraps_at is not None:
            if elapsed * MOST_WATTS > self.wraps_at:
                raise NotMeasuredError(f"the energy counter was not read for {elapsed:.0f} s and may have wrapped")
            if gained < 0:
                gained += self.wraps_at
        if not 0 < gained <= MOST_WATTS * (elapsed + LONGEST_DELAY):
            raise NotMeasuredError(f"the energy counter moved by {gained:.6g} J in {elapsed:.1f} s")
        self.value, self.moved = value, now
        return gained


class Power:
    """Joules by power in watts, integrated by the trapezoidal rule."""

    def __init__(self, read: Callable[[], float]) -> None:
        self.read = read
        self.watts, self.time = read(), monotonic()

    def advance(self) -> float:
        """As of a counter."""
        watts, now = self.read(), monotonic()
        elapsed = now - self.time
        if elapsed > LONGEST_GAP:
            raise NotMeasuredError(f"power was not read for {elapsed:.0f} s")
        if not (0 < self.watts <= MOST_WATTS and 0 < watts <= MOST_WATTS):
            raise NotMeasuredError(f"power reads {self.watts:g} W, then {watts:g} W")
        joules = elapsed * (self.watts + watts) / 2
        self.watts, self.time = watts, now
        return joules


class Meter:
    """Joules since it was opened.

    Attributes:
        source: what is read; None = not measured.
        problem: why nothing, or from some moment on nothing more, is measured; None where all is well.
    """

    def __init__(
        self,
        source: str | None,
        gauges: Sequence[Counter | Power] = (),
        *,
        every: float | None = None,
        problem: str | None = None,
    ) -> None:
        self.source, self.problem = source, problem
        self._gauges, self._joules = gauges, 0.0
        self._lock, self._closed = threading.Lock(), threading.Event()
        if every is not None:
            threading.Thread(target=self._watch, args=(every,), daemon=True).start()

    def read(self) -> float | None:
        """Joules so far; None where they are not measured, and from the moment on when one reading made no sense."""
        with self._lock:
            if self.problem is None:
                try:
                    self._joules += sum(gauge.advance() for gauge in self._gauges)
                except Exception as error:  # no training ends for want of its joules
                    self.problem = str(error)
            return None if self.problem is not None else self._joules

    def close(self) -> None:
        """Ends the readings in between."""
        self._closed.set()

    def _watch(self, every: float) -> None:
        while not self._closed.wait(every) and self.read() is not None:
            pass


def open_meter(device: torch.device, *, first_on_machine: bool) -> Meter:
    """A meter of what this process answers for: its own GPU, or the CPUs of the machine if it is the first there.

    Where that can be measured, the machine's other processes on the CPU read 0.0. It never raises: where nothing can
    be measured, the meter says why.
    """
    try:
        return _open_gpu(device) if device.type == "cuda" else _open_cpus(first_on_machine)
    except Exception as error:  # no training ends for want of its joules
        return Meter(None, problem=str(error))


def _open_gpu(device: torch.device) -> Meter:
    nvml, handle, title = _find_gpu(device)
    try:
        return Meter(f"NVML energy counter of {title}", [_gpu_counter(nvml, handle)])
    except (nvml.NVMLError, NotMeasuredError):
        return Meter(f"NVML power of {title}, integrated", [_gpu_power(nvml, handle)], every=BETWEEN_POWER)


def _find_gpu(device: torch.device) -> tuple[Any, Any, str]:
    """NVML, its handle of the GPU that PyTorch calls `device`, and what to call it.

    They are matched by UUID: the numbers of PyTorch count visible GPUs only, in an order that need not be NVML's.
    """
    import pynvml as nvml

    nvml.nvmlInit()
    handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    try:
        split = nvml.nvmlDeviceGetMigMode(handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE
    except nvml.NVMLError:  # a GPU that cannot be split
        split = False
    if split:
        raise NotMeasuredError("the GPU is split (MIG), and NVML measures the whole")
    return nvml, handle, f"GPU {nvml.nvmlDeviceGetIndex(handle)} ({nvml.nvmlDeviceGetName(handle)})"


def _gpu_counter(nvml: Any, handle: Any) -> Counter:
    return Counter(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)


def _gpu_power(nvml: Any, handle: Any) -> Power:
    return Power(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3)


def _open_cpus(first_on_machine: bool) -> Meter:
    """AMD's counters have the same names as Intel's. Packages hold their cores; "psys", beside them, holds all."""
    zones = sorted(POWERCAP.glob("intel-rapl:*"))
    packages = [zone for zone in zones if (zone / "name").read_text().startswith("package")]
    if not packages:
        raise NotMeasuredError(f"this machine shows no energy counter of its CPUs (RAPL) in {POWERCAP}")
    counters = [_package_counter(zone) for zone in packages]
    source = f"RAPL counters of all CPU packages ({len(packages)}), with all that runs on them"
    return Meter(source, counters, every=BETWEEN_RAPL) if first_on_machine else Meter(source)


def _package_counter(zone: Path) -> Counter:
    wraps_at = int((zone / "max_energy_range_uj").read_text()) / 1e6
    return Counter(lambda: int((zone / "energy_uj").read_text()) / 1e6, wraps_at)


def main(seconds: float = 60.0) -> None:
    """Prints the joules of a loaded GPU by its counter and by its integrated power, over the same time."""
    device = torch.device("cuda")
    nvml, handle, title = _find_gpu(device)
    factor = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)

    def load(until: float) -> None:
        while monotonic() < until:
            factor @ factor
            torch.cuda.synchronize(device)

    load(monotonic() + 5)  # until power is level
    counter = Meter(title, [_gpu_counter(nvml, handle)])
    power = Meter(title, [_gpu_power(nvml, handle)], every=BETWEEN_POWER)
    began = monotonic()
    load(began + seconds)
    joules = [counter.read(), power.read()]
    print(f"{title}, {monotonic() - began:.1f} s: counter {joules[0]} J, integrated power {joules[1]} J")


if __name__ == "__main__":
    main()
