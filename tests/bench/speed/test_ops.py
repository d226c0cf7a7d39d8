"""`speed op=norm`, rope, mlp, cross_entropy and grouped_gemm on a CPU, right and wrong, and their tables."""

import importlib
import json
import sys
from dataclasses import replace

import pytest
import torch

import kernels
from bench.__main__ import main
from bench.config import DeviceConfig
from bench.speed import contest, cross_entropy, grouped_gemm, mlp, norm, ops, rope
from bench.speed.contest import NotHere
from bench.speed.ops import check, measure_case, named
from bench.speed.ops_figures import figures, table
from bench.training.device import Device, open_device

H100 = Device(torch.device("cuda"), "bfloat16", "NVIDIA H100", 989.5e12, "auto")
SIZES = {norm: (13, 24), rope: (1, 2, 13, 8), mlp: (13, 8), cross_entropy: (13, 8, 17), grouped_gemm: (13, 3, 8, 16)}
NAMES = {module: module.__name__.rpartition(".")[2] for module in SIZES}
FUNCTIONS = {
    "norm": ("rms_norm", "layer_norm"),
    "rope": ("rotary_embedding",),
    "mlp": ("linear_relu_squared", "linear_gelu", "linear_swiglu"),
    "cross_entropy": ("cross_entropy", "linear_cross_entropy"),
    "grouped_gemm": ("grouped_gemm",),
}
WORK = {"norm": "share_of_copy", "rope": "share_of_copy", "mlp": "tflops", "grouped_gemm": "tflops"}


@pytest.fixture(autouse=True)
def _small(monkeypatch) -> None:
    monkeypatch.setattr(contest, "SECONDS", 0.0)
    for module, size in SIZES.items():
        monkeypatch.setattr(module, "SIZES", {"cpu": (size,)})
        monkeypatch.setattr(module, "CHECKED", {"cpu": (size,)})


@pytest.fixture
def cpu() -> Device:
    return open_device(DeviceConfig(name="cpu"))


def results_in(folder) -> dict:
    (path,) = folder.glob("*/*.json")
    return json.loads(path.read_text())


