"""Searches the tile sizes of the attention kernels and writes them to `kernels/attention/fused/tile_sizes.json`.

    python -m bench.speed.attention_tiles [--check] [--causal-only] [--architectures 90] [--head-sizes 64] [--bits 16]

A size is sound if it compiles without spills into the architecture's shared memory. On a GPU of the architecture the
fastest sound size is taken. Elsewhere the first in order of size is, unless the table's own is still sound: that is a
guess, and the table says so. Where none is sound, the one that spills least is taken. `--check` prints what the table's
sizes compile to instead, a JSON object a line.
"""

import argparse
import functools
import itertools
import json
from collections.abc import Iterator
from dataclasses import astuple
from unittest import mock

import torch
import triton
from triton.runtime.errors import TritonError

from bench.runs.folder import write_whole
from bench.speed.ahead_of_time import SHARED_BYTES, CompiledKernel, compile_for
from kernels.attention.fused import launch
from kernels.attention.fused.tile_sizes import HEAD_SIZES, KERNELS, TABLE, TileSize
from kernels.attention.options import AttentionOptions

Case = tuple[str, int, int, int, bool]
NAMES = ("kernel", "architecture", "head_size", "bits", "causal")
# A kernel without any is one that ptxas gave up on; HMMA where there is better is for tiles that are too narrow.
FASTEST_PRODUCT = {80: "HMMA", 86: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
DTYPES = {16: torch.bfloat16, 32: torch.float32}
GUESSED = "compiled without spills, not measured"
SPILLING = "compiled with the fewest spills, not measured"


def search(cases: list[Case]) -> None:
    """Finds each case's size and writes the table after each, so that an interrupted search loses nothing."""
    table = read_table()
    for case in cases:
        listed = table.get(case) or table.get((*case[:-1], True))  # causal or not, what compiles is much the same
        size, origin = fastest(case) if case[1] == architecture_here() else first_that_compiles(case, listed)
        table[case] = (size, origin)
        write_table(table)
        print(*case, *astuple(size), origin, flush=True)


def check(cases: list[Case]) -> None:
    """Prints what the table's size of each case compiles to."""
    table = read_table()
    for case in cases:
        size, _ = table[case]
        facts = dict(zip(NAMES, case, strict=True)) | {"tile": astuple(size)} | vars(compile_case(case, size))
        print(json.dumps(facts), flush=True)


def first_that_compiles(case: Case, listed: tuple[TileSize, str] | None) -> tuple[TileSize, str]:
    if listed is not None and (listed[1] not in (GUESSED, SPILLING) or is_sound(case, listed[0])):
        return listed
    sound = first_sound(case)
    return (sound, GUESSED) if sound else (least_spilling(case), SPILLING)


def first_sound(case: Case) -> TileSize | None:
    hopeless = set()  # tiles that spill so much that another depth of pipeline will not help
    for size in in_order(case):
        if (size.queries, size.keys, size.warps) in hopeless:
            continue
        if is_sound(case, size):
            return size
        compiled = try_to_compile(case, size)
        if compiled is None or compiled.stack_bytes > 64:
            hopeless |= {(size.queries, size.keys, warps) for warps in (4, 8, 16) if warps <= size.warps}
    return None


def fastest(case: Case) -> tuple[TileSize, str]:
    """By the median time at 16k tokens in sequences of 4,096, 16 heads (32 of 64)."""
    sound = [size for size in in_order(case) if is_sound(case, size)] or [least_spilling(case)]
    times = {size: measure(case, size) for size in sound}
    best = min(times, key=times.__getitem__)
    return best, f"{times[best]:.4g} ms, {torch.cuda.get_device_name()}, Triton {triton.__version__}"


def in_order(case: Case) -> Iterator[TileSize]:
    """Sizes that may fit, those with most work for each byte read first."""
    kernel, architecture, head_size, bits, _ = case
    lengths = (128, 64, 32, 16) if bits == 16 else (32, 16)  # float32 products do not run on tensor cores
    warps = (16, 8, 4) if head_size == 256 else (8, 4)
    sizes = [TileSize(*size) for size in itertools.product(lengths, lengths, warps, (3, 2))]
    by_keys = kernel.startswith("backward_key")
    for size in sorted(sizes, key=lambda s: (-s.queries * s.keys, -(s.keys if by_keys else s.queries))):
        resident, streamed = (size.keys, size.queries) if by_keys else (size.queries, size.keys)
        shared = (resident + 2 * streamed * size.stages) * head_size * bits // 8
        accumulators = resident * head_size * (2 if by_keys else 1)
        registers = (accumulators + size.queries * size.keys) / (32 * size.warps)
        if shared <= SHARED_BYTES[architecture] and registers <= 224:
            yield size


def is_sound(case: Case, size: TileSize) -> bool:
    compiled = try_to_compile(case, size)
    if compiled is None or compiled.spills() or compiled.wgmma_serialised:
        return False
    _, architecture, _, bits, _ = case
    products = {name for name in ("HMMA", "HGMMA", "UTCHMMA") if compiled.instructions[name]}
    return bits == 32 or products == {FASTEST_PRODUCT[architecture]}


def least_spilling(case: Case) -> TileSize:
    compiled = {size: try_to_compile(case, size) for size in in_order(case)}
    return min((size for size, one in compiled.items() if one), key=lambda size: compiled[size].stack_bytes)


@functools.cache
def try_to_compile(case: Case, size: TileSize) -> CompiledKernel | None:
    """None where it does not fit, or ptxas or one of Triton's passes cannot do it."""
    try:
        compiled = compile_case(case, size)
    except (TritonError, RuntimeError):
        return None
    return compiled if compiled.shared_bytes <= SHARED_BYTES[case[1]] else None


def compile_case(case: Case, size: TileSize) -> CompiledKernel:
    kernel, architecture, head_size, bits, causal = case
    with compile_for(architecture) as compiled:
        run(kernel, size, torch.empty(1, 2, 256, head_size, dtype=DTYPES[bits]), causal)
    return next(one for one in compiled if one.name == kernel_function(kernel))


def measure(case: Case, size: TileSize) -> float:
    """Milliseconds, median."""
    kernel, _, head_size, bits, causal = case
    q = torch.randn(4, 2048 // head_size, 4096, head_size, dtype=DTYPES[bits], device="cuda")
    return triton.testing.do_bench(lambda: run(kernel, size, q, causal), return_mode="median")


def run(kernel: str, size: TileSize, q: torch.Tensor, causal: bool) -> None:
    """Launches `kernel`, and of the backward pass nothing else that takes long."""
    options = AttentionOptions(None, None, None, causal, None, None, 0.0, q.shape[3] ** -0.5, True)
    lse, gradient = torch.zeros(q.shape[:3], device=q.device), torch.empty_like(q)
    tma = launch.tma_reads(q)
    with mock.patch.object(launch, "choose_tile", return_value=size):
        if kernel == "forward":
            launch.forward(q, q, q, gradient, lse, options)
        elif kernel == "backward_query":
            launch.backward_query(q, q, q, q, q, lse, lse, gradient, options, tma)
        else:
            sums = torch.zeros(q.shape, device=q.device) if kernel == "backward_key_adding_dq" else None
            launch.backward_key(q, q, q, q, lse, lse, sums, gradient, gradient, options, tma)


def kernel_function(kernel: str) -> str:
    return f"{kernel.removesuffix('_adding_dq')}_kernel"


def architecture_here() -> int | None:
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def read_table() -> dict[Case, tuple[TileSize, str]]:
    if not TABLE.exists():
        return {}
    rows = json.loads(TABLE.read_text())["sizes"]
    return {tuple(row[name] for name in NAMES): (TileSize(*row["tile"]), row["origin"]) for row in rows}


def write_table(table: dict[Case, tuple[TileSize, str]]) -> None:
    rows = [
        json.dumps(dict(zip(NAMES, case, strict=True)) | {"tile": list(astuple(size)), "origin": origin})
        for case, (size, origin) in sorted(table.items())
    ]
    head = '"tile": "query rows, key rows, warps, stages"'
    write_whole(TABLE, f'{{{head}, "sizes": [\n' + ",\n".join(rows) + "\n]}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--causal-only", action="store_true", help="leave out what is not causal")
    parser.add_argument("--check", action="store_true", help="compile the table instead of searching")
    parser.add_argument("--architectures", type=int, nargs="+", default=list(SHARED_BYTES), choices=SHARED_BYTES)
    parser.add_argument("--head-sizes", type=int, nargs="+", default=HEAD_SIZES, choices=HEAD_SIZES)
    parser.add_argument("--bits", type=int, nargs="+", default=list(DTYPES), choices=DTYPES)
    chosen = parser.parse_args()
    cases = list(itertools.product(KERNELS, chosen.architectures, chosen.head_sizes, chosen.bits, (True, False)))
    cases = [case for case in cases if case[-1] or not chosen.causal_only]
    (check if chosen.check else search)(cases)


if __name__ == "__main__":
    main()
