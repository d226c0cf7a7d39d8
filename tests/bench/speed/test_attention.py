"""`speed op=attention` on a CPU, end to end and with contestants that fail. No time decides anything here."""

import itertools
import json

import pytest
import torch

import kernels
from bench.__main__ import main
from bench.config import DeviceConfig, SpeedConfig
from bench.errors import UserError
from bench.speed import attention, attention_check, contest
from bench.speed.attention import choose_shapes, measure_shape
from bench.speed.attention_check import Shape
from bench.speed.attention_contestants import Contestant, sdpa
from bench.training.device import Device, open_device

right = kernels.flash_attention
H100 = Device(torch.device("cuda"), "bfloat16", "NVIDIA H100", 989.5e12, "auto")
CPU_NAMES = {"ours", "sdpa_flash", "sdpa_math"}
SMALL = ["op=attention", "device=cpu", "speed.head_sizes=[16]", "speed.sequences=[24,40]", "speed.groups=[2]"]


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch) -> None:
    monkeypatch.setattr(contest, "SECONDS", 0.0)
    monkeypatch.setattr(attention, "TOKENS", {"cpu": 40, "cuda": 16384})
    monkeypatch.setattr(attention, "WIDTHS", {"cpu": 64, "cuda": 2048})
    monkeypatch.setattr(attention_check, "CHECKED_SEQUENCES", (13,))


@pytest.fixture
def cpu() -> Device:
    return open_device(DeviceConfig(name="cpu"))


def results_in(folder) -> dict:
    (path,) = folder.glob("*/attention.json")
    return json.loads(path.read_text())


