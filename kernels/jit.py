"""What every op's file takes to hold and to launch Triton kernels.

`triton` and `tl` are stand-ins where Triton is not installed, so that a file imports there too.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.backend import interpreting

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:

    class _Absent:
        """Takes the decorations and annotations of kernels that nobody will run."""

        def __getattr__(self, name: str) -> "_Absent":
            return self

        def __call__(self, function: object = None, **options: object) -> object:
            return self if function is None else function

    triton = tl = _Absent()

LOG2_E = tl.constexpr(1.4426950408889634)
# Below every score, yet finite: what has seen no score so far then rescales by exp2(0), not by exp2(inf - inf).
LOWEST = tl.constexpr(-1e38)


def target_architecture() -> int:
    """Such as 90, of the device that Triton compiles for; 0 in the interpreter."""
    return 0 if interpreting() else int(triton.runtime.driver.active.get_current_target().arch)


def has_tma() -> bool:
    """Whether tensor descriptors work: in hardware, or in the interpreter, which plays all."""
    return interpreting() or target_architecture() >= 90


def tma_reads(*tensors: Tensor) -> bool:
    """Whether there is TMA and it can read these: rows of consecutive elements, all else a multiple of 16 bytes."""
    return has_tma() and all(
        tensor.data_ptr() % 16 == 0
        and tensor.shape[-1] * tensor.element_size() >= 16
        and all(stride > 0 and stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:-1])
        for tensor in tensors
    )


def source(tensor: Tensor, block: list[int], tma: bool) -> Any:
    """What a kernel reads blocks of that shape from: a tensor descriptor, or the tensor itself."""
    if not tma:
        return tensor
    from triton.tools.tensor_descriptor import TensorDescriptor  # Triton is on Linux only

    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)


def with_dense_rows(tensor: Tensor) -> Tensor:
    """Kernels take any strides but that of the last dimension, which must be 1."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def precision(tensor: Tensor) -> str:
    """How products of such tensors are computed: in float32 exactly, not in TF32."""
    return "ieee" if tensor.dtype == torch.float32 else "tf32"


@triton.jit
def tanh(x):
    """Within a few ulp: near 0 the polynomial of the Cephes library's tanhf, elsewhere by way of exp2."""
    square = x * x
    near = -5.70498872745e-3
    near = near * square + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    near = near * square * x + x
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))
