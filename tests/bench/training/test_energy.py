import sys
import threading
from types import SimpleNamespace

import pynvml
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.training import energy
from bench.training.energy import Counter, Meter, NotMeasuredError, Power, open_meter

WRAP = 65532.0  # joules, of AMD's counters; Intel's wrap at 262143
OTHER_UUID, OUR_UUID = "00000000-aaaa-0000-0000-000000000000", "11111111-bbbb-0000-0000-000000000000"


class Machine:
    """A clock that tests move, and energy that has flowed by then. Nothing here waits."""

    def __init__(self) -> None:
        self.time, self.joules, self.watts = 100.0, 5000.0, 250.0
        self.ticks = 0

    def run(self, seconds: float) -> None:
        self.time += seconds
        self.joules += self.watts * seconds

    def sleep(self, seconds: float) -> None:
        self.run(seconds)


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(energy, "monotonic", lambda: machine.time)
    monkeypatch.setattr(energy, "sleep", machine.sleep)
    return machine


class TestCounter:
    def test_constant_power_times_time(self, machine):
        counter = Counter(lambda: machine.joules)
        machine.run(60.0)
        assert counter.advance() == pytest.approx(250.0 * 60.0)
        assert counter.advance() == 0.0

    def test_what_flowed_before_does_not_count(self, machine):
        machine.run(1000.0)
        counter = Counter(lambda: machine.joules)
        machine.run(2.0)
        assert counter.advance() == pytest.approx(500.0)

    @given(st.lists(st.floats(0.5, 12.0), min_size=1, max_size=60), st.floats(0.0, WRAP))
    def test_wraps_lose_nothing(self, waits, start):
        machine = Machine()
        machine.joules, machine.watts = start, 400.0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(energy, "monotonic", lambda: machine.time)
            patch.setattr(energy, "sleep", machine.sleep)
            counter = Counter(lambda: machine.joules % WRAP, WRAP)
            began = machine.joules
            total = 0.0
            for wait in waits:
                machine.run(wait)
                total += counter.advance()
        assert total == pytest.approx(machine.joules - began)

    def test_not_read_for_so_long_that_it_may_have_wrapped_twice(self, machine):
        counter = Counter(lambda: machine.joules % WRAP, WRAP)
        machine.run(60.0)
        with pytest.raises(NotMeasuredError, match="was not read for 60 s and may have wrapped"):
            counter.advance()

    @pytest.mark.parametrize(("wraps_at", "value"), [(None, 0.0), (None, 4999.0), (None, 1e9), (WRAP, 0.0)])
    def test_a_counter_that_was_set(self, machine, wraps_at, value):
        counter = Counter(lambda: machine.joules, wraps_at)
        machine.run(1.0)
        machine.joules = value
        with pytest.raises(NotMeasuredError, match="the energy counter moved by"):
            counter.advance()

    def test_a_counter_that_stops(self, machine):
        counter = Counter(lambda: machine.joules)
        machine.watts = 0.0
        machine.run(4.0)
        assert counter.advance() == 0.0
        machine.run(4.0)
        with pytest.raises(NotMeasuredError, match=r"moved by 0 J in 8\.0 s"):
            counter.advance()

    def test_a_counter_that_never_moves_is_not_0_joules(self, machine):
        with pytest.raises(NotMeasuredError, match="stands still"):
            Counter(lambda: 0.0)

    def test_a_counter_that_moves_now_and_then(self, machine):
        counter = Counter(lambda: machine.joules // 25 * 25)  # every 0.1 s at 250 W
        total = 0.0
        for _ in range(1000):
            machine.run(0.01)
            total += counter.advance()
        assert total == pytest.approx(2500.0, abs=25.0)


class TestPower:
    def integrate(self, machine, watts_at, times):
        began = machine.time
        power = Power(lambda: watts_at(machine.time - began))
        total = 0.0
        for time in times:
            machine.time = began + time
            total += power.advance()
        return total

    def test_constant_power_times_time(self, machine):
        assert self.integrate(machine, lambda time: 300.0, range(1, 61)) == pytest.approx(300.0 * 60.0)

    @given(st.lists(st.floats(0.01, 4.0), min_size=1, max_size=30))
    def test_a_ramp_is_integrated_exactly_however_it_is_sampled(self, waits):
        machine, times = Machine(), [sum(waits[: count + 1]) for count in range(len(waits))]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(energy, "monotonic", lambda: machine.time)
            total = self.integrate(machine, lambda time: 100.0 + 7.0 * time, times)
        assert total == pytest.approx(100.0 * times[-1] + 3.5 * times[-1] ** 2)

    def test_a_gap_is_not_bridged(self, machine):
        with pytest.raises(NotMeasuredError, match="power was not read for 30 s"):
            self.integrate(machine, lambda time: 300.0, [1, 2, 32])

    @pytest.mark.parametrize("watts", [0.0, -1.0, 1e6, float("nan")])
    def test_a_power_that_cannot_be(self, machine, watts):
        with pytest.raises(NotMeasuredError, match="power reads 300 W, then"):
            self.integrate(machine, lambda time: 300.0 if time < 1 else watts, [1])


class Fixed:
    """A gauge that gives what it is told, and then fails."""

    def __init__(self, *joules):
        self.joules = list(joules)

    def advance(self):
        if not self.joules:
            raise OSError("the GPU fell off the bus")
        return self.joules.pop(0)


class TestMeter:
    def test_gauges_add_up_over_readings(self):
        meter = Meter("two packages", [Fixed(1.0, 2.0), Fixed(10.0, 20.0)])
        assert [meter.read(), meter.read()] == [11.0, 33.0]
        assert (meter.source, meter.problem) == ("two packages", None)

    def test_a_reading_that_fails_ends_the_measurement_for_good(self):
        gauge = Fixed(1.0)
        meter = Meter("a GPU", [gauge])
        assert meter.read() == 1.0
        assert meter.read() is None
        gauge.joules = [1.0]
        assert meter.read() is None
        assert meter.problem == "the GPU fell off the bus"

    def test_one_package_that_fails_is_not_half_the_joules(self):
        assert Meter("two packages", [Fixed(1.0), Fixed()]).read() is None

    def test_without_a_source_nothing_is_measured(self):
        assert Meter(None, problem="no GPU").read() is None

    def test_readings_in_between_until_it_is_closed(self):
        class Counting:
            def __init__(self):
                self.threads, self.third = [], threading.Event()

            def advance(self):
                self.threads.append(threading.current_thread())
                if len(self.threads) == 3:
                    self.third.set()
                return 1.0

        gauge = Counting()
        meter = Meter("a GPU", [gauge], every=0.001)
        assert gauge.third.wait(60.0)
        meter.close()
        gauge.threads[0].join(60.0)
        assert not gauge.threads[0].is_alive()
        assert meter.read() == len(gauge.threads) > 3


class Nvml(SimpleNamespace):
    """NVML on a machine with two GPUs, of which ours is NVML's second and PyTorch's first."""

    class NVMLError(Exception):
        pass

    NVML_DEVICE_MIG_ENABLE = 1

    def __init__(self, machine):
        super().__init__(machine=machine, split=None, counter=True, power=True, initialized=False)

    def nvmlInit(self):
        self.initialized = True

    def nvmlDeviceGetHandleByUUID(self, uuid):
        assert self.initialized
        handles = {f"GPU-{OTHER_UUID}": 0, f"GPU-{OUR_UUID}": 1}
        if uuid not in handles:
            raise self.NVMLError("Not Found")
        return handles[uuid]

    def nvmlDeviceGetMigMode(self, handle):
        if self.split is None:
            raise self.NVMLError("Not Supported")
        return [self.split, self.split]

    def nvmlDeviceGetIndex(self, handle):
        return handle

    def nvmlDeviceGetName(self, handle):
        return "NVIDIA H100"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if not self.counter:
            raise self.NVMLError("Not Supported")
        return int(1000 * self.machine.joules) if handle == 1 else 7

    def nvmlDeviceGetPowerUsage(self, handle):
        if not self.power:
            raise self.NVMLError("Not Supported")
        return int(1000 * self.machine.watts) if handle == 1 else 7


@pytest.fixture
def nvml(machine, monkeypatch):
    fake = Nvml(machine)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=OUR_UUID))
    monkeypatch.setattr(energy, "BETWEEN_POWER", 1e6)  # the clock of these tests moves by hand
    return fake


