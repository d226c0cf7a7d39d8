"""Figures and tables from made-up times."""

import pytest

from bench.speed.attention_figures import figures, progress, ratios, table

TITLES = {"ours": "ours", "ours_any_order": "any order", "cudnn": "cuDNN", "flash_attention_2": "FA2"}


def test_figures_of_made_up_times() -> None:
    times = {
        "ours": [0.002, 0.001, 0.003],
        "ours_any_order": [0.001] * 3,
        "cudnn": [0.0005] * 3,
        "flash_attention_2": [0.004] * 3,
    }
    found = figures(times, flops=1e12, peak_flops=1e15)
    ours = found["contestants"]["ours"]
    assert ours == pytest.approx(
        {"milliseconds": 2.0, "p20": 1.4, "p80": 2.6, "rounds": 3, "tflops": 500.0, "roofline": 0.5}
    )
    assert found["ratios"]["ours"] == {"best_peer": "cudnn", "to_best_peer": 0.25, "to_flash_attention_2": 2.0}
    assert found["ratios"]["ours_any_order"]["to_best_peer"] == 0.5
    assert set(found["ratios"]) == {"ours", "ours_any_order"}


def test_our_other_kernel_is_no_peer_and_what_is_missing_is_null() -> None:
    nothing = {"best_peer": None, "to_best_peer": None, "to_flash_attention_2": None}
    assert ratios("ours", {"ours": 1.0, "ours_any_order": 9.0}) == nothing
    assert figures({"ours": [1.0, 1.0]}, 1.0, None)["contestants"]["ours"]["roofline"] is None
    assert figures({"cudnn": [1.0, 1.0]}, 1.0, None)["ratios"] == {}
    assert figures({}, 1.0, None) == {"contestants": {}, "ratios": {}}


def row(sequence: int, times: dict[str, float], left_out: dict[str, str], group: int = 1) -> dict:
    part = figures({name: [seconds] * 2 for name, seconds in times.items()}, 1e12, 989.5e12)
    shape = {"batch": 1, "heads": 16, "key_heads": 16 // group, "sequence": sequence, "head_size": 128}
    peaks = {name: 512 * 2**20 for name in times}
    return {"shape": shape, "forward": part, "backward": part, "peak_bytes": peaks, "left_out": left_out}


def test_the_table_has_a_block_for_each_kind_of_heads_and_says_who_is_missing() -> None:
    everyone = {"ours": 0.002, "cudnn": 0.0025, "flash_attention_2": 0.004}
    rows = [
        row(512, everyone, {}),
        row(16384, {"ours": 0.002, "flash_attention_2": 0.001}, {"cudnn": "RuntimeError: no kernel"}),
        row(16384, {"cudnn": 0.002}, {"ours": "its dq is wrong"}, group=4),
    ]
    lines = table(rows, TITLES).splitlines()
    assert max(map(len, lines)) <= 100
    heads = [line for line in lines if line.startswith(("forward", "backward"))]
    assert heads[:2] == [f"{d}, TFLOP/s: 16 query heads, 16 key heads of 128" for d in ("forward", "backward")]
    assert [line.split()[4] for line in heads] == ["heads,"] * 4
    assert lines[2].split() == ["S", "ours", "cuDNN", "FA2", "roofline", "ours/best", "ours/FA2"]
    assert lines[3].split() == ["512", "500", "400", "250", "51%", "1.25", "2.00"]
    assert lines[4].split() == ["16384", "500", "-", "1000", "51%", "0.50", "0.50"]
    assert "peak memory in MiB, forward and backward, S 16384, 16/4 heads of 128:" in lines
    assert "  ours 512, FA2 512" in lines
    assert lines[-2:] == [
        "left out: cuDNN, at 1 of 3 shapes: RuntimeError: no kernel",
        "left out: ours, at 1 of 3 shapes: its dq is wrong",
    ]
    assert table([], TITLES).strip() == ""


def test_the_widest_table_fits_a_terminal() -> None:
    names = ["ours", "any order", "cuDNN", "FA2", "FA4", "Flex"]
    wide = row(16384, {f"peer_{name}": 0.0012345 for name in names}, {})
    assert max(map(len, table([wide], {f"peer_{name}": name for name in names}).splitlines())) <= 100


def test_progress_is_one_line() -> None:
    line = progress(row(512, {"ours": 0.002, "cudnn": 0.001}, {}), TITLES)
    assert line == "S 512, 16/16 heads of 128: forward 2 ms, 0.50 x cuDNN; backward 2 ms, 0.50 x cuDNN"
    assert progress(row(512, {"ours": 0.002}, {}), TITLES).endswith("forward 2 ms; backward 2 ms")
    assert "forward not timed" in progress(row(512, {"cudnn": 0.001}, {}), TITLES)
