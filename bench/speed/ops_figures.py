"""From times of cases to figures: FLOP/s or bytes/s, shares of what the device can do, ratios to peers, the table."""

import statistics
from typing import Any

from bench.speed.figures import missing_lines, number
from bench.speed.timing import summarise

DIRECTIONS = ("forward", "backward", "both")
TITLES = {
    "ours": "ours",
    "eager": "eager",
    "compiled": "compiled",
    "liger": "Liger",
    "grouped_mm": "grouped_mm",
    "copy": "copy",
}


def figures(
    times: dict[str, list[float]], flops: float | None, peak_flops: float | None, moved: float | None
) -> dict[str, Any]:
    """Figures of each contestant, and the time of each peer over ours.

    Args:
        times: seconds of each round, by contestant; `copy` is a plain copy of as many bytes.
        flops: of one launch, where the case counts them.
        peak_flops: of the device per second, where it is known.
        moved: bytes that one launch reads and writes, where the case counts them.
    """
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    copy = medians.pop("copy", None)
    contestants = {}
    for name, median in medians.items():
        contestants[name] = {
            **summarise(times[name]),
            "rounds": len(times[name]),
            "tflops": flops and flops / median / 1e12,
            "roofline": flops and peak_flops and flops / median / peak_flops,
            "gigabytes_per_second": moved and moved / median / 1e9,
            "share_of_copy": copy and copy / median,
        }
    ours = medians.pop("ours", None)
    return {
        "contestants": contestants,
        "copy_gigabytes_per_second": copy and moved and moved / copy / 1e9,
        "ratios": {name: median / ours for name, median in medians.items()} if ours else {},
    }


def describe(shape: dict[str, Any]) -> str:
    return ", ".join([shape["function"], *(f"{key} {value}" for key, value in shape.items() if key != "function")])


def progress(row: dict[str, Any]) -> str:
    """A case on one line: our times, and how many times as fast as the best peer they are."""
    parts = []
    for direction in DIRECTIONS:
        ours, ratios = row[direction]["contestants"].get("ours"), row[direction]["ratios"]
        if ours is None:
            parts.append(f"{direction} not timed")
            continue
        best = min(ratios, key=ratios.__getitem__, default=None)
        beside = f", {ratios[best]:.2f} x {TITLES[best]}" if best else ""
        parts.append(f"{direction} {ours['milliseconds']:.3g} ms{beside}")
    return f"{describe(row['shape'])}: {'; '.join(parts)}"


def table(rows: list[dict[str, Any]]) -> str:
    """A block for each case, a line for each contestant: by direction milliseconds, TFLOP/s or GB/s, their share of the
    roofline or of a plain copy's, and the time over ours; then memory, and who is missing.
    """
    lines = []
    for row in rows:
        unit = "GB/s" if row["forward"].get("copy_gigabytes_per_second") else "TFLOP/s"
        share = "of copy" if unit == "GB/s" else "of peak"
        heads = "".join(f"{f'{direction} ms':>11}{unit:>9}{share:>8}{'/ours':>6}" for direction in DIRECTIONS)
        lines += ["", describe(row["shape"]), f"{'':<11}{heads}{'MiB':>7}"]
        lines += [contestant_line(row, name) for name in TITLES if name in row["peak_bytes"]]
    return "\n".join([*lines, "", *missing_lines(rows, TITLES)])


def contestant_line(row: dict[str, Any], name: str) -> str:
    line = f"{TITLES[name]:<11}"
    for direction in DIRECTIONS:
        found = row[direction]["contestants"].get(name, {})
        rate = found.get("tflops") or found.get("gigabytes_per_second")
        share = found.get("roofline") or found.get("share_of_copy")
        ratio = row[direction]["ratios"].get(name)
        line += f"{number(found.get('milliseconds'), '.4g'):>11}{number(rate, '.3g'):>9}"
        line += f"{number(share, '.0%'):>8}{number(ratio, '.2f'):>6}"
    peak = row["peak_bytes"][name]
    return f"{line}{number(peak and peak / 2**20, '.0f'):>7}"