def open_gpu():
    return open_meter(torch.device("cuda"), first_on_machine=False)


class TestGpu:
    def test_the_library_has_what_is_asked_of_it(self):
        assert {name for name in vars(Nvml) if name.lower().startswith("nvml")} <= set(dir(pynvml))
        assert pynvml.NVML_DEVICE_MIG_ENABLE == Nvml.NVML_DEVICE_MIG_ENABLE

    def test_the_counter_of_the_very_gpu(self, nvml, machine):
        meter = open_gpu()
        machine.run(10.0)
        assert meter.read() == pytest.approx(2500.0)
        assert (meter.source, meter.problem) == ("NVML energy counter of GPU 1 (NVIDIA H100)", None)

    def test_every_process_answers_for_its_own(self, nvml, machine):
        meter = open_meter(torch.device("cuda", 3), first_on_machine=False)
        machine.run(1.0)
        assert meter.read() == pytest.approx(250.0)

    @pytest.mark.parametrize("still", [False, True])
    def test_power_where_there_is_no_counter_or_it_stands_still(self, nvml, machine, monkeypatch, still):
        nvml.counter = still
        monkeypatch.setattr(machine, "joules", 0.0)
        monkeypatch.setattr(machine, "run", lambda seconds: setattr(machine, "time", machine.time + seconds))
        meter = open_gpu()
        assert meter.source == "NVML power of GPU 1 (NVIDIA H100), integrated"
        for _ in range(20):
            machine.run(0.5)
            joules = meter.read()
        meter.close()
        assert joules == pytest.approx(2500.0)

    def test_neither_counter_nor_power(self, nvml):
        nvml.counter = nvml.power = False
        meter = open_gpu()
        assert (meter.source, meter.problem, meter.read()) == (None, "Not Supported", None)

    def test_a_slice_of_a_gpu_is_not_charged_with_the_whole(self, nvml):
        nvml.split = 1
        meter = open_gpu()
        assert (meter.source, meter.read()) == (None, None)
        assert "MIG" in meter.problem

    def test_a_gpu_that_could_be_split_but_is_not(self, nvml):
        nvml.split = 0
        assert open_gpu().source is not None

    def test_a_gpu_that_nvml_does_not_know(self, nvml, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="22222222"))
        assert (open_gpu().source, open_gpu().problem) == (None, "Not Found")

    def test_the_driver_is_loaded_anew(self, nvml, machine):
        meter = open_gpu()
        machine.run(10.0)
        assert meter.read() > 0
        machine.joules = 3.0
        assert meter.read() is None
        machine.run(10.0)
        assert meter.read() is None

    def test_without_the_library(self, nvml, monkeypatch):
        monkeypatch.setitem(sys.modules, "pynvml", None)
        meter = open_gpu()
        assert (meter.source, meter.read()) == (None, None)
        assert "pynvml" in meter.problem


