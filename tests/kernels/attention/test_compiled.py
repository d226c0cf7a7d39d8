"""The attention kernels compiled ahead of time: no spills, within shared memory, on the instructions that are fast."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[3]
SHARED_BYTES = {80: 166912, 90: 232448, 100: 232448}
MATRIX_PRODUCT = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}  # mma.sync, wgmma and tcgen05
FORWARD_AND_BACKWARD = {"forward", "backward_query", "backward_key", "backward_key_adding_dq"}


def run_compiled(*arguments: str) -> list:
    """What a script prints, a JSON value a line, where kernels are compiled and not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_resources_and_instructions(architecture: int) -> None:
    arguments = f"--check --causal-only --architectures {architecture} --head-sizes 64 128 --bits 16".split()
    compiled = run_compiled("-m", "bench.speed.attention_tiles", *arguments)
    assert len(compiled) == 8
    assert {one["kernel"] for one in compiled} == FORWARD_AND_BACKWARD
    for one in compiled:
        what = f"{one['kernel']} sm_{architecture} D={one['head_size']} causal={one['causal']} tile={one['tile']}"
        instructions = one["instructions"]
        print(f"{what}: {one['registers']} registers, {one['shared_bytes']} bytes shared")
        assert one["stack_bytes"] == 0, what
        assert not {"LDL", "STL"} & set(instructions), what
        assert one["shared_bytes"] <= SHARED_BYTES[architecture], what
        assert not one["wgmma_serialised"], what
        assert instructions[MATRIX_PRODUCT[architecture]] > 0, what
        if architecture == 80:
            assert "LDGSTS" in instructions, what  # cp.async: loads that overlap with products
        else:
            assert "HMMA" not in instructions, what  # no product on the slow path
            assert "UTMALDG" in instructions, what
        if one["kernel"] == "backward_key_adding_dq":
            assert ("RED" if architecture == 80 else "UTMAREDG") in instructions, what


def test_every_option_compiles() -> None:
    launched = run_compiled("-m", "tests.kernels.attention.compile_options")
    assert launched[:-1] == [["forward_kernel", "backward_query_kernel", "backward_key_kernel"]] * (len(launched) - 1)
    assert launched[-1] == ["forward_kernel", "backward_delta_kernel", "backward_key_kernel"]
