"""The table of tile sizes has an answer for every call the kernels can get."""

import itertools

import pytest

pytest.importorskip("triton")

from kernels.attention.fused.launch import padded
from kernels.attention.fused.tile_sizes import ARCHITECTURES, HEAD_SIZES, KERNELS, tile_size


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, 101, 130])
def test_every_call_finds_a_tile(architecture: int) -> None:
    for kernel, head_size, bits, causal in itertools.product(KERNELS, (1, 16, 65, 256), (16, 32), (True, False)):
        size = tile_size(kernel, architecture, padded(head_size), bits, causal)
        assert {size.queries, size.keys} <= {16, 32, 64, 128}
        assert size.warps in (4, 8, 16)
        assert size.stages >= 1


def test_a_consumer_gpu_has_tiles_of_its_own_size() -> None:
    """Compute capabilities 8.6, 8.9 and 12.0 have 99 KiB of shared memory, 8.0 has 163."""
    assert ARCHITECTURES[86] == ARCHITECTURES[89] == ARCHITECTURES[120] == 86
    assert tile_size("forward", 130, 128, 16, True) == tile_size("forward", 86, 128, 16, True)


@pytest.mark.parametrize(("head_size", "block"), [(1, 16), (16, 16), (17, 32), (64, 64), (80, 128), (256, 256)])
def test_head_sizes_are_padded_to_powers_of_two(head_size: int, block: int) -> None:
    assert padded(head_size) == block
    assert block <= max(HEAD_SIZES)
