"""From times of attention to figures: TFLOP/s, shares of the roofline, ratios to peers, and the table of them."""

import statistics
from typing import Any

from bench.speed.figures import is_ours, missing_lines, number
from bench.speed.timing import summarise

BLOCK = ("heads", "key_heads", "head_size")  # of a shape: what the rows of one block of the table share


def figures(times: dict[str, list[float]], flops: float, peak_flops: float | None) -> dict[str, Any]:
    """Figures of each contestant, and how many times as fast as its peers each of ours is.

    Args:
        times: seconds of each round, by contestant; the names of ours begin with `ours`.
        flops: of one launch.
        peak_flops: of the device per second, where it is known.
    """
    contestants = {}
    for name, seconds in times.items():
        rate = flops / statistics.median(seconds)
        contestants[name] = {
            **summarise(seconds),
            "rounds": len(seconds),
            "tflops": rate / 1e12,
            "roofline": peak_flops and rate / peak_flops,
        }
    rates = {name: found["tflops"] for name, found in contestants.items()}
    return {"contestants": contestants, "ratios": {name: ratios(name, rates) for name in rates if is_ours(name)}}


def ratios(name: str, rates: dict[str, float]) -> dict[str, Any]:
    """The rate of `name` over that of its fastest peer, and over FlashAttention-2's; null where there is none."""
    peers = {peer: rate for peer, rate in rates.items() if not is_ours(peer)}
    best = max(peers, key=peers.__getitem__, default=None)
    return {
        "best_peer": best,
        "to_best_peer": best and rates[name] / peers[best],
        "to_flash_attention_2": rates[name] / peers["flash_attention_2"] if "flash_attention_2" in peers else None,
    }


def progress(row: dict[str, Any], titles: dict[str, str]) -> str:
    """A shape on one line: our times, and how many times as fast as the best peer they are."""
    shape, parts = row["shape"], []
    for direction in ("forward", "backward"):
        ours = row[direction]["contestants"].get("ours")
        if ours is None:
            parts.append(f"{direction} not timed")
            continue
        ratio = row[direction]["ratios"]["ours"]
        beside = f", {ratio['to_best_peer']:.2f} x {titles[ratio['best_peer']]}" if ratio["best_peer"] else ""
        parts.append(f"{direction} {ours['milliseconds']:.3g} ms{beside}")
    heads = f"{shape['heads']}/{shape['key_heads']} heads of {shape['head_size']}"
    return f"S {shape['sequence']}, {heads}: {'; '.join(parts)}"


def table(rows: list[dict[str, Any]], titles: dict[str, str]) -> str:
    """TFLOP/s by sequence length, a block for each kind of heads and each direction; then memory and who is missing.

    Args:
        titles: of the columns, by contestant, in their order.
    """
    lines = []
    for block in dict.fromkeys(tuple(row["shape"][field] for field in BLOCK) for row in rows):
        members = [row for row in rows if tuple(row["shape"][field] for field in BLOCK) == block]
        for direction in ("forward", "backward"):
            lines += ["", f"{direction}, TFLOP/s: {block[0]} query heads, {block[1]} key heads of {block[2]}"]
            lines += block_lines([(row["shape"]["sequence"], row[direction]) for row in members], titles)
    return "\n".join([*lines, "", *memory_lines(rows, titles), *missing_lines(rows, titles)])


def block_lines(found: list[tuple[int, dict[str, Any]]], titles: dict[str, str]) -> list[str]:
    names = [name for name in titles if any(name in part["contestants"] for _, part in found)]
    head = f"{'S':>6}" + "".join(f"{titles[name]:>11}" for name in names)
    lines = [f"{head}{'roofline':>9}{'ours/best':>10}{'ours/FA2':>9}"]
    for sequence, part in found:
        rates = [part["contestants"].get(name, {}).get("tflops") for name in names]
        ours, ratio = part["contestants"].get("ours", {}), part["ratios"].get("ours", {})
        line = f"{sequence:>6}" + "".join(f"{number(rate, '.4g'):>11}" for rate in rates)
        line += f"{number(ours.get('roofline'), '.0%'):>9}{number(ratio.get('to_best_peer'), '.2f'):>10}"
        lines.append(f"{line}{number(ratio.get('to_flash_attention_2'), '.2f'):>9}")
    return lines


def memory_lines(rows: list[dict[str, Any]], titles: dict[str, str]) -> list[str]:
    """Of the longest sequences; none where memory is not measured."""
    longest = max((row["shape"]["sequence"] for row in rows), default=0)
    lines = []
    for row in rows:
        peaks = {name: peak for name, peak in row["peak_bytes"].items() if peak is not None}
        if row["shape"]["sequence"] == longest and peaks:
            heads, key_heads, size = (row["shape"][field] for field in BLOCK)
            lines.append(f"peak memory in MiB, forward and backward, S {longest}, {heads}/{key_heads} heads of {size}:")
            lines.append("  " + ", ".join(f"{titles[name]} {peak / 2**20:.0f}" for name, peak in peaks.items()))
    return lines