def cases_of(op: str, device: Device) -> list[ops.Case]:
    module = importlib.import_module(f"bench.speed.{op}")
    sizes = [SIZES[module]]
    if op == "mlp":
        return module.cases(sizes)
    return module.cases(sizes, device, summed=True) if op == "cross_entropy" else module.cases(sizes, device)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_the_command_checks_times_and_writes(op, tmp_path, capsys) -> None:
    assert main(["speed", f"op={op}", "device=cpu", f"paths.speed={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert f"{op} is torch's" in out
    found = results_in(tmp_path)
    assert found["op"] == op
    assert found["check"]["failures"] == []
    rows = found["shapes"]
    assert tuple(dict.fromkeys(row["shape"]["function"] for row in rows)) == FUNCTIONS[op]
    for row in rows:
        assert row["left_out"]["compiled"] == "for an NVIDIA GPU only"
        for direction in ("forward", "backward", "both"):
            contestants = row[direction]["contestants"]
            assert set(contestants) == {"ours", "eager"} | ({"grouped_mm"} if op == "grouped_gemm" else set())
            assert set(row[direction]["ratios"]) == set(contestants) - {"ours"}
            if op in WORK:
                assert contestants["ours"][WORK[op]] > 0


def test_a_cpu_writes_nothing_unless_told(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("bench.speed.record.RESULTS", tmp_path)
    assert main(["speed", "op=rope", "device=cpu"]) == 0
    assert not list(tmp_path.iterdir())


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 1.1


def wrong_result(function):
    def wrong(*tensors, **options):
        found = function(*tensors, **options)
        return tuple(part * 1.1 for part in found) if isinstance(found, tuple) else found * 1.1

    return wrong


def wrong_gradient(function):
    return lambda x, *others, **options: function(WrongGradient.apply(x), *others, **options)


@pytest.mark.parametrize(("spoil", "what"), [(wrong_result, "result 1"), (wrong_gradient, "gradient of ")])
@pytest.mark.parametrize("op", FUNCTIONS)
def test_a_wrong_op_is_not_timed(op, spoil, what, tmp_path, monkeypatch, capsys) -> None:
    name = FUNCTIONS[op][-1]
    monkeypatch.setattr(kernels, name, spoil(getattr(kernels, name)))
    monkeypatch.setattr(ops, "measure_case", lambda *arguments: pytest.fail("timed"))
    assert main(["speed", f"op={op}", "device=cpu", f"paths.speed={tmp_path}"]) == 1
    err = capsys.readouterr().err
    assert f"wrong: {name}, " in err
    assert f"float32: {what}" in err
    assert f"{op} failed its check, so nothing is timed" in err
    assert results_in(tmp_path)["shapes"] == []


def test_an_op_that_is_wrong_only_at_a_timed_size_is_not_timed_there(tmp_path, monkeypatch) -> None:
    right = kernels.linear_gelu
    monkeypatch.setattr(mlp, "SIZES", {"cpu": ((13, 8), (40, 8))})
    monkeypatch.setattr(kernels, "linear_gelu", lambda x, w: right(x, w) * (1.1 if x.shape[0] == 40 else 1.0))
    assert main(["speed", "op=mlp", "device=cpu", f"paths.speed={tmp_path}"]) == 1
    rows = [row for row in results_in(tmp_path)["shapes"] if row["shape"]["function"] == "linear_gelu"]
    assert ["ours" in row["both"]["contestants"] for row in rows] == [True, False]
    assert rows[1]["left_out"]["ours"].startswith("its result 1 is wrong")
    assert rows[1]["both"]["ratios"] == {}


@pytest.mark.parametrize("op", FUNCTIONS)
def test_all_is_right_in_bfloat16_and_float32(op) -> None:
    device = open_device(DeviceConfig(name="cpu", precision="bfloat16"))
    found = cases_of(op, device)
    assert check(found, device) == (2 * len(found), [])


@pytest.mark.parametrize("op", FUNCTIONS)
def test_what_is_compiled_is_one_graph_and_right(op, monkeypatch) -> None:
    device = open_device(DeviceConfig(name="cpu", precision="bfloat16"))
    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_with(f, backend="aot_eager", **options))
    monkeypatch.setattr(ops, "GPU_ONLY", ("liger",))
    for case in cases_of(op, device):
        row = measure_case(case, device, contest_seconds())
        assert "compiled" in row["both"]["contestants"], row["left_out"]


def contest_seconds() -> dict[str, float]:
    return dict.fromkeys(("ours", "eager", "compiled", "grouped_mm", "liger"), 0.0)


def test_a_peer_that_writes_over_its_inputs_spoils_nobody_elses(cpu) -> None:
    (case,) = cases_of("grouped_gemm", cpu)

    def careless(x, weight):
        out = case.reference(x, weight)
        x.data.zero_()
        return out + x.sum() * 0

    inputs = ops.draw(case, cpu.torch_device, torch.float32)[0]
    peers = {"eager": lambda: careless, **case.peers}
    row = measure_case(replace(case, peers=peers), cpu, contest_seconds())
    assert set(row["both"]["contestants"]) >= {"ours", "grouped_mm"}
    assert torch.equal(inputs[0], ops.draw(case, cpu.torch_device, torch.float32)[0][0])


def test_who_is_absent_says_why(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(NotHere, match="liger-kernel"):
        norm.LIGER["rms_norm", False]()
    with pytest.raises(NotHere, match="no layer norm with a residual"):
        norm.LIGER["layer_norm", True]()


def test_the_table_is_written_on_a_gpu_only(capsys) -> None:
    assert main(["speed", "op=mlp", "device=cpu", "speed.write_table=true"]) == 2
    assert "speed.write_table needs a GPU" in capsys.readouterr().err


def test_the_table_notes_ratios_and_forgets_what_failed(tmp_path, monkeypatch) -> None:
    path = tmp_path / "measured.json"
    earlier = {"NVIDIA H100": {"linear_gelu": {"512": 1.2, "768": 1.3}}, "NVIDIA A100": {"linear_gelu": {"768": 1.0}}}
    path.write_text(json.dumps(earlier))
    monkeypatch.setattr(kernels.mlp, "MEASURED", path)

    def row(function: str, width: int, times: dict[str, float]) -> dict:
        seconds = {name: [each] * 2 for name, each in times.items()}
        return {"shape": {"function": function, "width": width}, "both": figures(seconds, 1.0, None, None)}

    rows = [
        row("linear_gelu", 768, {"compiled": 0.5}),
        row("linear_gelu", 1024, {"ours": 0.4, "compiled": 0.5, "eager": 0.9}),
        row("linear_swiglu", 768, {"ours": 0.6, "compiled": 0.3}),
    ]
    mlp.write_table(rows, H100)
    assert json.loads(path.read_text()) == {
        "NVIDIA H100": {"linear_gelu": {"512": 1.2, "1024": 1.25}, "linear_swiglu": {"768": 0.5}},
        "NVIDIA A100": {"linear_gelu": {"768": 1.0}},
    }


def test_figures_of_made_up_times() -> None:
    times = {"ours": [0.002] * 3, "eager": [0.004] * 3, "copy": [0.001] * 3}
    found = figures(times, None, 1e15, 4e9)
    assert found["copy_gigabytes_per_second"] == pytest.approx(4000.0)
    ours = found["contestants"]["ours"]
    assert (ours["gigabytes_per_second"], ours["share_of_copy"]) == pytest.approx((2000.0, 0.5))
    assert (ours["tflops"], ours["roofline"]) == (None, None)
    assert found["ratios"] == {"eager": pytest.approx(2.0)}
    products = figures({"ours": [0.002] * 3}, 1e12, 1e15, None)["contestants"]["ours"]
    assert (products["tflops"], products["roofline"]) == pytest.approx((500.0, 0.5))
    assert figures({"eager": [1.0, 1.0]}, None, None, None)["ratios"] == {}
    assert figures({}, 1.0, None, None)["contestants"] == {}


def test_the_table_has_a_line_for_each_contestant_and_fits() -> None:
    part = figures({"ours": [0.002] * 2, "eager": [0.004] * 2, "copy": [0.001] * 2}, None, None, 4e9)
    row = {
        "shape": {"function": "rms_norm", "rows": 16384, "width": 4096, "residual": 0},
        **dict.fromkeys(("forward", "backward", "both"), part),
        "peak_bytes": {"ours": 2**30, "eager": 2**31},
        "left_out": {"liger": "RuntimeError: no kernel"},
    }
    lines = table([row]).splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[1] == "rms_norm, rows 16384, width 4096, residual 0"
    assert lines[3].split() == ["ours", *["2", "2e+03", "50%", "-"] * 3, "1024"]
    assert lines[4].split() == ["eager", *["4", "1e+03", "25%", "2.00"] * 3, "2048"]
    assert lines[-1] == "left out: Liger, at 1 of 1 shapes: RuntimeError: no kernel"


def test_results_are_named(cpu) -> None:
    case = norm.case("rms_norm", (3, 8), True, cpu)
    names = ["result 1", "result 2", "gradient of x", "gradient of weight", "gradient of residual"]
    assert list(named(case, [torch.ones(1)] * 5)) == names