def test_the_command_prints_tables_and_writes_results(tmp_path, capsys) -> None:
    assert main(["speed", *SMALL, f"paths.speed={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert "flash_attention is torch's" in out
    assert "check: 2 of 2 cases right" in out
    assert "[2/2] S 40, 4/2 heads of 16: forward" in out
    assert "backward, TFLOP/s: 4 query heads, 2 key heads of 16" in out
    assert "left out: cuDNN, at 2 of 2 shapes: for an NVIDIA GPU only" in out
    found = results_in(tmp_path)
    assert found["op"] == "attention"
    assert found["check"] == {"cases": 2, "failures": []}
    assert found["setting"]["implementation"] == "torch"
    assert [row["shape"]["sequence"] for row in found["shapes"]] == [24, 40]
    row = found["shapes"][1]
    assert row["shape"] == {"batch": 1, "heads": 4, "key_heads": 2, "sequence": 40, "head_size": 16}
    for direction in ("forward", "backward"):
        assert set(row[direction]["contestants"]) == CPU_NAMES
        assert set(row[direction]["ratios"]) == {"ours"}
    forward, backward = (row[direction]["contestants"]["ours"] for direction in ("forward", "backward"))
    flops = [each["tflops"] * each["milliseconds"] for each in (forward, backward)]
    assert flops[1] == pytest.approx(2.5 * flops[0])
    assert set(row["left_out"]) == set(attention.TITLES) - CPU_NAMES
    assert set(row["peak_bytes"].values()) == {None}
    assert row["measured"]["command"].startswith("python -m bench")


def test_a_cpu_writes_nothing_unless_told(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("bench.speed.record.RESULTS", tmp_path)
    assert main(["speed", *SMALL, "speed.sequences=[8]"]) == 0
    assert not list(tmp_path.iterdir())


def test_a_wrong_kernel_is_not_timed(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(kernels, "flash_attention", lambda q, k, v, **options: right(q, k, v, **options) * 1.1)
    monkeypatch.setattr(attention, "measure_shape", lambda *arguments: pytest.fail("timed"))
    assert main(["speed", *SMALL, f"paths.speed={tmp_path}"]) == 1
    err = capsys.readouterr().err
    assert "wrong: head size 16, 2 query heads a key head, 13 positions, causal: out is off by" in err
    assert "nothing is timed" in err
    assert results_in(tmp_path)["shapes"] == []
    assert len(results_in(tmp_path)["check"]["failures"]) == 2


def test_a_kernel_that_is_wrong_only_at_a_timed_shape_is_not_timed_there(tmp_path, monkeypatch, capsys) -> None:
    def wrong_at_40(q, k, v, causal=True):
        return right(q, k, v, causal=causal) * (1.1 if q.shape[2] == 40 else 1.0)

    monkeypatch.setattr(kernels, "flash_attention", wrong_at_40)
    assert main(["speed", *SMALL, f"paths.speed={tmp_path}"]) == 1
    first, second = results_in(tmp_path)["shapes"]
    assert set(first["forward"]["contestants"]) == CPU_NAMES
    assert set(second["forward"]["contestants"]) == set(second["backward"]["contestants"]) == CPU_NAMES - {"ours"}
    assert second["left_out"]["ours"].startswith("its out is wrong: the error is")
    assert "LEFT OUT: ours: its out is wrong" in capsys.readouterr().err


def test_an_interrupted_run_keeps_what_it_measured_and_a_later_one_adds_to_it(tmp_path, monkeypatch, capsys) -> None:
    shapes = itertools.count(1)

    def interrupted(*arguments):
        if next(shapes) == 2:
            raise KeyboardInterrupt
        return measure_shape(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(attention, "measure_shape", interrupted)
        assert main(["speed", *SMALL, f"paths.speed={tmp_path}"]) == 130
    captured = capsys.readouterr()
    assert "1 of 2 shapes were timed" in captured.err
    assert "forward, TFLOP/s" in captured.out
    assert [row["shape"]["sequence"] for row in results_in(tmp_path)["shapes"]] == [24]
    assert main(["speed", *SMALL, "speed.sequences=[40]", f"paths.speed={tmp_path}"]) == 0
    assert [row["shape"]["sequence"] for row in results_in(tmp_path)["shapes"]] == [24, 40]


def test_no_shape_begins_after_the_limit(capsys) -> None:
    assert main(["speed", *SMALL, "speed.limit=0"]) == 0
    assert "speed.limit=0 is over: 0 of 2 shapes were timed" in capsys.readouterr().out


def test_the_grid_of_a_gpu() -> None:
    shapes = choose_shapes(SpeedConfig(), H100)
    assert len(shapes) == 2 * 2 * 6
    assert {shape.batch * shape.sequence for shape in shapes} == {16384}
    assert {(shape.heads, shape.key_heads, shape.head_size) for shape in shapes} == {
        (16, 16, 128),
        (32, 32, 64),
        (16, 4, 128),
        (32, 8, 64),
    }


def test_wanted_sizes_replace_the_grid() -> None:
    wanted = SpeedConfig(head_sizes=[256], sequences=[100, 32768], groups=[3])
    assert choose_shapes(wanted, H100) == [Shape(163, 6, 2, 100, 256), Shape(1, 6, 2, 32768, 256)]
    with pytest.raises(UserError, match=r"speed\.sequences must be numbers above 0, got \[0\]"):
        choose_shapes(SpeedConfig(sequences=[0]), H100)


def with_peer(monkeypatch, make, **options) -> None:
    contestants = (*attention.CONTESTANTS, Contestant("peer", "peer", make, **options))
    monkeypatch.setattr(attention, "CONTESTANTS", contestants)


def fails_to_compile(sequence, device):
    raise RuntimeError("no kernel\nfor this GPU")


def is_wrong(sequence, device):
    flash = sdpa(torch.nn.attention.SDPBackend.FLASH_ATTENTION)(sequence, device)
    return lambda q, k, v: flash(q, k, v) + 1.0


def is_not_a_number(sequence, device):
    return lambda q, k, v: right(q, k, v) * float("nan")


def has_no_backward(sequence, device):
    return lambda q, k, v: right(q, k, v).detach()


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (fails_to_compile, "RuntimeError: no kernel for this GPU"),
        (is_wrong, "its out is wrong: the error is 1, "),
        (is_not_a_number, "its out is wrong: the error is nan"),
        (has_no_backward, "RuntimeError: element 0 of tensors does not require grad"),
    ],
)
def test_a_peer_that_fails_is_left_out_with_its_reason(cpu, monkeypatch, make, why) -> None:
    with_peer(monkeypatch, make)
    row = measure_shape(Shape(1, 4, 2, 24, 16), cpu, attention.defaultdict(float))
    assert row["left_out"]["peer"].startswith(why)
    assert set(row["forward"]["contestants"]) == set(row["backward"]["contestants"]) == CPU_NAMES


def test_a_shape_that_does_not_fit_is_a_row_without_times(tmp_path, monkeypatch, capsys) -> None:
    def out_of_memory(shape, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(attention, "draw", out_of_memory)
    assert main(["speed", *SMALL, f"paths.speed={tmp_path}"]) == 1
    assert "forward not timed; backward not timed" in capsys.readouterr().out
    row = results_in(tmp_path)["shapes"][0]
    assert row["left_out"] == dict.fromkeys(attention.TITLES, "OutOfMemoryError: CUDA out of memory")


def test_a_peer_that_compiles_for_too_long_is_left_out_of_later_shapes(cpu, monkeypatch) -> None:
    spent = attention.defaultdict(float, {"sdpa_math": 181.0, "ours": 181.0})
    row = measure_shape(Shape(1, 4, 2, 24, 16), cpu, spent)
    assert set(row["forward"]["contestants"]) == CPU_NAMES - {"sdpa_math"}
    assert row["left_out"]["sdpa_math"] == "it had already compiled for 180 seconds"


def test_who_competes_backward_only_has_no_forward_times(cpu, monkeypatch) -> None:
    with_peer(monkeypatch, lambda sequence, device: right, backward_only=True)
    row = measure_shape(Shape(1, 4, 2, 24, 16), cpu, attention.defaultdict(float))
    assert "peer" not in row["forward"]["contestants"]
    assert "peer" in row["backward"]["contestants"]


def test_tile_sizes_are_named_for_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(kernels.backend, "choose", lambda op, device: "triton")
    monkeypatch.setattr("kernels.attention.fused.launch.target_architecture", lambda: 90)
    found = attention.tiles(Shape(1, 16, 4, 1024, 128), H100)
    assert set(found) >= {"forward", "backward_query", "backward_key"}
    assert set(found["forward"]) == {"queries", "keys", "warps", "stages"}
    monkeypatch.setattr(kernels.backend, "choose", lambda op, device: "torch")
    assert attention.tiles(Shape(1, 16, 4, 1024, 128), H100) is None
