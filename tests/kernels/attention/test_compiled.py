"""The attention kernels compiled ahead of time: no spills, within shared memory, on the instructions that are fast."""

import pytest

from tests.kernels.compiled import MATRIX_PRODUCT, SHARED_BYTES, run_compiled

FORWARD_AND_BACKWARD = {"forward", "backward_query", "backward_key", "backward_key_adding_dq"}


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_resources_and_instructions(architecture: int) -> None:
    arguments = f"--check --causal-only --architectures {architecture} --head-sizes 64 128 --bits 16".split()
    compiled = run_compiled("bench.speed.attention_tiles", *arguments)
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
    launched = run_compiled("tests.kernels.attention.compile_options")
    assert launched[:-1] == [["forward_kernel", "backward_query_kernel", "backward_key_kernel"]] * (len(launched) - 1)
    assert launched[-1] == ["forward_kernel", "backward_delta_kernel", "backward_key_kernel"]