class Powercap:
    """A tree like /sys/class/powercap. Its files show the machine's clock by `write`."""

    def __init__(self, root, machine):
        self.root, self.machine = root, machine

    def add(self, zone, name, share=1.0, range_uj=262143328850):
        folder = self.root / zone
        folder.mkdir()
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
        (folder / "share").write_text(str(share))
        self.write()

    def write(self):
        for folder in self.root.iterdir():
            microjoules = int(self.machine.joules * 1e6 * float((folder / "share").read_text()))
            (folder / "energy_uj").write_text(f"{microjoules % int((folder / 'max_energy_range_uj').read_text())}\n")

    def run(self, seconds):
        self.machine.run(seconds)
        self.write()


@pytest.fixture
def powercap(tmp_path, machine, monkeypatch):
    tree = Powercap(tmp_path, machine)
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    monkeypatch.setattr(energy, "sleep", tree.run)
    monkeypatch.setattr(energy, "BETWEEN_RAPL", 1e6)  # the clock of these tests moves by hand
    return tree


def open_cpus(first_on_machine=True):
    return open_meter(torch.device("cpu"), first_on_machine=first_on_machine)


class TestCpus:
    def test_packages_add_up_without_their_parts_and_what_holds_them(self, powercap):
        powercap.add("intel-rapl:0", "package-0")
        powercap.add("intel-rapl:0:0", "core", share=0.5)
        powercap.add("intel-rapl:0:1", "dram", share=0.2)
        powercap.add("intel-rapl:1", "package-1", share=0.25)
        powercap.add("intel-rapl:2", "psys", share=3.0)
        powercap.add("intel-rapl-mmio:0", "package-0")
        meter = open_cpus()
        powercap.run(4.0)
        assert meter.read() == pytest.approx(250.0 * 4.0 * 1.25, rel=0.01)
        assert meter.source == "RAPL counters of all CPU packages (2), with all that runs on them"
        meter.close()

    def test_a_counter_that_wraps(self, powercap, machine):
        powercap.add("intel-rapl:0", "package-0", range_uj=65532610987)
        meter = open_cpus()
        began, read = machine.joules, []
        for _ in range(100):
            powercap.run(8.0)
            read.append(meter.read())
        assert read[-1] == pytest.approx(machine.joules - began)
        assert read == sorted(read)
        meter.close()

    def test_others_on_the_machine_leave_it_to_the_first(self, powercap):
        powercap.add("intel-rapl:0", "package-0")
        meter = open_cpus(first_on_machine=False)
        powercap.run(4.0)
        assert meter.read() == 0.0
        assert meter.source == open_cpus().source

    @pytest.mark.parametrize("first", [True, False])
    def test_without_a_counter_nobody_measures(self, powercap, first):
        powercap.add("intel-rapl:0:0", "core")
        meter = open_cpus(first)
        assert (meter.source, meter.read()) == (None, None)
        assert "shows no energy counter" in meter.problem

    @pytest.mark.parametrize("first", [True, False])
    def test_a_counter_that_may_not_be_read(self, powercap, first):
        powercap.add("intel-rapl:0", "package-0")
        (powercap.root / "intel-rapl:0/energy_uj").unlink()
        (powercap.root / "intel-rapl:0/energy_uj").mkdir()  # root may read every file, but no folder
        meter = open_cpus(first)
        assert (meter.source, meter.read()) == (None, None)
        assert "energy_uj" in meter.problem

    def test_a_counter_that_shows_no_number(self, powercap):
        powercap.add("intel-rapl:0", "package-0")
        meter = open_cpus()
        (powercap.root / "intel-rapl:0/energy_uj").write_text("")
        assert meter.read() is None
        meter.close()

    def test_a_machine_without_the_folder(self, powercap, monkeypatch):
        monkeypatch.setattr(energy, "POWERCAP", powercap.root / "none")
        assert open_cpus().source is None
