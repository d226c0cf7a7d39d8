"""Attention as Triton kernels: `launch` prepares and starts them, `forward` and `backward` are the kernels."""
